"""The engine in this process, over an FFN that can be made to fail, wait and remember."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from afd.compute import ComputeThread
from afd.errors import Cancelled, DeadlineExceeded, InternalError, PeerUnavailable
from afd.handoff.local import LocalFFN
from afd.model.checkpoint import Checkpoint
from afd.model.kv_cache import KVCache
from afd.model.moe import Routing
from afd.model.sampling_params import SamplingParams
from afd.model.weights import load_attention, load_ffn_shard
from afd.state.requests import SequenceKey
from afd.urgency import Urgency
from services.attention.block_manager import BlockManager
from services.attention.chunk import ChunkCost
from services.attention.decoder import Decoder
from services.attention.engine import Delivery, Engine
from services.attention.microbatch import MicrobatchBuilder
from services.attention.pipeline import Pipeline
from services.attention.scheduler import Scheduler
from services.attention.sequence import Sequence, TokenEvent
from services.attention.step_tracer import StepTracer
from tests.conftest import Model

CPU = torch.device("cpu")
NUM_BLOCKS, BLOCK_SIZE = 64, 4


class TestFFN(LocalFFN):
    """The whole FFN, with something that happens at each receive."""

    __test__ = False

    def __init__(self, local: LocalFFN) -> None:
        super().__init__(local.shard)
        self.before_receive: Callable[[], None] = lambda: None
        self.before_send: Callable[[Any], None] = lambda batch: None
        self.num_dropped = 0
        self.log: list[tuple[str, int]] = []  # what was done for which slot

    def send(self, batch: Any, layer_idx: int, ffn_input: Tensor, routing: Routing | None) -> None:
        self.log.append((f"send {layer_idx}", batch.slot))
        self.before_send(batch)
        super().send(batch, layer_idx, ffn_input, routing)

    def receive(self, batch: Any) -> Tensor:
        self.before_receive()
        self.log.append(("receive", batch.slot))
        return super().receive(batch)

    def drop(self, batch: Any) -> None:
        self.num_dropped += batch.slot in self._pending
        super().drop(batch)


@dataclass
class Harness:
    model: Model
    engine: Engine
    ffn: TestFFN
    events: dict[Sequence, list[Any]] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def deliver(self, deliveries: list[Delivery]) -> None:
        with self.changed:
            for delivery in deliveries:
                self.events[delivery.sequence].append(delivery.event)
            self.changed.notify_all()

    def submit(self, prompt: list[int], max_tokens: int, timeout_s: float | None = None) -> Sequence:
        params, context = SamplingParams(max_tokens=max_tokens, ignore_eos=True), NUM_BLOCKS * BLOCK_SIZE
        key, urgency = SequenceKey("r", len(self.events)), Urgency.within(timeout_s)
        sequence = Sequence(key, 1, prompt, [], params, (), context, urgency=urgency)
        self.events[sequence] = []
        self.engine.submit(sequence)
        return sequence

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, timeout=20)

    def tokens(self, sequence: Sequence) -> list[int]:
        self.wait(lambda: bool(self.events[sequence]) and getattr(self.events[sequence][-1], "finish_reason", True))
        assert all(isinstance(event, TokenEvent) for event in self.events[sequence]), self.events[sequence]
        return [event.token.id for event in self.events[sequence]]

    def check(self, sequence: Sequence) -> None:
        tokens = self.tokens(sequence)
        logprobs = [event.token.logprob for event in self.events[sequence]]
        self.model.check_greedy(sequence.prompt_ids, tokens, logprobs)

    @property
    def num_used(self) -> int:
        return self.engine.scheduler.blocks.num_used


@pytest.fixture
def harness(make_model: Callable[[int], Model]) -> Iterator[Harness]:
    model = make_model(4)
    checkpoint = Checkpoint(model.path)
    config = checkpoint.config

    def silent(done: int, total: int) -> None:
        pass

    stack = load_attention(checkpoint, torch.float32, CPU, silent)
    ffn = TestFFN(LocalFFN(load_ffn_shard(checkpoint, 0, 1, torch.float32, CPU, silent)))
    cache = KVCache.allocate(config.num_layers, NUM_BLOCKS * BLOCK_SIZE, config.head_dim, torch.float32, CPU)
    harness: Harness

    def deliver(deliveries: list[Delivery]) -> None:
        harness.deliver(deliveries)

    engine = Engine(
        decoder=Decoder(stack, cache, ffn),
        scheduler=Scheduler(
            BlockManager(NUM_BLOCKS, BLOCK_SIZE),
            max_sequences=8,
            prefill_chunk_tokens=16,
            cost=ChunkCost.of(config, 1),
        ),
        builder=MicrobatchBuilder(BLOCK_SIZE, config.head_dim, config.rope_theta, torch.float32, CPU),
        pipeline=Pipeline(range(2, 3)),
        tracer=StepTracer(),
        deliver=deliver,
        recovery_s=1.0,
    )
    harness = Harness(model, engine, ffn)
    engine.warm_up()
    engine.start(ComputeThread())
    yield harness
    engine.stop()


def raising(error: Exception, after: int) -> Callable[[], None]:
    """Raises at the receive number `after`."""
    count = itertools.count()

    def before_receive() -> None:
        if next(count) == after:
            raise error

    return before_receive


@pytest.mark.parametrize("after", [0, 1, 2, 3, 7])
def test_step_that_lost_its_ffn_is_run_again_with_the_same_tokens(harness: Harness, after: int) -> None:
    harness.ffn.before_receive = raising(PeerUnavailable("gone"), after)
    sequences = [harness.submit(harness.model.prompt(length, length), 12) for length in (3, 30, 7)]
    for sequence in sequences:
        harness.check(sequence)
    assert harness.num_used == 0


def test_sequences_of_a_failed_step_end_with_an_error_and_the_engine_goes_on(harness: Harness) -> None:
    harness.ffn.before_receive = raising(RuntimeError("broken"), 3)
    failed = harness.submit(harness.model.prompt(5, 1), 50)
    harness.wait(lambda: bool(harness.events[failed]) and isinstance(harness.events[failed][-1], InternalError))
    harness.ffn.before_receive = lambda: None
    harness.check(harness.submit(harness.model.prompt(5, 2), 10))
    assert harness.num_used == 0


def test_cancelled_sequence_leaves_the_step_it_is_in_and_its_frames_are_dropped(harness: Harness) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        reached.set()
        assert go_on.wait(10)

    harness.ffn.before_receive = hold
    cancelled = harness.submit(harness.model.prompt(40, 1), 50)
    assert reached.wait(10)
    harness.engine.cancel(cancelled)
    harness.ffn.before_receive = lambda: None
    go_on.set()
    other = harness.submit(harness.model.prompt(5, 2), 10)
    harness.check(other)
    assert harness.ffn.num_dropped == 1
    assert harness.events[cancelled] == []
    assert harness.num_used == 0


def test_sequence_out_of_time_ends_before_anything_is_computed_for_it(harness: Harness) -> None:
    late = harness.submit(harness.model.prompt(40, 1), 50, timeout_s=-1.0)
    other = harness.submit(harness.model.prompt(5, 2), 10, timeout_s=60.0)
    harness.check(other)
    counters = harness.engine.counters
    assert [type(event) for event in harness.events[late]] == [DeadlineExceeded]
    assert late.num_computed == 0
    assert (counters.num_dropped, counters.num_prefill_saved, counters.num_decode_saved) == (
        {"expired": 1},
        {"expired": 39},
        {"expired": 50},
    )
    assert harness.num_used == 0


def test_sequence_that_runs_out_of_time_while_decoding_leaves_its_blocks(harness: Harness) -> None:
    late = harness.submit(harness.model.prompt(5, 1), 200, timeout_s=0.2)
    harness.wait(lambda: bool(harness.events[late]) and isinstance(harness.events[late][-1], DeadlineExceeded))
    harness.check(harness.submit(harness.model.prompt(5, 2), 10))
    assert harness.engine.counters.num_dropped == {"expired": 1}
    assert harness.engine.counters.num_decode_saved["expired"] == 200 - len(late.output_ids) > 0
    assert harness.num_used == 0


def test_what_waits_for_a_lost_ffn_ends_with_its_deadline(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TestFFN, "is_whole", property(lambda ffn: False), raising=False)
    harness.engine.recovery_s = 60.0
    harness.ffn.before_receive = raising(PeerUnavailable("gone"), 2)
    late = harness.submit(harness.model.prompt(5, 1), 200, timeout_s=0.3)
    harness.wait(lambda: bool(harness.events[late]))
    assert [type(event) for event in harness.events[late]] == [DeadlineExceeded]
    monkeypatch.undo()
    harness.check(harness.submit(harness.model.prompt(5, 2), 10))


def test_microbatch_that_is_abandoned_while_away_lands_and_the_others_go_on(harness: Harness) -> None:
    def leave(batch: Any) -> None:
        if any(len(chunk.sequence.prompt_ids) == 15 for chunk in batch.chunks):
            harness.engine.cancel(leaving)
            harness.ffn.before_receive = raising(Cancelled("nobody waits"), 0)
            harness.ffn.before_send = lambda batch: None

    harness.ffn.before_send = leave
    other = harness.submit(harness.model.prompt(5, 5), 20)
    leaving = harness.submit(harness.model.prompt(15, 15), 20)
    harness.check(other)
    assert harness.events[leaving] == []
    assert harness.engine.counters.num_dropped == {"cancelled": 1}
    assert harness.num_used == 0


def test_neighbours_of_a_cancelled_sequence_are_not_disturbed(harness: Harness) -> None:
    sequences = [harness.submit(harness.model.prompt(length, length), 30) for length in (3, 20, 9, 33)]
    harness.wait(lambda: len(harness.events[sequences[1]]) > 3)
    harness.engine.cancel(sequences[1])
    for sequence in (sequences[0], *sequences[2:]):
        harness.check(sequence)
    assert harness.num_used == 0


def test_a_microbatch_begins_its_next_step_while_the_other_one_is_still_under_way(harness: Harness) -> None:
    sequences = [harness.submit(harness.model.prompt(length, length), 12) for length in (5, 6)]
    for sequence in sequences:
        harness.check(sequence)
    steady = harness.ffn.log[len(harness.ffn.log) // 3 : 2 * len(harness.ffn.log) // 3]
    begins = [index for index, entry in enumerate(steady) if entry == ("send 0", 0)]
    assert begins
    assert any(("receive", 1) in steady[index:] for index in begins)
    for index in begins[:-1]:
        after = [what for what, slot in steady[index:] if slot == 1]
        assert after[0] == "receive", "the other one is away while this one begins"


def test_microbatches_keep_half_of_the_layers_between_them(harness: Harness) -> None:
    for sequence in [harness.submit(harness.model.prompt(length, length), 12) for length in (5, 6, 7, 8)]:
        harness.check(sequence)
    num_layers = harness.model.oracle.config.num_layers
    half = math.ceil(num_layers / 2)
    sent = [(int(what.removeprefix("send ")), slot) for what, slot in harness.ffn.log if what != "receive"]
    steady = sent[len(sent) // 3 : 2 * len(sent) // 3]
    begins = [index for index, (layer, _) in enumerate(steady) if layer == 0 and index]
    assert len(begins) > 4
    assert {steady[index - 1][0] for index in begins} == {half - 1, num_layers - half}


def test_tokens_of_a_microbatch_that_keeps_its_distance_do_not_wait_for_its_next_one(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second request comes so late in the first one's pass that this has to wait for it."""
    num_layers = harness.model.oracle.config.num_layers
    sequences: list[Sequence] = []
    deliver = harness.engine.deliver

    def log_and_deliver(deliveries: list[Delivery]) -> None:
        harness.ffn.log.append(("deliver", 0))
        deliver(deliveries)

    def submit_second(batch: Any) -> None:
        if harness.ffn.log[-1][0] == f"send {num_layers - 2}" and len(sequences) == 1:
            sequences.append(harness.submit(harness.model.prompt(6, 6), 12))

    monkeypatch.setattr(harness.engine, "deliver", log_and_deliver)
    harness.ffn.before_send = submit_second
    sequences.append(harness.submit(harness.model.prompt(5, 5), 12))
    harness.wait(lambda: len(sequences) == 2)
    for sequence in sequences:
        harness.check(sequence)
    log = harness.ffn.log
    landed = log.index(("send 0", 1))
    after = [entry for entry in log[landed:] if entry[0] != "receive" or entry[1] == 1]
    assert after[1][0] == "deliver", "the first one's token goes out before the second one goes on"


def test_a_microbatch_that_fails_takes_no_other_one_along(harness: Harness) -> None:
    def fail_long_contexts(batch: Any) -> None:
        if any(len(chunk.sequence.prompt_ids) == 15 for chunk in batch.chunks):
            raise RuntimeError("broken")

    harness.ffn.before_send = fail_long_contexts
    failed, other = (harness.submit(harness.model.prompt(length, length), 20) for length in (15, 5))
    harness.wait(lambda: bool(harness.events[failed]))
    assert isinstance(harness.events[failed][-1], InternalError)
    harness.check(other)
    assert harness.num_used == 0


@pytest.mark.parametrize("part", ["schedule", "land"])
def test_what_fails_outside_the_layers_ends_its_sequences_and_not_the_engine(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        monkeypatch.undo()
        raise RuntimeError("broken")

    monkeypatch.setattr(harness.engine.scheduler, part, broken)
    failed = harness.submit(harness.model.prompt(5, 1), 20)
    harness.wait(lambda: bool(harness.events[failed]) and isinstance(harness.events[failed][-1], InternalError))
    harness.check(harness.submit(harness.model.prompt(5, 2), 10))
    assert harness.num_used == 0


def test_each_step_counts_every_microbatch_once(harness: Harness) -> None:
    sequences = [harness.submit(harness.model.prompt(length, length), 40) for length in (5, 6, 7, 8)]
    for sequence in sequences:
        harness.check(sequence)
    counters = harness.engine.counters
    assert 40 <= counters.num_steps <= 45
    assert counters.num_generated == 160
    assert 2 * 40 <= counters.num_microbatches <= 2 * 45
    num_layers = harness.model.oracle.config.num_layers
    assert abs(counters.shards[0].num_crossings - num_layers * counters.num_microbatches) <= num_layers
