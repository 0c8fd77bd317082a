"""A plan as people read it: in the terminal, or as one HTML file with its pictures."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from afd.errors import ConfigError
from afd.planner.deployment import Collocated, Disaggregated, Experts
from afd.planner.estimate import estimate
from afd.planner.ratio import ratio_at
from afd.planner.search import Goal, Option, Plan
from afd.planner.stages import INLINE, NIXL
from afd.planner.verdict import describe, verdict

_MANY = 50  # attention instances per FFN: there the FFN reads its weights for anyone, and a line says nothing
_EDGE = 0.9  # of the cards that are allowed
_WIDTHS = {1.0: "FP8", 2.0: "BF16"}


@dataclass(frozen=True)
class Table:
    """Rows of text; all columns but the first are numbers or short words."""

    title: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Report:
    title: str
    verdict: str
    tables: list[Table]
    notes: list[str]


def report(plan: Plan) -> Report:
    options = [*plan.disaggregated.options, *plan.collocated.options]
    tables = [_options(plan.goal, options), _spread(options)] if options else []
    best = plan.bests
    return Report(
        _title(plan.goal),
        verdict(plan).text,
        [*tables, *([_stages(best), _memory(best)] if best else [])],
        list(_notes(plan)),
    )


def _title(goal: Goal) -> str:
    asked = f"{goal.shape.name}, a context of {goal.context:,.0f} tokens, a token within {goal.tpot_s * 1e3:g} ms"
    if goal.ttft_s is not None:
        asked += f", the first within {goal.ttft_s * 1e3:g} ms"
    if goal.tokens_per_s:
        asked += f", {goal.tokens_per_s:,.0f} tokens/s"
    return asked


def _options(goal: Goal, options: Sequence[Option]) -> Table:
    columns: list[str] = ["deployment", "cards", "TPOT", "tokens/s/card", "$/Mtoken", "bound by"]
    rows = [_speed(option) for option in options]
    if goal.tokens_per_s:
        columns = [*columns, "units", "$/hour"]
        rows = [
            [*row, f"{option.units}", f"{option.dollars_per_hour:,.2f}"]
            for row, option in zip(rows, options, strict=True)
        ]
    return Table("the best of each kind", columns, rows)


def _speed(option: Option) -> list[str]:
    found = option.estimate
    return [
        option.deployment.name,
        option.deployment.cards_text,
        f"{found.tpot_s * 1e3:.1f} ms",
        f"{found.tokens_per_s_per_card:,.0f}",
        f"{found.dollars_per_million_tokens:.3g}",
        found.binding,
    ]


def _spread(options: Sequence[Option]) -> Table:
    columns = ["deployment", "sequences", "m", "attention", "FFN by", "over", "weights, KV"]
    return Table("how they are spread: m microbatches, TP within attention", columns, [*map(_spread_row, options)])


def _spread_row(option: Option) -> list[str]:
    deployment, precision = option.deployment, option.estimate.workload.precision
    if isinstance(deployment, Disaggregated):
        experts = "experts" if deployment.experts is Experts.expert else "matrices"
        ffn, over = f"{deployment.num_ffn}x{deployment.cards} {experts}", deployment.transport.name
        attention = f"{deployment.num_attention}x{deployment.cards} TP{deployment.tp}"
    else:
        assert isinstance(deployment, Collocated)
        attention, over = f"{deployment.num_groups}xTP{deployment.tp}", ""
        ffn = "experts" if deployment.num_groups > 1 else "matrices"
    widths = [_WIDTHS.get(width, f"{8 * width:g} bits") for width in (precision.weights, precision.kv)]
    sequences = f"{option.estimate.sequences:,}"
    return [deployment.name, sequences, f"{deployment.microbatches}", attention, ffn, over, ", ".join(widths)]


def _stages(options: Sequence[Option]) -> Table:
    """Per layer and microbatch."""
    rows = []
    for option in options:
        found = option.estimate
        num_layers, microbatches = found.workload.shape.num_layers, found.deployment.microbatches
        busy = [float(time) * microbatches / found.tpot_s for time in found.stages.occupied.values()]
        times = [float(time) / num_layers * 1e6 for time in found.stages.occupied.values()]
        rows.append([describe(option), *(f"{time:.0f} ({share:.0%})" for time, share in zip(times, busy, strict=True))])
    columns = ["deployment", "attention", "dispatch", "FFN", "combine"]
    return Table("µs per layer and microbatch (share of the TPOT)", columns, rows)


def _memory(options: Sequence[Option]) -> Table:
    columns = ["deployment", "attention's weights", "KV cache", "can be used", "FFN's weights", "can be used "]
    return Table("GB on each card", columns, [*map(_memory_row, options)])


def _memory_row(option: Option) -> list[str]:
    found, deployment = option.estimate, option.deployment
    attention, ffn = deployment.weight_bytes(found.workload)
    kv = found.batch * deployment.microbatches * deployment.kv_bytes(found.workload)
    row = [describe(option), _gigabytes(attention), _gigabytes(kv)]
    if isinstance(deployment, Disaggregated):
        usable = [found.workload.on(card).usable_bytes for card in (deployment.attention, deployment.ffn)]
        return [*row, _gigabytes(usable[0]), _gigabytes(ffn), _gigabytes(usable[1])]
    assert isinstance(deployment, Collocated)
    return [*row, _gigabytes(found.workload.on(deployment.card).usable_bytes), _gigabytes(ffn), "the same"]


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f}"


def _notes(plan: Plan) -> Iterator[str]:
    goal, best = plan.goal, plan.disaggregated.best
    if best is not None and isinstance(best.deployment, Disaggregated):
        found, deployment = best.estimate, best.deployment
        ratio = ratio_at(deployment, found.workload, found.batch)
        wanted = f"{ratio:.1f}" if ratio < _MANY else "any number of"
        yield (
            f"The closed form of arXiv 2601.21351 wants {wanted} attention instances for {deployment.num_ffn} of "
            f"the FFN at this batch; {deployment.num_attention} were found, with the network and the TPOT counted."
        )
        yield from _over_inline(best)
    if goal.tokens_per_s:
        yield f"Units are as many as keep them {goal.utilization:.0%} busy; $/Mtoken is of those that never idle."
    if goal.output_tokens and not goal.prefill.tokens:
        yield "Prompts are prefilled elsewhere, on cards that are not counted; --ttft-ms lets these do it."
    if any(option.estimate.binding == "memory" for option in plan.bests):
        yield (
            "Memory holds sequences as long as they are in the mean, as a cache of blocks does. Who admits a sequence "
            "only where its whole length fits has fewer, as `afd plan simulate` does."
        )
    if any(option.deployment.num_cards > plan.most_cards * _EDGE for option in plan.bests):
        yield f"The best is close to the {plan.most_cards} cards that were allowed: --max-cards allows more."
    stated = goal.efficiencies
    yield (
        f"Assumed: {stated.memory:.0%} of the memory's bandwidth, {stated.flops:.0%} of the FLOP/s, "
        f"{stated.link:.0%} of the link, {stated.overlap:.0%} of what can be hidden on shared cards, "
        f"{stated.link_overlap:.0%} of what FFN instances move over links hidden, the busiest card of spread experts "
        f"{stated.imbalance:g} times the mean, {stated.usable_memory:.0%} of the memory, "
        f"{stated.step_s * 1e3:g} ms per step beside the layers."
    )
    yield (
        f"{plan.disaggregated.considered:,} disaggregated and {plan.collocated.considered:,} collocated deployments "
        "were compared."
    )


def _over_inline(option: Option) -> Iterator[str]:
    found, deployment = option.estimate, option.deployment
    if not isinstance(deployment, Disaggregated) or deployment.transport != NIXL:
        return
    try:
        slower = estimate(replace(deployment, transport=INLINE), found.workload, found.tpot_s * 1.0001)
    except ConfigError:
        yield "With its tensors inline in gRPC messages instead, it could not keep this TPOT at all."
        return
    yield (
        f"With its tensors inline in gRPC messages instead, it would decode {slower.tokens_per_s_per_card:,.0f} "
        f"tokens/s per card within the same TPOT, {slower.tokens_per_s / found.tokens_per_s:.2f} of it."
    )


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328 }}
h1 {{ font-size: 1.4rem }} h2 {{ font-size: 1.1rem; margin-top: 2rem }}
.verdict {{ font-size: 1.15rem; border-left: 4px solid #0969da; padding-left: 1rem }}
.wide {{ overflow-x: auto }} table {{ border-collapse: collapse; font-size: .9rem }}
th, td {{ padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #d1d9e0; white-space: nowrap }}
th:first-child, td:first-child {{ text-align: left }} svg {{ max-width: 100%; height: auto }}
.note {{ color: #59636e; font-size: .9rem }}
</style>
<h1>{title}</h1>
<p class="verdict">{verdict}</p>
{pictures}
{tables}
{notes}
</html>
"""


def as_html(found: Report, pictures: Sequence[tuple[str, str]]) -> str:
    """One file that needs no other. `pictures` are titles and SVG."""
    return _PAGE.format(
        title=html.escape(found.title),
        verdict=html.escape(found.verdict),
        pictures="\n".join(f"<h2>{html.escape(title)}</h2>\n{svg}" for title, svg in pictures),
        tables="\n".join(map(_html_table, found.tables)),
        notes="\n".join(f'<p class="note">{html.escape(note)}</p>' for note in found.notes),
    )


def _html_table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = [row(table.columns, "th"), *(row(cells, "td") for cells in table.rows)]
    return f'<h2>{html.escape(table.title)}</h2>\n<div class="wide"><table>{"".join(lines)}</table></div>'


def as_json(plan: Plan) -> dict[str, object]:
    """Everything of the report in numbers; seconds, bytes and dollars."""
    goal, found = plan.goal, verdict(plan)
    return {
        "model": goal.shape.name,
        "context": goal.context,
        "tpot_s": goal.tpot_s,
        "ttft_s": goal.ttft_s,
        "tokens_per_s": goal.tokens_per_s,
        "output_tokens": goal.output_tokens,
        "prefilled_tokens_per_token": goal.prefill.tokens,
        "assumed": asdict(goal.efficiencies),
        "considered": {"disaggregated": plan.disaggregated.considered, "collocated": plan.collocated.considered},
        "verdict": found.choice.value,
        "reason": found.text,
        "disaggregated": [_option(option, goal) for option in plan.disaggregated.options],
        "collocated": [_option(option, goal) for option in plan.collocated.options],
        "pareto": {
            "tpot_s": plan.disaggregated.front.tpots_s.tolist(),
            "disaggregated_tokens_per_s_per_card": plan.disaggregated.front.tokens_per_s_per_card.tolist(),
            "collocated_tokens_per_s_per_card": plan.collocated.front.tokens_per_s_per_card.tolist(),
        },
    }


def _option(option: Option, goal: Goal) -> dict[str, object]:
    found, deployment = option.estimate, option.deployment
    row: dict[str, object] = {
        "deployment": deployment.name,
        "cards": deployment.cards_text,
        "num_cards": deployment.num_cards,
        "units": option.units,
        "microbatches": deployment.microbatches,
        "batch": found.batch,
        "sequences": found.sequences,
        "weight_bytes": found.workload.precision.weights,
        "kv_bytes": found.workload.precision.kv,
        "tpot_s": found.tpot_s,
        "tokens_per_s": found.tokens_per_s,
        "tokens_per_s_per_card": found.tokens_per_s_per_card,
        "ttft_s": found.ttft_s(goal.output_tokens) if goal.output_tokens and goal.prefill.tokens else None,
        "dollars_per_million_tokens": found.dollars_per_million_tokens,
        "dollars_per_hour": option.dollars_per_hour,
        "bound_by": found.binding,
        "stage_s": {name: float(time) for name, time in found.stages.occupied.items()},
        "tensor_parallel": getattr(deployment, "tp", 1),
    }
    if isinstance(deployment, Disaggregated):
        row |= {
            "num_attention": deployment.num_attention,
            "num_ffn": deployment.num_ffn,
            "cards_per_instance": deployment.cards,
            "experts": deployment.experts.value,
            "transport": deployment.transport.name,
            "closed_form_num_attention": ratio_at(deployment, found.workload, found.batch),
        }
    return row
