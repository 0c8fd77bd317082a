"""Between the contract's messages and our own types."""

from __future__ import annotations

from afd.model.sampling_params import SamplingParams
from afd.state.requests import FinishReason
from afd.v1 import sampling_pb2 as pb

MOST_TOKENS_AT_ONCE = 256  # in a message, whose size has a limit

_OPTIONAL = (
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "max_tokens",
)
_FINISH_REASONS: tuple[FinishReason | None, ...] = (None, "stop", "length")  # by their numbers in the proto
_PLAIN = ("temperature", "min_tokens", "ignore_eos", "top_logprobs")


def finish_reason_to_proto(reason: FinishReason | None) -> pb.FinishReason:
    return _FINISH_REASONS.index(reason)  # type: ignore[return-value]  # an enum of protobuf is its number


def finish_reason_from_proto(number: int) -> FinishReason | None:
    return _FINISH_REASONS[number]


def sampling_to_proto(params: SamplingParams) -> pb.SamplingParams:
    values = {name: getattr(params, name) for name in (*_OPTIONAL, *_PLAIN)}
    return pb.SamplingParams(
        **{name: value for name, value in values.items() if value is not None},
        logit_bias=params.logit_bias,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        n=params.n,
    )


def sampling_from_proto(message: pb.SamplingParams) -> SamplingParams:
    return SamplingParams(
        **{name: getattr(message, name) for name in _OPTIONAL if message.HasField(name)},
        **{name: getattr(message, name) for name in _PLAIN},
        logit_bias=dict(message.logit_bias),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        n=message.n or 1,
    )
