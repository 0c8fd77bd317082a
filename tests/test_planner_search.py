"""Which deployment the planner chooses: collocated ones by hand, the search against trying all, verdicts, reports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from afd.cli import app
from afd.errors import ConfigError
from afd.planner import paper, question
from afd.planner.accelerators import Accelerator, load_accelerators
from afd.planner.deployment import Collocated, Deployment, Disaggregated, Experts
from afd.planner.estimate import Estimate, estimate
from afd.planner.layers import Ffn, GroupedQuery
from afd.planner.ratio import attention_per_ffn, ratio_at
from afd.planner.search import Choices, Goal, Option, Plan, plan, rank
from afd.planner.shape import ModelShape, load_shape
from afd.planner.stages import (
    INLINE,
    LOCAL,
    Efficiencies,
    Precision,
    Prefill,
    Roofline,
    Stages,
    Workload,
    attention_s,
    expert_parallel_s,
)
from afd.planner.verdict import Choice, verdict
from tests.round_numbers import CARD, IDEAL, PERFECT

CARDS = load_accelerators()
H800, H20 = CARDS["H800"], CARDS["H20"]
STEP3 = load_shape("step-3")
ATTENTION, MOE = GroupedQuery(10, 4, 2, 5), Ffn(10, 20, num_experts=4, top_k=2, shared_size=10)
SMALL = ModelShape("small", 10, 100, 1000, ((ATTENTION, MOE),) * 3)


def test_spread_experts_by_hand() -> None:
    """Each of 4 experts has 600 parameters, the shared part 300; so many tokens that every expert has some."""
    on = Roofline(CARD, replace(PERFECT, imbalance=1.5))
    assert expert_parallel_s(MOE, 40, 4, 1, Precision(), on) == pytest.approx(600 / 1e4 + 300 / 1e4), "weights are read"
    many = expert_parallel_s(MOE, 4000, 4, 1, Precision(), on)
    assert many == pytest.approx(1.5 * 2400 * 4000 / 4 / 2e6 + 600 * 4000 / 4 / 2e6), "the busiest card is waited for"
    in_one_group = expert_parallel_s(MOE, 4000, 4, 4, Precision(), on)
    assert in_one_group == pytest.approx(2400 * 4000 / 4 / 2e6 + 600 * 4000 / 4 / 2e6), "matrices are spread evenly"


def test_what_an_ffn_instance_moves_is_hidden_as_far_as_is_said() -> None:
    """60 bytes over a link of 1000 per second, beside 0.02 s of multiplying."""
    for share, taken in ((1.0, 0.06), (0.5, 0.07), (0.0, 0.08)):
        on = Roofline(CARD, replace(PERFECT, link_overlap=share))
        assert on.moving_s(60, 0.02) == pytest.approx(taken)


def test_the_all_to_all_by_hand() -> None:
    """8 tokens per card, each to 2 experts: of 160 bytes half stay in a server of two cards when there are four."""
    workload = Workload(SMALL, 40, efficiencies=PERFECT)
    found = Collocated(CARD, 4, microbatches=1, transport=IDEAL).stages(workload, 8)
    assert found.dispatch == pytest.approx(3 * 80 / 1e2), "the network is slower than the link"
    assert found.combine == pytest.approx(2 * found.dispatch)
    assert Collocated(CARD, 2, transport=IDEAL).stages(workload, 8).dispatch == pytest.approx(3 * 160 / 1e3)
    assert Collocated(CARD, 2, tp=2, transport=IDEAL).stages(workload, 8).dispatch == 0, "nobody else has experts"


def test_a_group_adds_up_its_partial_sums() -> None:
    """Over the link, after attention and after the FFN: each of two cards sends and gets 8 x 10 x 2 bytes."""
    workload = Workload(SMALL, 40, efficiencies=PERFECT)
    alone, together = (Collocated(CARD, tp, tp=tp, microbatches=1).stages(workload, 8) for tp in (1, 2))
    assert together.ffn == pytest.approx(alone.ffn / 2 + 3 * 160 / 1e3, rel=1e-3)
    assert together.attention == pytest.approx(alone.attention / 2 + 3 * 160 / 1e3)


@pytest.mark.parametrize(
    ("overlap", "microbatches", "tpot_s"),
    [(0.0, 1, 12), (1.0, 1, 12), (0.0, 2, 23), (0.5, 2, 19), (1.0, 2, 15)],
)
def test_shared_cards_hide_a_part_of_what_crosses(overlap: float, microbatches: int, tpot_s: float) -> None:
    """7 are computed and 4 cross, each microbatch; 1 is beside. With one there is nothing to hide it behind."""
    assert Stages(3, 1, 4, 3, 1, overlap).tpot_s(microbatches) == pytest.approx(tpot_s)


def test_prompts_are_computed_with_what_is_decoded() -> None:
    """3 prompt tokens for each of 5 decoded ones, which follow 10 others: FLOPs of 4 h d = 80 per token of context."""
    slow = CARD.model_copy(update={"fp8_flops": 1e4})
    alone, both = (
        attention_s(ATTENTION, 10, 5, 40, Precision(), 1, Roofline(slow, PERFECT), prefill)
        for prefill in (Prefill(), Prefill(3, 10))
    )
    assert alone == pytest.approx(5 * 3200 / 1e4 + 2 * 600 * 5 / 1e4)
    assert both == pytest.approx(5 * (3200 + 3 * 800) / 1e4 + 4 * 2 * 600 * 5 / 1e4)
    for deployment in (Disaggregated(CARD, CARD, 1, 1, cards=2, transport=IDEAL), Collocated(CARD, 4, transport=IDEAL)):
        decoding = deployment.stages(Workload(SMALL, 40, efficiencies=PERFECT), 8)
        prefilling = deployment.stages(Workload(SMALL, 40, efficiencies=PERFECT, prefill=Prefill(3, 10)), 8)
        assert prefilling.dispatch == pytest.approx(4 * decoding.dispatch)
        assert prefilling.combine == pytest.approx(4 * decoding.combine)


def test_transports_by_hand() -> None:
    assert LOCAL.crossing_s(75, CARD) == pytest.approx(10e-6 + 75 / 750), "the link, not the NIC"
    assert INLINE.crossing_s(7e8, H800) == pytest.approx(110e-6 + 1), "gRPC is slower than any NIC"
    assert IDEAL.crossing_s(50, CARD) == pytest.approx(0.5)


def test_stage_times_of_many_batches_are_those_of_each() -> None:
    batches = np.array([1.0, 2, 50, 700])
    workload = Workload(load_shape("llama-4-maverick"), 9000)
    for deployment in (Disaggregated(H20, H800, 2, 1, experts=Experts.expert), Collocated(H800, 32, tp=2)):
        together = deployment.stages(workload, batches).tpot_s(3)
        assert together == pytest.approx([float(deployment.stages(workload, batch).tpot_s(3)) for batch in batches])


def test_the_all_to_all_of_deepep_is_predicted() -> None:
    """Its published times over 128 H800: 128 tokens of 7168 to 8 experts, out in FP8 and back in BF16."""
    workload = Workload(load_shape("deepseek-v3"), 4096)
    found = Collocated(H800, 128, microbatches=1).stages(workload, 128)
    moe_layers = 58
    assert float(found.dispatch) / moe_layers == pytest.approx(192e-6, rel=0.02)
    assert float(found.combine) / moe_layers == pytest.approx(369e-6, rel=0.02)


@pytest.mark.parametrize("row", paper.PUBLISHED_EXPERT_PARALLEL)
def test_published_expert_parallelism_is_predicted(row: paper.PublishedExpertParallel) -> None:
    assert row.predicted().tokens_per_s_per_card == pytest.approx(row.tokens_per_s_per_card, rel=0.14)


def test_the_ratio_by_hand() -> None:
    """T_A = 0.01 * 100 * 20 + 4 = 24; T_F = 0.05 * 100 r + 14: equal at r = 2."""
    assert attention_per_ffn(0.01, 4, 0.05, 14, 100, 20) == pytest.approx(2)
    assert attention_per_ffn(0.0001, 1, 0.05, 80, 100, 20) == pytest.approx(4), "sqrt(80 / 5)"
    assert attention_per_ffn(0.01, 4, 0, 14, 100, 20) == float("inf")


def test_at_its_ratio_attention_and_ffn_take_equally_long() -> None:
    deployment, workload = Disaggregated(H20, H800, 8, 2, experts=Experts.expert), Workload(STEP3, 8192)
    wanted = round(ratio_at(deployment, workload, 60))
    assert wanted == 11
    found = replace(deployment, num_attention=wanted).stages(workload, 60)
    assert float(found.attention) == pytest.approx(float(found.ffn), rel=0.1)


def best_of(found: Plan) -> Option | None:
    return min(found.bests, key=lambda option: option.worth, default=None)


def few(*cards: Accelerator, most: int = 24) -> Choices:
    return Choices(cards, cards, most_cards=most, microbatches=(3,))


def by_trying(deployments: list[Deployment], goal: Goal) -> list[Estimate]:
    found = []
    for deployment in deployments:
        try:
            found.append(estimate(deployment, goal.workload(Precision()), goal.tpot_s))
        except ConfigError:
            continue
    return sorted(found, key=lambda each: each.dollars_per_million_tokens)


@pytest.mark.parametrize("tpot_s", [0.02, 0.05])
@pytest.mark.parametrize("model", ["step-3", "qwen3-32b"])
def test_the_best_is_what_trying_all_finds(model: str, tpot_s: float) -> None:
    goal, choices = Goal(load_shape(model), 8192, tpot_s), few(H800, H20)
    for deployments in (list(choices.disaggregated(goal.shape)), list(choices.collocated(goal.shape))):
        best = rank(deployments, choices.precisions, goal).best
        tried = by_trying([*deployments], goal)
        assert best is not None
        assert best.estimate.dollars_per_million_tokens == pytest.approx(tried[0].dollars_per_million_tokens, rel=0.01)


def test_all_choices_are_within_the_cards_and_none_is_twice() -> None:
    choices = Choices((H800, H20), (H800,), most_cards=20)
    apart, together = list(choices.disaggregated(STEP3)), list(choices.collocated(STEP3))
    assert len(set(apart)) == len(apart)
    assert len(set(together)) == len(together)
    assert max(each.num_cards for each in [*apart, *together]) <= 20
    assert {each.card.name for each in together} == {"H800"}, "H20 is for attention only"
    assert {(each.num_attention, each.num_ffn) for each in apart if each.cards == 1} >= {(1, 1), (3, 5), (16, 4)}
    local = [each for each in apart if each.transport == LOCAL]
    assert all(each.attention == each.ffn and each.num_cards <= 8 for each in local)
    assert local


def test_a_longer_tpot_never_costs_more() -> None:
    found = plan(Goal(STEP3, 4096, 0.05), few(H800))
    for front in (found.disaggregated.front, found.collocated.front):
        assert (np.diff(front.tokens_per_s_per_card) >= 0).all()
        assert (np.diff(front.dollars_per_million_tokens[np.isfinite(front.dollars_per_million_tokens)]) <= 0).all()
    wide = found.disaggregated.front
    at = int(np.argmin(np.abs(wide.tpots_s - 0.05)))
    best = found.disaggregated.best
    assert best is not None
    assert best.estimate.tokens_per_s_per_card == pytest.approx(wide.tokens_per_s_per_card[at], rel=0.1)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(["memory_bytes_per_s", "memory_bytes", "link_bytes_per_s", "nic_bytes_per_s", "fp8_flops"]),
    st.floats(1.0, 4.0),
)
def test_a_better_card_never_costs_more(field: str, factor: float) -> None:
    better = H800.model_copy(update={field: getattr(H800, field) * factor})
    goal = Goal(STEP3, 8192, 0.05)
    before, after = (best_of(plan(goal, few(card))) for card in (H800, better))
    assert before is not None
    assert after is not None
    assert after.worth <= before.worth * 1.001


def test_units_are_as_many_as_a_rate_needs() -> None:
    goal = replace(Goal(STEP3, 4096, 0.05), tokens_per_s=1e6)
    best = best_of(plan(goal, few(H800)))
    assert best is not None
    assert best.units is not None
    capacity = best.estimate.tokens_per_s * 0.8
    assert (best.units - 1) * capacity < 1e6 <= best.units * capacity
    assert best.dollars_per_hour == best.units * best.deployment.num_cards * 2.0
    small = best_of(plan(replace(goal, tokens_per_s=10.0), few(H800)))
    assert small is not None
    assert small.units == 1
    assert small.num_cards <= 8, "no more than hold the model"


def choice(goal: Goal, choices: Choices) -> tuple[Choice, str]:
    found = verdict(plan(goal, choices))
    return found.choice, found.text


def test_cards_of_two_kinds_are_worth_disaggregating() -> None:
    assert choice(Goal(STEP3, 8192, 0.05), replace(few(H800, H20, most=96), microbatches=(4,))) == (
        Choice.disaggregate,
        "Disaggregate: 10A2F on 80 H20 + 16 H800 does it for 33% less than EP7 on 7 H20.",
    )


def test_a_model_that_fits_one_card_is_not() -> None:
    nano = replace(STEP3, layers=STEP3.layers[:4])
    chosen, text = choice(Goal(nano, 4096, 0.05), few(CARDS["H200"]))
    assert chosen is Choice.collocate
    assert text.startswith("Collocate: TP1 on 1 H200")


def test_a_small_gain_is_none() -> None:
    goal, choices = Goal(STEP3, 4096, 0.05), few(H800, most=16)
    found = plan(goal, choices)
    apart, together = found.disaggregated.best, found.collocated.best
    assert apart is not None
    assert together is not None
    share = together.worth / apart.worth / 1.05  # as if the FFN's cards were dearer, so that 5 % are left
    dearer = replace(found.disaggregated, options=[_dearer(option, share) for option in found.disaggregated.options])
    said = verdict(replace(found, disaggregated=dearer))
    assert said.choice is Choice.collocate
    assert "no more than these estimates are uncertain by" in said.text


def _dearer(option, factor):  # type: ignore[no-untyped-def]
    deployment = option.deployment
    cards = {
        side: getattr(deployment, side).model_copy(
            update={"dollars_per_hour": getattr(deployment, side).dollars_per_hour * factor}
        )
        for side in ("attention", "ffn")
    }
    return replace(option, estimate=replace(option.estimate, deployment=replace(deployment, **cards)))


def test_a_verdict_says_when_it_turns_on_the_overlap() -> None:
    chosen, text = choice(Goal(STEP3, 4096, 0.05), Choices((H800,), (H800,), microbatches=(3, 4)))
    assert chosen is Choice.disaggregate
    assert re.search(r"all-to-all.*with all of it hidden, 3A2F .* and EP128 .* and the verdict is to collocate", text)
    assert re.search(r"over its link.*with nothing of it hidden, .*, and the verdict is to collocate", text)


@pytest.mark.parametrize(
    ("goal", "card", "sentence"),
    [
        (Goal(STEP3, 4096, 0.002), H800, r"within 2 ms; the shortest TPOT is [\d.]+ ms"),
        (Goal(STEP3, 4096, 0.05), CARDS["L4"], "fits no deployment"),
        (
            replace(Goal(STEP3, 4096, 0.05), ttft_s=0.06, output_tokens=500.0, prefill=Prefill(8, 2000)),
            H800,
            "no deployment keeps the TTFT",
        ),
    ],
)
def test_nothing_is_said_with_its_reason(goal: Goal, card: Accelerator, sentence: str) -> None:
    found = verdict(plan(goal, few(card, most=8)))
    assert found.choice is Choice.nothing
    assert re.search(sentence, found.text)


def test_a_kind_that_cannot_be_is_said_with_its_reason() -> None:
    """Cards of one kind for attention and another for the FFN cannot be shared; one card cannot be two."""
    apart = verdict(plan(Goal(STEP3, 4096, 0.05), Choices((H20,), (H800,), most_cards=16, microbatches=(3,))))
    assert apart.text == (
        "Disaggregate: no collocated deployment that was looked at is possible: none could be made of these cards."
    )
    alone = verdict(plan(Goal(load_shape("qwen3-32b"), 4096, 0.05), few(CARDS["H200"], most=1)))
    assert alone.choice is Choice.collocate
    assert "no disaggregated deployment that was looked at is possible" in alone.text
    slow = verdict(plan(Goal(STEP3, 4096, 0.0035), few(H800, most=16)))
    assert re.search(r"no disaggregated .* keeps the TPOT; the shortest is [\d.]+ ms", slow.text)


def test_quantisations_are_compared() -> None:
    widths = [Precision(kv=1), Precision(kv=2)]
    found = plan(Goal(STEP3, 8192, 0.05), replace(few(H800), precisions=widths)).collocated.options
    assert {option.estimate.workload.precision.kv for option in found} == {1, 2}


def test_collocated_cards_are_any_number_in_a_server_and_then_whole_servers() -> None:
    sizes = {each.num_cards for each in few(H800, most=40).collocated(STEP3)}
    assert sizes == {1, 2, 3, 4, 5, 6, 7, 8, 16, 24, 32, 40}
    assert {each.num_cards for each in few(H800, most=40).collocated(load_shape("qwen3-32b"))} == {1, 2, 4, 8}


def test_a_ttft_is_kept_with_what_the_prompts_cost() -> None:
    goal = replace(Goal(STEP3, 4096, 0.05), ttft_s=1.0, output_tokens=500.0, prefill=Prefill(8, 2000))
    with_prompts, without = (best_of(plan(each, few(H800))) for each in (goal, Goal(STEP3, 4096, 0.05)))
    assert with_prompts is not None
    assert without is not None
    assert with_prompts.estimate.ttft_s(500) <= 1.0
    assert with_prompts.worth > 2 * without.worth, "eight prompt tokens with each decoded one"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=True)


SMALL_PLAN = ("--model", "step-3", "--card", "H800", "--max-cards", "16", "--microbatches", "3")


def test_the_memory_by_hand() -> None:
    """Attention has 600 parameters in each of 3 layers, and 2000 for embedding and head; an FFN has 2700."""
    workload = Workload(SMALL, 40, Precision(weights=2), PERFECT)
    apart = Disaggregated(CARD, CARD, 1, 2, cards=2)
    assert apart.weight_bytes(workload) == pytest.approx((2 * (3 * 600 + 2000 / 2), 2 * 3 * 2700 / 4))
    spread = replace(apart, experts=Experts.expert)
    assert spread.weight_bytes(workload)[1] == pytest.approx(2 * 3 * (2400 / 4 + 300)), "the shared part is on each"
    together = Collocated(CARD, 4, tp=2)
    assert together.weight_bytes(workload) == pytest.approx((2 * (900 + 1000), 2 * 3 * (2400 / 4 + 300 / 2)))
    assert together.free_bytes(workload) == pytest.approx(1e6 - sum(together.weight_bytes(workload)))
    assert together.kv_bytes(workload) == pytest.approx(3 * 40 * 20 / 2)


def test_the_report_says_it_all_and_is_written(tmp_path: Path) -> None:
    page, numbers = tmp_path / "plan.html", tmp_path / "plan.json"
    done = run(
        *SMALL_PLAN, "--prompt", "3000", "--output", "600", "--rate", "10", "--html", str(page), "--json", str(numbers)
    )
    assert done.exit_code == 0, done.output
    for part in ("a context of 3,300 tokens", "the best of each kind", "how they are spread", "bound by", "Assumed"):
        assert part in done.output
    found = json.loads(numbers.read_text())
    assert found["verdict"] in ("disaggregate", "collocate")
    assert found["context"] == pytest.approx(3299.5)
    best = found["disaggregated"][0]
    assert best["units"] >= 1
    assert best["tpot_s"] <= 0.05
    assert sum(best["stage_s"].values()) > 0
    html = page.read_text()
    assert html.count("<svg") == 2
    assert found["reason"].split(":")[0] in html
    assert "<script" not in html
    assert run(*SMALL_PLAN, "--pictures", str(tmp_path)).exit_code == 0
    drawn = (tmp_path / "plan-pareto.svg").read_text()
    assert drawn[drawn.index("<svg") :] in run_html(tmp_path)
    assert (tmp_path / "plan-timeline.png").exists()


def run_html(folder: Path) -> str:
    assert run(*SMALL_PLAN, "--html", str(folder / "again.html")).exit_code == 0
    return (folder / "again.html").read_text()


def test_a_plan_that_nothing_keeps_ends_with_status_3() -> None:
    done = run(*SMALL_PLAN, "--tpot-ms", "1")
    assert done.exit_code == 3
    assert "Neither: no deployment decodes a token within 1 ms" in done.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--card", "H800"), "name the model"),
        (("--model", "step-3"), "name the cards"),
        (("--model", "step-3", "--attention-card", "H20"), "name cards for both parts"),
        (("--model", "step-4", "--card", "H800"), "there is no model step-4"),
        (("--model", "step-3", "--card", "B100"), "there is no card 'B100'"),
        ((*SMALL_PLAN, "--context", "70000"), "not within 1..65536"),
        ((*SMALL_PLAN, "--context", "0"), "not within 1..65536"),
        ((*SMALL_PLAN, "--context", "nan"), "not within 1..65536"),
        ((*SMALL_PLAN, "--tpot-ms", "-5"), "--tpot-ms -5: give a number above 0"),
        ((*SMALL_PLAN, "--tpot-ms", "inf"), "--tpot-ms inf: give a number above 0"),
        ((*SMALL_PLAN, "--max-cards", "0"), "--max-cards 0 is not within 1..4096"),
        (("--model", "step-3", "--card", "H800", "--microbatches", "0"), "--microbatches 0 is not within 1..16"),
        ((*SMALL_PLAN, "--transport", "rdma"), "--transport rdma: there are nixl and inline"),
        ((*SMALL_PLAN, "--rate", "5"), "need the lengths of requests"),
        ((*SMALL_PLAN, "--ttft-ms", "500"), "need the lengths of requests"),
        ((*SMALL_PLAN, "--prompt", "500"), "--prompt and --output go together"),
        ((*SMALL_PLAN, "--prompt", "5", "--output", "5", "--context", "5"), "leave one of them out"),
        ((*SMALL_PLAN, "--prompt", "5", "--output", "5", "--rate", "-1"), "--rate -1: give a number above 0"),
        ((*SMALL_PLAN, "--prompt", "5", "--lengths", "x"), "leave out --prompt and --output"),
        ((*SMALL_PLAN, "--lengths", "/nowhere/at.all"), "cannot be read"),
        ((*SMALL_PLAN, "--assume", "memory=2"), "memory is a number from 0.01 to 1"),
        ((*SMALL_PLAN, "--assume", "memory"), "memory is a number from 0.01 to 1"),
        ((*SMALL_PLAN, "--assume", "speed=2"), "there is no 'speed'"),
        ((*SMALL_PLAN, "--html", "/nowhere/plan.html"), "cannot be written"),
        ((*SMALL_PLAN, "paper"), "--model is of `afd plan` itself"),
        (
            (*SMALL_PLAN, "--prompt", "60000", "--output", "10000"),
            "requests of 70000 tokens in the mean are over step-3's",
        ),
        (("--measured", "/dev/zero", "--model", "step-3"), "/dev/zero cannot be read: it is no file"),
        (("--measured", __file__, "--model", "step-3", "--microbatches", "0"), "--microbatches 0 is not within 1..16"),
        (("--measured", __file__, "--model", "step-3", "--context", "99999"), "--context 99999 is not within 1..65536"),
    ],
)
def test_nonsense_is_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    done = run(*arguments)
    assert isinstance(done.exception, ConfigError), done.output
    assert sentence in str(done.exception)
    assert "\n" not in str(done.exception)


def test_without_matplotlib_a_picture_is_a_sentence(tmp_path: Path) -> None:
    blocked = "import sys; sys.modules['matplotlib'] = None; from afd.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", blocked, "plan", *SMALL_PLAN, "--html", str(tmp_path / "plan.html")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "afd: pictures need matplotlib: pip install 'afd[planner]'\n"


def test_a_verdict_says_when_it_turns_on_whole_units() -> None:
    """One unit of EP16 just misses this rate."""
    arguments = ("--model", "deepseek-v3", "--card", "H800", "--prompt", "2000", "--output", "300", "--ttft-ms", "500")
    assert "how many whole units" in " ".join(run(*arguments, "--rate", "20").output.split())
    assert "how many whole units" not in " ".join(run(*arguments, "--rate", "2000").output.split())


def test_a_tie_is_one() -> None:
    same = plan(replace(Goal(STEP3, 3599, 0.05), tokens_per_s=24_000.0), Choices((H800,), (H800,)))
    assert verdict(same).text.startswith("Collocate: EP8 on 8 H800 costs the same as")


def test_assumptions_change_the_plan() -> None:
    slower = question.assume(["memory=0.4", "overlap=0"])
    assert (slower.memory, slower.overlap, slower.flops) == (0.4, 0.0, 0.75)
    goal = Goal(STEP3, 8192, 0.05)
    stated, assumed = (best_of(plan(replace(goal, efficiencies=each), few(H800))) for each in (Efficiencies(), slower))
    assert stated is not None
    assert assumed is not None
    assert assumed.worth > stated.worth
