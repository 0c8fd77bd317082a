"""What crosses between attention and FFN: a frame out, a partial sum back.

T tokens, D hidden size, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from afd.model.moe import Routing


@dataclass(frozen=True)
class Frame:
    """One layer of one microbatch on its way to an FFN shard."""

    frame_id: int
    layer_idx: int
    ffn_input: Tensor  # [T, D]
    routing: Routing | None  # None exactly on dense layers
    traceparent: str = ""


@dataclass(frozen=True)
class FrameOutput:
    """A shard's answer. Intervals were taken on the FFN's host; no clocks are compared."""

    frame_id: int
    ffn_output: Tensor  # [T, D], this shard's partial sum
    queue_ns: int
    compute_ns: int
    num_batch_tokens: int
    arrived_ns: int = 0  # on the attention host's clock


@dataclass(frozen=True)
class Crossing:
    """The times of one frame's way to one shard and back, for the step's trace."""

    shard: int
    layer_idx: int
    slot: int
    sent_ns: int
    arrived_ns: int
    queue_ns: int
    compute_ns: int
    num_batch_tokens: int


class InFlight(Protocol):
    """What the handoff needs of a microbatch: which one it is, and where to note its crossings."""

    @property
    def slot(self) -> int: ...

    @property
    def crossings(self) -> list[Crossing]: ...


class FFN(Protocol):
    """The one seam: the decoder drives each layer through it, whatever is behind."""

    def send(self, batch: InFlight, layer_idx: int, ffn_input: Tensor, routing: Routing | None) -> None:
        """Hands one layer of a microbatch over; returns before it is computed where that is possible."""

    def receive(self, batch: InFlight) -> Tensor:
        """The sum of all partial sums [T, D] of what was last sent for this microbatch.

        Raises PeerUnavailable if a shard is lost or does not answer in time.
        """

    def drop(self, batch: InFlight) -> None:
        """Forgets what was sent for this microbatch, here and in the shards' queues."""

    def close(self) -> None:
        """Ends the connections."""
