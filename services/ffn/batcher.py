"""Joins the frames of one layer that wait, from all attention replicas, into one batch, and computes it.

One thread looks at every pair for frames, owns the arithmetic, and answers.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from afd.compute import ComputeThread
from afd.errors import AfdError, InternalError, InvalidRequest, StaleEpoch
from afd.handoff.bell import Bell, Lookout
from afd.handoff.frame import Frame, Timing
from afd.handoff.slots import Region
from afd.model.ffn import FFNShard
from afd.model.moe import Routing
from afd.telemetry import record_ffn_spans

log = logging.getLogger(__name__)

_NO_WORK_S = 1.0
_LONGEST_PASSED_OVER_S = 0.05  # half of what attention waits at least before it asks another replica


class Endpoint(Protocol):
    """The FFN side of an attention-FFN pair, whatever its transport."""

    @property
    def bell(self) -> Bell | None:
        """Rings when there may be something to poll; None if nobody rings, and it has to be looked at."""

    @property
    def regions(self) -> tuple[Region, ...]:
        """What frames and answers lie in."""

    def poll(self) -> list[Frame]:
        """What has arrived since the last look, checked. What is wrong with a frame is told to its sender."""

    def drop(self, frame_id: int) -> None:
        """The sender says so in the stream: it no longer wants the answer. Called on the network's thread."""

    def awaits(self, frame: Frame) -> bool:
        """Whether the sender still wants the answer."""

    def buffer(self, frame: Frame) -> Tensor:
        """Where the frame's partial sum [T, D] goes."""

    def reply(self, frame: Frame, ffn_output: Tensor, timing: Timing) -> None:
        """Answers; ffn_output is the frame's buffer, filled."""

    def refuse(self, frame_id: int, error: AfdError) -> None:
        """Answers with an error."""

    def close(self) -> None:
        """The pair has ended."""


class QueuedFrame(NamedTuple):
    """A frame that waits, and whom it came from."""

    endpoint: Endpoint
    frame: Frame
    queued_ns: int


@dataclass
class BatcherCounters:
    """Totals since the start."""

    num_frames: int = 0
    num_batches: int = 0
    num_tokens: int = 0
    num_frames_dropped: int = 0
    num_tokens_dropped: int = 0
    queue_ns: int = 0
    compute_ns: int = 0
    bubble_ns: int = 0


class Batcher:
    """Takes the most urgent frame and with it every frame of the same layer that is there: nobody waits for a peer
    that has nothing to send."""

    def __init__(self, shard: FFNShard, max_batch_tokens: int, spin_s: float, device: torch.device) -> None:
        self.shard = shard
        self.max_batch_tokens = max_batch_tokens
        self.spin_s = spin_s
        self.device = device
        self.oldest_epoch = 0  # frames for layouts before it are refused
        self.counters = BatcherCounters()
        self.endpoints: tuple[Endpoint, ...] = ()
        self._queue: list[QueuedFrame] = []
        self._worked_at = 0.0
        self._own_bell = Bell.private()
        self._lookout = Lookout(spin_s, [self._own_bell])
        self._looks_out_for: tuple[Endpoint, ...] = ()
        self._stopping = False
        self._ended: Future[None] | None = None

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    def start(self, compute: ComputeThread) -> None:
        self._ended = compute.submit(self._run)

    def stop(self) -> None:
        self._stopping = True
        self._own_bell.ring()
        if self._ended:
            self._ended.result()

    def attach(self, endpoint: Endpoint) -> None:
        for region in endpoint.regions:
            region.pin(self.device)
        self.endpoints = (*self.endpoints, endpoint)
        self._own_bell.ring()

    def detach(self, endpoint: Endpoint) -> None:
        """Its frames that wait are dropped: nobody awaits the answers."""
        self.endpoints = tuple(other for other in self.endpoints if other is not endpoint)
        endpoint.close()

    @torch.inference_mode()
    def _run(self) -> None:
        while not self._stopping:
            self._collect()
            if self._queue:
                self._count_bubble()
                self._compute_or_refuse(self._next_batch())
                self._worked_at = time.monotonic()
            else:
                self._idle()

    def _count_bubble(self) -> None:
        """The time since the last batch, unless it is so long that there was no work."""
        idle_s = time.monotonic() - self._worked_at
        if idle_s <= _NO_WORK_S:
            self.counters.bubble_ns += int(idle_s * 1e9)

    def _idle(self) -> None:
        if self._looks_out_for is not self.endpoints:
            self._looks_out_for = self.endpoints
            bells = [self._own_bell, *(endpoint.bell for endpoint in self.endpoints)]
            self._lookout = Lookout(self.spin_s, bells)
        self._lookout.pause(time.monotonic() - self._worked_at)

    def _collect(self) -> None:
        for endpoint in self.endpoints:
            for frame in endpoint.poll():
                if frame.is_probe:
                    _echo(endpoint, frame)
                    self._worked_at = time.monotonic()
                elif frame.epoch < self.oldest_epoch:
                    endpoint.refuse(frame.frame_id, StaleEpoch(f"the layout of epoch {frame.epoch} is over"))
                else:
                    self._queue.append(QueuedFrame(endpoint, frame, time.perf_counter_ns()))
        if self._queue:
            self._drop_unawaited()

    def _drop_unawaited(self) -> None:
        awaited = []
        for queued in self._queue:
            if self._is_awaited(queued):
                awaited.append(queued)
            else:
                self.counters.num_frames_dropped += 1
                self.counters.num_tokens_dropped += queued.frame.num_tokens
        self._queue = awaited

    def _is_awaited(self, queued: QueuedFrame) -> bool:
        endpoint, frame = queued.endpoint, queued.frame
        return endpoint in self.endpoints and endpoint.awaits(frame) and not frame.urgency.is_over

    def _put_first(self) -> None:
        """The oldest of the most urgent frames comes first, unless another one was passed over for too long."""
        oldest = self._queue[0]
        first = min(self._queue, key=lambda queued: queued.frame.urgency.priority)
        waited_s = (time.perf_counter_ns() - oldest.queued_ns) / 1e9
        if first is not oldest and waited_s <= _LONGEST_PASSED_OVER_S:
            self._queue.remove(first)
            self._queue.insert(0, first)

    def _next_batch(self) -> list[QueuedFrame]:
        """The first frame, and those of its layer that fit beside it."""
        self._put_first()
        layer_idx, num_tokens = self._queue[0].frame.layer_idx, 0
        batch: list[QueuedFrame] = []
        rest: list[QueuedFrame] = []
        for queued in self._queue:
            size = queued.frame.num_tokens
            joins = queued.frame.layer_idx == layer_idx
            if joins and (not batch or num_tokens + size <= self.max_batch_tokens):
                batch.append(queued)
                num_tokens += size
            else:
                rest.append(queued)
        self._queue = rest
        return batch

    def _compute_or_refuse(self, batch: list[QueuedFrame]) -> None:
        try:
            self._compute(batch)
        except InvalidRequest as error:
            self._find_invalid(batch, error)
        except Exception:
            log.exception("layer %d could not be computed", batch[0].frame.layer_idx)
            for queued in batch:
                queued.endpoint.refuse(queued.frame.frame_id, InternalError("the FFN failed; its log has the reason"))

    def _find_invalid(self, batch: list[QueuedFrame], error: InvalidRequest) -> None:
        """Refuses the frame that cannot be; the others are computed one by one."""
        if len(batch) == 1:
            batch[0].endpoint.refuse(batch[0].frame.frame_id, error)
        else:
            for queued in batch:
                self._compute_or_refuse([queued])

    def _compute(self, batch: list[QueuedFrame]) -> None:
        start_ns = time.perf_counter_ns()
        frames = [queued.frame for queued in batch]
        ffn_input, routing = _join(frames, self.device)
        buffers = [queued.endpoint.buffer(queued.frame) for queued in batch]
        if len(buffers) == 1 and self.device.type == "cpu":
            self.shard(frames[0].layer_idx, ffn_input, routing, out=buffers[0])
        else:
            ffn_output = self.shard(frames[0].layer_idx, ffn_input, routing)
            for buffer, part in zip(buffers, ffn_output.split([frame.num_tokens for frame in frames]), strict=True):
                buffer.copy_(part, non_blocking=True)
            if ffn_output.is_cuda:
                torch.cuda.current_stream(self.device).synchronize()
        compute_ns = time.perf_counter_ns() - start_ns
        for queued, buffer in zip(batch, buffers, strict=True):
            timing = Timing(start_ns - queued.queued_ns, compute_ns, ffn_input.shape[0])
            queued.endpoint.reply(queued.frame, buffer, timing)
            self.counters.queue_ns += timing.queue_ns
            if queued.frame.traceparent:
                record_ffn_spans(queued.frame, self.shard.shard, timing)
        self.counters.num_frames += len(batch)
        self.counters.num_batches += 1
        self.counters.num_tokens += ffn_input.shape[0]
        self.counters.compute_ns += compute_ns


def _echo(endpoint: Endpoint, probe: Frame) -> None:
    buffer = endpoint.buffer(probe)
    buffer.copy_(probe.ffn_input)
    endpoint.reply(probe, buffer, Timing(0, 0, probe.num_tokens))


def _join(frames: list[Frame], device: torch.device) -> tuple[Tensor, Routing | None]:
    """What the frames hold, one after the other, on the device."""
    ffn_input = _cat([frame.ffn_input for frame in frames], device)
    routings = [frame.routing for frame in frames if frame.routing is not None]
    if not routings:
        return ffn_input, None
    topk_ids, topk_weights = [r.topk_ids for r in routings], [r.topk_weights for r in routings]
    return ffn_input, Routing(_cat(topk_ids, device), _cat(topk_weights, device))


def _cat(parts: list[Tensor], device: torch.device) -> Tensor:
    there = [part.to(device, non_blocking=True) for part in parts]
    return there[0] if len(there) == 1 else torch.cat(there)
