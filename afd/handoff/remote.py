"""Fan-out to the shards of the FFN (M2N dispatch) and combination of their partial sums."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from afd.handoff.control import ControlStream
from afd.handoff.frame import Crossing, Frame, FrameOutput, InFlight
from afd.handoff.slots import FrameSlots, Region
from afd.model.moe import Routing


class Transport(Protocol):
    """One attention-FFN pair: how its frames move. A frame is sent after it was written to its slot."""

    name: str
    control: ControlStream

    @property
    def regions(self) -> tuple[Region, ...]:
        """What answers lie in."""

    def send(self, frame: Frame) -> None:
        """Starts moving a frame."""

    def receive(self, frame: Frame, timeout_s: float) -> FrameOutput:
        """Waits for a frame's answer; raises PeerUnavailable if the pair is lost or the time is over."""

    def drop(self, frame: Frame) -> None:
        """The answer is no longer awaited."""

    def close(self) -> None:
        """Ends the pair."""


class RemoteFFN:
    """Sends every frame to every shard and adds up what comes back; transports[i] leads to shard i."""

    def __init__(
        self,
        transports: Sequence[Transport],
        frames: FrameSlots,
        device: torch.device,
        timeout_s: float,
        traceparent: Callable[[], str] = lambda: "",
    ) -> None:
        self.transports = transports
        self.frames = frames
        self.device = device
        self.timeout_s = timeout_s
        self.traceparent = traceparent
        self._sent: dict[int, tuple[Frame, int]] = {}  # by slot: what is under way, and since when
        self._frame_ids = itertools.count(1)
        self._crossings: list[Crossing] = []

    @property
    def transport_names(self) -> tuple[str, ...]:
        return tuple(transport.name for transport in self.transports)

    def buffer(self, batch: InFlight) -> tuple[Tensor, Routing] | None:
        return self.frames.buffer(batch.slot, batch.num_tokens) if self.device.type == "cpu" else None

    def send(self, batch: InFlight, layer_idx: int, ffn_input: Tensor, routing: Routing | None) -> None:
        frame = Frame(next(self._frame_ids), batch.slot, layer_idx, ffn_input, routing, self.traceparent())
        self._sent[batch.slot] = frame, time.perf_counter_ns()
        self.frames.write(frame)
        for transport in self.transports:
            transport.send(frame)

    def receive(self, batch: InFlight) -> Tensor:
        frame, sent_ns = self._sent.pop(batch.slot)
        total: Tensor | None = None
        for shard, transport in enumerate(self.transports):
            output = transport.receive(frame, self.timeout_s)
            part = output.ffn_output.to(self.device, non_blocking=True)
            total = part if total is None else total + part
            self._crossings.append(
                Crossing(shard, frame.layer_idx, batch.slot, sent_ns, output.arrived_ns, output.timing)
            )
        assert total is not None
        return total

    def drop(self, batch: InFlight) -> None:
        frame, _ = self._sent.pop(batch.slot, (None, 0))
        if frame is not None:
            self.frames.withdraw(batch.slot)
            for transport in self.transports:
                transport.drop(frame)

    def take_crossings(self) -> list[Crossing]:
        taken, self._crossings = self._crossings, []
        return taken

    def close(self) -> None:
        for transport in self.transports:
            transport.close()
