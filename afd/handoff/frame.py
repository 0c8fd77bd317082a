"""What crosses between attention and FFN: a frame out, a partial sum back.

T tokens, D hidden size, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from afd.errors import InvalidRequest
from afd.model.config import ModelConfig
from afd.model.moe import Routing
from afd.urgency import NOT_URGENT, Urgency

_MOST_US = (1 << 32) - 1


class Frame(NamedTuple):
    """One layer of one microbatch on its way to an FFN shard."""

    frame_id: int  # never used twice by a sender: also the generation of its slot
    slot: int
    layer_idx: int
    ffn_input: Tensor  # [T, D]
    routing: Routing | None  # None exactly on dense layers
    traceparent: str = ""
    is_probe: bool = False  # not to be computed: ffn_input itself is the answer
    epoch: int = 0  # of the layout of shards that it is for
    urgency: Urgency = NOT_URGENT  # its deadline is by the clock of whoever holds it

    @property
    def num_tokens(self) -> int:
        return self.ffn_input.shape[0]


class Timing(NamedTuple):
    """What became of a frame at the FFN. Intervals were taken on its host; no clocks are compared."""

    queue_ns: int
    compute_ns: int
    num_batch_tokens: int  # rows of the batch that it was computed in, all frames together


class FrameOutput(NamedTuple):
    """A shard's answer, on the attention side."""

    ffn_output: Tensor  # [T, D], this shard's partial sum; good until the slot's next frame is sent
    timing: Timing
    arrived_ns: int


class Crossing(NamedTuple):
    """The times of one frame's way to one shard and back, for the step's trace."""

    shard: int
    layer_idx: int
    slot: int
    sent_ns: int
    arrived_ns: int
    timing: Timing


class InFlight(Protocol):
    """What the handoff needs of a microbatch."""

    @property
    def slot(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def urgency(self) -> Urgency: ...

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits for it any more."""


class FFN(Protocol):
    """The one seam: the decoder drives each layer through it, whatever is behind."""

    @property
    def transport_names(self) -> tuple[str, ...]:
        """How frames get to each shard; empty where the FFN is in this process."""

    @property
    def is_whole(self) -> bool:
        """Whether there is a replica of every shard, so that a step can be done at all."""

    @property
    def epoch(self) -> int:
        """Of the layout of shards that frames go by; 0 where the FFN is in this process."""

    def buffer(self, batch: InFlight) -> tuple[Tensor, Routing] | None:
        """Where ffn_input [T, D] and routing are best written, so that they need not be copied; None: anywhere."""

    def send(self, batch: InFlight, layer_idx: int, ffn_input: Tensor, routing: Routing | None) -> None:
        """Hands one layer of a microbatch over; returns before it is computed where that is possible."""

    def receive(self, batch: InFlight) -> Tensor:
        """The sum of all partial sums [T, D] of what was last sent for this microbatch; good until the next send.

        Raises PeerUnavailable if no replica of a shard is left, or none answers in time; Cancelled if the microbatch is
        abandoned meanwhile.
        """

    def drop(self, batch: InFlight) -> None:
        """Forgets what was sent for this microbatch, here and in the shards' queues."""

    def take_crossings(self) -> list[Crossing]:
        """The times of all that was received since they were last taken."""

    def close(self) -> None:
        """Ends the connections."""


def time_left_us(urgency: Urgency) -> int:
    """As it crosses, where clocks are not compared; 0 without a deadline, or with one too far away to matter."""
    seconds = urgency.time_left_s
    return 0 if seconds is None or seconds * 1e6 > _MOST_US else max(1, int(seconds * 1e6))


def urgency_of(priority: int, time_left_us: int) -> Urgency:
    """What has crossed, by this host's clock."""
    if priority == time_left_us == 0:
        return NOT_URGENT
    return Urgency.within(time_left_us / 1e6 if time_left_us else None, priority)


@dataclass(frozen=True)
class FrameRules:
    """What a frame must be like. Every transport asks before it touches the tensors."""

    config: ModelConfig
    dtype: torch.dtype  # of ffn_input once it is decoded
    max_tokens: int

    def check(self, layer_idx: int, num_tokens: int, has_routing: bool) -> None:
        """Raises InvalidRequest for what this model cannot have."""
        config = self.config
        if not 0 <= layer_idx < config.num_layers:
            raise InvalidRequest(f"layer {layer_idx} does not exist; the model has {config.num_layers}")
        self.check_size(num_tokens)
        if has_routing and not config.is_moe(layer_idx):
            raise InvalidRequest(f"layer {layer_idx} is dense, but the frame chooses experts")
        if not has_routing and config.is_moe(layer_idx):
            raise InvalidRequest(f"layer {layer_idx} has experts, but the frame chooses none")

    def check_size(self, num_tokens: int) -> None:
        if not 1 <= num_tokens <= self.max_tokens:
            raise InvalidRequest(f"the frame has {num_tokens} tokens; from 1 to {self.max_tokens} are allowed")
