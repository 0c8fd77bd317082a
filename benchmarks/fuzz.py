"""Malformed HTTP, gRPC messages, frames and handshakes, thrown at a mesh over the network, while a client beside them
has its tokens compared. `python -m benchmarks.fuzz --inputs 100000 --seed 1`.

Every input is a function of the seed, its kind and its number; `--only http --from 4711 --inputs 1` throws one again.
Exit status 1 if a service crashed, hung, answered with a fault of its own (5xx, INTERNAL, UNKNOWN), logged a traceback
or kept memory or files, or if the client beside got other tokens than it should.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from afd.bench import counters
from afd.client import Client
from afd.errors import AfdError
from afd.mesh import Mesh, MeshOptions, running_mesh
from afd.model.checkpoint import Checkpoint
from afd.model.random_checkpoint import ModelSizes, make_checkpoint
from afd.model.transformer import Transformer
from afd.model.weights import load_all
from afd.state.connection import connect
from benchmarks.fuzzing.answers import HANG_S, Answer, Thrower
from benchmarks.fuzzing.grpc_inputs import GrpcThrower, methods, recorded
from benchmarks.fuzzing.http_inputs import HttpThrower
from benchmarks.fuzzing.pair_inputs import FRAMES_A_STREAM, FrameThrower, HandshakeThrower, Shard
from benchmarks.logs import alarms, output_to
from benchmarks.usage import Usage, usages

_SHARES = {"http": 0.4, "grpc": 0.3, "frames": 0.2, "handshakes": 0.1}
_WORKERS = {"http": 16, "grpc": 8, "frames": 3, "handshakes": 4}
_WARM_UP = 0.4  # of the inputs, before the first reading
_JOURNAL_TTL_S = 3.0
_SETTLE_S = 30.0
_CROWD = 100
_MOST_NOTES, _NOTE_CHARS = 40, 400  # all of their characters are in the JSON
_HELD = ("afd_sequences_running", "afd_sequences_waiting", "afd_kv_blocks_used", "afd_ffn_queue_frames")
_MEMORY_MB, _FILES = 24.0, 4  # what an allocator, and a pool of connections, may keep more
_CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}{{ message.name | tojson }}\n{% endfor %}"
)
_PROMPT, _NUM_TOKENS = [5, 6, 7], 40


@dataclass(frozen=True)
class Plan:
    seed: int
    num_inputs: dict[str, int]  # by kind
    first: int = 0  # number of the first


@dataclass
class Outcome:
    """What became of all inputs, and of the mesh."""

    answers: dict[str, Counter[str]] = field(default_factory=dict)  # by kind
    num_faults: Counter[str] = field(default_factory=Counter)  # by kind
    num_hangs: Counter[str] = field(default_factory=Counter)  # by kind
    notes: list[str] = field(default_factory=list)
    num_right: int = 0  # answers of the client beside
    wrong: list[str] = field(default_factory=list)
    before: dict[str, Usage] = field(default_factory=dict)
    after: dict[str, Usage] = field(default_factory=dict)
    keys: tuple[int, int] = (0, 0)
    held: dict[str, float] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def take(self, kind: str, number: int, answer: Answer) -> None:
        self.answers.setdefault(kind, Counter())[answer.what] += 1
        self.num_faults[kind] += answer.is_fault
        self.num_hangs[kind] += answer.what == "hang"
        if answer.detail and len(self.notes) < _MOST_NOTES:
            self.notes.append(f"{kind} {number}: {answer.what}: {answer.detail}")

    @property
    def crashed(self) -> list[str]:
        return [name for name, usage in self.before.items() if self.after.get(name, usage).pid != usage.pid] + [
            name for name in self.before if name not in self.after
        ]

    @property
    def kept(self) -> list[str]:
        """Who holds more than before."""
        return [
            name
            for name, after in self.after.items()
            if after.memory_mb > self.before[name].memory_mb + _MEMORY_MB
            or after.num_files > self.before[name].num_files + _FILES
        ]

    @property
    def is_good(self) -> bool:
        faults = self.num_faults.total() + self.num_hangs.total()
        return not (faults or self.wrong or self.crashed or self.kept or self.log or any(self.held.values()))


@contextlib.contextmanager
def arena() -> Iterator[tuple[Mesh, Path, Transformer]]:
    """A mesh of small random weights with a chat template, its log, and its oracle."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        model, log = Path(folder) / "model", Path(folder) / "log"
        make_checkpoint(model, ModelSizes(max_seq_len=64))
        (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": _CHAT_TEMPLATE}))
        settings = {"journal_ttl_s": str(_JOURNAL_TTL_S), "read_timeout_s": "2", "log_level": "warning"}
        checkpoint = Checkpoint(model)
        with output_to(log):
            mesh = stack.enter_context(
                running_mesh(MeshOptions(model=model, dtype="float32", threads=1, settings=settings))
            )
        yield mesh, log, Transformer(checkpoint.config, load_all(checkpoint))


async def run(plan: Plan, mesh: Mesh, log: Path, oracle: Transformer, console: Console) -> Outcome:
    expected = _greedy(oracle)
    addresses: dict[str, str] = {service.role: service.replica.address for service in mesh.services if service.replica}
    shard = await asyncio.to_thread(Shard, addresses["ffn"], oracle.config)
    makers = await _makers(plan, mesh, addresses, shard)
    warm_up = {kind: max(_WORKERS[kind], int(_WARM_UP * number)) for kind, number in plan.num_inputs.items()}
    outcome, ignored = Outcome(), Outcome()
    async with _client_beside(mesh, expected, outcome):
        await _throw_all(Plan(-plan.seed, warm_up), makers, ignored, console)
    await _crowd(mesh)
    outcome.before, keys_before, _ = await _settled(mesh)
    began = time.monotonic()
    async with _client_beside(mesh, expected, outcome):
        await _throw_all(plan, makers, outcome, console)
    outcome.seconds = time.monotonic() - began
    outcome.after, keys_after, outcome.held = await _settled(mesh)
    outcome.keys = keys_before, keys_after
    outcome.log = alarms(log)
    return outcome


async def _makers(plan: Plan, mesh: Mesh, addresses: dict[str, str], shard: Shard) -> dict[str, Callable[[], Thrower]]:
    """What makes a thrower of each kind."""
    conversations = {method.role: await recorded(method, addresses[method.role]) for method in methods()}
    metrics = [str(s.replica.metrics_address) for s in mesh.services if s.replica and s.role != "gateway"]
    http_address, model_name = mesh.gateway.http_address, mesh.options.model.name
    assert http_address is not None
    return {
        "http": lambda: HttpThrower(http_address, metrics, model_name),
        "grpc": lambda: GrpcThrower(addresses, conversations),
        "frames": lambda: FrameThrower(shard),
        "handshakes": lambda: HandshakeThrower(shard),
    }


async def _throw_all(plan: Plan, makers: dict[str, Callable[[], Thrower]], outcome: Outcome, console: Console) -> None:
    """All kinds side by side, each by several workers."""
    with Progress(console=console, transient=True) as progress:
        work = []
        for kind, total in plan.num_inputs.items():
            task = progress.add_task(kind, total=total)

            def taken(kind: str, number: int, answers: list[Answer], task: Any = task) -> None:
                for answer in answers:
                    outcome.take(kind, number, answer)
                progress.advance(task, len(answers))

            throws = math.ceil(total / (FRAMES_A_STREAM if kind == "frames" else 1))
            numbers = iter(range(plan.first, plan.first + throws))
            workers = min(_WORKERS[kind], throws)
            work += [_work(plan.seed, kind, numbers, makers[kind](), taken) for _ in range(workers)]
        await asyncio.gather(*work)


async def _work(
    seed: int, kind: str, numbers: Iterator[int], thrower: Thrower, taken: Callable[[str, int, list[Answer]], None]
) -> None:
    for number in numbers:
        try:
            answers = await thrower.throw(random.Random(f"{seed}-{kind}-{number}"))
        except TimeoutError:
            answers = [Answer("hang", detail="neither an answer nor a close")]
        except Exception as error:  # the service is not there, or says what cannot be
            answers = [Answer("lost", is_fault=True, detail=f"{type(error).__name__}: {error}")]
        taken(kind, number, answers)
    await thrower.close()


@torch.inference_mode()
def _greedy(oracle: Transformer) -> list[int]:
    """What the client beside should get."""
    ids = list(_PROMPT)
    for _ in range(_NUM_TOKENS):
        ids.append(int(oracle(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(_PROMPT) :]


@contextlib.asynccontextmanager
async def _client_beside(mesh: Mesh, expected: list[int], outcome: Outcome) -> AsyncIterator[None]:
    """One that asks the same again and again, and minds its own business; it asks once more at the end."""
    is_over = asyncio.Event()

    async def ask(client: Client) -> None:
        was_last = False
        while not was_last:
            was_last = is_over.is_set()
            try:
                stream = client.generate(_PROMPT, max_tokens=_NUM_TOKENS, ignore_eos=True)
                ids = [token.id async for token in stream]
            except AfdError as error:
                outcome.wrong.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.5)
                continue
            outcome.num_right += ids == expected
            if ids != expected:
                outcome.wrong.append(f"{ids} instead of {expected}")

    async with Client(mesh.target) as client:
        asking = asyncio.create_task(ask(client))
        try:
            yield
        finally:
            is_over.set()
            await asyncio.wait([asking], timeout=2 * HANG_S)
            if not asking.done():
                outcome.wrong.append("no answer")
                asking.cancel()


async def _crowd(mesh: Mesh) -> None:
    """So many at once that every pool of connections is full: these are kept, and are no leak."""
    async with Client(mesh.target) as client:

        async def ask() -> None:
            async for _ in client.generate(_PROMPT, max_tokens=2, ignore_eos=True):
                pass

        for _ in range(3):
            await asyncio.gather(*(ask() for _ in range(_CROWD)))


async def _settled(mesh: Mesh) -> tuple[dict[str, Usage], int, dict[str, float]]:
    """What is held once nobody asks any more: by processes, in Redis, and by the services' own counts."""
    await asyncio.sleep(_JOURNAL_TTL_S + 1)
    deadline = time.monotonic() + _SETTLE_S
    while True:
        held = {name: value for name, value in (await asyncio.to_thread(counters, mesh)).items() if name in _HELD}
        if not any(held.values()) or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.5)
    async with connect(mesh.redis_url, None) as redis:
        keys = int(await redis.dbsize())
    return usages(mesh), keys, held


# The report.


def report(outcome: Outcome) -> Iterator[Table | str]:
    kinds = Table("inputs", "number", "hangs", "faults", "answers", title="what became of them")
    for kind, answers in outcome.answers.items():
        said = ", ".join(f"{what} {number}" for what, number in answers.most_common())
        kinds.add_row(kind, str(answers.total()), str(outcome.num_hangs[kind]), str(outcome.num_faults[kind]), said)
    yield kinds
    held = Table(
        "process", "MB before", "after", "files before", "after", "threads before", "after", title="what they hold"
    )
    for name, before in outcome.before.items():
        after = outcome.after.get(name)
        pairs = [
            (f"{one.memory_mb:.1f}", str(one.num_files), str(one.num_threads)) if one else ("gone",) * 3
            for one in (before, after)
        ]
        held.add_row(name, *(text for pair in zip(*pairs, strict=True) for text in pair))
    yield held
    sums = Table("", "number")
    for name, value in as_json(outcome).items():
        if isinstance(value, int | float):
            sums.add_row(name, f"{value:g}")
    yield sums
    yield from (note[:_NOTE_CHARS] for note in (*outcome.notes, *outcome.wrong[:5], *outcome.log[-5:]))


def as_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "inputs": sum(answers.total() for answers in outcome.answers.values()),
        "seconds": round(outcome.seconds, 1),
        "crashes": len(outcome.crashed),
        "hangs": outcome.num_hangs.total(),
        "faults": outcome.num_faults.total(),
        "alarms in the logs": len(outcome.log),
        "right answers beside": outcome.num_right,
        "wrong answers beside": len(outcome.wrong),
        "Redis keys before": outcome.keys[0],
        "Redis keys after": outcome.keys[1],
        "kept memory or files": len(outcome.kept),
        **{f"left: {name}": value for name, value in outcome.held.items()},
        "answers": {kind: dict(answers) for kind, answers in outcome.answers.items()},
        "memory MB": {name: _pair(outcome, name, "memory_mb") for name in outcome.after},
        "files": {name: _pair(outcome, name, "num_files") for name in outcome.after},
        "notes": outcome.notes,
        "log": outcome.log,
    }


def _pair(outcome: Outcome, name: str, field_name: str) -> list[float]:
    return [round(float(getattr(usage[name], field_name)), 1) for usage in (outcome.before, outcome.after)]


def fuzz(plan: Plan, console: Console) -> Outcome:
    with arena() as (mesh, log, oracle):
        return asyncio.run(run(plan, mesh, log, oracle, console))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=_SHARES, help="inputs of this kind alone")
    parser.add_argument("--from", type=int, default=0, dest="first", metavar="NUMBER", help="of the first input")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    outcome = fuzz(plan_of(arguments.inputs, arguments.seed, arguments.only, arguments.first), Console(stderr=True))
    console = Console()
    for part in report(outcome):
        console.print(part, markup=False)
    if arguments.json:
        arguments.json.write_text(json.dumps(as_json(outcome), indent=2) + "\n")
    sys.exit(0 if outcome.is_good else 1)


def plan_of(num_inputs: int, seed: int, only: str | None = None, first: int = 0) -> Plan:
    shares = {only: 1.0} if only else _SHARES
    return Plan(seed, {kind: max(1, round(share * num_inputs)) for kind, share in shares.items()}, first)


if __name__ == "__main__":
    main()
