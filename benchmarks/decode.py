"""Decoding with the FFN in the same process, beside it on the same cores, and on cores of its own:
`python -m benchmarks.decode --model DIR`.

All meshes run at once, and take turns; those that wait sleep. Tokens/s are counted while every stream decodes: from the
third token of the last one, when the step that has its prefill is over, to the last token of the first one. Ratios are
to the first mesh, collocated on all cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from afd.bench import Load, counters, difference, random_prompt, total
from afd.client import Client
from afd.mesh import Mesh, MeshOptions, running_mesh
from afd.placement import Cores
from benchmarks.rounds import alternate, report

_LONGEST_S = 1800.0  # for one load; then the run ends with an error
_UNCOUNTED = 3  # tokens of the last stream
_SHORTEST_WINDOW = 8  # tokens of each stream that are counted, at least


def meshes(model: Path, device: str = "cpu") -> dict[str, MeshOptions]:
    if device != "cpu":
        there = partial(MeshOptions, model, device=device)
        return {
            "collocated": there(ffn=0),
            "1A1F, serial": there(microbatches="1"),
            "1A1F, pipelined": there(microbatches="2"),
            "1A1F": there(),
            "1A1F inline": there(settings={"handoff": "inline"}),
        }
    own = partial(MeshOptions, model, cores=Cores.own)
    return {
        "collocated": MeshOptions(model, ffn=0),
        "collocated, torch": MeshOptions(model, ffn=0, settings={"kernels": "torch"}),
        "1A1F": MeshOptions(model),
        "1A1F inline": MeshOptions(model, settings={"handoff": "inline"}),
        "1A1F own cores, serial": own(microbatches="1"),
        "1A1F own cores, pipelined": own(),
        "1A1F own cores, auto": own(microbatches="auto"),
    }


@dataclass(frozen=True)
class Division:
    """Where a decode step's time went, in milliseconds of a step. `ffn` is computing there, whatever waits for it."""

    step: float
    schedule: float
    attention: float
    send: float
    receive: float
    lm_head: float
    sample: float
    ffn: float

    @property
    def bubbles(self) -> tuple[float, float]:
        """Shares of the step in which attention waits for the FFN, and in which the FFN computes nothing."""
        return self.receive / self.step, 1 - self.ffn / self.step

    @classmethod
    def of(cls, spent: dict[str, float]) -> Division:
        def per_step(name: str) -> float:
            return 1e3 * total(spent, name) / spent["afd_steps"]

        parts = ("schedule", "attention", "send", "receive", "lm_head", "sample")
        named = {part: 1e3 * spent[f"afd_step_part_seconds/{part}"] / spent["afd_steps"] for part in parts}
        return cls(step=per_step("afd_step_seconds"), ffn=per_step("afd_handoff_ffn_compute_seconds"), **named)


@dataclass
class MeasuredMesh:
    """A running mesh, and how its steps divided under each load."""

    mesh: Mesh
    divisions: dict[Load, list[Division]] = field(default_factory=dict)

    def __call__(self, load: Load) -> float:
        speed, spent = asyncio.run(asyncio.wait_for(decode(self.mesh, load), _LONGEST_S))
        self.divisions.setdefault(load, []).append(Division.of(spent))
        return speed


async def decode(mesh: Mesh, load: Load) -> tuple[float, dict[str, float]]:
    """Tokens/s while all streams decode, and what the counters have counted meanwhile."""
    everyone_decodes = asyncio.Barrier(load.streams + 1)
    somebody_ended = asyncio.Event()
    async with Client(mesh.gateway.address) as client:
        vocab_size = (await client.get_model()).vocab_size

        async def stream(group: asyncio.TaskGroup, seed: int) -> list[float]:
            times = list[float]()
            prompt = random_prompt(seed, load.prompt_tokens, vocab_size)
            async for _ in client.generate(prompt, max_tokens=load.output_tokens, ignore_eos=True):
                times.append(time.perf_counter())
                if len(times) == _UNCOUNTED:
                    group.create_task(everyone_decodes.wait())
            somebody_ended.set()
            return times

        async with asyncio.TaskGroup() as group:  # a stream that fails ends the waiting for it
            tasks = [group.create_task(stream(group, seed)) for seed in range(load.streams)]
            await everyone_decodes.wait()
            before = await asyncio.to_thread(counters, mesh)
            await somebody_ended.wait()
            spent = difference(await asyncio.to_thread(counters, mesh), before)
    times = [task.result() for task in tasks]
    start, end = max(own[_UNCOUNTED - 1] for own in times), min(own[-1] for own in times)
    counted = [sum(start < at <= end for at in own) for own in times]
    if min(counted) < _SHORTEST_WINDOW:
        raise SystemExit(
            f"{load.streams} streams of {load.prompt_tokens} tokens hardly decode together: with "
            f"--output-tokens {load.output_tokens} some end while others still prefill; give more"
        )
    return sum(counted) / (end - start), spent


def division_table(title: str, contenders: dict[str, MeasuredMesh], loads: Sequence[Load], num_rounds: int) -> Table:
    table = Table(title=title)
    headings = ("prompt", "streams", "contender", "step", "schedule", "attention", "send", "receive", "lm_head")
    for heading in (*headings, "sample", "FFN computes", "bubble A, %", "bubble F, %"):
        table.add_column(heading, justify="left" if heading == "contender" else "right")
    for load in loads:
        for name, contender in contenders.items():
            mean = _medians(contender.divisions[load][-num_rounds:])
            bubbles = (f"{100 * share:.0f}" for share in mean.bubbles) if contender.mesh.options.ffn else ("", "")
            parts = (f"{value:.1f}" for value in asdict(mean).values())
            table.add_row(str(load.prompt_tokens), str(load.streams), name, *parts, *bubbles)
    return table


def _medians(divisions: Sequence[Division]) -> Division:
    rows = [asdict(each) for each in divisions]
    return Division(**{name: statistics.median(row[name] for row in rows) for name in rows[0]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[64])
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--prefill-chunk-tokens", type=int, default=512, help="of every mesh")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="MESH", help="these meshes; default: all")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; default: cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.output_tokens < _UNCOUNTED + _SHORTEST_WINDOW:
        parser.error(f"--output-tokens: at least {_UNCOUNTED + _SHORTEST_WINDOW}")
    known = meshes(options.model, options.device)
    if unknown := set(options.only or ()) - known.keys():
        parser.error(f"--only: there is no {unknown.pop()!r}, only: {'; '.join(known)}")
    prefill = {"prefill_chunk_tokens": str(options.prefill_chunk_tokens)}
    loads = [
        Load(streams, prompt, options.output_tokens) for prompt in options.prompt_tokens for streams in options.streams
    ]
    with contextlib.ExitStack() as stack:
        contenders = {
            name: MeasuredMesh(stack.enter_context(running_mesh(replace(mesh, settings=mesh.settings | prefill))))
            for name, mesh in known.items()
            if name in (options.only or [name])
        }
        rows = alternate(contenders, loads, options.rounds, Console(stderr=True))
    console = Console(width=160)
    console.print(report(f"decoding {options.model.name}, bfloat16", rows))
    console.print(division_table("a decode step's time, ms", contenders, loads, options.rounds))
    if options.json:
        divisions = [
            {"contender": name, **asdict(load), "steps": [asdict(each) for each in divided[-options.rounds :]]}
            for name, contender in contenders.items()
            for load, divided in contender.divisions.items()
            if load in loads
        ]
        values = {"speeds": [row.as_json() for row in rows], "steps": divisions}
        options.json.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
