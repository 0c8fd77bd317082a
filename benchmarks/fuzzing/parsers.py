"""The parsers that others' bytes get to, in this process and guided by coverage:
`python -m benchmarks.fuzzing.parsers slot -max_total_time=60`; what follows the name is libFuzzer's.

Atheris and not hypothesis: it sees which branches an input takes and with what it is compared, and tries tens of
thousands a second. Needs `pip install 'afd[fuzz]'`.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["afd", "services"]):
    import torch
    from google.protobuf.message import DecodeError
    from pydantic import ValidationError

    from afd.errors import InvalidRequest, Mismatch
    from afd.handoff.frame import FrameRules
    from afd.handoff.handshake import refuse_mismatch, topology
    from afd.handoff.inline import frame_from_proto
    from afd.handoff.slots import FrameSlots, Region, SlotShape
    from afd.handoff.tensors import to_proto
    from afd.model.config import ModelConfig
    from afd.protocol import sampling_from_proto, sampling_to_proto
    from afd.v1 import ffn_pb2, sampling_pb2
    from benchmarks.fuzzing.grpc_inputs import SAMPLING
    from benchmarks.fuzzing.http_inputs import CHAT, COMPLETION
    from services.gateway.openai_types import ChatBody, CompletionBody
    from services.gateway.place import Place

_CONFIG = ModelConfig(
    num_layers=4, hidden_size=8, vocab_size=512, max_context_tokens=64, num_heads=1, head_dim=8, share_q_dim=8,
    intermediate_size=8, num_experts=6, top_k=2, moe_intermediate_size=8, share_expert_dim=8, moe_layers=frozenset({1}),
    norm_expert_weight=False, rope_theta=1e4, rms_norm_eps=1e-5, bos_token_id=0, eos_token_ids=(1,),
)  # fmt: skip
_RULES = FrameRules(_CONFIG, torch.float32, max_tokens=4)
_SHAPE = SlotShape(1, 4, _CONFIG.hidden_size, _CONFIG.top_k, torch.float32, torch.float32, torch.float32)
_SLOTS = FrameSlots(Region.private(_SHAPE.frame_stride), _SHAPE)
_TOPOLOGY = topology(_CONFIG, "0", torch.float32, 0, 1)


def place(data: bytes) -> None:
    parsed = Place.parse(data[1:].decode("latin-1"), 1 + data[0] % 5 if data else 1)
    assert [index for number in range(parsed.num_prompts) for index in parsed.of_prompt(number)] == parsed.next_index
    assert len(parsed.names) == parsed.num_prompts


def completion(data: bytes) -> None:
    body = CompletionBody.model_validate(json.loads(data))
    params = body.sampling(body.max_tokens, body.logprobs or 0)
    params.check(_CONFIG.vocab_size)
    sampling_to_proto(params)
    body.prompts()


def chat(data: bytes) -> None:
    body = ChatBody.model_validate(json.loads(data))
    for number, message in enumerate(body.messages):
        assert "role" in message.for_template(number)


def sampling(data: bytes) -> None:
    params = sampling_from_proto(sampling_pb2.SamplingParams.FromString(data))
    params.check(_CONFIG.vocab_size)
    assert sampling_from_proto(sampling_to_proto(params)) == params


def frame(data: bytes) -> None:
    read = frame_from_proto(ffn_pb2.Frame.FromString(data), _RULES, torch.float32)
    assert read.ffn_input.shape == (read.num_tokens, _CONFIG.hidden_size)


def slot(data: bytes) -> None:
    _SLOTS.region.memory[: len(data)] = data[: _SHAPE.frame_stride]
    read = _SLOTS.read(0, _RULES)
    assert 1 <= read.num_tokens <= _SHAPE.max_tokens
    assert read.is_probe or (read.routing is not None) == _CONFIG.is_moe(read.layer_idx)


def hello(data: bytes) -> None:
    refuse_mismatch(ffn_pb2.Hello.FromString(data).topology, _TOPOLOGY)


_PARSERS: dict[str, Callable[[bytes], None]] = {
    parser.__name__: parser for parser in (place, completion, chat, sampling, frame, slot, hello)
}
_SEEDS = {
    "place": b"\x00name/3.5",
    "completion": json.dumps({**COMPLETION, "model": "m"}).encode(),
    "chat": json.dumps({**CHAT, "model": "m"}).encode(),
    "sampling": SAMPLING.SerializeToString(),
    "frame": ffn_pb2.Frame(ffn_input=to_proto(torch.zeros(2, _CONFIG.hidden_size))).SerializeToString(),
    "slot": bytes(_SHAPE.frame_stride),
    "hello": ffn_pb2.Hello(topology=_TOPOLOGY).SerializeToString(),
}
_REFUSALS = (
    InvalidRequest,
    Mismatch,
    ValidationError,
    DecodeError,
    json.JSONDecodeError,
    UnicodeDecodeError,
    RecursionError,
)


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in _PARSERS:
        sys.exit(f"{__doc__}\nThere are {', '.join(_PARSERS)}.")
    name = sys.argv.pop(1)
    parser = _PARSERS[name]

    def take(data: bytes) -> None:
        with contextlib.suppress(*_REFUSALS):
            parser(data)

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "seed").write_bytes(_SEEDS[name])
        atheris.Setup([*sys.argv, folder], take)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
