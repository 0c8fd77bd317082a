"""The engine: one thread that runs step after step. The network talks to it through a queue of commands.

Microbatches take turns, each in its slot: one goes on until it is away at the FFN, then the next one does. When one is
through all layers, its tokens are sampled and the slot's next microbatch begins, wherever the others are. A step is the
time in which each goes through all layers once: it ends when the one ends that leads.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from afd.compute import ComputeThread
from afd.errors import AfdError, Cancelled, DeadlineExceeded, InternalError, PeerUnavailable
from afd.model.sampler import sample
from afd.model.sampling_params import SamplingParams
from afd.state.requests import SequenceKey
from services.attention.chunk import Chunk, context_tokens
from services.attention.decoder import Decoder
from services.attention.microbatch import Microbatch, MicrobatchBuilder
from services.attention.pipeline import Pipeline
from services.attention.recent_steps import RecentSteps
from services.attention.scheduler import Scheduler
from services.attention.sequence import Sequence, TokenEvent
from services.attention.step_tracer import StepTracer
from services.attention.timeline import StepCounters, Timeline

log = logging.getLogger(__name__)

_IDLE_WAIT_S = 1.0
_RECOVERY_POLL_S = 0.01
_END = object()
_NOT_FINITE = "the logits are not finite: the weights are damaged, or the arithmetic overflowed"


@dataclass(frozen=True)
class Delivery:
    """Something a sequence's stream must be told: a token, or the error that ends it."""

    sequence: Sequence
    event: TokenEvent | AfdError


@dataclass(frozen=True)
class _Add:
    sequence: Sequence


@dataclass(frozen=True)
class _Cancel:
    sequence: Sequence


@dataclass
class _UnderWay:
    batch: Microbatch
    layers: Iterator[None]
    num_sent: int = 0  # layers


class Engine:
    """`deliver` is called with all that came of a microbatch when the next one is prepared, so that the network's
    thread works while this one waits for arithmetic."""

    def __init__(
        self,
        decoder: Decoder,
        scheduler: Scheduler,
        builder: MicrobatchBuilder,
        pipeline: Pipeline,
        tracer: StepTracer,
        deliver: Callable[[list[Delivery]], None],
        recovery_s: float,
    ) -> None:
        self.decoder = decoder
        self.scheduler = scheduler
        self.builder = builder
        self.pipeline = pipeline
        self.tracer = tracer
        self.deliver = deliver
        self.recovery_s = recovery_s
        self.timeline = Timeline()
        self.counters = StepCounters()
        self.recent = RecentSteps()
        self._num_microbatches = 0
        self._under_way: dict[int, _UnderWay] = {}  # by slot
        self._leader = 0  # its slot
        self._landed: list[Chunk] = []  # in this step
        self._undelivered: list[Delivery] = []
        self._commands: queue.SimpleQueue[_Add | _Cancel | None] = queue.SimpleQueue()
        self._stopping = False
        self._ended: Future[None] | None = None

    @property
    def num_in_flight(self) -> int:
        return len(self._under_way)

    @property
    def _everyone(self) -> list[Sequence]:
        return [*self.scheduler.running, *self.scheduler.waiting]

    @torch.inference_mode()
    def warm_up(self) -> None:
        """One token through all layers before the first request, there and back: what is slow at first is not its.
        Raises what a step raises."""
        sequence = Sequence(SequenceKey("warm-up"), 0, [0], [], SamplingParams(), (), 1, block_table=[0])
        batch = self.builder.build(0, [Chunk(sequence, 1)])
        for _ in self.decoder.forward(batch, self.timeline):
            pass
        self.decoder.logits(batch)

    def start(self, compute: ComputeThread) -> None:
        self._ended = compute.submit(self._run)

    def stop(self) -> None:
        """Ends soon. Sequences that are left are cancelled."""
        self._stopping = True
        self._commands.put(None)
        if self._ended:
            self._ended.result()
        self.decoder.ffn.close()

    def submit(self, sequence: Sequence) -> None:
        self._commands.put(_Add(sequence))

    def cancel(self, sequence: Sequence) -> None:
        """Removes a sequence as soon as no microbatch computes it; one that nobody else is in is dropped at its next
        layer."""
        sequence.cancelled = True
        self._commands.put(_Cancel(sequence))

    @torch.inference_mode()
    def _run(self) -> None:
        while not self._stopping:
            self._take_commands()
            for slot in range(self.pipeline.most):
                self._take_turn(slot)
        self._abandon()
        self._hand_over()

    def _hand_over(self) -> None:
        deliveries, self._undelivered = self._undelivered, []
        if deliveries:
            self.deliver(deliveries)

    def _take_commands(self) -> None:
        """Acts on what the network asked for; with nothing else to do, waits for it."""
        if not self.scheduler.has_work:
            self._hand_over()
        while not (self._stopping or (self.scheduler.has_work and self._commands.empty())):
            try:
                self._obey(self._commands.get(timeout=_IDLE_WAIT_S))
            except queue.Empty:
                return

    def _obey(self, command: _Add | _Cancel | None) -> None:
        if isinstance(command, _Add):
            self.scheduler.add(command.sequence)
        elif isinstance(command, _Cancel) and self.scheduler.remove(command.sequence):
            self.counters.add_dropped(command.sequence, "cancelled")

    def _take_turn(self, slot: int) -> None:
        try:
            self._turn(slot)
        except PeerUnavailable as error:
            self._abandon(error)
            self._recover(error)
        except AfdError as error:
            self._fail(self._abandon(error).get(slot, self._everyone), error)
        except Exception as error:
            log.exception("a step failed")
            reason = InternalError("the step failed; the log has the reason")
            self._fail(self._abandon(error).get(slot, self._everyone), reason)

    def _turn(self, slot: int) -> None:
        if slot in self._under_way and not self._go_on(slot):
            return
        if not self._is_apart():
            self._hand_over()
        elif self._begin(slot):
            self._go_on(slot)

    def _is_apart(self) -> bool:
        """Whether a microbatch that begins now keeps its distance to the others, which is the same between all: the
        layers that take the FFN long meet those that take it less, and the end of one the middle of another."""
        if not self._under_way:
            return True
        distance = math.ceil(len(self.decoder.stack.layers) / self._num_microbatches)
        return all(other.num_sent >= distance for other in self._under_way.values())

    def _begin(self, slot: int) -> bool:
        """Prepares the slot's next microbatch. False if there is nothing for it."""
        if not self._under_way:
            self._begin_step()
        self._expire()
        with self.timeline.measure("schedule"):
            chunks = self.scheduler.schedule(slot, self._num_microbatches)
            if chunks:
                batch = self.builder.build(slot, chunks)
                self._under_way[slot] = _UnderWay(batch, self.decoder.forward(batch, self.timeline))
        self._hand_over()
        return bool(chunks)

    def _go_on(self, slot: int) -> bool:
        """A layer more. True if that was the end."""
        if self._leader not in self._under_way:
            self._leader = slot
        under_way = self._under_way[slot]
        batch = under_way.batch
        computed = False
        with contextlib.suppress(Cancelled):  # abandoned while it was away
            if not batch.abandoned:
                computed = next(under_way.layers, _END) is _END
                if not computed:
                    under_way.num_sent += 1
                    return False
        self._land(batch, computed)
        if slot == self._leader:
            self._end_step(computed)
        return True

    def _land(self, batch: Microbatch, computed: bool) -> None:
        """Ends a microbatch that is through all layers, or that nobody waits for any more."""
        deliveries: list[Delivery] = []
        if not computed:
            self.decoder.ffn.drop(batch)
        elif batch.sampled:
            deliveries = self._sample(batch)
        self.scheduler.land(batch.slot, computed)
        for delivery in deliveries:
            if isinstance(delivery.event, AfdError) or delivery.event.finish_reason:
                self.scheduler.remove(delivery.sequence)
        del self._under_way[batch.slot]
        self._landed += batch.chunks
        self._undelivered += deliveries
        self.counters.add_microbatch(batch.num_tokens, context_tokens(batch.chunks), len(deliveries))

    def _sample(self, batch: Microbatch) -> list[Delivery]:
        with self.timeline.measure("lm_head"):
            logits = self.decoder.logits(batch)
        with self.timeline.measure("sample"):
            tokens = sample(logits, [sequence.sampler_row() for sequence in batch.sampled])
            finite = logits.isfinite().all(dim=-1).tolist()
            return [
                Delivery(sequence, sequence.append(token) if is_finite else InternalError(_NOT_FINITE))
                for sequence, token, is_finite in zip(batch.sampled, tokens, finite, strict=True)
            ]

    def _begin_step(self) -> None:
        self.timeline.begin()
        self.tracer.begin(self.timeline.start_ns, self.decoder.ffn.transport_names)
        self.decoder.ffn.take_crossings()  # of what came to nothing
        self._landed = []
        self._num_microbatches = self.pipeline.choose(len(self.scheduler.running) + len(self.scheduler.waiting))

    def _end_step(self, computed: bool) -> None:
        step = self.timeline.end(self.decoder.ffn.take_crossings())
        self.counters.add_step(step)
        self.tracer.end(step, self._landed)
        if computed:
            self.recent.note(step, self._landed)
        else:
            self.recent.interrupt()
        if all(chunk.num_tokens == 1 for chunk in self._landed):
            self.pipeline.observe(step.duration_ns / len(self._landed))
        self._begin_step()

    def _abandon(self, error: Exception | None = None) -> dict[int, list[Sequence]]:
        """Ends all microbatches: nothing of them is kept. Returns the sequences that were in each slot's."""
        if error:
            self.tracer.fail(error)
        for under_way in self._under_way.values():
            self.decoder.ffn.drop(under_way.batch)
        self._under_way.clear()
        in_flight = {slot: [chunk.sequence for chunk in chunks] for slot, chunks in self.scheduler.in_flight.items()}
        for slot in in_flight:
            self.scheduler.land(slot, computed=False)
        return in_flight

    def _recover(self, error: PeerUnavailable) -> None:
        """Waits for the FFN, up to recovery_s. What was under way is then scheduled again: nothing of it was kept."""
        log.warning("the step is put off: %s", error)
        self._hand_over()
        deadline = time.monotonic() + self.recovery_s
        while self.scheduler.has_work and not (self._stopping or self.decoder.ffn.is_whole):
            if time.monotonic() > deadline:
                self._fail(self._everyone, PeerUnavailable(f"the FFN is lost: {error}"))
            time.sleep(_RECOVERY_POLL_S)
            self._expire()
            self._hand_over()
            while not self._commands.empty():
                self._obey(self._commands.get())

    def _expire(self) -> None:
        """Ends what is out of time, before anything more is computed for it."""
        now = time.monotonic()
        for sequence in self._everyone:
            if sequence.urgency.deadline <= now and self.scheduler.remove(sequence):
                self.counters.add_dropped(sequence, "expired")
                self._undelivered.append(Delivery(sequence, DeadlineExceeded("the request's deadline has passed")))

    def _fail(self, sequences: list[Sequence], error: AfdError) -> None:
        for sequence in sequences:
            self.scheduler.remove(sequence)
        self._undelivered += [Delivery(sequence, error) for sequence in sequences]
