"""The sampler against brute force: what may be drawn and how often, and that draws depend on seed and position only."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from afd.errors import InvalidRequest
from afd.model.sampler import SampledToken, SamplerRow, sample, uniform
from afd.model.sampling_params import SamplingParams

NUM_DRAWS = 1500

examples = settings(max_examples=40, deadline=None, derandomize=True)
some_logits = st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=10)


def row(params: SamplingParams, prompt: list[int] | None = None, output: list[int] | None = None) -> SamplerRow:
    return SamplerRow(params, prompt or [0], output or [])


def draw_one(logits: list[float], params: SamplingParams, **context: list[int]) -> SampledToken:
    return sample(torch.tensor([logits]), [row(params, **context)])[0]


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    weights = [math.exp((value - max(logits)) / temperature) for value in logits]
    return [weight / sum(weights) for weight in weights]


def frequencies(logits: list[float], params: SamplingParams) -> Counter[int]:
    """How often each token comes in NUM_DRAWS draws, each with a seed of its own."""
    rows = [row(replace(params, seed=seed)) for seed in range(NUM_DRAWS)]
    return Counter(token.id for token in sample(torch.tensor(logits).expand(NUM_DRAWS, -1), rows))


def assert_drawn_as(logits: list[float], params: SamplingParams, probs: list[float]) -> None:
    """Never a token without probability, and every other within five standard deviations of its share."""
    counts = frequencies(logits, params)
    for token_id, p in enumerate(probs):
        expected, deviation = NUM_DRAWS * p, math.sqrt(NUM_DRAWS * p * (1 - p))
        assert (counts[token_id] == 0) if p == 0 else (abs(counts[token_id] - expected) <= 5 * deviation + 4)


def kept_by_brute_force(probs: list[float], params: SamplingParams) -> list[float]:
    """min-p, top-k, then top-p, each by its definition; the rest renormalised."""
    ranking = sorted(range(len(probs)), key=lambda token_id: -probs[token_id])
    kept = {token_id for token_id in ranking if probs[token_id] >= (params.min_p or 0) * max(probs)}
    kept &= set(ranking[: params.top_k or len(probs)])
    total = sum(probs[token_id] for token_id in kept)
    left = [probs[token_id] / total if token_id in kept else 0.0 for token_id in range(len(probs))]
    nucleus: set[int] = set()
    for token_id in ranking:
        mass = sum(left[chosen] for chosen in nucleus)
        assume(abs(mass - (params.top_p or 1)) > 1e-6)  # rounding decides
        if mass < (params.top_p or 1):
            nucleus.add(token_id)
    total = sum(left[token_id] for token_id in nucleus)
    return [left[token_id] / total if token_id in nucleus else 0.0 for token_id in range(len(probs))]


# --- greedy and temperature ---


def test_temperature_zero_takes_the_likeliest_token() -> None:
    assert draw_one([0.5, 3.0, -1.0, 2.9], SamplingParams()).id == 1
    assert draw_one([0.5, 3.0, -1.0, 2.9], SamplingParams(top_k=3, top_p=0.9, min_p=0.1, seed=5)).id == 1


@examples
@given(some_logits, st.floats(0.2, 3))
def test_draws_follow_the_tempered_softmax(logits: list[float], temperature: float) -> None:
    assert_drawn_as(logits, SamplingParams(temperature=temperature), softmax(logits, temperature))


@pytest.mark.parametrize("temperature", [1e-6, 1e-30])
def test_a_tiny_temperature_is_as_good_as_greedy(temperature: float) -> None:
    assert frequencies([1.0, 1.1, 0.9], SamplingParams(temperature=temperature)) == {1: NUM_DRAWS}


def test_a_large_vocabulary_is_drawn_from_evenly() -> None:
    rows = [row(SamplingParams(temperature=1.0, seed=seed)) for seed in range(300)]
    ids = [token.id for token in sample(torch.zeros(300, 30_000), rows)]
    assert max(ids) < 30_000
    quarters = Counter(token_id // 7_500 for token_id in ids)
    assert all(45 < quarters[quarter] < 105 for quarter in range(4))


# --- filters ---


@examples
@given(some_logits, st.integers(1, 10))
def test_top_k_keeps_the_k_likeliest(logits: list[float], k: int) -> None:
    assume(len(set(logits)) == len(logits))
    params = SamplingParams(temperature=1.0, top_k=k)
    assert_drawn_as(logits, params, kept_by_brute_force(softmax(logits), params))


@examples
@given(some_logits, st.floats(0.01, 1))
def test_top_p_keeps_the_smallest_set_that_sums_to_it(logits: list[float], p: float) -> None:
    assume(len(set(logits)) == len(logits))
    params = SamplingParams(temperature=1.0, top_p=p)
    assert_drawn_as(logits, params, kept_by_brute_force(softmax(logits), params))


@examples
@given(some_logits, st.floats(0, 1))
def test_min_p_keeps_what_is_likely_beside_the_likeliest(logits: list[float], p: float) -> None:
    probs = softmax(logits)
    assume(all(abs(value / max(probs) - p) > 1e-6 for value in probs if value != max(probs)))
    params = SamplingParams(temperature=1.0, min_p=p)
    assert_drawn_as(logits, params, kept_by_brute_force(probs, params))


@examples
@given(some_logits, st.floats(0.3, 2), st.integers(1, 10), st.floats(0.05, 1), st.floats(0, 0.9))
def test_filters_together_keep_what_each_of_them_keeps(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    probs = softmax(logits, temperature)
    assume(len(set(logits)) == len(logits))
    assume(all(abs(value / max(probs) - min_p) > 1e-6 for value in probs))
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert_drawn_as(logits, params, kept_by_brute_force(probs, params))


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_the_tightest_filter_leaves_the_likeliest_token(params: dict[str, Any]) -> None:
    assert frequencies([0.1, 0.3, 0.2], SamplingParams(temperature=5.0, **params)) == {1: NUM_DRAWS}


# --- penalties and bias ---


@examples
@given(st.data())
def test_bias_and_penalties_follow_their_formulas(data: st.DataObject) -> None:
    logits = data.draw(st.lists(st.floats(-4, 4, width=32), min_size=3, max_size=8))
    token_ids = st.lists(st.integers(0, len(logits) - 1), max_size=6)
    prompt, output = data.draw(token_ids) or [0], data.draw(token_ids)
    params = SamplingParams(
        repetition_penalty=data.draw(st.none() | st.floats(0.5, 3)),
        presence_penalty=data.draw(st.none() | st.floats(-2, 2)),
        frequency_penalty=data.draw(st.none() | st.floats(-2, 2)),
        logit_bias=data.draw(st.dictionaries(st.integers(0, len(logits) - 1), st.floats(-5, 5), max_size=3)),
    )
    expected = []
    for token_id, logit in enumerate(logits):
        value = logit + params.logit_bias.get(token_id, 0)
        if token_id in prompt + output:
            factor = params.repetition_penalty or 1
            value = value / factor if value > 0 else value * factor
        if token_id in output:
            value -= params.presence_penalty or 0
        value -= output.count(token_id) * (params.frequency_penalty or 0)
        expected.append(value)
    best, second = sorted(expected, reverse=True)[:2]
    assume(best - second > 1e-4)
    assert draw_one(logits, params, prompt=prompt, output=output).id == expected.index(best)


def test_repetition_penalty_looks_at_prompt_and_output() -> None:
    params = SamplingParams(repetition_penalty=2.0)
    assert draw_one([3.0, 2.0, 1.0], params, prompt=[0], output=[]).id == 1
    assert draw_one([3.0, 2.0, 1.6], params, prompt=[0], output=[1]).id == 2


def test_presence_and_frequency_penalties_look_at_the_output_only() -> None:
    for params in (SamplingParams(presence_penalty=2.0), SamplingParams(frequency_penalty=2.0)):
        assert draw_one([3.0, 2.0], params, prompt=[0, 0, 0]).id == 0
        assert draw_one([3.0, 2.0], params, prompt=[1], output=[0]).id == 1


def test_frequency_penalty_counts_and_presence_penalty_does_not() -> None:
    output = [0, 0, 0]
    assert draw_one([3.0, 0.0], SamplingParams(frequency_penalty=1.1), output=output).id == 1
    assert draw_one([3.0, 0.0], SamplingParams(presence_penalty=1.1), output=output).id == 0


def test_a_bias_of_minus_hundred_bans_a_token_and_of_plus_hundred_forces_it() -> None:
    banned = SamplingParams(temperature=1.0, logit_bias={0: -100})
    assert frequencies([2.0, 1.0, 0.5], banned)[0] == 0
    assert frequencies([2.0, 1.0, 0.5], replace(banned, logit_bias={2: 100})) == {2: NUM_DRAWS}


def test_penalties_of_one_row_leave_its_neighbours_alone() -> None:
    logits = torch.tensor([[3.0, 2.0]] * 3)
    rows = [row(SamplingParams()), row(SamplingParams(logit_bias={0: -50})), row(SamplingParams())]
    assert [token.id for token in sample(logits, rows)] == [0, 1, 0]
    assert logits.tolist() == [[3.0, 2.0]] * 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_end_tokens_are_forbidden_before_min_tokens(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_k=2, logit_bias={1: 100})
    rows = [SamplerRow(replace(params, seed=seed), [0], [], forbidden_ids=(1, 3)) for seed in range(200)]
    assert {token.id for token in sample(torch.tensor([[0.0, 9.0, 2.0, 8.0]]).expand(200, -1), rows)} <= {0, 2}


# --- log-probabilities ---


@examples
@given(some_logits, st.integers(0, 99))
def test_logprobs_are_of_the_raw_logits(logits: list[float], seed: int) -> None:
    params = SamplingParams(
        temperature=0.7, top_k=2, repetition_penalty=1.5, presence_penalty=1.0, logit_bias={1: 2.0}, seed=seed
    )
    token = draw_one(logits, params, prompt=[0], output=[1])
    assert token.logprob == pytest.approx(math.log(softmax(logits)[token.id]), abs=1e-4)


def test_alternatives_are_the_likeliest_tokens_in_order_as_many_as_each_row_asked_for() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]] * 3)
    rows = [row(SamplingParams(top_logprobs=number, logit_bias={1: -100})) for number in (2, 0, 20)]
    tops = [token.top_logprobs for token in sample(logits, rows)]
    assert [[token_id for token_id, _ in top] for top in tops] == [[1, 3], [], [1, 3, 2, 0]]
    expected = [math.log(p) for p in sorted(softmax([0.0, 3.0, 1.0, 2.0]), reverse=True)]
    assert [value for _, value in tops[2]] == pytest.approx(expected, abs=1e-5)


# --- draws are a function of seed and position ---


def mixed_rows(number: int) -> tuple[torch.Tensor, list[SamplerRow]]:
    chooser = random.Random(number)
    rows = []
    for seed in range(number):
        params = SamplingParams(
            temperature=chooser.choice([0.0, 0.5, 1.0, 3.0]),
            top_k=chooser.choice([None, 5]),
            top_p=chooser.choice([None, 0.8]),
            min_p=chooser.choice([None, 0.05]),
            presence_penalty=chooser.choice([None, 1.0]),
            top_logprobs=chooser.randint(0, 3),
            seed=seed,
        )
        rows.append(row(params, chooser.choices(range(50), k=3), chooser.choices(range(50), k=seed % 5)))
    return 3 * torch.randn(number, 50, generator=torch.Generator().manual_seed(number)), rows


@pytest.mark.parametrize("number", [2, 17, 64])
def test_a_row_gives_the_same_token_alone_and_in_any_company(number: int) -> None:
    logits, rows = mixed_rows(number)
    alone = [sample(logits[i : i + 1], [rows[i]])[0] for i in range(number)]
    order = random.Random(1).sample(range(number), number)
    together = sample(logits[order], [rows[i] for i in order])
    assert [token.id for token in together] == [alone[i].id for i in order]
    assert [token.logprob for token in together] == pytest.approx([alone[i].logprob for i in order], abs=1e-5)


def test_resumed_sequence_draws_the_same_tokens() -> None:
    params = SamplingParams(temperature=1.0, seed=77)
    logits = torch.zeros(1, 1000)
    first = sample(logits, [row(params, [1, 2], [3, 4])])[0]
    assert sample(logits, [row(params, [1, 2, 3, 4], [])])[0] == first
    assert sample(logits, [row(params, [1, 2], [3, 4, 5])])[0] != first


def test_another_seed_draws_other_tokens() -> None:
    logits = torch.zeros(20, 10_000)
    same = [row(SamplingParams(temperature=1.0, seed=5)) for _ in range(20)]
    other = [row(SamplingParams(temperature=1.0, seed=seed)) for seed in range(20)]
    assert len({token.id for token in sample(logits, same)}) == 1
    assert len({token.id for token in sample(logits, other)}) == 20


def test_uniform_numbers_fill_the_unit_interval_for_any_seed() -> None:
    numbers = [uniform(seed, position) for seed in (0, 1, 2**64 - 1) for position in range(1000)]
    assert len(set(numbers)) == 3000
    assert all(0 <= number < 1 for number in numbers)
    tenths = Counter(int(number * 10) for number in numbers)
    assert all(220 < tenths[tenth] < 380 for tenth in range(10))


# --- what is refused ---


@pytest.mark.parametrize(
    ("param", "value"),
    [
        *[
            (name, value)
            for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
            for value in (math.nan, math.inf, -math.inf, -2.5, 101)
        ],
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", 1.01),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", 2.1),
        ("top_k", 0),
        ("top_k", -1),
        ("top_k", 11),
        ("seed", -1),
        ("seed", 2**64),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("min_tokens", -1),
        ("min_tokens", 2**31 + 1),
        ("n", 0),
        ("n", 129),
        ("top_logprobs", -1),
        ("top_logprobs", 21),
        ("stop", ("",)),
        ("stop", ("x",) * 17),
        ("stop_token_ids", (10,)),
        ("stop_token_ids", (-1,)),
        ("logit_bias", {10: 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: 100.5}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: -math.inf}),
    ],
)
def test_absurd_values_are_refused_by_name(param: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=param) as caught:
        SamplingParams(**{param: value}).check(vocab_size=10)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1.100000023841858, "1.1"),
        (1.1, "1.1"),
        (1.0000001192092896, "1.0000001"),
        (1.00000001, "1.00000001"),
        (1e300, "1e+300"),
    ],
)
def test_number_that_is_refused_is_said_as_it_was_asked(value: float, shown: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(top_p=value).check(vocab_size=10)
    assert str(caught.value).endswith(f"to 1, not {shown}")


@pytest.mark.parametrize("param", ["temperature", "top_p", "min_p", "presence_penalty", "top_k", "seed", "max_tokens"])
@pytest.mark.parametrize("sign", [1, -1])
def test_integers_too_large_for_a_float_are_refused_like_others(param: str, sign: int) -> None:
    with pytest.raises(InvalidRequest, match=param):
        SamplingParams(**{param: sign * 10**400}).check(vocab_size=10)


def test_more_min_tokens_than_max_tokens_are_refused() -> None:
    SamplingParams(min_tokens=3, max_tokens=3).check(10)
    with pytest.raises(InvalidRequest, match="min_tokens"):
        SamplingParams(min_tokens=4, max_tokens=3).check(10)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=100, top_k=10, top_p=1, min_p=1, repetition_penalty=100, seed=2**64 - 1),
        SamplingParams(presence_penalty=-2, frequency_penalty=2, min_p=0, logit_bias={0: -100, 9: 100}),
        SamplingParams(n=128, stop=("x",) * 16, stop_token_ids=(0, 9), max_tokens=1, min_tokens=1, top_logprobs=20),
    ],
)
def test_the_ends_of_every_range_are_accepted(params: SamplingParams) -> None:
    params.check(vocab_size=10)


def test_rounding_of_equal_logits_does_not_change_a_draw() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (4 * torch.rand(150, generator=generator)).repeat(2).expand(200, -1)  # each there twice
    rows = [row(SamplingParams(top_k=300, temperature=0.8, seed=seed)) for seed in range(200)]
    rounded = logits + 1e-6 * torch.randn(200, 300, generator=generator)
    ids = [[token.id for token in sample(each.contiguous(), rows)] for each in (logits, rounded)]
    assert ids[0] == ids[1]
