"""vLLM as a contender of `benchmarks.peers`; run by the Python of an environment with vLLM, not by this project's.

Reads lines of JSON, [streams, prompt tokens, output tokens]; answers each with a line, "tokens/s N".
"""

from __future__ import annotations

import json
import os
import random
import sys
import time

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}  # GiB


def main() -> None:
    from transformers import AutoConfig
    from vllm import LLM, SamplingParams
    from vllm.transformers_utils.configs.step3_vl import Step3TextConfig

    AutoConfig.register("step3_text", Step3TextConfig)
    model = LLM(
        model=sys.argv[1],
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_num_seqs=64,
        max_model_len=2048,
        enable_prefix_caching=False,
    )
    vocab_size, chooser = model.llm_engine.model_config.get_vocab_size(), random.Random(0)
    for line in sys.stdin:
        streams, prompt_tokens, output_tokens = json.loads(line)
        prompts = [
            {"prompt_token_ids": [chooser.randrange(vocab_size) for _ in range(prompt_tokens)]} for _ in range(streams)
        ]
        sampling = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        model.generate(prompts, sampling, use_tqdm=False)
        print("tokens/s", streams * output_tokens / (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()
