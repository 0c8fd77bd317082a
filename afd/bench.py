"""`afd bench`: a mesh of its own under a load of equal streams; speeds, latencies, and where a step's time goes."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from afd.client import Client
from afd.mesh import Mesh, MeshOptions, running_mesh
from afd.scrape import scrape

_ROUNDS = 2  # every stream asks so many times, one after the other
_PARTS = ("attention", "send", "receive", "lm_head", "sample", "schedule")


@dataclass(frozen=True)
class Load:
    """So many streams at once, each with prompts and answers of these lengths."""

    streams: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Percentiles:
    """Milliseconds."""

    p50: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Percentiles:
        ordered = sorted(seconds)
        return cls(1e3 * statistics.median(ordered), 1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))])


@dataclass(frozen=True)
class Result:
    """One row. `step_share` is each part's share of the attention replicas' step time; `receive` is waiting for the
    FFN (computing it, where it is in-process), and `ffn_compute` and `ffn_queue` the FFN's share of the crossings."""

    load: Load
    output_throughput: float  # tokens/s
    request_throughput: float  # requests/s
    ttft_ms: Percentiles
    tpot_ms: Percentiles
    step_ms: float
    step_share: dict[str, float]
    crossing_share: dict[str, float]
    bubble_share: dict[str, float]  # attention's of its steps, the FFN's of the time it works; none if collocated


@dataclass(frozen=True)
class Results:
    options: MeshOptions
    rows: list[Result]

    def as_json(self) -> dict[str, Any]:
        options = {name: str(value) for name, value in asdict(self.options).items() if name != "settings"}
        return {"mesh": options, "rows": [asdict(row) for row in self.rows]}


def run_bench(options: MeshOptions, loads: Sequence[Load], notes: Console) -> Results:
    """Starts the mesh, runs one load after the other, stops it. Raises what the mesh or a request raises."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with running_mesh(options) as mesh, Progress(*columns, console=notes, transient=True) as progress:
        rows = []
        for load in loads:
            task = progress.add_task(f"{load.streams} streams", total=load.streams * load.output_tokens * _ROUNDS)
            rows.append(asyncio.run(measure(mesh, load, lambda task=task: progress.advance(task))))  # type: ignore[misc]
        return Results(options, rows)


async def measure(mesh: Mesh, load: Load, advance: Callable[[], None] = lambda: None) -> Result:
    """Puts the load on a running mesh; `advance` is called for every token."""
    tls = mesh.options.tls
    async with Client(mesh.gateway.address, ca=tls and tls / "ca.crt") as client:
        vocab_size = (await client.get_model()).vocab_size
        await _stream(client, Load(1, load.prompt_tokens, 2), vocab_size, 0, lambda: None)  # warm up
        before = counters(mesh)
        start = time.perf_counter()

        async def ask_repeatedly(number: int) -> list[list[float]]:
            seeds = range(1 + number * _ROUNDS, 1 + (number + 1) * _ROUNDS)
            return [await _stream(client, load, vocab_size, seed, advance) for seed in seeds]

        streams = await asyncio.gather(*(ask_repeatedly(number) for number in range(load.streams)))
        seconds = time.perf_counter() - start
        spent = difference(counters(mesh), before)
    times = [request for stream in streams for request in stream]
    return _result(load, times, seconds, spent)


def random_prompt(seed: int, num_tokens: int, vocab_size: int) -> list[int]:
    chooser = random.Random(seed)
    return [chooser.randrange(vocab_size) for _ in range(num_tokens)]


async def _stream(client: Client, load: Load, vocab_size: int, seed: int, advance: Any) -> list[float]:
    """Times since the request of its tokens, in seconds."""
    prompt = random_prompt(seed, load.prompt_tokens, vocab_size)
    start = time.perf_counter()
    times: list[float] = []
    async for _ in client.generate(prompt, max_tokens=load.output_tokens, ignore_eos=True):
        times.append(time.perf_counter() - start)
        advance()
    return times


def _result(load: Load, times: list[list[float]], seconds: float, spent: dict[str, float]) -> Result:
    step_s = spent["afd_step_seconds"]
    crossing_s = total(spent, "afd_handoff_seconds")
    return Result(
        load=load,
        output_throughput=sum(map(len, times)) / seconds,
        request_throughput=len(times) / seconds,
        ttft_ms=Percentiles.of([request[0] for request in times]),
        tpot_ms=Percentiles.of([(request[-1] - request[0]) / (len(request) - 1) for request in times]),
        step_ms=1e3 * step_s / spent["afd_steps"],
        step_share={part: spent[f"afd_step_part_seconds/{part}"] / step_s for part in _PARTS},
        crossing_share={
            name: total(spent, f"afd_handoff_{name}_seconds") / crossing_s for name in ("ffn_compute", "ffn_queue")
        },
        bubble_share=_bubble_share(spent),
    )


def total(spent: dict[str, float], name: str) -> float:
    """Of all labels."""
    return sum(value for each, value in spent.items() if each.partition("/")[0] == name)


def _bubble_share(spent: dict[str, float]) -> dict[str, float]:
    ffn_bubble_s = spent.get("afd_ffn_bubble_seconds")
    if ffn_bubble_s is None:
        return {}
    return {
        "attention": spent["afd_attention_bubble_seconds"] / spent["afd_step_seconds"],
        "ffn": ffn_bubble_s / (ffn_bubble_s + spent["afd_ffn_compute_seconds"]),
    }


def counters(mesh: Mesh, *replica_ids: str) -> dict[str, float]:
    """The counters of these attention and FFN replicas, or of all, added up; a label's value stands behind a slash."""
    totals: dict[str, float] = {}
    for service in mesh.services:
        asked = service.replica_id in replica_ids or not replica_ids
        if asked and service.role != "gateway" and service.replica:
            for name, value in scrape(str(service.replica.metrics_address)).items():
                totals[name] = totals.get(name, 0.0) + value
    return totals


def difference(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def report(results: Results) -> tuple[Table, Table, Table]:
    """Tables for people: the speeds, where the time went, and who had to wait."""
    return _speeds(results), _shares(results), _bubbles(results)


def _speeds(results: Results) -> Table:
    options = results.options
    ffn = f"{options.ffn}F, microbatches: {options.num_microbatches}" if options.ffn else " collocated"
    mesh = f"{options.attention}A{ffn}, {options.dtype}"
    cores = f"{options.threads} threads each" if options.threads else f"cores {options.cores}"
    title = f"{options.model.name}: {mesh}, {cores}"
    table = _table(title, "streams", "tokens/s", "TTFT p50", "p99", "TPOT p50", "p99 ms")
    for row in results.rows:
        times = (row.ttft_ms.p50, row.ttft_ms.p99, row.tpot_ms.p50, row.tpot_ms.p99)
        table.add_row(str(row.load.streams), f"{row.output_throughput:.1f}", *(f"{time:.1f}" for time in times))
    return table


def _shares(results: Results) -> Table:
    title = "where a decode step's time went, % (receive: waiting for the FFN)"
    table = _table(title, "streams", "step ms", *_PARTS)
    for row in results.rows:
        parts = (f"{100 * row.step_share[part]:.0f}" for part in _PARTS)
        table.add_row(str(row.load.streams), f"{row.step_ms:.2f}", *parts)
    return table


def _bubbles(results: Results) -> Table:
    table = _table("bubbles, %", "streams", "attention", "FFN")
    for row in results.rows:
        shares = (f"{100 * share:.0f}" for share in row.bubble_share.values())
        table.add_row(str(row.load.streams), *shares)
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table
