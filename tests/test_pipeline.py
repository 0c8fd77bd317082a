"""How many microbatches steps are cut into, and which chunk falls to which: on stages whose times are made up."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd.model.config import ModelConfig
from afd.model.sampling_params import SamplingParams
from afd.state.requests import SequenceKey
from services.attention.chunk import Chunk, ChunkCost, fair_share
from services.attention.pipeline import Pipeline
from services.attention.sequence import Sequence
from tests.conftest import Model

NUM_LAYERS, NUM_STEPS = 10, 5
StageTime = Callable[[float], float]  # of so many tokens


def decoding(context: int) -> Chunk:
    """The next token of a sequence with so many before it."""
    return Chunk(sequence(context + 1, context), 1)


def sequence(num_prompt: int, num_computed: int = 0) -> Sequence:
    params = SamplingParams()
    return Sequence(SequenceKey("r"), 1, [7] * num_prompt, [], params, (), 1 << 20, num_computed=num_computed)


def step_time(number: int, num_tokens: int, attention: StageTime, ffn: StageTime, way: float) -> float:
    """Of so many equal microbatches that take turns without end: two stages that work in order, the way in between."""
    size = num_tokens / number
    attention_free = ffn_free = 0.0
    back = [0.0] * number
    for _ in range(NUM_LAYERS * NUM_STEPS):
        for each in range(number):
            attention_free = max(attention_free, back[each]) + attention(size)
            ffn_free = max(ffn_free, attention_free + way / 2) + ffn(size)
            back[each] = ffn_free + way / 2
    return max(back) / NUM_STEPS


def chosen(attention: StageTime, ffn: StageTime, way: float = 0.0, num_sequences: int = 32, noise: float = 0.0) -> int:
    """What `auto` settles on."""
    pipeline, chooser = Pipeline(range(1, 5)), random.Random(1)
    number = last = 0
    for _ in range(40):
        number, last = pipeline.choose(num_sequences), number
        seconds = step_time(number, num_sequences, attention, ffn, way) * (1 + noise * chooser.random())
        settling = 1 if number == last else 2
        pipeline.observe(1e6 * settling * seconds / num_sequences)
    return number


def compute_bound(tokens: float) -> float:
    return tokens


def memory_bound(tokens: float) -> float:
    return 32.0


def test_equal_stages_that_split_well_are_cut_in_two() -> None:
    assert chosen(compute_bound, compute_bound) == 2


def test_stages_that_take_as_long_for_half_the_tokens_are_not_cut() -> None:
    assert chosen(memory_bound, memory_bound) == 1
    assert chosen(compute_bound, memory_bound) == 1


@pytest.mark.parametrize("way", [4, 8, 16])
def test_the_longer_the_way_the_more_microbatches_hide_it(way: float) -> None:
    number = chosen(compute_bound, compute_bound, way)
    stages = {each: 32 / each for each in (2, 3, 4)}
    assert number == min(each for each, stage in stages.items() if each >= 2 + way / stage)


def test_a_way_that_no_number_hides_gets_as_many_as_there_may_be() -> None:
    assert chosen(compute_bound, compute_bound, way=64) == 4


def test_noise_does_not_cut_what_should_stay_whole() -> None:
    assert chosen(memory_bound, lambda tokens: 64.0, noise=0.2) == 1
    assert chosen(compute_bound, compute_bound, noise=0.04) == 2


@pytest.mark.parametrize("candidates", [range(1, 5), range(3, 4), range(1, 2)])
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 10**9)), max_size=60))
def test_what_is_tried_are_never_more_microbatches_than_sequences(
    candidates: range, steps: list[tuple[int, int]]
) -> None:
    pipeline = Pipeline(candidates)
    for num_sequences, ns_per_token in steps:
        number = pipeline.choose(num_sequences)
        assert number in candidates
        assert number <= max(num_sequences, candidates[0])
        pipeline.observe(ns_per_token)


def test_a_fixed_number_is_what_every_step_gets() -> None:
    pipeline = Pipeline(range(3, 4))
    for _ in range(20):
        assert pipeline.choose(8) == 3
        pipeline.observe(10**9)


def test_sizes_of_steps_are_learnt_apart() -> None:
    pipeline = Pipeline(range(1, 5))
    for _ in range(30):
        for num_sequences, best in ((4, 1), (32, 2)):
            number = pipeline.choose(num_sequences)
            pipeline.observe(1000 + 500 * abs(number - best))
    assert (pipeline.choose(4), pipeline.choose(32)) == (1, 2)


def test_what_has_changed_is_found_out() -> None:
    pipeline = Pipeline(range(1, 5))
    for best in (1, 3):
        for _ in range(600):
            number = pipeline.choose(32)
            pipeline.observe(1000 + 500 * abs(number - best))
        assert pipeline.choose(32) == best


def test_a_choice_stays_while_others_are_not_clearly_better() -> None:
    pipeline = Pipeline(range(1, 5))
    times = {1: 1000, 2: 800, 3: 980, 4: 990}
    numbers = []
    for step in range(1200):
        if step == 520:
            times |= {1: 790, 3: 770}
        numbers.append(pipeline.choose(32))
        pipeline.observe(times[numbers[-1]])
    settled = numbers[-100:]
    assert set(settled) == {2}


def test_a_step_that_failed_is_not_counted() -> None:
    pipeline = Pipeline(range(1, 3))
    assert [pipeline.choose(2) for _ in range(9)] == [1] * 9


def all_shares(chunks: list[Chunk], number: int, cost: ChunkCost) -> tuple[list[list[Chunk]], list[Chunk]]:
    """What each of so many microbatches takes that begin one after the other, and what is left until one lands."""
    shares: list[list[Chunk]] = []
    left = chunks
    for num_free in reversed(range(number)):
        others = [sum(map(cost, share)) for share in shares]
        shares.append(fair_share(left, [*others, *[0.0] * num_free], cost))
        left = without(left, shares[-1])
    return [share for share in shares if share], left


def without(chunks: list[Chunk], taken: list[Chunk]) -> list[Chunk]:
    return [chunk for chunk in chunks if not any(chunk is other for other in taken)]


def test_one_long_context_is_balanced_by_many_short_ones() -> None:
    cost = ChunkCost(0.01)
    long, short = decoding(1000), [decoding(1) for _ in range(16)]
    (others, with_long), _ = all_shares([*short, long], 2, cost)
    assert long in with_long
    assert len(with_long) < 5
    costs = [sum(map(cost, share)) for share in (with_long, others)]
    assert max(costs) < 1.1 * min(costs)


def test_what_falls_to_a_cheaper_microbatch_is_left_for_it() -> None:
    cost = ChunkCost(0.0)
    chunks = [decoding(1) for _ in range(10)]
    assert len(fair_share(chunks, [4.0], cost)) == 7
    assert fair_share(chunks, [10.0], cost) == chunks
    assert fair_share(chunks, [0.0, 20.0], cost) == chunks[::2]


def test_the_oldest_is_never_left_for_others() -> None:
    cost = ChunkCost(1.0)
    oldest, dear = decoding(1), decoding(100)
    assert fair_share([oldest, dear], [0.0], cost) == [oldest]
    assert fair_share([oldest, dear], [500.0], cost) == [oldest, dear]


def test_a_prefill_chunk_costs_its_tokens_and_half_of_what_they_look_back_at() -> None:
    cost = ChunkCost(0.5)
    assert cost(decoding(99)) == 1 + 0.5 * 100
    assert cost(Chunk(sequence(4), 4)) == 4 + 0.5 * (1 + 2 + 3 + 4)
    assert cost(Chunk(sequence(10, num_computed=6), 4)) == 4 + 0.5 * (7 + 8 + 9 + 10)


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 64)), min_size=1, max_size=40), st.integers(1, 6))
def test_shares_are_about_equal_and_what_is_left_is_taken_within_a_round(
    sizes: list[tuple[int, int]], number: int
) -> None:
    chunks = [Chunk(sequence(before + tokens, before), tokens) for before, tokens in sizes]
    cost = ChunkCost(0.001)
    shares, left = all_shares(chunks, number, cost)
    assert len(shares) == min(number, len(chunks))
    assert sum(map(len, [*shares, left])) == len(chunks)
    costs = [sum(map(cost, share)) for share in shares]
    assert max(costs) <= sum(map(cost, chunks)) / number + max(map(cost, chunks))
    for slot, landed in enumerate(shares):
        others = [sum(map(cost, share)) for index, share in enumerate(shares) if index != slot]
        free = [chunk for chunk in chunks if any(chunk is other for other in [*landed, *left])]
        shares[slot] = fair_share(free, others, cost)
        left = without(left, shares[slot])
    assert not left


def test_context_weighs_more_where_the_ffn_is_small_or_has_many_shards(make_model: Callable[[int], Model]) -> None:
    config: ModelConfig = make_model(4).oracle.config
    weights = [ChunkCost.of(config, num_shards).context_weight for num_shards in (0, 1, 2, 8)]
    assert weights[0] == weights[1] > 0
    assert all(fewer < more for fewer, more in pairwise(weights[1:]))
