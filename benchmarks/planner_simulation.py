"""What a simulation takes: time and memory for a minute of traffic, `python -m benchmarks.planner_simulation`.

Each case has a process of its own, on one core. Step-3 with full batches, jitter and failures; a replica is one of
attention or of the FFN, so that 10,000 of them are 2500 times 2A2F.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.table import Table

from afd.output import write_json
from afd.planner.accelerators import load_accelerators
from afd.planner.deployment import Disaggregated
from afd.planner.shape import load_shape
from afd.planner.simulation import Conditions, Scenario, Streams, simulate
from afd.planner.stages import Workload
from afd.planner.traffic import Drawn, distribution

_PER_CARD = 120  # sequences in each microbatch
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Case:
    units: int
    num_attention: int
    num_ffn: int


CASES = (Case(1, 1, 1), Case(50, 1, 1), Case(25, 2, 2), Case(2500, 2, 2), Case(10_000, 1, 1))


@dataclass(frozen=True)
class Cost:
    deployment: str
    units: int
    replicas: int
    sequences: int
    steps: int
    simulated_s: float
    wall_s: float
    peak_mib: float
    difference: float  # of its tokens per second from the estimate's


def measure(case: Case, seconds: float) -> Cost:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    card = load_accelerators()["H800"]
    deployment = Disaggregated(card, card, case.num_attention, case.num_ffn)
    lengths = Drawn(distribution("lognormal:3800,0.5"), distribution("geometric:500"))
    per_card = _PER_CARD * case.num_ffn // 2  # as many tokens for an FFN replica in all cases
    streams = per_card * deployment.num_groups * deployment.microbatches * case.units
    scenario = Scenario(
        deployment,
        Workload(load_shape("step-3"), lengths.live_context),
        lengths,
        Streams(streams),
        case.units,
        conditions=Conditions(jitter=0.05, mean_time_between_failures_s=86_400),
        seconds=seconds,
    )
    start = time.perf_counter()
    found = simulate(scenario)
    return Cost(
        deployment.name,
        case.units,
        case.units * (case.num_attention + case.num_ffn),
        streams,
        found.steps,
        seconds,
        time.perf_counter() - start,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        found.tokens_per_s / found.expected.tokens_per_s - 1,
    )


def _alone(case: Case, seconds: float) -> Cost:
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(measure, case, seconds).result()


def _table(costs: list[Cost]) -> Table:
    table = Table()
    for name in ("deployment", "replicas", "sequences", "steps", "simulated", "took", "memory", "from the estimate"):
        table.add_column(name, justify="right")
    for cost in costs:
        table.add_row(
            f"{cost.units} x {cost.deployment}",
            f"{cost.replicas}",
            f"{cost.sequences}",
            f"{cost.steps}",
            f"{cost.simulated_s:g} s",
            f"{cost.wall_s:.1f} s",
            f"{cost.peak_mib:.0f} MiB",
            f"{cost.difference:+.1%}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="that are simulated")
    parser.add_argument("--case", type=int, action="append", choices=range(len(CASES)), help="only this one; repeat it")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    os.environ.update(_ONE_THREAD)
    costs = [_alone(CASES[index], arguments.seconds) for index in arguments.case or range(len(CASES))]
    Console().print(_table(costs))
    if arguments.json:
        write_json(arguments.json, [asdict(cost) for cost in costs])


if __name__ == "__main__":
    main()
