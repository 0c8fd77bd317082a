"""A mesh under a steady load, for long: does anything grow, or stay behind? `python -m benchmarks.soak --minutes 30`.

First a burst makes every pool and heap as large as it will be, and a closed loop finds how many requests a second the
mesh can take. Then requests arrive at random (Poisson), at a share of that, over gRPC and HTTP, with and without an API
key. Some clients leave or cancel midway, some ask for what cannot be. Every few seconds it is noted what each process
takes up. Records and journals expire soon here, so that at the end nothing may be left of any request. Exit status 1 if
something is, if something grew, or if a request failed.

Memory is what a process has made itself (anonymous and shared pages, swap). Growth compares medians: of the second
sixth of the time, the first being warm-up, and of the last.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from redis.asyncio import Redis
from rich.console import Console
from rich.table import Table

from afd.client import Client
from afd.mesh import Mesh, MeshOptions, running_mesh
from afd.state.api_keys import ApiKeys, Limits
from afd.state.connection import connect
from benchmarks.clients import Answer, Api, Asker, GrpcAsker, HttpAsker, Question, ask
from benchmarks.logs import alarms, output_to
from benchmarks.usage import Sample, keys_of, shm_files

_WARM_UP_S = 30.0
_BURST_STREAMS = 128  # more than the load will have open
_CAPACITY_STREAMS = 32
_JOURNAL_TTL_S = 15.0
_REQUEST_TIMEOUT_S = 120.0
_SETTLE_S = 30.0  # beyond what Redis keeps longest
_REPORT_S = 30.0
_SHM_S = 10.0  # meshes that come up on this machine have sockets there for a moment
_MOST_GROWTH = 0.01
_NO_GROWTH_MB = 0.5  # so little is noise, where there is little: in Redis
_SPARE_THREADS = 8  # of pools, which start them when they are needed
_BAD: tuple[dict[str, Any], ...] = ({"temperature": -1.0}, {"top_p": 2.0}, {"max_tokens": 1_000_000})


# The load.


@dataclass(frozen=True)
class Visit:
    """One request, as the seed has it, and how it is made."""

    question: Question
    has_key: bool
    cancels_after_s: float | None
    is_bad: bool

    @classmethod
    def of(cls, chooser: random.Random, vocab_size: int) -> Visit:
        question, fate = Question.of(chooser, vocab_size), chooser.random()
        cancels_after_s = chooser.uniform(0, 2) if fate < 0.08 else None
        is_bad = 0.08 <= fate < 0.14
        more: dict[str, Any] = dict(chooser.choice(_BAD)) if is_bad else {}
        if cancels_after_s is not None or chooser.random() < 0.3:
            more["request_id"] = uuid.uuid4().hex
        return cls(replace(question, options=question.options | more), chooser.random() < 0.5, cancels_after_s, is_bad)

    def end(self, answer: Answer) -> str:
        """How it ended, in a word; what should not have been begins with "failed"."""
        kind = answer.error.partition(":")[0]
        if self.is_bad:
            return "refused" if kind == "InvalidRequest" else f"failed: not refused, {answer.error}"
        if self.cancels_after_s is not None and kind == "Cancelled":
            return "cancelled"
        if answer.error:
            return f"failed: {answer.error}"
        num_tokens = self.question.options["max_tokens"] * self.question.options.get("n", 1)
        if len(answer.tokens) == num_tokens and not answer.num_twice:
            return "finished"
        return "left" if len(answer.tokens) == self.question.leaves_after else "failed: tokens are missing"


@dataclass(frozen=True)
class Clients:
    """With an API key, or without."""

    client: Client
    askers: dict[Api, Asker]


@dataclass
class Load:
    mesh: Mesh
    seed: int
    api_key: str
    ends: Counter[str] = field(default_factory=Counter)
    num_open: int = 0
    _num_begun: int = 0

    @contextlib.asynccontextmanager
    async def clients(self) -> AsyncIterator[dict[bool, Clients]]:
        """By whether they have a key."""
        async with contextlib.AsyncExitStack() as stack:
            found = {}
            for api_key in (None, self.api_key):
                client = await stack.enter_async_context(Client(self.mesh.target, api_key=api_key))
                model = await client.get_model()
                http = await stack.enter_async_context(HttpAsker(self.mesh.http_urls, model.name, api_key))
                found[api_key is not None] = Clients(client, {"gRPC": GrpcAsker(client), "HTTP": http})
            yield found

    async def visit(self, clients: dict[bool, Clients], vocab_size: int) -> None:
        number, self._num_begun = self._num_begun, self._num_begun + 1
        visit = Visit.of(random.Random(f"{self.seed}-{number}"), vocab_size)
        self.num_open += 1
        answer = await self._answer(visit, clients[visit.has_key])
        self.num_open -= 1
        self.ends[visit.end(answer)] += 1

    async def _answer(self, visit: Visit, clients: Clients) -> Answer:
        asking = asyncio.create_task(ask(clients.askers[visit.question.api], visit.question))
        if visit.cancels_after_s is not None:
            await asyncio.sleep(visit.cancels_after_s)
            await clients.client.cancel(visit.question.options["request_id"])
        return await asking

    async def closed_loop(self, num_streams: int, seconds: float) -> float:
        """Requests/s."""
        began, num_begun = time.monotonic(), self._num_begun

        async def keep_visiting(clients: dict[bool, Clients], vocab_size: int) -> None:
            while time.monotonic() < began + seconds:
                await self.visit(clients, vocab_size)

        async with self.clients() as clients:
            vocab_size = (await clients[False].client.get_model()).vocab_size
            await asyncio.gather(*(keep_visiting(clients, vocab_size) for _ in range(num_streams)))
        return (self._num_begun - num_begun) / (time.monotonic() - began)

    async def offer(self, requests_per_s: float, seconds: float) -> None:
        """An open loop: they come whether the earlier ones have ended or not."""
        chooser, due_s = random.Random(self.seed), time.monotonic()
        until_s = due_s + seconds
        async with self.clients() as clients, asyncio.TaskGroup() as visits:
            vocab_size = (await clients[False].client.get_model()).vocab_size
            while (due_s := due_s + chooser.expovariate(requests_per_s)) < until_s:
                await asyncio.sleep(due_s - time.monotonic())
                visits.create_task(self.visit(clients, vocab_size))


# The run.


@dataclass(frozen=True)
class Plan:
    seed: int
    minutes: float
    load: float
    every_s: float
    options: MeshOptions


@dataclass
class Outcome:
    plan: Plan
    requests_per_s: float
    ends: Counter[str]
    idle: Sample
    samples: list[Sample]
    end: Sample
    keys_left: list[str]
    leftovers: list[str] = field(default_factory=list)  # files, processes and lines of the log, when all is over

    def memory(self, name: str, sixth: int) -> float:
        """MB, in a sixth of the time: its samples' median."""
        size = len(self.samples) // 6
        counted = self.samples[sixth * size : (sixth + 1) * size]
        return statistics.median(sample.processes[name].memory_mb for sample in counted)

    def growth(self, name: str) -> float:
        return self.memory(name, 5) / self.memory(name, 1) - 1

    def faults(self) -> Iterator[str]:
        """What should not be."""
        for name, idle in self.idle.processes.items():
            if self.growth(name) >= max(_MOST_GROWTH, _NO_GROWTH_MB / self.memory(name, 1)):
                yield f"{name}: memory grew by {100 * self.growth(name):.1f} %"
            end = self.end.processes[name]
            if end.num_files > idle.num_files:
                yield f"{name}: {end.num_files} open files, {idle.num_files} before the load"
            if end.num_threads > idle.num_threads + _SPARE_THREADS:
                yield f"{name}: {end.num_threads} threads, {idle.num_threads} before the load"
        yield from (f"{number} requests {end}" for end, number in self.ends.items() if end.startswith("failed"))
        yield from (f"Redis still has {key}" for key in self.keys_left)
        yield from self.leftovers


async def run(plan: Plan, mesh: Mesh, notes: Console) -> Outcome:
    async with connect(mesh.redis_url) as redis:
        load = Load(mesh, plan.seed, await ApiKeys(redis).create("soak", Limits(10_000, concurrency=1_000)))
        await load.closed_loop(_BURST_STREAMS, _WARM_UP_S)
        capacity = await load.closed_loop(_CAPACITY_STREAMS, _WARM_UP_S)
        rate = plan.load * capacity
        notes.print(f"{capacity:.2f} requests/s are the most; {rate:.2f} will come for {plan.minutes:g} minutes")
        await asyncio.sleep(_JOURNAL_TTL_S)
        idle, keys = await Sample.of(mesh, redis), await keys_of(redis)
        samples: list[Sample] = []
        async with _sampling(mesh, redis, plan.every_s, samples), _reporting(load, samples, notes):
            await load.offer(rate, 60 * plan.minutes)
        keys_left = await _keys_left(redis, keys)
        end = await _settled(mesh, redis, idle)
    return Outcome(plan, rate, load.ends, idle, samples, end, sorted(keys_left))


@contextlib.asynccontextmanager
async def _sampling(mesh: Mesh, redis: Redis, every_s: float, samples: list[Sample]) -> AsyncIterator[None]:
    async def keep_sampling() -> None:
        while True:
            await asyncio.sleep(every_s)
            samples.append(await Sample.of(mesh, redis))

    async with _beside(asyncio.create_task(keep_sampling())):
        yield


@contextlib.asynccontextmanager
async def _reporting(load: Load, samples: list[Sample], notes: Console) -> AsyncIterator[None]:
    began = time.monotonic()

    async def keep_reporting() -> None:
        while True:
            await asyncio.sleep(_REPORT_S)
            usages = samples[-1].processes.items() if samples else ()
            memory = ", ".join(f"{name} {usage.memory_mb:.1f}" for name, usage in usages)
            failed = sum(number for end, number in load.ends.items() if end.startswith("failed"))
            minutes = (time.monotonic() - began) / 60
            counts = f"{load.ends.total()} requests, {failed} failed, {load.num_open} open"
            notes.print(f"{minutes:.1f} min: {counts}; MB: {memory}", style="dim", highlight=False)

    async with _beside(asyncio.create_task(keep_reporting())):
        yield


@contextlib.asynccontextmanager
async def _beside(task: asyncio.Task[None]) -> AsyncIterator[None]:
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _keys_left(redis: Redis, before: frozenset[str]) -> frozenset[str]:
    """What is there that was not, once all that expires had the time to."""
    deadline = time.monotonic() + _JOURNAL_TTL_S + _REQUEST_TIMEOUT_S + _SETTLE_S
    while (left := await keys_of(redis) - before) and time.monotonic() < deadline:
        await asyncio.sleep(1.0)
    return left


async def _settled(mesh: Mesh, redis: Redis, idle: Sample) -> Sample:
    """The end: when no more files are open than before the load, or it has taken too long."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        end = await Sample.of(mesh, redis)
        more = [name for name, usage in end.processes.items() if usage.num_files > idle.processes[name].num_files]
        if not more or time.monotonic() > deadline:
            return end
        await asyncio.sleep(1.0)


def soak(plan: Plan) -> Outcome:
    files = shm_files()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with output_to(log) as terminal, running_mesh(plan.options) as mesh:
            outcome = asyncio.run(run(plan, mesh, Console(file=terminal, width=200)))
        left = shm_files() - files
        if left:
            time.sleep(_SHM_S)
        outcome.leftovers += [f"/dev/shm/{name} is left" for name in sorted(left & shm_files())]
        outcome.leftovers += [f"a process is left: {child}" for child in psutil.Process().children(recursive=True)]
        outcome.leftovers += [f"in a log: {alarm}" for alarm in alarms(log)]
    return outcome


# The report.


def report(outcome: Outcome) -> Iterator[Table | str]:
    plan = outcome.plan
    usages = Table(title=f"seed {plan.seed}, {plan.minutes:g} minutes, {outcome.requests_per_s:.2f} requests/s")
    for heading in ("process", "MB idle", "warmed up", "at last", "growth %", "MB an hour", "files", "threads"):
        usages.add_column(heading, justify="left" if heading == "process" else "right")
    for name, row in as_json(outcome)["processes"].items():
        memory = (f"{mb:.1f}" for mb in (row["idle_mb"], row["warm_mb"], row["last_mb"]))
        growth = f"{100 * row['growth']:+.2f}", f"{row['mb_per_hour']:+.2f}"
        counts = (f"{before} -> {after}" for before, after in (row["files"], row["threads"]))
        usages.add_row(name, *memory, *growth, *counts)
    yield usages
    ends = Table("requests", "number")
    for end, number in sorted(outcome.ends.items()):
        ends.add_row(end, str(number))
    yield ends
    most = max(sample.num_keys for sample in outcome.samples), max(sample.data_mb for sample in outcome.samples)
    yield f"Redis: at most {most[0]} keys, {most[1]:.1f} MB of data; at the end {outcome.end.num_keys} keys"
    yield from outcome.faults()


def as_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "minutes": outcome.plan.minutes,
        "requests_per_s": outcome.requests_per_s,
        "ends": dict(outcome.ends),
        "processes": {name: _row(outcome, name) for name in outcome.idle.processes},
        "redis_keys": [sample.num_keys for sample in outcome.samples],
        "faults": list(outcome.faults()),
    }


def _row(outcome: Outcome, name: str) -> dict[str, Any]:
    idle, end = outcome.idle.processes[name], outcome.end.processes[name]
    return {
        "idle_mb": idle.memory_mb,
        "warm_mb": outcome.memory(name, 1),
        "last_mb": outcome.memory(name, 5),
        "growth": outcome.growth(name),
        "mb_per_hour": _slope(outcome, name),
        "files": [idle.num_files, end.num_files],
        "threads": [idle.num_threads, end.num_threads],
        "memory_mb": [round(sample.processes[name].memory_mb, 2) for sample in outcome.samples],
    }


def _slope(outcome: Outcome, name: str) -> float:
    """Least squares, behind the warm-up."""
    counted = outcome.samples[len(outcome.samples) // 6 :]
    hours = [sample.at_s / 3600 for sample in counted]
    return statistics.linear_regression(hours, [sample.processes[name].memory_mb for sample in counted]).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/step3-nano"))
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--load", type=float, default=0.8, help="share of what the mesh can take")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=float, default=15.0, metavar="SECONDS", help="between two looks")
    parser.add_argument("--topology", default="2A2F", help="attention replicas, FFN shards")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.minutes * 60 / arguments.every < 6:
        parser.error("--minutes: there must be a look in each sixth of them")
    attention, ffn = (int(number) for number in arguments.topology.rstrip("F").split("A"))
    options = MeshOptions(
        model=arguments.model,
        attention=attention,
        ffn=ffn,
        dtype="float32",
        threads=1,
        settings={
            "journal_ttl_s": str(_JOURNAL_TTL_S),
            "request_timeout_s": str(_REQUEST_TIMEOUT_S),
            "log_level": "warning",
        },
    )
    outcome = soak(Plan(arguments.seed, arguments.minutes, arguments.load, arguments.every, options))
    console = Console(width=120)
    for part in report(outcome):
        console.print(part)
    if arguments.json:
        arguments.json.write_text(json.dumps(as_json(outcome), indent=2) + "\n")
    sys.exit(1 if any(outcome.faults()) else 0)


if __name__ == "__main__":
    main()
