"""The scheduler, its blocks and its sequences, driven without a model: each step "computes" what was scheduled."""

from __future__ import annotations

import random
from bisect import insort
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.model.sampler import SampledToken
from afd.model.sampling_params import SamplingParams
from afd.state.requests import SequenceKey
from afd.urgency import Urgency
from services.attention.block_manager import BlockManager
from services.attention.chunk import Chunk, ChunkCost
from services.attention.scheduler import Scheduler
from services.attention.sequence import Sequence, TokenEvent

EOS = 1
WORD = 7


def sequence(
    num_prompt: int, max_tokens: int = 4, max_context: int = 1000, priority: int = 0, **params: object
) -> Sequence:
    sampling = SamplingParams(max_tokens=max_tokens, **params)  # type: ignore[arg-type]
    urgency = Urgency(priority)
    return Sequence(SequenceKey("r"), 1, [WORD] * num_prompt, [], sampling, (EOS,), max_context, urgency=urgency)


def append(target: Sequence, token_id: int) -> TokenEvent:
    return target.append(SampledToken(token_id, 0.0))


def summary(chunks: list[Chunk]) -> list[tuple[Sequence, int]]:
    return [(chunk.sequence, chunk.num_tokens) for chunk in chunks]


def scheduling(
    num_blocks: int, block_size: int, max_sequences: int, prefill_chunk_tokens: int, context_weight: float = 0.0
) -> Scheduler:
    blocks, cost = BlockManager(num_blocks, block_size), ChunkCost(context_weight)
    return Scheduler(blocks, max_sequences, prefill_chunk_tokens, cost)


@dataclass
class Run:
    """Steps a scheduler and checks after each what must always hold."""

    scheduler: Scheduler
    num_microbatches: int = 1
    arrived: list[Sequence] = field(default_factory=list)
    finished: list[Sequence] = field(default_factory=list)
    computed: dict[Sequence, list[int]] = field(default_factory=dict)

    def arrive(self, *sequences: Sequence) -> None:
        for each in sequences:
            self.scheduler.add(each)
            insort(self.arrived, each, key=lambda other: other.turn)

    def cancel(self, target: Sequence) -> None:
        self.arrived.remove(target)
        self.scheduler.remove(target)

    def step(self) -> list[Chunk]:
        """A microbatch begins and lands."""
        chunks = self.begin(0)
        assert all(each in chunks_of(chunks) for each in self.running if each.num_uncomputed == 1), "all decode"
        if not any(each.turn[0] for each in self.arrived):
            assert [*self.running, *self.scheduler.waiting] == self.arrived, "first come, first served"
        self.land(0)
        return chunks

    def begin(self, slot: int) -> list[Chunk]:
        idle = [each for each in self.arrived if not each.in_flight]
        chunks = self.scheduler.schedule(slot, self.num_microbatches)
        self._check(chunks, idle)
        return chunks

    def land(self, slot: int, computed: bool = True) -> None:
        chunks = self.scheduler.in_flight.get(slot, [])
        ending = [chunk.sequence for chunk in chunks if chunk.ends_sequence]
        for chunk in chunks:
            target = chunk.sequence
            if target.num_computed == 0:
                self.computed[target] = []
            if computed:
                self.computed[target] += range(target.num_computed, target.num_computed + chunk.num_tokens)
        if chunks:
            self.scheduler.land(slot, computed)
        for target in ending if computed else ():
            if target in self.arrived and append(target, WORD).finish_reason:
                self._finish(target)

    def run(self) -> None:
        for _ in range(10_000):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("the work does not end")

    @property
    def running(self) -> list[Sequence]:
        return self.scheduler.running

    def _finish(self, target: Sequence) -> None:
        assert self.computed[target] == list(range(target.num_tokens - 1)), "each token once, in order"
        self.arrived.remove(target)
        self.scheduler.remove(target)
        self.finished.append(target)

    def _check(self, chunks: list[Chunk], idle: list[Sequence]) -> None:
        scheduler, blocks = self.scheduler, self.scheduler.blocks
        assert len(self.running) <= scheduler.max_sequences
        holders = {*self.arrived, *self.running}  # those that were cancelled in flight hold theirs until they land
        owned = [block for each in holders for block in each.block_table]
        assert len(owned) == len(set(owned)) == blocks.num_used, "a block has one owner"
        assert set(owned) <= set(range(blocks.num_blocks))
        for place in (self.running, scheduler.waiting):
            assert place == sorted(place, key=lambda each: each.turn), "in turn"
        scheduled = chunks_of(chunks)
        assert len(scheduled) == len(set(scheduled))
        assert set(scheduled) <= set(self.running) & set(idle), "nobody is computed twice at once"
        for chunk in chunks:
            assert 1 <= chunk.num_tokens <= chunk.sequence.num_uncomputed
            room = len(chunk.sequence.block_table) * blocks.block_size
            assert chunk.sequence.num_computed + chunk.num_tokens <= room
        in_flight = [chunk for own in scheduler.in_flight.values() for chunk in own]
        assert prefill_tokens(in_flight) <= scheduler.prefill_chunk_tokens
        if len(in_flight) == len(chunks):
            assert not idle or idle[0] in scheduled, "the first always gets on"


def chunks_of(chunks: list[Chunk]) -> list[Sequence]:
    return [chunk.sequence for chunk in chunks]


def prefill_tokens(chunks: list[Chunk]) -> int:
    """Tokens of a step beside those of decoding sequences; asked before the step."""
    return sum(chunk.num_tokens for chunk in chunks if chunk.sequence.num_uncomputed > 1)


# --- one step ---


def test_all_running_sequences_decode_in_every_step() -> None:
    run = Run(scheduling(100, 4, 8, 64))
    run.arrive(*(sequence(number, max_tokens=3) for number in (3, 5, 9)))
    run.step()
    assert [size for _, size in summary(run.step())] == [1, 1, 1]


def test_a_long_prompt_does_not_hold_up_those_who_decode() -> None:
    run = Run(scheduling(100, 4, 8, 10))
    talker, reader = sequence(2, max_tokens=9), sequence(35)
    run.arrive(talker, reader)
    assert summary(run.step()) == [(talker, 2), (reader, 8)]
    assert summary(run.step()) == [(talker, 1), (reader, 10)]
    assert summary(run.step()) == [(talker, 1), (reader, 10)]
    assert summary(run.step()) == [(talker, 1), (reader, 7)]
    assert summary(run.step()) == [(talker, 1), (reader, 1)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(1, 9))
def test_prompts_share_one_budget_of_tokens_a_step(prompts: list[int], budget: int) -> None:
    scheduler = scheduling(100, 4, 8, budget)
    for num_prompt in prompts:
        scheduler.add(sequence(num_prompt))
    while scheduler.has_work:
        chunks = scheduler.schedule(0, 1)
        assert prefill_tokens(chunks) <= budget
        scheduler.land(0, computed=True)
        for chunk in chunks:
            if not chunk.sequence.num_uncomputed:
                scheduler.remove(chunk.sequence)


def test_no_more_than_max_sequences_run_and_the_next_follows_in_turn() -> None:
    run = Run(scheduling(100, 4, 2, 64))
    first, second, third, fourth = (sequence(3, max_tokens=number) for number in (2, 3, 1, 1))
    run.arrive(first, second, third, fourth)
    assert summary(run.step()) == [(first, 3), (second, 3)]
    run.step()
    assert summary(run.step()) == [(second, 1), (third, 3)]
    run.run()
    assert run.finished == [first, second, third, fourth]


# --- preemption ---


def test_the_youngest_gives_its_blocks_to_the_oldest() -> None:
    run = Run(scheduling(4, 2, 8, 64))
    old, young = sequence(3, max_tokens=4), sequence(2, max_tokens=4)
    run.arrive(old, young)
    run.run()
    assert run.scheduler.num_preemptions > 0
    assert run.finished == [old, young]


def test_a_preempted_sequence_waits_first_in_line_and_is_computed_anew() -> None:
    scheduler = scheduling(3, 2, 2, 64)
    run = Run(scheduler)
    old, young, later = sequence(2, max_tokens=5), sequence(1, max_tokens=5), sequence(1, max_tokens=1)
    run.arrive(old, young, later)
    run.step()
    while scheduler.running[-1] is young:
        run.step()
    assert scheduler.waiting == [young, later]
    assert (young.block_table, young.num_computed) == ([], 0)
    run.run()
    assert len(young.output_ids) == 5


def test_a_sequence_alone_can_use_every_block() -> None:
    run = Run(scheduling(3, 4, 8, 64))
    whole = sequence(5, max_tokens=100, max_context=12)
    run.arrive(whole)
    run.run()
    assert whole.num_tokens == 12
    assert run.scheduler.num_preemptions == 0


def test_a_cancelled_sequence_frees_its_blocks_wherever_it_is() -> None:
    run = Run(scheduling(10, 2, 1, 4))
    running, waiting = sequence(7), sequence(3)
    run.arrive(running, waiting)
    run.step()
    run.cancel(waiting)
    run.cancel(running)
    run.scheduler.remove(running)  # twice does no harm
    assert not run.scheduler.has_work
    assert run.scheduler.blocks.num_free == 10


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_whatever_comes_and_goes_all_work_ends_and_all_blocks_are_free(data: st.DataObject) -> None:
    block_size, num_blocks = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 12))
    context = block_size * num_blocks
    run = Run(scheduling(num_blocks, block_size, data.draw(st.integers(1, 6)), data.draw(st.integers(1, 20))))
    lengths = data.draw(
        st.lists(
            st.tuples(st.integers(1, context - 1), st.integers(1, 12), st.integers(0, 20), st.integers(-1, 1)),
            max_size=10,
        )
    )
    arrivals = sorted(lengths, key=lambda item: item[2])
    cancels = data.draw(st.dictionaries(st.integers(0, 40), st.integers(0, 9), max_size=5))
    for step in range(41):
        while arrivals and arrivals[0][2] <= step:
            num_prompt, max_tokens, _, priority = arrivals.pop(0)
            run.arrive(sequence(num_prompt, max_tokens, max_context=context, priority=priority))
        if step in cancels and len(run.arrived) > cancels[step]:
            run.cancel(run.arrived[cancels[step]])
        run.step()
    run.run()
    assert not run.arrived
    assert run.scheduler.blocks.num_free == num_blocks
    assert all(
        len(each.output_ids) == (each.params.max_tokens or 0) or each.num_tokens == context for each in run.finished
    )


# --- priorities ---


def test_the_more_urgent_is_admitted_first_and_equals_as_they_came() -> None:
    run = Run(scheduling(100, 4, 1, 64))
    late, first, second, urgent = (sequence(3, 2, priority=priority) for priority in (5, 0, 0, -1))
    run.arrive(late, first, second, urgent)
    run.run()
    assert run.finished == [urgent, first, second, late]


def test_the_more_urgent_takes_the_place_of_the_last_that_is_less_so() -> None:
    run = Run(scheduling(100, 4, 2, 64))
    one, two, equal, urgent = (sequence(3, 9, priority=priority) for priority in (1, 1, 1, 0))
    run.arrive(one, two)
    run.step()
    run.arrive(equal)
    run.step()
    assert (run.running, run.scheduler.num_preemptions) == ([one, two], 0), "not that of an equal"
    run.arrive(urgent)
    assert (urgent, 3) in summary(run.step())
    assert (run.running, run.scheduler.waiting) == ([urgent, one], [two, equal])
    run.run()
    assert run.finished == [one, urgent, two, equal]


def test_the_more_urgent_gets_the_blocks_of_the_less_urgent() -> None:
    run = Run(scheduling(6, 2, 8, 64))
    less, urgent = sequence(8, 4, priority=1), sequence(7, 2)
    run.arrive(less)
    run.step()
    run.arrive(urgent)
    assert summary(run.step()) == [(urgent, 7)]
    run.run()
    assert run.finished == [urgent, less]


def test_nobody_gives_way_where_that_would_not_be_enough() -> None:
    run = Run(scheduling(6, 2, 8, 64))
    first, less, second = sequence(5, 4), sequence(1, 4, priority=1), sequence(7, 2)
    run.arrive(first, less)
    run.step()
    run.arrive(second)
    run.step()
    assert (run.running, run.scheduler.num_preemptions) == ([first, less], 0)
    run.run()
    assert run.finished == [first, less, second]


def test_the_more_urgent_gets_the_budget_of_prefill_first() -> None:
    run = Run(scheduling(100, 4, 8, 4))
    less, urgent = sequence(30, 1, priority=1), sequence(6, 1)
    run.arrive(less)
    run.step()
    run.arrive(urgent)
    assert summary(run.step()) == [(urgent, 4)]
    assert summary(run.step()) == [(urgent, 2), (less, 2)]


# --- microbatches ---


def test_microbatches_share_what_there_is() -> None:
    run = Run(scheduling(100, 4, 8, 64), num_microbatches=2)
    run.arrive(*(sequence(3) for _ in range(4)))
    assert [len(run.begin(slot)) for slot in (0, 1)] == [2, 2]
    run.land(0)
    assert len(run.begin(0)) == 2


def test_a_microbatch_that_got_dearer_leaves_some_to_the_other() -> None:
    run = Run(scheduling(100, 4, 8, 64), num_microbatches=2)
    first, second, *others = (sequence(1, max_tokens=1 if number in (1, 3, 5) else 9) for number in range(6))
    run.arrive(first, second, *others)
    run.begin(0), run.begin(1)
    run.land(0), run.land(1)
    assert len(run.arrived) == 3
    assert [len(run.begin(slot)) for slot in (0, 1)] == [2, 1]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(2, 4), st.sampled_from((1e-4, 0.01, 0.2)), st.randoms(use_true_random=False))
def test_nobody_is_left_for_others_twice_in_a_row(number: int, context_weight: float, chooser: random.Random) -> None:
    run = Run(scheduling(10_000, 16, 64, 512, context_weight), num_microbatches=number)
    num_sequences = chooser.randint(2, 8)
    since: dict[Sequence, tuple[int, int]] = {}  # the last round in which it got a token, and how many it has
    for round_number in range(60):
        while len(run.arrived) < num_sequences:
            run.arrive(sequence(chooser.choice((1, 8, 40, 150)), max_tokens=chooser.randint(2, 60)))
        for slot in range(number):
            run.land(slot)
            run.begin(slot)
        for each in run.arrived:
            if since.get(each, (0, -1))[1] != len(each.output_ids):
                since[each] = round_number, len(each.output_ids)
            assert round_number - since[each][0] < 2, "two rounds without a token"


def test_one_sequence_is_never_in_two_microbatches() -> None:
    run = Run(scheduling(100, 4, 8, 4), num_microbatches=3)
    run.arrive(sequence(30))
    assert [len(run.begin(slot)) for slot in (0, 1, 2)] == [1, 0, 0]


def test_fewer_microbatches_take_over_what_the_others_had() -> None:
    run = Run(scheduling(100, 4, 8, 64), num_microbatches=3)
    run.arrive(*(sequence(1) for _ in range(6)))
    assert [len(run.begin(slot)) for slot in (0, 1, 2)] == [2, 2, 2]
    run.num_microbatches = 1
    for slot in (1, 2):
        run.land(slot)
        assert run.begin(slot) == []
    run.land(0)
    assert len(run.begin(0)) == 6


def test_nobody_in_flight_is_preempted_and_the_oldest_gets_its_turn() -> None:
    run = Run(scheduling(4, 1, 8, 64), num_microbatches=2)
    old, young = sequence(2, max_tokens=3), sequence(1, max_tokens=2)
    run.arrive(old, young)
    assert [chunks_of(run.begin(slot)) for slot in (0, 1)] == [[old], [young]]
    run.land(0)
    assert chunks_of(run.begin(0)) == [old]
    run.land(0)
    assert run.begin(0) == []  # the last block is the young one's, which is in flight
    run.land(1)
    assert (chunks_of(run.begin(0)), run.scheduler.num_preemptions) == ([old], 1)


def test_blocks_of_a_sequence_that_is_cancelled_in_flight_are_free_when_it_lands() -> None:
    run = Run(scheduling(10, 2, 8, 64), num_microbatches=2)
    leaving, other = sequence(3), sequence(3)
    run.arrive(leaving, other)
    run.begin(0), run.begin(1)
    run.cancel(leaving)
    assert leaving.block_table
    run.land(0)
    assert (leaving.block_table, run.running) == ([], [other])


def test_a_microbatch_that_came_to_nothing_is_computed_anew() -> None:
    run = Run(scheduling(10, 2, 8, 64), num_microbatches=2)
    target = sequence(5, max_tokens=1)
    run.arrive(target)
    before = run.begin(0)
    run.land(0, computed=False)
    assert run.begin(1) == before
    run.land(1)
    assert run.finished == [target]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_however_microbatches_take_turns_all_work_ends_and_all_blocks_are_free(data: st.DataObject) -> None:
    block_size, num_blocks = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 12))
    context = block_size * num_blocks
    run = Run(
        scheduling(num_blocks, block_size, data.draw(st.integers(1, 6)), data.draw(st.integers(1, 20))),
        num_microbatches=data.draw(st.integers(2, 4)),
    )
    for _ in range(data.draw(st.integers(1, 60))):
        match data.draw(st.sampled_from(("arrive", "begin", "begin", "land", "land", "fail", "cancel"))):
            case "arrive":
                run.arrive(sequence(data.draw(st.integers(1, context - 1)), data.draw(st.integers(1, 9)), context))
            case "begin":
                free = [slot for slot in range(run.num_microbatches) if slot not in run.scheduler.in_flight]
                if free:
                    run.begin(data.draw(st.sampled_from(free)))
            case "cancel":
                if run.arrived:
                    run.cancel(data.draw(st.sampled_from(run.arrived)))
            case ended:
                if run.scheduler.in_flight:
                    run.land(data.draw(st.sampled_from(sorted(run.scheduler.in_flight))), computed=ended == "land")
    for turn in range(10_000):
        if not run.scheduler.has_work:
            break
        slot = turn % run.num_microbatches
        run.land(slot)
        run.begin(slot)
    assert not run.arrived
    assert run.scheduler.blocks.num_free == num_blocks


# --- blocks ---


def test_blocks_that_are_not_there_are_not_half_given() -> None:
    blocks = BlockManager(3, 4)
    first, second = sequence(1), sequence(1)
    assert blocks.grow(first, 5)
    assert not blocks.grow(second, 5)
    assert (second.block_table, blocks.num_free, blocks.num_used) == ([], 1, 2)
    assert blocks.grow(second, 4)
    assert blocks.grow(second, 3)
    assert len(second.block_table) == 1


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_a_started_block_is_a_whole_block(num_tokens: int, num_blocks: int) -> None:
    assert BlockManager(9, 4).num_needed(num_tokens) == num_blocks


# --- how a sequence ends ---


def test_the_models_end_token_stops() -> None:
    assert append(sequence(2), WORD).finish_reason is None
    assert append(sequence(2), EOS).finish_reason == "stop"


def test_a_stop_token_of_the_request_stops() -> None:
    assert append(sequence(2, stop_token_ids=(5,)), 5).finish_reason == "stop"
    assert append(sequence(2, stop_token_ids=(5,)), EOS).finish_reason == "stop"


def test_ignore_eos_goes_on_but_still_heeds_the_requests_own_stop_tokens() -> None:
    target = sequence(2, ignore_eos=True, stop_token_ids=(5,))
    assert append(target, EOS).finish_reason is None
    assert append(target, 5).finish_reason == "stop"


def test_max_tokens_are_never_exceeded() -> None:
    target = sequence(2, max_tokens=3)
    assert [append(target, WORD).finish_reason for _ in range(3)] == [None, None, "length"]


def test_the_end_of_the_context_ends_a_sequence() -> None:
    target = sequence(2, max_tokens=100, max_context=4)
    assert [append(target, WORD).finish_reason for _ in range(2)] == [None, "length"]


def test_an_end_token_in_the_last_place_counts_as_stop() -> None:
    assert append(sequence(2, max_tokens=1), EOS).finish_reason == "stop"


def test_end_tokens_are_forbidden_until_min_tokens_are_there() -> None:
    target = sequence(2, max_tokens=9, min_tokens=2, stop_token_ids=(5,))
    forbidden = []
    for _ in range(3):
        forbidden.append(set(target.sampler_row().forbidden_ids))
        append(target, WORD)
    assert forbidden == [{EOS, 5}, {EOS, 5}, set()]


def test_tokens_are_numbered_from_zero_also_after_a_takeover() -> None:
    taken_over = Sequence(SequenceKey("r"), 2, [WORD], [8, 9], SamplingParams(max_tokens=3), (EOS,), 100)
    event = append(taken_over, WORD)
    assert (event.index, event.finish_reason) == (2, "length")


def test_prompt_and_output_read_as_one_row_of_tokens() -> None:
    target = Sequence(SequenceKey("r"), 1, [1, 2, 3], [4, 5], SamplingParams(), (), 100)
    whole = [1, 2, 3, 4, 5]
    assert all(target.token_ids(i, j) == whole[i:j] for i in range(6) for j in range(i, 6))
