"""How well `afd plan --measured` predicts a mesh on this machine.

`python -m benchmarks.planner_prediction --model DIR`.

Meshes of several ratios run at once and take turns, each process with one thread. Under some loads the stages are
calibrated; the others are predicted from them, and measured in the same rounds. One thread each, since `afd up` would
give the processes of each ratio another number of cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track

from afd.bench import Load
from afd.mesh import MeshOptions, running_mesh
from afd.output import write_json
from afd.planner.calibration import Calibration, calibrate
from afd.planner.observations import Observation, Setting, of_window
from afd.planner.shape import load_shape
from benchmarks.decode import decode

_OUTPUT_TOKENS = 64


class Ratio(NamedTuple):
    attention: int
    ffn: int
    microbatches: int

    def __str__(self) -> str:
        pipelined = f", {self.microbatches} microbatches" if self.microbatches > 1 else ""
        return f"{self.attention}A{self.ffn}F{pipelined}"


class Point(NamedTuple):
    ratio: Ratio
    streams: int
    prompt_tokens: int


_SERIAL, _PIPELINED = Ratio(1, 1, 1), Ratio(1, 1, 2)
_MORE_ATTENTION, _MORE_FFN, _MORE_OF_BOTH = Ratio(2, 1, 1), Ratio(1, 2, 1), Ratio(2, 2, 1)

ONE_TO_ONE = (
    Point(_SERIAL, 1, 64),
    Point(_SERIAL, 4, 64),
    Point(_SERIAL, 8, 64),
    Point(_SERIAL, 16, 64),
    Point(_SERIAL, 16, 512),
    Point(_PIPELINED, 16, 64),
)
OTHERS = (Point(_MORE_FFN, 16, 64), Point(_MORE_OF_BOTH, 16, 64))
HELD_OUT = (
    Point(_SERIAL, 32, 64),
    Point(_SERIAL, 16, 1024),
    Point(_PIPELINED, 32, 64),
    Point(_MORE_ATTENTION, 16, 64),
    Point(_MORE_ATTENTION, 32, 64),
    Point(_MORE_ATTENTION, 16, 512),
    Point(_MORE_FFN, 32, 64),
    Point(_MORE_FFN, 16, 512),
    Point(_MORE_OF_BOTH, 32, 64),
    Point(_MORE_OF_BOTH, 16, 512),
)


@dataclass(frozen=True)
class Run:
    """What was measured of a point once."""

    point: Point
    tokens_per_s: float
    observation: Observation

    @classmethod
    def read(cls, saved: Any) -> Run:
        ratio, streams, prompt_tokens = saved["point"]
        observation = saved["observation"]
        return cls(
            Point(Ratio(*ratio), streams, prompt_tokens),
            saved["tokens_per_s"],
            Observation(**{**observation, "setting": Setting(**observation["setting"])}),
        )


def measure(model: Path, num_rounds: int) -> list[Run]:
    """All points, one after the other, so many times; after a round that does not count."""
    points = [*ONE_TO_ONE, *OTHERS, *HELD_OUT]
    with contextlib.ExitStack() as stack:
        meshes = {
            ratio: stack.enter_context(
                running_mesh(
                    MeshOptions(
                        model,
                        attention=ratio.attention,
                        ffn=ratio.ffn,
                        microbatches=str(ratio.microbatches),
                        threads=1,
                        settings={"prefill_chunk_tokens": "2048"},
                    )
                )
            )
            for ratio in dict.fromkeys(point.ratio for point in points)
        }
        for mesh in meshes.values():
            asyncio.run(decode(mesh, Load(4, 64, 32)))
        runs = []
        for point in track(points * num_rounds, console=Console(stderr=True), transient=True):
            load = Load(point.streams, point.prompt_tokens, _OUTPUT_TOKENS)
            tokens_per_s, spent = asyncio.run(decode(meshes[point.ratio], load))
            runs.append(Run(point, tokens_per_s, of_window(spent, point.ratio.attention)))
        return runs


def compare(title: str, calibration: Calibration, runs: Sequence[Run], points: Sequence[Point]) -> str:
    """A table in Markdown."""
    lines = [
        f"{title}: {calibration.machine}; steps that it was fitted to {_spread(calibration.errors)} off",
        "",
        "| mesh | streams | prompt | measured, tokens/s | median | predicted | | bound by |",
        "|---|---:|---:|---|---:|---:|---:|---|",
    ]
    errors = []
    for point in points:
        own = [run for run in runs if run.point == point]
        speed = median(run.tokens_per_s for run in own)
        found = calibration.predict(typical(own).setting)
        errors.append(found.tokens_per_s / speed - 1)
        measured = ", ".join(f"{run.tokens_per_s:.0f}" for run in own)
        lines.append(
            f"| {point.ratio} | {point.streams} | {point.prompt_tokens} | {measured} | {speed:.0f} "
            f"| {found.tokens_per_s:.0f} | {errors[-1]:+.1%} | {found.binding} |"
        )
    within = sum(abs(error) <= 0.1 for error in errors)
    return "\n".join([*lines, "", f"{within} of {len(errors)} within 10 %, {_spread(errors)} off", ""])


def typical(own: Sequence[Run]) -> Observation:
    """Of the run that is the median one: others may have been disturbed."""
    return sorted(own, key=lambda run: run.tokens_per_s)[(len(own) - 1) // 2].observation


def _spread(errors: Sequence[float]) -> str:
    return f"{median(map(abs, errors)):.1%} in the median, {max(map(abs, errors)):.1%} at most"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2, help="0: compare what --with has")
    parser.add_argument("--with", type=Path, nargs="+", default=[], dest="others", help="--json of earlier runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runs = [Run.read(saved) for path in options.others for saved in json.loads(path.read_text())]
    runs += measure(options.model, options.rounds) if options.rounds else []
    if options.json:
        write_json(options.json, [asdict(run) for run in runs])
    shape, cores = load_shape(str(options.model)), len(os.sched_getaffinity(0))
    for title, points, others in (
        ("From 1A1F alone", ONE_TO_ONE, [*OTHERS, *HELD_OUT]),
        ("From 1A1F, and one load of 1A2F and 2A2F each", [*ONE_TO_ONE, *OTHERS], HELD_OUT),
    ):
        measured = [typical([run for run in runs if run.point == point]) for point in points]
        found = calibrate(measured, shape, cores)
        print(compare(title, found, runs, others))


if __name__ == "__main__":
    main()
