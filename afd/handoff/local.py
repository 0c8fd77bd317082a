"""Collocated: the whole FFN in the attention process, behind the same seam."""

from __future__ import annotations

import time

from torch import Tensor

from afd.handoff.frame import Crossing, InFlight, Timing
from afd.model.ffn import FFNShard
from afd.model.moe import Routing


class LocalFFN:
    """Computes on receive. One device has nothing to overlap."""

    transport_names: tuple[str, ...] = ()
    is_whole = True
    epoch = 0

    def __init__(self, shard: FFNShard) -> None:
        self.shard = shard
        self._pending: dict[int, tuple[int, Tensor, Routing | None]] = {}
        self._crossings: list[Crossing] = []

    def buffer(self, batch: InFlight) -> None:
        return None

    def send(self, batch: InFlight, layer_idx: int, ffn_input: Tensor, routing: Routing | None) -> None:
        self._pending[batch.slot] = layer_idx, ffn_input, routing

    def receive(self, batch: InFlight) -> Tensor:
        layer_idx, ffn_input, routing = self._pending.pop(batch.slot)
        start = time.perf_counter_ns()
        output = self.shard(layer_idx, ffn_input, routing)
        end = time.perf_counter_ns()
        timing = Timing(0, end - start, ffn_input.shape[0])
        self._crossings.append(Crossing(0, layer_idx, batch.slot, start, end, timing))
        return output

    def drop(self, batch: InFlight) -> None:
        self._pending.pop(batch.slot, None)

    def take_crossings(self) -> list[Crossing]:
        taken, self._crossings = self._crossings, []
        return taken

    def close(self) -> None:
        self._pending.clear()
