"""The planner's cost model: the paper's tables, cases that can be computed by hand, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from afd.cli import app
from afd.errors import ConfigError
from afd.planner import paper
from afd.planner.accelerators import Accelerator, accelerator, load_accelerators
from afd.planner.cost import KvFormat, Pair, TokenCost, cheapest_pair, min_sparsity, token_cost
from afd.planner.layers import Ffn, GroupedQuery, Lightning, MultiLatent, MultiMatrix
from afd.planner.paper import AFD, MODELS, cells
from afd.planner.shape import load_shape, shipped

CARDS = load_accelerators()
SHAPES = {name: load_shape(name) for name in shipped()}
CARD = Accelerator(
    name="round numbers",
    bf16_flops=1e12,
    fp8_flops=2e12,
    memory_bytes_per_s=1e10,
    memory_bytes=1e9,
    link_bytes_per_s=1e9,
    nic_bytes_per_s=1e9,
    cards_per_server=4,
    dollars_per_hour=3600.0,
    source="none",
)


def test_every_number_that_the_paper_prints_is_reproduced() -> None:
    printed = [cell for cell in cells() if cell.printed is not None]
    assert len(printed) == 9 * 4 + 9 * 4 + 9 * 4 * 2 + 3 + 3 * 2 + 4
    for cell in printed:
        tolerance = {"abs": 0.0015} if cell.unit == "$/Mtoken" else {"rel": 0.005}
        assert cell.value == pytest.approx(cell.printed, **tolerance), cell


def test_the_papers_tables_are_whole() -> None:
    found = {(cell.quantity, cell.model, cell.context, cell.card) for cell in cells()}
    assert len(found) == len(cells())
    for model in MODELS:
        for context in (8192, 32768):
            assert {("total_cost", model, context, card) for card in ("H800", "H20", "A800", "910B", AFD)} <= found


def test_at_32k_step3_costs_least_where_each_part_has_its_card() -> None:
    totals = {cell.model: cell.value for cell in cells() if (cell.context, cell.card) == (32768, AFD)}
    assert min(totals, key=lambda model: totals[model]) == "Step-3"
    assert totals["Step-3"] == pytest.approx(0.129, abs=0.0015)


def test_the_least_sparsity_leaves_step3_compute_bound_on_all_but_the_largest_card() -> None:
    step3 = load_shape("step-3")
    assert step3.moe is not None
    assert step3.moe.sparsity == pytest.approx(4 / 49)
    found = {name: min_sparsity(step3, card, 0.05) for name, card in load_accelerators().items()}
    # H * FLOPs * L / (Net * BW * 11.1 ms)
    assert found["H800"] == pytest.approx(7168 * 1.98e15 * 61 / (8 * 50e9 * 3.35e12 * 0.0111), rel=0.005)
    assert found["H20"] == pytest.approx(0.0073, rel=0.005)
    assert found["A800"] == pytest.approx(0.0307, rel=0.005)


@pytest.mark.parametrize(
    ("attention", "parameters", "kv_bytes", "flops"),
    [
        # hidden 6, 4 heads of 2 over 2 key and value heads: q and o 2*6*8, k and v 2*6*4; 10 tokens of 2*2*2 elements
        (GroupedQuery(6, 4, 2, 2), 144, 80, 4 * 4 * 2 * 10),
        (GroupedQuery(6, 4, 2, 2, window=7), 144, 56, 4 * 4 * 2 * 7),
        # q down 6*3, k and v 6*4, q up 3*8, o 8*6
        (MultiMatrix(6, 4, 2, 3), 18 + 24 + 24 + 48, 40, 4 * 4 * 2 * 10),
        # q down 6*3 and up 3*4*(2+1), kv down 6*(5+1), kv up 4*(2+2)*5, o 4*2*6
        (MultiLatent(6, 4, 3, 5, 2, 1, 2), 18 + 36 + 36 + 80 + 48, 60, 4 * 4 * 6 * 10),
        (MultiLatent(6, 4, 0, 5, 2, 1, 2), 72 + 36 + 80 + 48, 60, 4 * 4 * 6 * 10),
        # five of 6*8; a state of 4*2*2 in four bytes, read and written
        (Lightning(6, 4, 2), 240, 16 * 8, 160),
    ],
)
def test_attention_by_hand(attention: GroupedQuery, parameters: int, kv_bytes: float, flops: float) -> None:
    assert (attention.parameters, attention.kv_bytes(10, 1), attention.flops(10)) == (parameters, kv_bytes, flops)


def test_ffn_by_hand() -> None:
    dense, moe = Ffn(6, 8), Ffn(6, 8, num_experts=4, top_k=2, shared_size=4)
    assert (dense.parameters, dense.flops, dense.sparsity) == (144, 288, 1)
    assert (moe.parameters, moe.flops) == (3 * 6 * 36, 2 * 3 * 6 * 20)
    assert moe.sparsity == pytest.approx(20 / 36)
    assert moe.parameters_read(1) == pytest.approx(3 * 6 * 20), "one token reads what it has"
    assert moe.parameters_read(2) == pytest.approx(3 * 6 * (4 * 8 * 0.75 + 4)), "half of what two have is the same"
    assert moe.parameters_read(10_000) == pytest.approx(moe.parameters)


def test_money_by_hand() -> None:
    """A dollar per second: 1e-10 per byte, 5e-13 per FLOP."""
    assert (CARD.unit_byte, CARD.unit_flop, CARD.roofline) == (1e-10, 5e-13, 200)
    reads_more = TokenCost(kv_bytes=1e3, attention_flops=1e5, linear_flops=2e5, ffn_flops=4e5)
    assert reads_more.attention_dollars(CARD) == pytest.approx(1e6 * (1e-7 + 1e-7))
    assert reads_more.ffn_dollars(CARD) == pytest.approx(1e6 * 2e-7)
    computes_more = TokenCost(kv_bytes=1e3, attention_flops=1e6, linear_flops=2e5, ffn_flops=4e5)
    assert computes_more.attention_dollars(CARD) == pytest.approx(1e6 * (5e-7 + 1e-7))
    assert computes_more.intensity == 1000


def test_the_format_of_the_kv_cache_counts() -> None:
    llama = load_shape("llama-4-maverick")
    eight, mixed, wide = (token_cost(llama, 8192, kv).kv_bytes for kv in (KvFormat(), KvFormat(1, 2), KvFormat(2)))
    assert (mixed / eight, wide / eight) == (pytest.approx(1.25), pytest.approx(2))


@given(st.floats(1, 60_000), st.floats(1.01, 100), st.sampled_from(sorted(SHAPES)))
def test_more_of_anything_never_costs_more(context: float, factor: float, model: str) -> None:
    shape = SHAPES[model]
    cost = token_cost(shape, min(context, shape.max_context_tokens))
    for field in ("bf16_flops", "fp8_flops", "memory_bytes_per_s"):
        better = CARD.model_copy(update={field: getattr(CARD, field) * factor})
        assert Pair(better, better).dollars(cost) <= Pair(CARD, CARD).dollars(cost)


@given(st.sampled_from(sorted(SHAPES)), st.lists(st.sampled_from(list(CARDS.values())), min_size=1))
def test_two_kinds_of_cards_never_cost_more_than_one(model: str, cards: list[Accelerator]) -> None:
    cost = token_cost(SHAPES[model], 8192)
    assert cheapest_pair(cost, cards).dollars(cost) <= min(Pair(card, card).dollars(cost) for card in cards)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


GOOD = "\n".join(
    f"{field} = 2.0" for field in Accelerator.model_fields if field not in ("name", "cards_per_server", "source")
)


def test_a_file_of_ones_own_goes_before_what_is_shipped(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.toml", f'[H800]\n{GOOD}\ncards_per_server = 1\nsource = "me"\n')
    cards = load_accelerators(mine)
    assert (cards["H800"].source, cards["H20"].dollars_per_hour) == ("me", 0.8)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[X]\nbf16_flops = -1.0", r"mine.toml: \[X\] bf16_flops: Input should be greater than 0"),
        ("[X]\nbf16_flops = nan", r"\[X\] bf16_flops: .*finite|greater"),
        ("[X]\nbf16_flops = 1.0", r"\[X\] memory_bytes_per_s: Field required"),
        (f"[X]\n{GOOD}\ncards_per_server = 1\nsource = ''\nspeed = 3", r"\[X\] speed: Extra inputs are not permitted"),
        (f"[X]\n{GOOD}\ncards_per_server = 0\nsource = ''", r"\[X\] cards_per_server: Input should be greater than 0"),
        ("X = 3", "X is not a table"),
        ("[X", "not valid TOML"),
    ],
)
def test_accelerators_that_cannot_be_are_refused_in_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_accelerators(write(tmp_path / "mine.toml", text))


def test_a_card_or_file_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no card 'H8000'; there are H800, "):
        accelerator("H8000", load_accelerators())
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_accelerators(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "mamba"}, "model_type: 'mamba' is none that is known: .*step3_text"),
        ({"num_attention_heads": None}, "num_attention_heads is missing"),
        ({"num_attention_heads": -4}, "num_attention_heads: -4 is not a positive whole number"),
        ({"num_experts_per_tok": 500}, "num_experts_per_tok: 500 is more than n_routed_experts, 256"),
        ({"first_k_dense_replace": "three"}, "first_k_dense_replace: 'three' is not a whole number"),
        ({"max_position_embeddings": None}, "max_position_embeddings is missing"),
    ],
)
def test_a_model_that_cannot_be_is_refused_in_a_sentence(
    tmp_path: Path, change: dict[str, object], sentence: str
) -> None:
    config = json.loads(shipped()["deepseek-v3"].read_text()) | change
    with pytest.raises(ConfigError, match=sentence):
        load_shape(str(write(tmp_path / "config.json", json.dumps(config))))


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"70000 tokens is not within 1\.\.65536, the limit of step-3"):
        token_cost(load_shape("step-3"), 70_000)
    with pytest.raises(ConfigError, match=r"there is no model step-4: .*one of deepseek-v3, .*step-3"):
        load_shape("step-4")


def test_other_files_of_known_families_are_read(tmp_path: Path) -> None:
    """Qwen3 with a window in some layers, and a model with layers of its text part under `text_config`."""
    config = json.loads(shipped()["qwen3-32b"].read_text())
    config |= {
        "num_hidden_layers": 3,
        "sliding_window": 512,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    path = tmp_path / "config.json"
    with pytest.raises(ConfigError, match="num_hidden_layers: 3, but 4 layers have a kind of attention"):
        load_shape(str(write(path, json.dumps(config))))
    config["num_hidden_layers"] = 4
    write(path, json.dumps(config))
    windows = [attention.window for attention, _ in load_shape(str(tmp_path)).layers]  # type: ignore[attr-defined]
    assert windows == [512, None, 512, None]


def test_the_command_prints_the_papers_tables_and_writes_each_cell(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["plan", "paper", "--json", str(tmp_path / "cells.json")])
    assert done.exit_code == 0, done.output
    assert "157 of 157 numbers" in done.output
    written = json.loads((tmp_path / "cells.json").read_text())
    assert len(written) == len(cells())
    (best,) = [
        cell for cell in written if (cell["model"], cell["context"], cell["card"]) == ("Step-3", 8192, AFD)
    ]  # nothing but the total has two kinds of cards
    assert best == {
        "quantity": "total_cost",
        "model": "Step-3",
        "context": 8192,
        "card": "AFD",
        "value": pytest.approx(0.055, abs=0.0015),
        "unit": "$/Mtoken",
    }


def test_the_command_fails_where_a_number_is_not_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [replace(cell, value=cell.value * 1.01) for cell in cells()]
    monkeypatch.setattr(paper, "cells", lambda: wrong)
    assert CliRunner().invoke(app, ["plan", "paper"]).exit_code == 1


def test_the_papers_figures_are_drawn_and_are_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for folder in ("first", "second"):
        done = CliRunner().invoke(app, ["plan", "paper", "--pictures", str(tmp_path / folder)])
        assert done.exit_code == 0, done.output
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == sorted(
        f"{figure}.{kind}"
        for figure in (
            "attention-and-ffn-share",
            "cost-against-context",
            "intensity-against-rooflines",
            "kv-against-compute",
        )
        for kind in ("png", "svg")
    )
    for path in (tmp_path / "first").glob("*.svg"):
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
        assert "Step-3" in path.read_text()
