"""The planner's estimate of a deployment: published results, cases computed by hand, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd.errors import ConfigError
from afd.planner import paper
from afd.planner.accelerators import Accelerator, load_accelerators
from afd.planner.deployment import Disaggregated
from afd.planner.estimate import Estimate, estimate
from afd.planner.layers import Ffn, GroupedQuery
from afd.planner.shape import ModelShape, load_shape
from afd.planner.stages import (
    Efficiencies,
    Precision,
    Roofline,
    Stages,
    Workload,
    attention_s,
    tensor_parallel_s,
)
from tests.round_numbers import CARD, IDEAL, PERFECT

CARDS = load_accelerators()
STEP3 = load_shape("step-3")
ATTENTION, FFN = GroupedQuery(10, 4, 2, 5), Ffn(10, 20)
SMALL = ModelShape("small", 10, 100, 1000, ((ATTENTION, FFN),) * 3)


@pytest.mark.parametrize("row", paper.PUBLISHED)
def test_published_results_are_predicted_with_one_set_of_efficiencies(row: paper.Published) -> None:
    found = row.predicted()
    assert found.tokens_per_s_per_card == pytest.approx(row.tokens_per_s_per_card, rel=0.1)
    assert found.tpot_s <= 0.05


@pytest.mark.parametrize(("hidden", "low", "high"), [(0.5, 0.755, 0.795), (0.0, 0.535, 0.575)])
def test_published_results_need_links_that_are_hidden(hidden: float, low: float, high: float) -> None:
    """What docs/planner.md says of the `link_overlap`."""
    for row in paper.PUBLISHED:
        found = row.predicted(Efficiencies(link_overlap=hidden))
        assert low <= found.tokens_per_s_per_card / row.tokens_per_s_per_card <= high


@pytest.mark.parametrize("row", paper.MEASURED_LAYERS)
def test_a_measured_layer_is_predicted(row: paper.MeasuredLayer) -> None:
    within = 0.18 if row.model == "Step-3" else 0.21
    assert row.predicted_us == pytest.approx(row.measured_us, rel=within)


def test_attention_by_hand() -> None:
    """600 parameters; a token of context is 20 bytes and 80 FLOPs; 5 sequences of 40 tokens."""

    def layer_s(card: Accelerator = CARD, bytes_each: float = 1, tp: int = 1) -> float:
        precision = Precision(weights=bytes_each, kv=bytes_each)
        return attention_s(ATTENTION, 10, 5, 40, precision, tp, Roofline(card, PERFECT))

    assert layer_s() == pytest.approx(5 * 800 / 1e4 + 600 / 1e4), "memory binds both"
    slow = CARD.model_copy(update={"fp8_flops": 1e4})
    assert layer_s(slow) == pytest.approx(5 * 3200 / 1e4 + 2 * 600 * 5 / 1e4), "compute binds both"
    assert layer_s(bytes_each=2) == pytest.approx(5 * 1600 / 1e4 + 1200 / 1e4)
    all_reduce = 2 * (3 / 4) * 5 * 10 * 2 / 1e3
    assert layer_s(tp=4) == pytest.approx(5 * 400 / 1e4 + 150 / 1e4 + all_reduce), "two key heads make two parts"


def test_ffn_by_hand() -> None:
    """600 parameters; 10 tokens move 10 elements of one byte out and two back, but for the card's own part."""
    on = Roofline(CARD, PERFECT)
    assert tensor_parallel_s(FFN, 10, 1, 1, Precision(), on) == pytest.approx(600 / 1e4)
    assert tensor_parallel_s(FFN, 1000, 1, 1, Precision(), on) == pytest.approx(1000 * 1200 / 2e6)
    assert tensor_parallel_s(FFN, 10, 1, 2, Precision(), on) == pytest.approx(max(300 / 1e4, 0.5 * 10 * 10 * 3 / 1e3))
    assert tensor_parallel_s(FFN, 10, 2, 2, Precision(), on) == pytest.approx(0.5 * 10 * 10 * 3 / 1e3), (
        "each sees all tokens"
    )


def test_the_crossing_by_hand() -> None:
    """2A1F of two cards: 8 tokens on 4 attention cards, and so 4 for each of the two FFN cards, 10 bytes each."""
    found = Disaggregated(CARD, CARD, 2, 1, cards=2, transport=IDEAL).stages(
        Workload(SMALL, 40, efficiencies=PERFECT), 2
    )
    assert found.dispatch == pytest.approx(3 * 4 * 10 / 1e2)
    assert found.combine == pytest.approx(2 * found.dispatch)
    to_many = Disaggregated(CARD, CARD, 1, 3, cards=2, transport=IDEAL).stages(
        Workload(SMALL, 40, efficiencies=PERFECT), 2
    )
    assert to_many.dispatch == pytest.approx(3 * 2 * 3 * 10 / 1e2), "three copies of two tokens leave each card"


@pytest.mark.parametrize(
    ("stages", "microbatches", "tpot_s"),
    [
        (Stages(2, 1, 2, 1, 0), 1, 6),  # through all, alone
        (Stages(2, 1, 2, 1, 0), 2, 6),  # two never hide the network
        (Stages(2, 1, 2, 1, 0), 3, 6),  # 2 + 2/2: now they do
        (Stages(2, 1, 2, 1, 0), 4, 8),
        (Stages(2, 1, 5, 1, 3), 3, 18),
    ],
)
def test_the_pipeline_by_hand(stages: Stages, microbatches: int, tpot_s: float) -> None:
    assert stages.tpot_s(microbatches) == tpot_s


def test_the_batch_is_the_largest_that_keeps_the_tpot() -> None:
    deployment = Disaggregated(CARDS["H800"], CARDS["H800"], 2, 2)
    workload = Workload(STEP3, 4096)
    found = estimate(deployment, workload, 0.05)
    assert found.tpot_s <= 0.05 < deployment.stages(workload, found.batch + 1).tpot_s(3)
    assert found.binding == "FFN"
    assert found.sequences == found.batch * 3 * 16
    assert found.dollars_per_million_tokens == pytest.approx(32 * 2 / 3600 / found.tokens_per_s * 1e6)


def test_memory_binds_where_the_cache_is_large() -> None:
    deployment = Disaggregated(CARDS["H800"], CARDS["H800"], 2, 2)
    found = estimate(deployment, Workload(STEP3, 32768), 0.5)
    assert found.binding == "memory"
    weights = (STEP3.attention_parameters + 2 * STEP3.vocab_size * STEP3.hidden_size / 8) * 1.0
    cache = found.batch * 3 * 61 * 512 * 32768
    assert weights + cache <= 0.92 * 8.5e10 < weights + cache * (found.batch + 1) / found.batch


@pytest.mark.parametrize(
    ("deployment", "workload", "tpot_s", "sentence"),
    [
        (
            Disaggregated(CARDS["L4"], CARDS["L4"], 1, 1),
            Workload(STEP3, 4096),
            0.05,
            "FFN's weights are .* GB on each L4",
        ),
        (
            Disaggregated(CARDS["H800"], CARDS["H800"], 1, 1),
            Workload(STEP3, 4096),
            0.001,
            "a token takes .* ms with one",
        ),
        (Disaggregated(CARDS["H800"], CARDS["H800"], 1, 1), Workload(STEP3, 70_000), 0.05, r"not within 1\.\.65536"),
        (
            Disaggregated(CARDS["H800"].model_copy(update={"memory_bytes": 1.4e10}), CARDS["H200"], 1, 1),
            Workload(STEP3, 65_536),
            0.5,
            "3 sequences of 65536 tokens do not fit beside the weights",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    deployment: Disaggregated, workload: Workload, tpot_s: float, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        estimate(deployment, workload, tpot_s)


def best(deployment: Disaggregated, workload: Workload) -> Estimate:
    return estimate(deployment, workload, 0.05)


@given(
    st.sampled_from(["memory_bytes_per_s", "memory_bytes", "link_bytes_per_s", "nic_bytes_per_s", "fp8_flops"]),
    st.floats(1, 10),
    st.sampled_from(["attention", "ffn"]),
    st.sampled_from([(1, 1), (2, 2), (3, 1), (1, 3)]),
    st.sampled_from([1024.0, 4096.0, 20_000.0]),
)
def test_a_better_card_is_never_slower(
    field: str, factor: float, side: str, ratio: tuple[int, int], context: float
) -> None:
    card = CARDS["H800"]
    better = card.model_copy(update={field: getattr(card, field) * factor})
    before = Disaggregated(card, card, *ratio)
    workload = Workload(STEP3, context)
    after = replace(before, **{side: better})
    assert best(after, workload).tokens_per_s >= best(before, workload).tokens_per_s * 0.999


@given(st.floats(1000, 30_000), st.floats(1.01, 2))
def test_a_longer_context_is_never_faster(context: float, factor: float) -> None:
    deployment = Disaggregated(CARDS["H20"], CARDS["H800"], 2, 2)
    shorter, longer = (best(deployment, Workload(STEP3, length)) for length in (context, context * factor))
    assert longer.tokens_per_s <= shorter.tokens_per_s
