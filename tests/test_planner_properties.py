"""What must hold of the planner's costs for any card, model and context: units and monotony."""

from __future__ import annotations

import random
import tomllib
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from afd.planner.accelerators import Accelerator, load_accelerators
from afd.planner.cost import KvFormat, Pair, cheapest_pair, min_sparsity, token_cost
from afd.planner.layers import Attention, Ffn, GroupedQuery, Lightning, MultiLatent, MultiMatrix
from afd.planner.shape import ModelShape, load_shape, shipped

CARDS = list(load_accelerators().values())
SHAPES = [load_shape(name) for name in shipped()]
RATES = ("bf16_flops", "fp8_flops", "memory_bytes_per_s", "link_bytes_per_s", "nic_bytes_per_s")

counts = st.integers(1, 300)
factors = st.floats(1, 1000)
rates = st.floats(1e6, 1e17)
cards = st.builds(
    Accelerator,
    name=st.text(),
    bf16_flops=rates,
    fp8_flops=st.none() | rates,
    memory_bytes_per_s=rates,
    memory_bytes=rates,
    link_bytes_per_s=rates,
    nic_bytes_per_s=rates,
    cards_per_server=st.integers(1, 1024),
    dollars_per_hour=st.floats(1e-4, 1e4),
    source=st.text(),
)
grouped = st.builds(
    lambda hidden_size, kv_heads, group, head_dim, window: GroupedQuery(
        hidden_size, kv_heads * group, kv_heads, head_dim, window
    ),
    *(counts, counts, counts, counts, st.none() | counts),
)
attentions = st.one_of(
    grouped,
    st.builds(MultiMatrix, counts, counts, counts, counts),
    st.builds(MultiLatent, counts, counts, st.integers(0, 300), counts, counts, counts, counts),
    st.builds(Lightning, counts, counts, counts),
)
moes = st.builds(
    lambda hidden_size, width, top_k, others, shared: Ffn(hidden_size, width, top_k + others, top_k, shared),
    *(counts, counts, counts, st.integers(0, 300), st.integers(0, 300)),
)
ffns = st.one_of(moes, st.builds(Ffn, counts, counts))
shapes = st.sampled_from(SHAPES) | st.builds(
    ModelShape,
    name=st.just("any"),
    hidden_size=counts,
    vocab_size=counts,
    max_context_tokens=st.just(1_000_000),
    layers=st.lists(st.tuples(attentions, ffns), min_size=1, max_size=5).map(tuple),
)
contexts = st.integers(1, 20_000)  # within what every shipped model can have


def no_more(less: float, more: float) -> bool:
    """Up to rounding."""
    return less <= more * (1 + 1e-12)


@given(cards, shapes, contexts, factors)
def test_more_of_anything_and_a_lower_price_never_cost_more(
    card: Accelerator, shape: ModelShape, context: int, factor: float
) -> None:
    cost = token_cost(shape, context)
    before = Pair(card, card).dollars(cost)
    for field in RATES:
        better = card.model_copy(update={field: (getattr(card, field) or card.bf16_flops) * factor})
        assert no_more(Pair(better, better).dollars(cost), before)
    cheaper = card.model_copy(update={"dollars_per_hour": card.dollars_per_hour / factor})
    assert no_more(Pair(cheaper, cheaper).dollars(cost), before)


@given(cards, shapes, contexts, factors)
def test_cost_is_homogeneous(card: Accelerator, shape: ModelShape, context: int, factor: float) -> None:
    """It follows the price, and only what a dollar buys counts."""
    cost = token_cost(shape, context)
    dollars = Pair(card, card).dollars(cost)
    dearer = card.model_copy(update={"dollars_per_hour": card.dollars_per_hour * factor})
    assert Pair(dearer, dearer).dollars(cost) == pytest.approx(dollars * factor)
    faster = dearer.model_copy(update={field: (getattr(card, field) or 0) * factor or None for field in RATES})
    assert Pair(faster, faster).dollars(cost) == pytest.approx(dollars)
    assert faster.roofline == pytest.approx(card.roofline)


@given(shapes, cards, contexts, contexts)
def test_a_longer_context_never_costs_less(shape: ModelShape, card: Accelerator, one: int, other: int) -> None:
    shorter, longer = sorted([one, other])
    less, more = token_cost(shape, shorter), token_cost(shape, longer)
    assert less.kv_bytes <= more.kv_bytes
    assert less.attention_flops <= more.attention_flops
    assert less.attention_dollars(card) <= more.attention_dollars(card)
    assert (less.linear_flops, less.ffn_flops) == (more.linear_flops, more.ffn_flops)


@given(shapes, st.lists(st.sampled_from(CARDS) | cards, min_size=1, max_size=6), contexts, st.randoms())
def test_the_cheapest_pair_is_that_of_any_order_and_beats_every_card(
    shape: ModelShape, choice: list[Accelerator], context: int, order: random.Random
) -> None:
    cost = token_cost(shape, context)
    cheapest = cheapest_pair(cost, choice).dollars(cost)
    assert cheapest == cheapest_pair(cost, order.sample(choice, len(choice))).dollars(cost)
    assert cheapest == min(Pair(one, other).dollars(cost) for one in choice for other in choice)
    assert cheapest <= min(Pair(card, card).dollars(cost) for card in choice)


@given(grouped, counts, st.floats(1, 1e5), st.floats(0.5, 4))
def test_a_window_never_makes_attention_dearer(
    attention: GroupedQuery, window: int, context: float, element_bytes: float
) -> None:
    whole, windowed = replace(attention, window=None), replace(attention, window=window)
    assert windowed.kv_bytes(context, element_bytes) <= whole.kv_bytes(context, element_bytes)
    assert windowed.flops(context) <= whole.flops(context)
    assert windowed.parameters == whole.parameters
    if context <= window:
        assert windowed.kv_bytes(context, element_bytes) == whole.kv_bytes(context, element_bytes)


@given(attentions, st.integers(1, 100_000), st.integers(1, 8))
def test_a_cache_follows_the_bytes_of_its_elements(attention: Attention, context: int, element_bytes: int) -> None:
    """But for a state, which is FP32 whatever the rest is."""
    times = 1 if isinstance(attention, Lightning) else element_bytes
    assert attention.kv_bytes(context, element_bytes) == times * attention.kv_bytes(context, 1)


@given(shapes, contexts, st.floats(0.5, 4), st.floats(0.5, 4))
def test_the_format_of_layers_that_see_all_is_theirs_alone(
    shape: ModelShape, context: int, windowed: float, whole: float
) -> None:
    mixed = token_cost(shape, context, KvFormat(windowed, whole))
    low, high = (token_cost(shape, context, KvFormat(choose(windowed, whole))) for choose in (min, max))
    assert no_more(low.kv_bytes, mixed.kv_bytes)
    assert no_more(mixed.kv_bytes, high.kv_bytes)
    assert replace(mixed, kv_bytes=0) == replace(low, kv_bytes=0)


@given(moes, st.integers(0, 10_000), st.integers(1, 10_000))
def test_more_tokens_read_more_of_a_moe_and_never_more_than_all(moe: Ffn, num_tokens: int, more: int) -> None:
    read = moe.parameters_read(num_tokens)
    assert no_more(read, moe.parameters_read(num_tokens + more))
    assert no_more(moe.parameters_read(1), moe.parameters_read(num_tokens + 1))
    assert no_more(moe.parameters_read(num_tokens + 1), moe.parameters)
    assert moe.parameters_read(1) == pytest.approx(moe.flops / 2), "a token reads what it is multiplied with"
    assert moe.parameters_read(0) == pytest.approx(moe.common_parameters)


@given(shapes)
def test_a_token_is_multiplied_with_no_more_than_there_is(shape: ModelShape) -> None:
    assert shape.active_parameters <= shape.parameters
    assert all(0 < ffn.sparsity <= 1 for ffn in shape.ffns)
    assert token_cost(shape, 1).linear_flops + token_cost(shape, 1).ffn_flops <= 2 * shape.parameters


@given(shapes, st.integers(1, 20_000))
def test_a_token_of_context_adds_no_more_to_the_cache_than_it_does_while_no_window_is_full(
    shape: ModelShape, context: int
) -> None:
    now, then = (token_cost(shape, tokens).kv_bytes for tokens in (context, context + 1))
    assert then - now <= shape.kv_growth()


@given(st.sampled_from(SHAPES), cards, st.floats(1e-3, 1), factors)
def test_the_least_sparsity_follows_the_network_and_the_time(
    shape: ModelShape, card: Accelerator, tpot_s: float, factor: float
) -> None:
    least = min_sparsity(shape, card, tpot_s)
    faster = card.model_copy(update={"nic_bytes_per_s": card.nic_bytes_per_s * factor})
    assert min_sparsity(shape, faster, tpot_s) == pytest.approx(least / factor)
    assert min_sparsity(shape, card, tpot_s * factor) == pytest.approx(least / factor)


@given(cards)
@example(CARDS[0].model_copy(update={"name": "a\x7f b", "source": '"\\\n\x7f'}))
def test_a_card_is_read_from_its_toml_as_it_was(card: Accelerator) -> None:
    ((name, fields),) = tomllib.loads(card.toml()).items()
    assert Accelerator.model_validate({**fields, "name": name}) == card
