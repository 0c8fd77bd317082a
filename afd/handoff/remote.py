"""Fan-out to the shards of the FFN (M2N dispatch) and combination of their partial sums."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from afd.handoff.frame import Crossing, Frame, FrameOutput, InFlight
from afd.model.moe import Routing


class Transport(Protocol):
    """One attention-FFN pair: how its frames move."""

    def send(self, frame: Frame) -> None:
        """Starts moving a frame; raises PeerUnavailable if the pair is lost."""

    def receive(self, frame_id: int, timeout_s: float) -> FrameOutput:
        """Waits for a frame's answer; raises PeerUnavailable if the pair is lost or the time is over."""

    def drop(self, frame_id: int) -> None:
        """The answer is no longer awaited."""

    def close(self) -> None:
        """Ends the pair."""


@dataclass(frozen=True)
class _Sent:
    frame_id: int
    layer_idx: int
    at_ns: int


class RemoteFFN:
    """Sends every frame to every shard and adds up what comes back; transports[i] leads to shard i."""

    def __init__(
        self, transports: Sequence[Transport], timeout_s: float, traceparent: Callable[[], str] = lambda: ""
    ) -> None:
        self.transports = transports
        self.timeout_s = timeout_s
        self.traceparent = traceparent
        self._sent: dict[int, _Sent] = {}
        self._frame_ids = itertools.count(1)

    def send(self, batch: InFlight, layer_idx: int, ffn_input: Tensor, routing: Routing | None) -> None:
        frame = Frame(next(self._frame_ids), layer_idx, ffn_input, routing, self.traceparent())
        self._sent[batch.slot] = _Sent(frame.frame_id, layer_idx, time.perf_counter_ns())
        for transport in self.transports:
            transport.send(frame)

    def receive(self, batch: InFlight) -> Tensor:
        sent = self._sent.pop(batch.slot)
        total: Tensor | None = None
        for shard, transport in enumerate(self.transports):
            output = transport.receive(sent.frame_id, self.timeout_s)
            total = output.ffn_output if total is None else total + output.ffn_output
            batch.crossings.append(_crossing(shard, batch, sent, output))
        assert total is not None
        return total

    def drop(self, batch: InFlight) -> None:
        sent = self._sent.pop(batch.slot, None)
        if sent is not None:
            for transport in self.transports:
                transport.drop(sent.frame_id)

    def close(self) -> None:
        for transport in self.transports:
            transport.close()


def _crossing(shard: int, batch: InFlight, sent: _Sent, output: FrameOutput) -> Crossing:
    return Crossing(
        shard=shard,
        layer_idx=sent.layer_idx,
        slot=batch.slot,
        sent_ns=sent.at_ns,
        arrived_ns=output.arrived_ns,
        queue_ns=output.queue_ns,
        compute_ns=output.compute_ns,
        num_batch_tokens=output.num_batch_tokens,
    )
