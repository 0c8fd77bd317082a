"""A simulation over time."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from afd.planner.drawing import ATTENTION, FFN, SOFT, Axes, EngFormatter, Figure, save
from afd.planner.simulation.outcome import Simulated
from afd.planner.simulation.scenario import Scenario

_MOST_MARKS = 200  # more than that are a grey area


def draw_simulation(folder: Path, found: Simulated, scenario: Scenario) -> list[Path]:
    """Says where. Raises ConfigError if the folder cannot be written."""
    figure = Figure(figsize=(9, 6.5))
    rows: list[Axes] = list(figure.subplots(3, 1, sharex=True))
    lines = (
        ("tokens per second", [second.tokens for second in found.series], ATTENTION),
        ("sequences that decode", [second.sequences for second in found.series], FFN),
        ("requests that wait", [second.waiting for second in found.series], SOFT),
    )
    for axes, (name, values, colour) in zip(rows, lines, strict=True):
        middle = np.minimum(np.arange(len(values)) + 0.5, scenario.seconds)
        axes.plot(middle, values, color=colour, linewidth=1.8)
        axes.set(ylim=(0, 1.15 * max(*values, 1)), title=name)
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
    rows[0].axhline(found.expected.tokens_per_s, color=SOFT, linestyle=":", linewidth=1.2, label="estimate")
    _mark(rows, found)
    rows[-1].set(xlabel="simulated seconds", xlim=(0, scenario.seconds))
    rows[0].legend(frameon=False, ncols=3, loc="lower right", fontsize=9)
    return save(folder, "plan-simulation", figure)


def _mark(rows: list[Axes], found: Simulated) -> None:
    """Losses as ticks at the top of the first picture, scaling as lines through all."""
    for what, colour, height in (("attention lost", ATTENTION, 0.97), ("FFN lost", FFN, 0.90)):
        at_s = [event.at_s for event in found.events if event.what == what][:_MOST_MARKS]
        if at_s:
            top = rows[0].get_xaxis_transform()
            rows[0].plot(at_s, [height] * len(at_s), "v", color=colour, markersize=5, transform=top, label=what)
    for event in found.events:
        if event.what.endswith("replicas"):
            for axes in rows:
                axes.axvline(event.at_s, color=SOFT, linestyle="--", linewidth=1)
            rows[1].annotate(
                event.what,
                (event.at_s, 0.06),
                xycoords=rows[1].get_xaxis_transform(),
                xytext=(4, 0),
                textcoords="offset points",
                color=SOFT,
                size=9,
            )
