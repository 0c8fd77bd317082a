"""Joins the frames of one layer that wait, from all attention replicas, into one batch, and computes it.

One thread owns the arithmetic; frames come in from the network's thread and answers go back through callbacks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from afd.errors import AfdError, InternalError
from afd.handoff.frame import Frame, FrameOutput
from afd.model.ffn import FFNShard
from afd.model.moe import Routing

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QueuedFrame:
    """A frame that waits, and where its answer goes. `stream` tells the frames of one peer from another's."""

    stream: object
    frame: Frame
    reply: Callable[[FrameOutput | AfdError], None]
    queued_ns: int = field(default_factory=time.perf_counter_ns)


@dataclass
class BatcherCounters:
    """Totals since the start."""

    num_frames: int = 0
    num_batches: int = 0
    num_tokens: int = 0
    num_frames_dropped: int = 0
    queue_ns: int = 0
    compute_ns: int = 0


class Batcher:
    """Takes the oldest frame and with it every frame of the same layer that is there: nobody waits for a peer
    that has nothing to send."""

    def __init__(self, shard: FFNShard, max_batch_tokens: int) -> None:
        self.shard = shard
        self.max_batch_tokens = max_batch_tokens
        self.counters = BatcherCounters()
        self._queue: list[QueuedFrame] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="ffn", daemon=True)

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def submit(self, queued: QueuedFrame) -> None:
        with self._changed:
            self._queue.append(queued)
            self._changed.notify()

    def drop(self, stream: object, frame_id: int | None = None) -> None:
        """Forgets one queued frame of a stream, or all of them: nobody awaits the answers."""
        with self._changed:
            kept = [
                queued
                for queued in self._queue
                if queued.stream is not stream or frame_id not in (None, queued.frame.frame_id)
            ]
            self.counters.num_frames_dropped += len(self._queue) - len(kept)
            self._queue = kept

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            try:
                self._compute(batch)
            except Exception:
                log.exception("layer %d could not be computed", batch[0].frame.layer_idx)
                for queued in batch:
                    queued.reply(InternalError("the FFN failed; its log has the reason"))

    def _next_batch(self) -> list[QueuedFrame] | None:
        """Waits for work; None at the stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._stopping)
            if self._stopping:
                return None
            layer_idx, num_tokens = self._queue[0].frame.layer_idx, 0
            batch: list[QueuedFrame] = []
            rest: list[QueuedFrame] = []
            for queued in self._queue:
                size = queued.frame.ffn_input.shape[0]
                joins = queued.frame.layer_idx == layer_idx
                if joins and (not batch or num_tokens + size <= self.max_batch_tokens):
                    batch.append(queued)
                    num_tokens += size
                else:
                    rest.append(queued)
            self._queue = rest
            return batch

    def _compute(self, batch: list[QueuedFrame]) -> None:
        start_ns = time.perf_counter_ns()
        frames = [queued.frame for queued in batch]
        ffn_input, routing = _join(frames)
        ffn_output = self.shard(frames[0].layer_idx, ffn_input, routing)
        compute_ns = time.perf_counter_ns() - start_ns
        num_tokens = ffn_input.shape[0]
        outputs = ffn_output.split([frame.ffn_input.shape[0] for frame in frames])
        for queued, output in zip(batch, outputs, strict=True):
            queue_ns = start_ns - queued.queued_ns
            self.counters.queue_ns += queue_ns
            queued.reply(FrameOutput(queued.frame.frame_id, output, queue_ns, compute_ns, num_tokens))
        self.counters.num_frames += len(batch)
        self.counters.num_batches += 1
        self.counters.num_tokens += num_tokens
        self.counters.compute_ns += compute_ns


def _join(frames: list[Frame]) -> tuple[torch.Tensor, Routing | None]:
    if len(frames) == 1:
        return frames[0].ffn_input, frames[0].routing
    routings = [frame.routing for frame in frames if frame.routing is not None]
    routing = (
        Routing(torch.cat([r.topk_ids for r in routings]), torch.cat([r.topk_weights for r in routings]))
        if routings
        else None
    )
    return torch.cat([frame.ffn_input for frame in frames]), routing
