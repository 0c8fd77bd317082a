"""One prompt with its tokens, while it lives on this replica."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from opentelemetry.trace import SpanContext

from afd.errors import AfdError
from afd.model.sampler import SampledToken, SamplerRow
from afd.model.sampling_params import SamplingParams
from afd.state.requests import FinishReason, SequenceKey
from afd.urgency import NOT_URGENT, Urgency


@dataclass(frozen=True)
class TokenEvent:
    """A token that was just sampled; the last one has a finish reason."""

    index: int
    token: SampledToken
    finish_reason: FinishReason | None


@dataclass(eq=False)
class Sequence:
    """`num_computed` tokens have their keys and values in the KV blocks of `block_table`."""

    key: SequenceKey
    epoch: int
    prompt_ids: list[int]
    output_ids: list[int]
    params: SamplingParams
    eos_token_ids: tuple[int, ...]
    max_context_tokens: int
    outbox: asyncio.Queue[TokenEvent | AfdError] = field(default_factory=asyncio.Queue)
    span_context: SpanContext | None = None
    urgency: Urgency = NOT_URGENT
    turn: tuple[int, int] = (0, 0)  # of all sequences here: by priority, then as they came
    waits_since: float = 0.0  # time.monotonic() when it was last put off
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0
    in_flight: bool = False  # a microbatch is computing its next tokens
    cancelled: bool = False  # set by the network's thread, acted on by the engine

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def num_undecoded(self) -> int:
        """Tokens still to be sampled, if nothing ends it before."""
        room = self.max_context_tokens - self.num_tokens
        return room if self.params.max_tokens is None else min(room, self.params.max_tokens - len(self.output_ids))

    @property
    def is_unwanted(self) -> bool:
        """Whether nobody waits for its next token any more."""
        return self.cancelled or self.urgency.is_over

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Tokens [start, stop) of prompt and output together."""
        num_prompt = len(self.prompt_ids)
        return self.prompt_ids[start:stop] + self.output_ids[max(0, start - num_prompt) : max(0, stop - num_prompt)]

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end the sequence."""
        return self.params.stop_token_ids + (() if self.params.ignore_eos else self.eos_token_ids)

    def sampler_row(self) -> SamplerRow:
        too_early = len(self.output_ids) < self.params.min_tokens
        return SamplerRow(self.params, self.prompt_ids, self.output_ids, self.end_ids if too_early else ())

    def append(self, token: SampledToken) -> TokenEvent:
        """Adds a sampled token, and says whether it is the last."""
        self.output_ids.append(token.id)
        return TokenEvent(len(self.output_ids) - 1, token, self._finish_reason(token.id))

    def _finish_reason(self, token_id: int) -> FinishReason | None:
        if token_id in self.end_ids:
            return "stop"
        num_output = len(self.output_ids)
        if num_output >= (self.params.max_tokens or num_output + 1) or self.num_tokens >= self.max_context_tokens:
            return "length"
        return None
