"""The scheduler, its blocks and its sequences, driven without a model: each step "computes" what was scheduled."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afd.model.sampler import SampledToken
from afd.model.sampling_params import SamplingParams
from afd.state.requests import SequenceKey
from services.attention.block_manager import BlockManager
from services.attention.scheduler import Chunk, Scheduler
from services.attention.sequence import FinishReason, Sequence, TokenEvent

EOS = 1
WORD = 7


def sequence(num_prompt: int, max_tokens: int = 4, max_context: int = 1000, **params: object) -> Sequence:
    sampling = SamplingParams(max_tokens=max_tokens, **params)  # type: ignore[arg-type]
    return Sequence(SequenceKey("r"), 1, [WORD] * num_prompt, [], sampling, (EOS,), max_context)


def append(target: Sequence, token_id: int) -> TokenEvent:
    return target.append(SampledToken(token_id, 0.0))


def summary(chunks: list[Chunk]) -> list[tuple[Sequence, int]]:
    return [(chunk.sequence, chunk.num_tokens) for chunk in chunks]


@dataclass
class Run:
    """Steps a scheduler and checks after each what must always hold."""

    scheduler: Scheduler
    arrived: list[Sequence] = field(default_factory=list)
    finished: list[Sequence] = field(default_factory=list)
    computed: dict[Sequence, list[int]] = field(default_factory=dict)

    def arrive(self, *sequences: Sequence) -> None:
        for each in sequences:
            self.arrived.append(each)
            self.scheduler.add(each)

    def cancel(self, target: Sequence) -> None:
        self.arrived.remove(target)
        self.scheduler.remove(target)

    def step(self) -> list[Chunk]:
        chunks = self.scheduler.schedule()
        self._check(chunks)
        for chunk in chunks:
            target, ends = chunk.sequence, chunk.ends_sequence
            if target.num_computed == 0:
                self.computed[target] = []
            self.computed[target] += range(target.num_computed, target.num_computed + chunk.num_tokens)
            target.num_computed += chunk.num_tokens
            if ends and append(target, WORD).finish_reason:
                self._finish(target)
        return chunks

    def run(self) -> None:
        for _ in range(10_000):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("the work does not end")

    def _finish(self, target: Sequence) -> None:
        assert self.computed[target] == list(range(target.num_tokens - 1)), "each token once, in order"
        self.arrived.remove(target)
        self.scheduler.remove(target)
        self.finished.append(target)

    def _check(self, chunks: list[Chunk]) -> None:
        scheduler, blocks = self.scheduler, self.scheduler.blocks
        assert len(scheduler.running) <= scheduler.max_sequences
        owned = [block for each in self.arrived for block in each.block_table]
        assert len(owned) == len(set(owned)) == blocks.num_used, "a block has one owner"
        assert set(owned) <= set(range(blocks.num_blocks))
        scheduled = [chunk.sequence for chunk in chunks]
        assert len(scheduled) == len(set(scheduled))
        assert set(scheduled) <= set(scheduler.running)
        for chunk in chunks:
            assert 1 <= chunk.num_tokens <= chunk.sequence.num_uncomputed
            room = len(chunk.sequence.block_table) * blocks.block_size
            assert chunk.sequence.num_computed + chunk.num_tokens <= room
        assert all(each in scheduled for each in scheduler.running if each.num_uncomputed == 1), "all decode"
        assert [*scheduler.running, *scheduler.waiting] == self.arrived, "first come, first served"
        assert not self.arrived or self.arrived[0] in scheduled, "the oldest always gets on"


def prefill_tokens(chunks: list[Chunk]) -> int:
    """Tokens of a step beside those of decoding sequences; asked before the step."""
    return sum(chunk.num_tokens for chunk in chunks if chunk.sequence.num_uncomputed > 1)


# --- one step ---


def test_all_running_sequences_decode_in_every_step() -> None:
    run = Run(Scheduler(BlockManager(100, 4), 8, 64))
    run.arrive(*(sequence(number, max_tokens=3) for number in (3, 5, 9)))
    run.step()
    assert [size for _, size in summary(run.step())] == [1, 1, 1]


def test_a_long_prompt_does_not_hold_up_those_who_decode() -> None:
    run = Run(Scheduler(BlockManager(100, 4), 8, 10))
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
    scheduler = Scheduler(BlockManager(100, 4), 8, budget)
    for num_prompt in prompts:
        scheduler.add(sequence(num_prompt))
    while scheduler.has_work:
        chunks = scheduler.schedule()
        assert prefill_tokens(chunks) <= budget
        for chunk in chunks:
            chunk.sequence.num_computed += chunk.num_tokens
            if not chunk.sequence.num_uncomputed:
                scheduler.remove(chunk.sequence)


def test_no_more_than_max_sequences_run_and_the_next_follows_in_turn() -> None:
    run = Run(Scheduler(BlockManager(100, 4), 2, 64))
    first, second, third, fourth = (sequence(3, max_tokens=number) for number in (2, 3, 1, 1))
    run.arrive(first, second, third, fourth)
    assert summary(run.step()) == [(first, 3), (second, 3)]
    run.step()
    assert summary(run.step()) == [(second, 1), (third, 3)]
    run.run()
    assert run.finished == [first, second, third, fourth]


# --- preemption ---


def test_the_youngest_gives_its_blocks_to_the_oldest() -> None:
    run = Run(Scheduler(BlockManager(4, 2), 8, 64))
    old, young = sequence(3, max_tokens=4), sequence(2, max_tokens=4)
    run.arrive(old, young)
    run.run()
    assert run.scheduler.num_preemptions > 0
    assert run.finished == [old, young]


def test_a_preempted_sequence_waits_first_in_line_and_is_computed_anew() -> None:
    scheduler = Scheduler(BlockManager(3, 2), 2, 64)
    run = Run(scheduler)
    old, young, later = sequence(2, max_tokens=5), sequence(1, max_tokens=5), sequence(1, max_tokens=1)
    run.arrive(old, young, later)
    run.step()
    while scheduler.running[-1] is young:
        run.step()
    assert list(scheduler.waiting) == [young, later]
    assert (young.block_table, young.num_computed) == ([], 0)
    run.run()
    assert len(young.output_ids) == 5


def test_a_sequence_alone_can_use_every_block() -> None:
    run = Run(Scheduler(BlockManager(3, 4), 8, 64))
    whole = sequence(5, max_tokens=100, max_context=12)
    run.arrive(whole)
    run.run()
    assert whole.num_tokens == 12
    assert run.scheduler.num_preemptions == 0


def test_a_cancelled_sequence_frees_its_blocks_wherever_it_is() -> None:
    run = Run(Scheduler(BlockManager(10, 2), 1, 4))
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
    run = Run(
        Scheduler(BlockManager(num_blocks, block_size), data.draw(st.integers(1, 6)), data.draw(st.integers(1, 20)))
    )
    lengths = data.draw(
        st.lists(st.tuples(st.integers(1, context - 1), st.integers(1, 12), st.integers(0, 20)), max_size=10)
    )
    arrivals = sorted(lengths, key=lambda item: item[2])
    cancels = data.draw(st.dictionaries(st.integers(0, 40), st.integers(0, 9), max_size=5))
    for step in range(41):
        while arrivals and arrivals[0][2] <= step:
            num_prompt, max_tokens, _ = arrivals.pop(0)
            run.arrive(sequence(num_prompt, max_tokens, max_context=context))
        if step in cancels and len(run.arrived) > cancels[step]:
            run.cancel(run.arrived[cancels[step]])
        run.step()
    run.run()
    assert not run.arrived
    assert run.scheduler.blocks.num_free == num_blocks
    assert all(
        len(each.output_ids) == (each.params.max_tokens or 0) or each.num_tokens == context for each in run.finished
    )


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
    assert append(sequence(2), EOS).finish_reason is FinishReason.STOP


def test_a_stop_token_of_the_request_stops() -> None:
    assert append(sequence(2, stop_token_ids=(5,)), 5).finish_reason is FinishReason.STOP
    assert append(sequence(2, stop_token_ids=(5,)), EOS).finish_reason is FinishReason.STOP


def test_ignore_eos_goes_on_but_still_heeds_the_requests_own_stop_tokens() -> None:
    target = sequence(2, ignore_eos=True, stop_token_ids=(5,))
    assert append(target, EOS).finish_reason is None
    assert append(target, 5).finish_reason is FinishReason.STOP


def test_max_tokens_are_never_exceeded() -> None:
    target = sequence(2, max_tokens=3)
    assert [append(target, WORD).finish_reason for _ in range(3)] == [None, None, FinishReason.LENGTH]


def test_the_end_of_the_context_ends_a_sequence() -> None:
    target = sequence(2, max_tokens=100, max_context=4)
    assert [append(target, WORD).finish_reason for _ in range(2)] == [None, FinishReason.LENGTH]


def test_an_end_token_in_the_last_place_counts_as_stop() -> None:
    assert append(sequence(2, max_tokens=1), EOS).finish_reason is FinishReason.STOP


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
    assert (event.index, event.finish_reason) == (2, FinishReason.LENGTH)


def test_prompt_and_output_read_as_one_row_of_tokens() -> None:
    target = Sequence(SequenceKey("r"), 1, [1, 2, 3], [4, 5], SamplingParams(), (), 100)
    whole = [1, 2, 3, 4, 5]
    assert all(target.token_ids(i, j) == whole[i:j] for i in range(6) for j in range(i, 6))
