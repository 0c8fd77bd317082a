"""A mesh under load whose parts are killed, frozen, drained, cut off and slowed down at random: does every request end
with the tokens of an undisturbed run? `python -m benchmarks.chaos --model models/step3-nano --minutes 5 --seed 1`.

Every request and every fault is a function of the seed (when a fault strikes a stream is not). A third of the requests
comes over HTTP, as server-sent events. After the faults the same requests are asked once more, undisturbed and over
gRPC, and compared token by token. Exit status 1 if anything was lost, wrong or shown twice, hung or leaked.

As root the run has a small /dev/shm of its own, so that this can be filled, too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, get_args

import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from afd.bench import counters
from afd.client import Client
from afd.errors import PeerUnavailable
from afd.forkserver import ForkServer
from afd.mesh import Mesh, MeshOptions, Service
from afd.state.embedded import EmbeddedRedis
from benchmarks.clients import STALL_S, Answer, Api, Asker, GrpcAsker, HttpAsker, Question, ask
from benchmarks.proxy import Proxy, tcp_proxy

_WATCH_S = 0.1
_SETTLE_S = 20.0
_NOTICED_S = 2.0  # after so long the mesh knows of a fault
_LEASE_S = 2.0
_CLONE_NEWNS = 0x20000  # of unshare(2): mounts of our own
_SHM_SIZE = "256m"
_LEAKS = ("afd_sequences_running", "afd_sequences_waiting", "afd_kv_blocks_used", "afd_ffn_queue_frames")


# The faults.


@dataclass
class Arena:
    """The mesh and what can be done to it."""

    mesh: Mesh
    proxies: dict[str, Proxy]  # by replica_id: the way to its gRPC port

    def services(self, role: str) -> list[Service]:
        return [service for service in self.mesh.services if service.role == role and service.alive]


@dataclass(frozen=True)
class Fault:
    at_s: float
    kind: str
    target: str


Strike = Callable[[Arena, random.Random], Awaitable[str]]  # returns whom it struck, when it is over


def _send(role: str, number: signal.Signals) -> Strike:
    async def strike(arena: Arena, chooser: random.Random) -> str:
        service = chooser.choice(arena.services(role))
        assert service.process is not None
        service.process.send_signal(number)
        return service.replica_id

    return strike


def _freeze(role: str) -> Strike:
    async def strike(arena: Arena, chooser: random.Random) -> str:
        service, seconds = chooser.choice(arena.services(role)), chooser.uniform(0.3, 6.0)
        process = service.process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(seconds)
        process.send_signal(signal.SIGCONT)
        return f"{service.replica_id} for {seconds:.1f} s"

    return strike


async def _reset(arena: Arena, chooser: random.Random) -> str:
    name = chooser.choice(sorted(arena.proxies))
    arena.proxies[name].cut()
    return name


async def _partition(arena: Arena, chooser: random.Random) -> str:
    name, seconds = chooser.choice(sorted(arena.proxies)), chooser.uniform(0.5, 6.0)
    arena.proxies[name].hold()
    await asyncio.sleep(seconds)
    arena.proxies[name].go_on()
    return f"{name} for {seconds:.1f} s"


async def _slow_down(arena: Arena, chooser: random.Random) -> str:
    name, seconds, delay_s = chooser.choice(sorted(arena.proxies)), chooser.uniform(1, 4), chooser.uniform(0.01, 0.1)
    arena.proxies[name].delay_s = delay_s
    await asyncio.sleep(seconds)
    arena.proxies[name].delay_s = 0.0
    return f"{name} by {1e3 * delay_s:.0f} ms for {seconds:.1f} s"


async def _kill_fork_server(arena: Arena, chooser: random.Random) -> str:
    if (pid := arena.mesh.fork_server.pid) is not None:
        os.kill(pid, signal.SIGKILL)
    return "the fork server"


async def _kill_redis(arena: Arena, chooser: random.Random) -> str:
    assert arena.mesh.embedded is not None
    arena.mesh.embedded.process.kill()
    return "redis"


async def _freeze_redis(arena: Arena, chooser: random.Random) -> str:
    assert arena.mesh.embedded is not None
    process, seconds = arena.mesh.embedded.process, chooser.uniform(0.3, 4.0)
    process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(seconds)
    process.send_signal(signal.SIGCONT)
    return f"redis for {seconds:.1f} s"


async def _fill_shared_memory(arena: Arena, chooser: random.Random) -> str:
    seconds = chooser.uniform(0.3, 6.0)
    with tempfile.TemporaryFile(dir="/dev/shm", buffering=0) as file:
        await asyncio.to_thread(_fill, file)  # the clients' loop goes on meanwhile
        await asyncio.sleep(seconds)
    return f"/dev/shm for {seconds:.1f} s"


def _fill(file: IO[bytes]) -> None:
    with contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 20))


def own_shared_memory() -> bool:
    """From now on this process and its children have a small /dev/shm to themselves; False without the right to it."""
    if ctypes.CDLL(None).unshare(_CLONE_NEWNS):
        return False
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_SHM_SIZE}", "tmpfs", "/dev/shm"], check=True)
    return True


FILLING = "full /dev/shm"
FAULTS: dict[str, Strike] = {
    **{f"SIGKILL {role}": _send(role, signal.SIGKILL) for role in ("gateway", "attention", "ffn")},
    **{f"SIGTERM {role}": _send(role, signal.SIGTERM) for role in ("gateway", "attention", "ffn")},
    **{f"SIGSTOP {role}": _freeze(role) for role in ("gateway", "attention", "ffn")},
    "reset": _reset,
    "partition": _partition,
    "slow link": _slow_down,
    "SIGKILL fork server": _kill_fork_server,
    "SIGKILL redis": _kill_redis,
    "SIGSTOP redis": _freeze_redis,
    FILLING: _fill_shared_memory,
}


async def strike_one_by_one(
    arena: Arena, chooser: random.Random, until: float, kind: str, pause_s: float
) -> list[Fault]:
    """Faults of one kind, each when nothing is left of the one before: all are back for pause_s."""
    done: list[Fault] = []
    await asyncio.sleep(pause_s)
    while time.monotonic() < until:
        began = time.monotonic()
        done.append(Fault(began, kind, await FAULTS[kind](arena, chooser)))
        await asyncio.sleep(_NOTICED_S)
        await _until_all_answer(arena.mesh)
        await asyncio.sleep(pause_s)
    return done


async def strike_at_random(
    arena: Arena, chooser: random.Random, until: float, kinds: Sequence[str], mean_s: float
) -> list[Fault]:
    """Faults of these kinds, each kind as often as the others, one about every mean_s; several can go on at once."""
    done: list[Fault] = []
    under_way: set[asyncio.Task[None]] = set()
    deck: list[str] = []

    async def strike(kind: str) -> None:
        began = time.monotonic()
        with contextlib.suppress(IndexError, ProcessLookupError):  # nobody of the role is alive just now
            done.append(Fault(began, kind, await FAULTS[kind](arena, chooser)))

    while time.monotonic() < until:
        if not deck:
            deck = list(kinds)
            chooser.shuffle(deck)
        task = asyncio.create_task(strike(deck.pop()))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
        await asyncio.sleep(chooser.expovariate(1 / mean_s))
    await asyncio.gather(*under_way)
    return done


# The run.


@dataclass
class Plan:
    seed: int
    minutes: float
    streams: int
    every_s: float
    kinds: Sequence[str]  # of faults; those of one kind alone come one after the other
    options: MeshOptions


@dataclass
class Outcome:
    plan: Plan
    faults: list[Fault]
    answers: dict[int, Answer]
    expected: dict[int, Answer]
    questions: dict[int, Question]
    leaks: dict[str, float]
    tokens_per_s: tuple[float, float]  # with the faults, and without

    @property
    def lost(self) -> list[int]:
        return [number for number, answer in self.answers.items() if answer.error]

    @property
    def wrong(self) -> list[int]:
        return [number for number in self.answers if number not in self.lost and not self._is_right(number)]

    @property
    def num_twice(self) -> int:
        return sum(answer.num_twice for answer in self.answers.values())

    @property
    def is_good(self) -> bool:
        return not (self.lost or self.wrong or self.num_twice or any(self.leaks.values()))

    def _is_right(self, number: int) -> bool:
        seen, expected = self.answers[number].tokens, self.expected[number].tokens
        if self.questions[number].leaves_after is None:
            return seen == expected
        return all(expected.get(place) == token for place, token in seen.items())


@contextlib.contextmanager
def arena_of(options: MeshOptions) -> Iterator[Arena]:
    """A mesh whose attention and FFN replicas are reached through proxies."""
    with ForkServer(options.environment) as fork_server, EmbeddedRedis() as redis, contextlib.ExitStack() as stack:
        mesh = Mesh(options, redis.url, fork_server, redis)
        proxies: dict[str, Proxy] = {}
        for service in mesh.services:
            if service.role != "gateway":
                proxy = proxies[service.replica_id] = stack.enter_context(tcp_proxy(_free_port()))
                service.settings |= {"grpc_port": proxy.target_port, "advertise_port": proxy.port}
        stack.callback(mesh.stop)
        mesh.start()
        yield Arena(mesh, proxies)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def watched(mesh: Mesh) -> AsyncIterator[None]:
    """What ends is started again."""

    async def watch() -> None:
        while True:
            await asyncio.to_thread(mesh.watch)
            await asyncio.sleep(_WATCH_S)

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def run(plan: Plan, arena: Arena, notes: Console) -> Outcome:
    questions: dict[int, Question] = {}
    answers: dict[int, Answer] = {}
    mesh, num_asked = arena.mesh, 0

    async def keep_asking(askers: dict[Api, Asker], until: float, vocab_size: int) -> None:
        nonlocal num_asked
        while time.monotonic() < until:
            number, num_asked = num_asked, num_asked + 1
            question = questions[number] = Question.of(random.Random(f"{plan.seed}-{number}"), vocab_size)
            answers[number] = await ask(askers[question.api], question)

    async with watched(mesh), Client(mesh.target) as client, contextlib.AsyncExitStack() as stack:
        model = await client.get_model()
        http = await stack.enter_async_context(HttpAsker(mesh.http_urls, model.name))
        began, chooser = time.monotonic(), random.Random(plan.seed)
        until = began + 60 * plan.minutes
        askers: dict[Api, Asker] = {"gRPC": GrpcAsker(client), "HTTP": http}
        asking = [asyncio.create_task(keep_asking(askers, until, model.vocab_size)) for _ in range(plan.streams)]
        if len(plan.kinds) == 1:
            strikes = strike_one_by_one(arena, chooser, until, plan.kinds[0], plan.every_s)
        else:
            strikes = strike_at_random(arena, chooser, until, plan.kinds, plan.every_s)
        striking = asyncio.create_task(strikes)
        await _show_progress(notes, until, answers, plan.minutes)
        faults = await striking
        await asyncio.gather(*asking)
        disturbed_s = time.monotonic() - began
        notes.print(f"{len(faults)} faults, {len(answers)} requests; asking them again, undisturbed", style="dim")
        await _until_all_answer(mesh)
        expected, undisturbed_s = await _undisturbed(plan, client, questions)
        leaks = await _leaks(mesh)
    speeds = _num_tokens(answers) / disturbed_s, _num_tokens(expected) / undisturbed_s
    return Outcome(plan, faults, answers, expected, questions, leaks, speeds)


def _num_tokens(answers: dict[int, Answer]) -> int:
    return sum(len(answer.tokens) for answer in answers.values())


async def _show_progress(notes: Console, until: float, answers: dict[int, Answer], minutes: float) -> None:
    with Progress(console=notes, transient=True) as progress:
        task = progress.add_task("faults", total=60 * minutes)
        while (left := until - time.monotonic()) > 0:
            lost = sum(bool(answer.error) for answer in answers.values())
            progress.update(task, completed=60 * minutes - left, description=f"{len(answers)} requests, {lost} lost")
            await asyncio.sleep(min(left, 0.5))


async def _until_all_answer(mesh: Mesh) -> None:
    """Everybody is back, or it has taken too long."""
    deadline = time.monotonic() + _SETTLE_S
    while time.monotonic() < deadline:
        await asyncio.sleep(0.5)
        with contextlib.suppress(PeerUnavailable):
            await asyncio.to_thread(counters, mesh)
            return


async def _undisturbed(plan: Plan, client: Client, questions: dict[int, Question]) -> tuple[dict[int, Answer], float]:
    asker, expected = GrpcAsker(client), dict[int, Answer]()
    left = sorted(questions, reverse=True)

    async def keep_asking() -> None:
        while left:
            number = left.pop()
            expected[number] = await ask(asker, replace(questions[number], leaves_after=None))

    began = time.monotonic()
    await asyncio.gather(*(keep_asking() for _ in range(plan.streams)))
    return expected, time.monotonic() - began


async def _leaks(mesh: Mesh) -> dict[str, float]:
    """What is still held when nobody asks any more; all of it should be nothing."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        counted = await asyncio.to_thread(counters, mesh)
        leaks = {name: counted[name] for name in _LEAKS}
        ours = {mesh.fork_server.pid, *(service.process.pid for service in mesh.services if service.process)}
        leaks["processes"] = len([process for process in _from_fork_servers() if process.pid not in ours])
        leaks["files in /dev/shm"] = len(list(Path("/dev/shm").glob("afd-*")))
        if not any(leaks.values()) or time.monotonic() > deadline:
            return leaks
        await asyncio.sleep(0.5)


def _from_fork_servers() -> Iterator[psutil.Process]:
    """Those of this run, the servers included, whoever their parent is now."""
    began = psutil.Process().create_time()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.create_time() >= began and "afd.forkserver" in process.cmdline():
                yield process


# The report.


def report(outcome: Outcome) -> Iterator[Table | str]:
    faults = Table("fault", "number", "stalls", "p50 ms", "p99 ms", "longest ms", title="faults and stalls after them")
    for kind, number in sorted(Counter(fault.kind for fault in outcome.faults).items()):
        faults.add_row(kind, str(number), *_figures(_stalls_after(outcome, kind)))
    undisturbed = [seconds for answer in outcome.expected.values() for _, seconds in answer.stalls_s]
    faults.add_row("none, asked again", "", *_figures(undisturbed))
    yield faults
    clients = Table("clients", "requests", "tokens", "lost", "wrong", "shown twice", title="by the API that they use")
    for api in get_args(Api):
        clients.add_row(api, *map(str, _counts_of(outcome, api).values()))
    yield clients
    sums = Table("", "number", title=f"seed {outcome.plan.seed}, {outcome.plan.minutes:g} minutes")
    for name, value in as_json(outcome).items():
        if isinstance(value, int | float):
            sums.add_row(name, f"{value:g}")
    yield sums
    yield from (f"request {number}: {outcome.answers[number].error}" for number in outcome.lost[:10])
    yield from (f"request {number}: {_first_difference(outcome, number)}" for number in outcome.wrong[:10])


def _figures(stalls: list[float]) -> Iterator[str]:
    yield str(len(stalls))
    if stalls:
        yield from (f"{1e3 * s:.0f}" for s in (statistics.median(stalls), _quantile(stalls, 0.99), max(stalls)))


def _first_difference(outcome: Outcome, number: int) -> str:
    seen, expected = outcome.answers[number].tokens, outcome.expected[number].tokens
    question = outcome.questions[number]
    places = seen.keys() if question.leaves_after else seen.keys() | expected.keys()
    place = min(place for place in places if seen.get(place) != expected.get(place))
    difference = f"token {seen.get(place)} instead of {expected.get(place)} at (choice, index) {place}"
    return f"{difference}, asked with {question.options}"


def _counts_of(outcome: Outcome, api: Api) -> dict[str, int]:
    own = {number: answer for number, answer in outcome.answers.items() if outcome.questions[number].api == api}
    return {
        "requests": len(own),
        "tokens": _num_tokens(own),
        "lost": len(own.keys() & set(outcome.lost)),
        "wrong": len(own.keys() & set(outcome.wrong)),
        "tokens shown twice": sum(answer.num_twice for answer in own.values()),
    }


def _stalls_after(outcome: Outcome, kind: str) -> list[float]:
    """Of the stalls, each belongs to the last fault before its end's beginning."""
    found = []
    times = [(fault.at_s, fault.kind) for fault in outcome.faults]
    for answer in outcome.answers.values():
        for ended, seconds in answer.stalls_s:
            struck = [(at, one) for at, one in times if at <= ended - seconds + STALL_S]
            if struck and max(struck)[1] == kind:
                found.append(seconds)
    return found


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def as_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "faults": len(outcome.faults),
        "requests": len(outcome.answers),
        "tokens": _num_tokens(outcome.answers),
        "lost": len(outcome.lost),
        "wrong": len(outcome.wrong),
        "tokens shown twice": outcome.num_twice,
        "resumed over HTTP": sum(answer.num_resumed for answer in outcome.answers.values()),
        "tokens/s with faults": round(outcome.tokens_per_s[0], 1),
        "tokens/s without": round(outcome.tokens_per_s[1], 1),
        **{f"left: {name}": value for name, value in outcome.leaks.items()},
        "by API": {api: _counts_of(outcome, api) for api in get_args(Api)},
        "by kind": dict(Counter(fault.kind for fault in outcome.faults)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/step3-nano"))
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="mean time between faults")
    parser.add_argument("--only", choices=FAULTS, help="faults of this kind alone, each when all are back")
    parser.add_argument("--topology", default="2A2F2", help="attention replicas, FFN shards, replicas of each")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    attention, ffn, replicas = (int(number) for number in arguments.topology.replace("F", "A").split("A"))
    options = MeshOptions(
        model=arguments.model,
        attention=attention,
        gateways=2,
        ffn=ffn,
        ffn_replicas=replicas,
        dtype="float32",
        threads=1,
        settings={"lease_s": str(_LEASE_S), "log_level": "error", "drain_timeout_s": "2"},
    )
    console, notes = Console(), Console(stderr=True)
    kinds = [arguments.only] if arguments.only else list(FAULTS)
    if FILLING in kinds and not own_shared_memory():
        notes.print(f"no {FILLING}: it takes root, so that none but this run's own is filled", style="dim")
        kinds.remove(FILLING)
    if not kinds:
        sys.exit(2)
    plan = Plan(arguments.seed, arguments.minutes, arguments.streams, arguments.every, kinds, options)
    with arena_of(options) as arena:
        outcome = asyncio.run(run(plan, arena, notes))
    for part in report(outcome):
        console.print(part)
    if arguments.json:
        arguments.json.write_text(json.dumps(as_json(outcome), indent=2) + "\n")
    sys.exit(0 if outcome.is_good else 1)


if __name__ == "__main__":
    main()
