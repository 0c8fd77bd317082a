"""The minute of a failure against the minute before it: what does the loss of one replica cost in throughput, where the
others have room? `python -m benchmarks.failure --model models/step3-nano --kill ffn-0`.

Equal requests arrive at equal distances (an open loop), at a share of what the mesh can take, which a closed loop finds
first. In the middle of each round a replica is killed; the mesh starts it again. Tokens are counted when a client sees
them. Every request must end with the same tokens; exit status 1 if one did not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from afd.bench import Percentiles
from afd.client import Client, Token
from afd.mesh import Mesh, MeshOptions, running_mesh
from benchmarks.chaos import watched

_CAPACITY_S = 15.0
_CAPACITY_STREAMS = 8
_RECOVERY_S = 15.0  # between rounds, until the replica is back
_PROMPT_TOKENS, _OUTPUT_TOKENS = 16, 64


@dataclass
class Seen:
    """Of all requests of a time."""

    arrivals_s: list[float] = field(default_factory=list)  # of tokens
    gaps_s: list[tuple[float, float]] = field(default_factory=list)  # between two of one request: when, how long
    answers: list[tuple[int, ...]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def num_tokens(self, start_s: float, stop_s: float) -> int:
        return sum(start_s <= at < stop_s for at in self.arrivals_s)

    def gaps_ms(self, start_s: float, stop_s: float) -> Percentiles:
        return Percentiles.of([gap for at, gap in self.gaps_s if start_s <= at < stop_s])


@dataclass(frozen=True)
class Round:
    tokens_before: int
    tokens_after: int
    gaps_before: Percentiles
    gaps_after: Percentiles

    @property
    def loss(self) -> float:
        return 1 - self.tokens_after / self.tokens_before


@dataclass
class Outcome:
    requests_per_s: float
    rounds: list[Round]
    errors: list[str]
    num_wrong: int

    @property
    def loss(self) -> float:
        """Of all rounds together."""
        before, after = sum(r.tokens_before for r in self.rounds), sum(r.tokens_after for r in self.rounds)
        return 1 - after / before


async def _ask(client: Client, prompt: list[int], seen: Seen) -> None:
    ids: list[int] = []
    last_s: float | None = None
    try:
        async for token in client.generate(prompt, max_tokens=_OUTPUT_TOKENS, ignore_eos=True):
            last_s = _note(token, last_s, seen)
            ids.append(token.id)
    except Exception as error:
        seen.errors.append(repr(error))
    seen.answers.append(tuple(ids))


def _note(token: Token, last_s: float | None, seen: Seen) -> float:
    now = time.monotonic()
    seen.arrivals_s.append(now)
    if last_s is not None:
        seen.gaps_s.append((now, now - last_s))
    return now


async def _capacity(client: Client, prompt: list[int]) -> float:
    """Requests/s of a closed loop."""
    seen, began = Seen(), time.monotonic()

    async def keep_asking() -> None:
        while time.monotonic() < began + _CAPACITY_S:
            await _ask(client, prompt, seen)

    await asyncio.gather(*(keep_asking() for _ in range(_CAPACITY_STREAMS)))
    return len(seen.answers) / (time.monotonic() - began)


async def _offer(client: Client, prompt: list[int], requests_per_s: float, seconds: float, seen: Seen) -> None:
    began = time.monotonic()
    async with asyncio.TaskGroup() as asking:
        for number in range(int(seconds * requests_per_s)):
            await asyncio.sleep(began + number / requests_per_s - time.monotonic())
            asking.create_task(_ask(client, prompt, seen))


async def _round(mesh: Mesh, client: Client, prompt: list[int], plan: Plan, rate: float, seen: Seen) -> Round:
    """A while to get steady, the minute before, the minute of the failure."""
    began = time.monotonic()
    failed_s = began + plan.warm_up_s + plan.minute_s

    async def fail() -> None:
        await asyncio.sleep(failed_s - time.monotonic())
        victim = next(service for service in mesh.services if service.replica_id == plan.victim)
        assert victim.process is not None
        victim.process.send_signal(signal.SIGKILL)

    await asyncio.gather(_offer(client, prompt, rate, plan.warm_up_s + 2 * plan.minute_s, seen), fail())
    before, after = (failed_s - plan.minute_s, failed_s), (failed_s, failed_s + plan.minute_s)
    return Round(seen.num_tokens(*before), seen.num_tokens(*after), seen.gaps_ms(*before), seen.gaps_ms(*after))


@dataclass(frozen=True)
class Plan:
    victim: str  # its replica_id
    load: float
    num_rounds: int
    minute_s: float = 60.0
    warm_up_s: float = 5.0


async def run(mesh: Mesh, plan: Plan, notes: Console) -> Outcome:
    async with watched(mesh), Client(mesh.target) as client:
        chooser = random.Random(1)
        prompt = [chooser.randrange(2, (await client.get_model()).vocab_size) for _ in range(_PROMPT_TOKENS)]
        await _capacity(client, prompt)  # warms everything up
        capacity = await _capacity(client, prompt)
        rate = plan.load * capacity
        notes.print(f"{capacity:.2f} requests/s are the most; {rate:.2f} will come", style="dim")
        seen, rounds = Seen(), []
        for number in range(plan.num_rounds):
            rounds.append(await _round(mesh, client, prompt, plan, rate, seen))
            notes.print(f"round {number + 1}: loses {100 * rounds[-1].loss:.2f} %", style="dim")
            await asyncio.sleep(_RECOVERY_S)
    num_wrong = sum(answer != seen.answers[0] for answer in seen.answers)
    return Outcome(rate, rounds, seen.errors, num_wrong)


def report(outcome: Outcome, plan: Plan) -> Iterator[Table | str]:
    table = Table(title=f"SIGKILL {plan.victim}, at {100 * plan.load:.0f} % of what the mesh can take")
    for heading in ("round", "tokens before", "after", "lost %", "gap p99 ms before", "after"):
        table.add_column(heading, justify="right")
    for number, each in enumerate(outcome.rounds, 1):
        gaps = f"{each.gaps_before.p99:.0f}", f"{each.gaps_after.p99:.0f}"
        table.add_row(str(number), str(each.tokens_before), str(each.tokens_after), f"{100 * each.loss:.2f}", *gaps)
    yield table
    losses = [each.loss for each in outcome.rounds]
    yield f"all rounds: {100 * outcome.loss:.2f} % lost; median {100 * statistics.median(losses):.2f} %"
    yield f"{len(outcome.errors)} requests failed, {outcome.num_wrong} had other tokens"
    yield from outcome.errors[:5]


def as_json(outcome: Outcome) -> dict[str, Any]:
    return {"loss": outcome.loss, **asdict(outcome)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/step3-nano"))
    parser.add_argument("--kill", default="ffn-0", metavar="REPLICA", help="as the registry calls it")
    parser.add_argument("--load", type=float, default=0.5, help="share of what the mesh can take")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--topology", default="2A1F2R", help="attention replicas, FFN shards, replicas of each")
    parser.add_argument("--minute", type=float, default=60.0, metavar="SECONDS", help="how long a minute is")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    attention, ffn, replicas = (int(part) for part in arguments.topology.rstrip("R").replace("F", "A").split("A"))
    options = MeshOptions(
        model=arguments.model,
        attention=attention,
        ffn=ffn,
        ffn_replicas=replicas,
        dtype="float32",
        threads=1,
        settings={"log_level": "warning"},
    )
    plan, notes = Plan(arguments.kill, arguments.load, arguments.rounds, arguments.minute), Console(stderr=True)
    with running_mesh(options) as mesh:
        outcome = asyncio.run(run(mesh, plan, notes))
    console = Console()
    for part in report(outcome, plan):
        console.print(part)
    if arguments.json:
        arguments.json.write_text(json.dumps(as_json(outcome), indent=2) + "\n")
    sys.exit(1 if outcome.errors or outcome.num_wrong else 0)


if __name__ == "__main__":
    main()
