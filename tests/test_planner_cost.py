"""The planner's cost model: the paper's tables, cases that can be computed by hand, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from afd.cli import app
from afd.errors import ConfigError
from afd.planner import paper
from afd.planner.accelerators import Accelerator, accelerator, load_accelerators
from afd.planner.cost import KvFormat, TokenCost, cheapest_pair, min_sparsity, token_cost
from afd.planner.layers import Attention, Ffn, GroupedQuery, Lightning, MultiLatent, MultiMatrix
from afd.planner.paper import AFD, MODELS, cells
from afd.planner.shape import ModelShape, load_shape, shipped

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
def test_attention_by_hand(attention: Attention, parameters: int, kv_bytes: float, flops: float) -> None:
    assert (attention.parameters, attention.kv_bytes(10, 1), attention.flops(10)) == (parameters, kv_bytes, flops)


@pytest.mark.parametrize(
    ("attention", "kind", "kv_shards"),
    [
        (GroupedQuery(6, 4, 2, 2), "GQA", 2),
        (GroupedQuery(6, 4, 2, 2, window=7), "GQA over 7", 2),
        (GroupedQuery(6, 4, 4, 2), "MHA", 4),
        (GroupedQuery(6, 4, 1, 2), "MQA", 1),
        (MultiMatrix(6, 4, 2, 3), "MFA", 1),
        (MultiLatent(6, 4, 3, 5, 2, 1, 2), "MLA", 1),
        (Lightning(6, 4, 2), "lightning", 4),
    ],
)
def test_kinds_of_attention_and_into_how_many_parts_their_caches_split(
    attention: Attention, kind: str, kv_shards: int
) -> None:
    assert (attention.kind, attention.kv_shards) == (kind, kv_shards)


def test_ffn_by_hand() -> None:
    dense, moe = Ffn(6, 8), Ffn(6, 8, num_experts=4, top_k=2, shared_size=4)
    assert (dense.parameters, dense.flops, dense.sparsity) == (144, 288, 1)
    assert (moe.parameters, moe.flops) == (3 * 6 * 36, 2 * 3 * 6 * 20)
    assert (dense.is_moe, moe.is_moe) == (False, True)
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


# hidden 6; 144 parameters of attention each; dense 144 and two experts of 144, of which a token has one, and 72 shared
DENSE, MOE = Ffn(6, 8), Ffn(6, 8, num_experts=2, top_k=1, shared_size=4)
WINDOWED, WHOLE = GroupedQuery(6, 4, 2, 2, window=7), GroupedQuery(6, 4, 2, 2)
SMALL = ModelShape("small", 6, 10, 100, ((WHOLE, DENSE), (WINDOWED, MOE), (WINDOWED, MOE)))


def test_a_models_token_by_hand() -> None:
    cost = token_cost(SMALL, 10)
    assert cost == TokenCost(
        kv_bytes=80 + 2 * 56, attention_flops=320 + 2 * 224, linear_flops=2 * 432, ffn_flops=2 * (144 + 2 * 216)
    )
    assert token_cost(SMALL, 10, KvFormat(1, 2)).kv_bytes == 160 + 2 * 56, "who sees all has two bytes"
    assert token_cost(SMALL, 10, KvFormat(0.5)).kv_bytes == 40 + 2 * 28
    assert cost.intensity == 768 / 192


def test_a_models_sizes_by_hand() -> None:
    assert (SMALL.attention_parameters, SMALL.ffn_parameters) == (432, 144 + 2 * 360)
    assert SMALL.vocabulary_parameters == 2 * 10 * 6
    assert SMALL.parameters == 432 + 864 + 120
    assert SMALL.active_parameters == 432 + 144 + 2 * 216 + 60
    assert SMALL.kv_growth() == 3 * 8
    assert SMALL.moe == MOE
    state = ModelShape("state", 6, 10, 100, ((Lightning(6, 4, 2), DENSE),))
    assert (state.kv_growth(), state.moe) == (0, None)


def test_the_cheapest_pair_by_hand() -> None:
    """One card reads for a tenth of the price, the other computes for a fourth."""
    reads = CARD.model_copy(update={"memory_bytes_per_s": 1e11})
    computes = CARD.model_copy(update={"fp8_flops": 8e12})
    cost = TokenCost(kv_bytes=1e4, attention_flops=1e4, linear_flops=0, ffn_flops=1e6)
    pair = cheapest_pair(cost, [CARD, reads, computes])
    assert (pair.attention, pair.ffn) == (reads, computes)
    assert pair.dollars(cost) == pytest.approx(1e6 * (1e4 * 1e-11 + 1e6 / 8e12))


def test_the_least_sparsity_by_hand() -> None:
    """Compute-bound with 100 tokens per unit of sparsity, which three layers send to and fro: 3 bytes of 6 elements
    each, through NICs of 4 GB/s for a third of 90 ms."""
    assert min_sparsity(SMALL, CARD, 0.09) == pytest.approx(3 * 6 * 3 * 100 / (4e9 * 0.03))


def test_a_card_computes_with_the_width_of_its_operands() -> None:
    assert [CARD.flops_per_s(width) for width in (0.5, 1, 2)] == [2e12, 2e12, 1e12]
    assert CARD.model_copy(update={"fp8_flops": None}).flops_per_s(1) == 1e12


PUBLISHED_BILLIONS = {
    "deepseek-v3": (671, 37),
    "ernie-4.5-300b-a47b": (300, 47),
    "kimi-k2": (1030, 32),
    "llama-4-maverick": (400, 17),
    "minimax-m1": (456, 45.9),
    "pangu-pro-moe": (72, 16),
    "qwen3-235b-a22b": (235, 22),
    "qwen3-32b": (32.8, 32.8),
    "step-3": (316, 38),
}


@pytest.mark.parametrize("model", shipped())
def test_shipped_models_have_the_parameters_that_their_publishers_state(model: str) -> None:
    total, active = PUBLISHED_BILLIONS[model]
    assert SHAPES[model].parameters == pytest.approx(total * 1e9, rel=0.01)
    assert SHAPES[model].active_parameters == pytest.approx(active * 1e9, rel=0.06)


def test_the_format_of_the_kv_cache_counts() -> None:
    llama = load_shape("llama-4-maverick")
    eight, mixed, wide = (token_cost(llama, 8192, kv).kv_bytes for kv in (KvFormat(), KvFormat(1, 2), KvFormat(2)))
    assert (mixed / eight, wide / eight) == (pytest.approx(1.25), pytest.approx(2))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def card_table(**changes: str | None) -> str:
    """A table of a good card, [X], with fields as their TOML, or without them."""
    fields = dict(line.split(" = ", 1) for line in CARDS["H100"].toml().splitlines()[1:]) | changes
    return "\n".join(["[X]", *(f"{field} = {value}" for field, value in fields.items() if value is not None), ""])


def test_a_file_of_ones_own_goes_before_what_is_shipped(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.toml", card_table(source='"me"').replace("[X]", "[H800]"))
    cards = load_accelerators(mine)
    assert (cards["H800"].source, cards["H20"].dollars_per_hour) == ("me", 0.8)
    later = write(tmp_path / "later.toml", card_table(source='"later"').replace("[X]", "[H800]"))
    assert load_accelerators(mine, later)["H800"].source == "later"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (card_table(bf16_flops="-1.0"), r"mine.toml: \[X\] bf16_flops: -1.0 is not a finite number above 0; `afd plan"),
        (card_table(bf16_flops="0"), r"\[X\] bf16_flops: 0 is not a finite number above 0"),
        (card_table(bf16_flops="nan"), r"\[X\] bf16_flops: nan is not a finite"),
        (card_table(fp8_flops="inf"), r"\[X\] fp8_flops: inf is not a finite"),
        (card_table(memory_bytes="1" + "0" * 400), r"\[X\] memory_bytes: 1000.* is not a finite"),
        (card_table(memory_bytes="true"), r"\[X\] memory_bytes: True is not a finite"),
        (card_table(memory_bytes='"80 GB"'), r"\[X\] memory_bytes: '80 GB' is not a finite number above 0"),
        (card_table(memory_bytes="80"), r"memory_bytes: 80 is not within .* it is in bytes, 8e10 for 80 GB"),
        (card_table(memory_bytes="8e20"), r"memory_bytes: 8e\+20 is not within "),
        (card_table(memory_bytes_per_s="3.35"), r"memory_bytes_per_s: 3.35 is not within .* 3.35e12 for 3.35 TB/s"),
        (card_table(bf16_flops="989"), r"bf16_flops: 989 is not within .* it is in FLOP/s, 9.89e14 for 989 TFLOP/s"),
        (card_table(fp8_flops="1979"), r"fp8_flops: 1979 is not within"),
        (card_table(link_bytes_per_s="450.0"), r"link_bytes_per_s: 450 is not within .* 4.5e11 for 450 GB/s"),
        (card_table(nic_bytes_per_s="400"), r"nic_bytes_per_s: 400 is not within .* 5e10 for 400 Gbit/s"),
        (card_table(dollars_per_hour="0.00001"), r"dollars_per_hour: 1e-05 is not within .* an hour of one card"),
        (card_table(cards_per_server="0"), r"\[X\] cards_per_server: 0 is not a whole number above 0"),
        (card_table(cards_per_server="8.5"), r"\[X\] cards_per_server: 8.5 is not a whole number above 0"),
        (card_table(cards_per_server="true"), r"\[X\] cards_per_server: True is not a whole number"),
        (card_table(cards_per_server="2000"), r"\[X\] cards_per_server: 2000 is not within 1..1024"),
        (card_table(source="3"), r"\[X\] source: 3 is not text in quotes"),
        (card_table(memory_bytes=None), r"\[X\] memory_bytes is missing; `afd plan cards H100` shows how one looks"),
        (card_table(memory="8e10"), r"\[X\] memory is no field of a card, did you mean memory_bytes\?"),
        (card_table(zzz="3"), r"\[X\] zzz is no field of a card; they are bf16_flops, .*, source"),
        (card_table(name='"Y"'), r"\[X\] name is no field of a card"),
        (card_table() * 2, r"not valid TOML: Cannot declare \('X',\) twice \(at line 11"),
        ("X = 3", r"X is not a card, which is a table like \[X\]"),
        ("[X", "not valid TOML"),
        ("a = " + "[" * 100_000, "not valid TOML"),
        ("a = 1" + "0" * 5000, "not valid TOML"),
        ("", "mine.toml has no cards; `afd plan cards H100` shows how one looks"),
        ("#" * 1_000_001, "mine.toml has more than 1000000 characters, so it is no file of accelerators"),
    ],
)
def test_accelerators_that_cannot_be_are_refused_in_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as refusal:
        load_accelerators(write(tmp_path / "mine.toml", text))
    assert "\n" not in str(refusal.value)


def test_a_card_or_file_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no card 'H8000'; there are H800, "):
        accelerator("H8000", load_accelerators())
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_accelerators(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_accelerators(tmp_path)
    with pytest.raises(ConfigError, match="more than 1000000 characters"):
        load_accelerators(Path("/dev/zero"))
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_accelerators(tmp_path / "bytes.toml")


@pytest.mark.parametrize(
    ("model", "change", "sentence"),
    [
        ("deepseek-v3", {"model_type": "mamba"}, "model_type: 'mamba' is none that is known: .*step3_text"),
        ("deepseek-v3", {"model_type": ["llama"]}, "model_type: .* is none that is known"),
        ("deepseek-v3", {"model_type": None}, "model_type is missing"),
        ("deepseek-v3", {"num_attention_heads": None}, "num_attention_heads is missing"),
        ("deepseek-v3", {"num_attention_heads": -4}, "num_attention_heads: -4 is not a positive whole number"),
        ("deepseek-v3", {"kv_lora_rank": 512.0}, "kv_lora_rank: 512.0 is not a positive whole number"),
        ("deepseek-v3", {"vocab_size": True}, "vocab_size: True is not a positive whole number"),
        ("deepseek-v3", {"num_experts_per_tok": 500}, "num_experts_per_tok: 500 is more than n_routed_experts, 256"),
        ("deepseek-v3", {"first_k_dense_replace": "three"}, "first_k_dense_replace: 'three' is not a whole number"),
        ("deepseek-v3", {"max_position_embeddings": None}, "max_position_embeddings is missing"),
        ("deepseek-v3", {"hidden_size": 10**12}, "hidden_size: 1000000000000 is more than any model has; the limit"),
        ("deepseek-v3", {"n_shared_experts": 10**12}, "n_shared_experts: 1000000000000 is more than any model"),
        ("deepseek-v3", {"num_hidden_layers": 10**8}, "num_hidden_layers: 100000000 is more .* the limit is 10000"),
        ("step-3", {"num_hidden_layers": 10**8}, "num_hidden_layers: 100000000 is more .* the limit is 10000"),
        (
            "qwen3-32b",
            {"num_key_value_heads": 7},
            "num_attention_heads: 64 is not a multiple of num_key_value_heads, 7",
        ),
        ("qwen3-32b", {"head_dim": None, "hidden_size": 100}, "head_dim: it is missing, and hidden_size, 100, is not"),
        ("qwen3-32b", {"layer_types": "all"}, "layer_types: 'all' is not a list"),
        ("qwen3-32b", {"layer_types": ["full_attention"]}, "num_hidden_layers: 64, but 1 layers have a kind"),
        ("minimax-m1", {"attn_type_list": [1, "0"]}, "attn_type_list: .* is not a list of whole numbers"),
        ("llama-4-maverick", {"text_config": [1]}, "text_config: .* is not a JSON object"),
    ],
)
def test_a_model_that_cannot_be_is_refused_in_a_sentence(
    tmp_path: Path, model: str, change: dict[str, object], sentence: str
) -> None:
    config = json.loads(shipped()[model].read_text()) | change
    with pytest.raises(ConfigError, match=sentence) as refusal:
        load_shape(str(write(tmp_path / "config.json", json.dumps(config))))
    assert "config.json" in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "config.json is not valid JSON"),
        ("[]", "config.json does not hold a JSON object"),
        ("[" * 100_000, "config.json is not valid JSON"),
        ('{"hidden_size": ' + "1" * 5000 + "}", "config.json is not valid JSON"),
    ],
)
def test_a_description_that_is_no_json_object_is_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_shape(str(write(tmp_path / "config.json", text)))


def test_a_description_that_never_ends_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"/dev/zero has more than \d+ characters, so it describes no model"):
        load_shape("/dev/zero")


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"70000 tokens is not within 1\.\.65536, the limit of step-3"):
        token_cost(load_shape("step-3"), 70_000)
    for context in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"tokens is not within 1\.\.65536"):
            token_cost(load_shape("step-3"), context)


def test_a_model_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    for name in ("step-4", "x" * 5000):
        with pytest.raises(ConfigError, match=f"there is no model {name}: .*one of deepseek-v3, .*step-3"):
            load_shape(name)
    with pytest.raises(ConfigError, match=r"is no model directory: it has no config.json"):
        load_shape(str(tmp_path))


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


def test_a_model_is_called_as_its_folder_or_file(tmp_path: Path) -> None:
    text = shipped()["llama-4-maverick"].read_text()
    assert load_shape(str(write(tmp_path / "config.json", text))).name == tmp_path.name
    own = load_shape(str(write(tmp_path / "own.json", text)))
    assert (own.name, own.layers) == ("own", SHAPES["llama-4-maverick"].layers)


def test_ernies_last_moe_layer_can_be_called_minus_one(tmp_path: Path) -> None:
    config = json.loads(shipped()["ernie-4.5-300b-a47b"].read_text()) | {"moe_layer_end_index": -1}
    path = write(tmp_path / "config.json", json.dumps(config))
    assert load_shape(str(path)).layers == SHAPES["ernie-4.5-300b-a47b"].layers


def run(*arguments: str) -> str:
    done = CliRunner(env={"COLUMNS": "100"}).invoke(app, ["plan", *arguments])
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 100 or "source = " in done.output
    return done.output


def test_cards_are_listed_with_ones_own(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.toml", card_table(dollars_per_hour="36"))
    output = run("cards", "--accelerators", str(mine), "--json", str(tmp_path / "cards.json"))
    assert all(name in output for name in CARDS)
    written = {card["name"]: card for card in json.loads((tmp_path / "cards.json").read_text())}
    assert list(written) == [*CARDS, "X"]
    assert written["X"]["dollars_per_flop"] == pytest.approx(36 / 3600 / 1.979e15)
    assert written["A100"]["fp8_flops"] is None
    (row,) = [line.split() for line in output.splitlines() if line.split()[:1] == ["X"]]
    assert row == ["X", "989", "1979", "85", "3350", "450", "50", "8", "36.00", "5.053", "2.985", "591"]


@pytest.mark.parametrize("name", CARDS)
def test_one_card_is_shown_as_the_file_has_it(tmp_path: Path, name: str) -> None:
    text = run("cards", name)
    assert load_accelerators(write(tmp_path / "mine.toml", text))[name] == CARDS[name]


def test_models_are_listed_and_ones_own_alone(tmp_path: Path) -> None:
    output = run("models", "--json", str(tmp_path / "models.json"))
    assert all(name in output for name in shipped())
    written = {model["model"]: model for model in json.loads((tmp_path / "models.json").read_text())}
    assert list(written) == list(shipped())
    assert written["llama-4-maverick"]["layers_by_attention"] == {"GQA over 8192": 36, "GQA": 12}
    (row,) = [line.split() for line in output.splitlines() if "step-3" in line]
    assert row == ["step-3", "MFA", "61", "316.3", "37.9", "31232", "3", "of", "48", "+", "1", "0.082", "65536"]
    own = run("models", "--model", str(write(tmp_path / "own.json", shipped()["qwen3-32b"].read_text())))
    assert "own" in own
    assert "dense" in own
    assert "step-3" not in own


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
