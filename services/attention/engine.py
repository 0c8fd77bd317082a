"""The engine: one thread that runs step after step. The network talks to it through a queue of commands."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from afd.compute import ComputeThread
from afd.errors import AfdError, InternalError, PeerUnavailable
from afd.handoff.frame import FFN
from afd.model.sampler import sample
from afd.model.sampling_params import SamplingParams
from afd.state.requests import SequenceKey
from services.attention.decoder import Decoder
from services.attention.microbatch import Microbatch, MicrobatchBuilder
from services.attention.pipeline import Pipeline
from services.attention.scheduler import Chunk, Scheduler
from services.attention.sequence import Sequence, TokenEvent
from services.attention.step_tracer import StepTracer
from services.attention.timeline import StepCounters, StepTimeline

log = logging.getLogger(__name__)

_IDLE_WAIT_S = 1.0
_RECONNECT_PAUSE_S = 0.1
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


class Engine:
    """`deliver` is called once a step with all that came of it: when the next one is prepared, so that the network's
    thread works while this one waits for arithmetic. `reconnect` makes the FFN anew after a loss."""

    def __init__(
        self,
        decoder: Decoder,
        scheduler: Scheduler,
        builder: MicrobatchBuilder,
        pipeline: Pipeline,
        tracer: StepTracer,
        deliver: Callable[[list[Delivery]], None],
        reconnect: Callable[[], FFN],
        recovery_s: float,
    ) -> None:
        self.decoder = decoder
        self.scheduler = scheduler
        self.builder = builder
        self.pipeline = pipeline
        self.tracer = tracer
        self.deliver = deliver
        self.reconnect = reconnect
        self.recovery_s = recovery_s
        self.counters = StepCounters()
        self.num_in_flight = 0
        self._microbatches: list[Microbatch] = []
        self._undelivered: list[Delivery] = []
        self._commands: queue.SimpleQueue[_Add | _Cancel | None] = queue.SimpleQueue()
        self._stopping = False
        self._ended: Future[None] | None = None

    @torch.inference_mode()
    def warm_up(self) -> None:
        """One token through all layers before the first request, there and back: what is slow at first is not its.
        Raises what a step raises."""
        sequence = Sequence(SequenceKey("warm-up"), 0, [0], [], SamplingParams(), (), 1, block_table=[0])
        batch = self.builder.build(0, [Chunk(sequence, 1)])
        self.decoder.forward([batch], StepTimeline())
        self.decoder.logits([batch])

    def start(self, compute: ComputeThread) -> None:
        self._ended = compute.submit(self._run)

    def stop(self) -> None:
        """Ends after the current step. Sequences that are left are cancelled."""
        self._stopping = True
        self._commands.put(None)
        if self._ended:
            self._ended.result()
        self.decoder.ffn.close()

    def submit(self, sequence: Sequence) -> None:
        self._commands.put(_Add(sequence))

    def cancel(self, sequence: Sequence) -> None:
        """Removes a sequence at the next step; a microbatch that nobody else is in is dropped at its next layer."""
        sequence.cancelled = True
        self._commands.put(_Cancel(sequence))

    @torch.inference_mode()
    def _run(self) -> None:
        while not self._stopping:
            if not self.scheduler.has_work:
                self._hand_over()
            self._take_commands()
            timeline = StepTimeline()
            with timeline.measure("schedule"):
                chunks = self.scheduler.schedule()
            if chunks:
                self._run_step(chunks, timeline)
            else:
                self._hand_over()
        self._hand_over()

    def _hand_over(self) -> None:
        deliveries, self._undelivered = self._undelivered, []
        if deliveries:
            self.deliver(deliveries)

    def _take_commands(self) -> None:
        """Acts on what the network asked for; with nothing else to do, waits for it."""
        while True:
            try:
                command = self._commands.get(block=not self.scheduler.has_work, timeout=_IDLE_WAIT_S)
            except queue.Empty:
                return
            if isinstance(command, _Add):
                self.scheduler.add(command.sequence)
            elif isinstance(command, _Cancel):
                self.scheduler.remove(command.sequence)
            if self._stopping:
                return

    def _run_step(self, chunks: list[Chunk], timeline: StepTimeline) -> None:
        try:
            self._step(chunks, timeline)
        except PeerUnavailable as error:
            self._abandon(error)
            self._recover(error)
        except AfdError as error:
            self._abandon(error)
            self._fail([chunk.sequence for chunk in chunks], error)
        except Exception as error:
            log.exception("a step failed")
            self._abandon(error)
            self._fail([chunk.sequence for chunk in chunks], InternalError("the step failed; the log has the reason"))

    def _step(self, chunks: list[Chunk], timeline: StepTimeline) -> None:
        self.tracer.begin(chunks, timeline, self.decoder.ffn.transport_names)
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        with timeline.measure("schedule"):
            self._microbatches = self.builder.split(chunks, self.pipeline.choose(len(chunks), num_tokens))
        self._hand_over()
        self.num_in_flight = len(self._microbatches)
        self.decoder.forward(self._microbatches, timeline)
        self.num_in_flight = 0
        for chunk in chunks:
            chunk.sequence.num_computed += chunk.num_tokens
        deliveries = self._sample(self._microbatches, timeline)
        self._undelivered += deliveries
        timeline.end_ns = time.perf_counter_ns()
        for batch in self._microbatches:
            timeline.crossings += batch.crossings
        self.pipeline.observe(timeline.end_ns - timeline.start_ns)
        self.counters.add(timeline, len(self._microbatches), num_tokens, len(deliveries))
        self.tracer.end(timeline)

    def _sample(self, microbatches: list[Microbatch], timeline: StepTimeline) -> list[Delivery]:
        awaited = [batch for batch in microbatches if batch.sampled and not batch.abandoned]
        if not awaited:
            return []
        with timeline.measure("lm_head"):
            logits = self.decoder.logits(awaited)
        with timeline.measure("sample"):
            sequences = [sequence for batch in awaited for sequence in batch.sampled]
            tokens = sample(logits, [sequence.sampler_row() for sequence in sequences])
            finite = logits.isfinite().all(dim=-1).tolist()
            deliveries = [
                Delivery(sequence, sequence.append(token) if is_finite else InternalError(_NOT_FINITE))
                for sequence, token, is_finite in zip(sequences, tokens, finite, strict=True)
            ]
        for delivery in deliveries:
            if isinstance(delivery.event, AfdError) or delivery.event.finish_reason:
                self.scheduler.remove(delivery.sequence)
        return deliveries

    def _abandon(self, error: Exception) -> None:
        """Ends a step that failed: nothing of it is kept."""
        self.tracer.fail(error)
        for batch in self._microbatches:
            self.decoder.ffn.drop(batch)
        self.num_in_flight = 0

    def _recover(self, error: PeerUnavailable) -> None:
        """Connects anew, within recovery_s; the step is then scheduled again, as nothing of it was kept."""
        log.warning("the step is put off: %s", error)
        deadline = time.monotonic() + self.recovery_s
        self.decoder.ffn.close()
        while not self._stopping:
            try:
                self.decoder.ffn = self.reconnect()
            except AfdError as reason:
                if time.monotonic() > deadline:
                    everyone = [*self.scheduler.running, *self.scheduler.waiting]
                    self._fail(everyone, PeerUnavailable(f"the FFN is lost: {reason}"))
                    return
                time.sleep(_RECONNECT_PAUSE_S)
            else:
                log.info("the FFN is back")
                return

    def _fail(self, sequences: list[Sequence], error: AfdError) -> None:
        for sequence in sequences:
            self.scheduler.remove(sequence)
        self._undelivered += [Delivery(sequence, error) for sequence in sequences]
