"""A plan's figures: the Pareto front, and a few layers of the pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from afd.planner.drawing import (
    ATTENTION,
    FFN,
    SOFT,
    Axes,
    Figure,
    FuncFormatter,
    NullFormatter,
    ScalarFormatter,
    mpl,
)
from afd.planner.search import Option, Plan
from afd.planner.stages import Stages

_LAYERS = 4
_TICKS = [2, 5, 10, 20, 50, 100, 200, 500, 1000]


def pareto(plan: Plan) -> Figure:
    """Tokens per second and card, and dollars, within each TPOT, of both kinds."""
    figure = Figure(figsize=(10, 4.6))
    speed, money = figure.subplots(1, 2)
    apart, together = plan.disaggregated.front, plan.collocated.front
    low, high = plan.unhidden.front, plan.hidden.front
    tpots = apart.tpots_s * 1e3
    for axes, name in ((speed, "tokens_per_s_per_card"), (money, "dollars_per_million_tokens")):
        lines = [_finite(getattr(front, name)) for front in (apart, together, low, high)]
        axes.plot(tpots, lines[0], color=ATTENTION, linewidth=2.5, label="disaggregated")
        axes.plot(tpots, lines[1], color=FFN, linewidth=2.5, label="collocated")
        axes.fill_between(
            tpots,
            lines[2],
            lines[3],
            color=FFN,
            alpha=0.15,
            linewidth=0,
            label="with none to all of the all-to-all hidden",
        )
        axes.axvline(plan.goal.tpot_s * 1e3, color=SOFT, linestyle="--", linewidth=1)
        axes.set(xscale="log", xlabel="TPOT, ms", xlim=(tpots[0], tpots[-1]))
        axes.set_xticks([tick for tick in _TICKS if tpots[0] <= tick <= tpots[-1]])
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
    _name_points(speed, tpots, apart.tokens_per_s_per_card, apart.fastest, plan.goal.tpot_s * 1e3)
    speed.set(ylim=(0, None), title="Tokens per second and card, at most")
    money.set(yscale="log", title="$ per million tokens, at least")
    money.yaxis.set_major_formatter(FuncFormatter(lambda dollars, _: f"{dollars:.2g}"))
    speed.legend(frameon=False, loc="lower right", fontsize=9)
    return figure


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where((values > 0) & np.isfinite(values), values, np.nan)


def _name_points(
    axes: Axes, tpots: NDArray[np.float64], speeds: NDArray[np.float64], names: Sequence[str], wanted: float
) -> None:
    """What the fastest is called: at the TPOT that is wanted, and at a half and the double of it."""
    for tpot in (wanted / 2, wanted, wanted * 2):
        index = int(np.searchsorted(tpots, tpot * 1.0001, side="right")) - 1
        if 0 <= index < len(names) and names[index]:
            axes.plot(tpots[index], speeds[index], "o", color=ATTENTION, markersize=5)
            axes.annotate(
                names[index],
                (tpots[index], speeds[index]),
                xytext=(5, -13),
                textcoords="offset points",
                color=ATTENTION,
            )


@dataclass(frozen=True)
class _Span:
    row: int
    microbatch: int
    start_s: float
    stop_s: float


def timeline(option: Option) -> Figure:
    """The first layers of a disaggregated step, microbatch by microbatch."""
    estimate = option.estimate
    num_layers = estimate.workload.shape.num_layers
    spans = _spans(estimate.stages, estimate.deployment.microbatches, num_layers)
    figure = Figure(figsize=(10, 2.6))
    axes = figure.subplots()
    colours = mpl.color_sequences["tab10"]
    for span in spans:
        start, width = span.start_s * 1e6, (span.stop_s - span.start_s) * 1e6
        axes.barh(span.row, width, left=start, height=0.8, color=colours[span.microbatch], edgecolor="white")
    for microbatch in range(estimate.deployment.microbatches):
        axes.barh(0, 0, color=colours[microbatch], label=f"microbatch {microbatch + 1}")
    axes.set_yticks(range(4), list(estimate.stages.occupied))
    axes.invert_yaxis()
    axes.set(xlabel="µs", xlim=(0, None))
    axes.set_title(f"The first {_LAYERS} layers of a step of {estimate.deployment.name}")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    return figure


def _spans(stages: Stages, microbatches: int, num_layers: int) -> list[_Span]:
    """Each part begins when the one before it is done with the microbatch, and it with the microbatch before."""
    times = [float(time) / num_layers for time in stages.occupied.values()]
    free, ready, spans = [0.0] * len(times), [0.0] * microbatches, []
    for _ in range(_LAYERS):
        for microbatch in range(microbatches):
            for row, time in enumerate(times):
                start = max(free[row], ready[microbatch])
                free[row] = ready[microbatch] = start + time
                spans.append(_Span(row, microbatch, start, start + time))
    return spans
