"""`afd advise`: what of a running mesh to scale next, and why; from the leases that `afd top` shows."""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from afd.client import Client, Replica
from afd.errors import ConfigError, PeerUnavailable

_EVERY_S = 1.0  # leases are renewed every second or two
_BUSY = 0.85  # of the time: there is no more to be had
_FULL = 0.9  # of the KV blocks
_KV_GOAL = 0.8  # of them, after scaling
_SPARE = 0.6  # of places, blocks and time, that fewer replicas may take
_WAITS = 0.3  # of a step: worth to be told
_MOST_AT_ONCE = 2  # times as many


@dataclass(frozen=True)
class Goal:
    """Milliseconds that a token, and the first one, may take in the mean; None is any."""

    tpot_ms: float | None = None
    ttft_ms: float | None = None


@dataclass(frozen=True)
class Advice:
    """The numbers wanted, as `afd scale` and charts take them, and a sentence or two."""

    attention: int
    ffn: int  # shards
    reason: str

    def as_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Look:
    """A mesh for some seconds, in sums over its attention replicas; shares are of the time."""

    attention: int
    ffn: int  # shards
    missing_shards: tuple[int, ...]
    running: float
    waiting: float
    places: int
    kv_use: float
    steps_per_s: float
    step_s: float  # time in steps, per second
    bubble_s: float
    handoff_s: float
    queue_s: float
    compute_s: float
    ffn_busy: float  # of the busiest shard
    ttft_ms: float | None

    @property
    def tpot_ms(self) -> float:
        """Of a step, which gives each sequence a token."""
        return 1e3 * self.step_s / self.steps_per_s

    @property
    def decoding(self) -> float:
        """Share of the time in which attention replicas are in a step."""
        return self.step_s / self.attention

    @property
    def waits(self) -> float:
        """Share of a step in which attention waits for the FFN."""
        return self.bubble_s / self.step_s

    @property
    def way(self) -> float:
        """Share of the handoffs' time in which frames are under way, and neither queued nor computed."""
        return max(0.0, 1 - (self.queue_s + self.compute_s) / self.handoff_s) if self.handoff_s else 0.0

    @property
    def queue_ms(self) -> float:
        """Of a step and shard."""
        return 1e3 * self.queue_s / self.ffn / self.steps_per_s


async def look(client: Client, seconds: float) -> Look:
    """Raises PeerUnavailable where there is no mesh, or none that could decode."""
    seen = [await client.get_mesh()]
    for _ in range(math.ceil(seconds / _EVERY_S)):
        await asyncio.sleep(_EVERY_S)
        seen.append(await client.get_mesh())
    return seen_as(seen)


def seen_as(seen: Sequence[Sequence[Replica]]) -> Look:
    """The replicas that are there at last, with the means of all that was seen of them."""
    roles: dict[str, list[Replica]] = defaultdict(list)
    for replica in seen[-1]:
        roles[replica.role].append(replica)
    attention, ffn = roles["attention"], roles["ffn"]
    if not attention:
        raise PeerUnavailable("no attention replica of this mesh holds a lease: start one")
    if not ffn:
        raise ConfigError("this mesh has the FFN inside its attention replicas, so there is no ratio to advise on")
    num_shards = max(replica.shard[1] for replica in ffn if replica.shard)

    def rate(name: str, of: Iterable[Replica] = attention) -> float:
        ids = {replica.replica_id for replica in of}
        return fmean(sum(each.rates.get(name, 0.0) for each in replicas if each.replica_id in ids) for replicas in seen)

    def load(name: str) -> float:
        return fmean(sum(each.load.get(name, 0) for each in replicas if each.role == "attention") for replicas in seen)

    shards = {shard: [each for each in ffn if each.shard == (shard, num_shards)] for shard in range(num_shards)}
    blocks = sum(replica.capacity.get("kv_blocks", 0) for replica in attention)
    first_tokens = rate("first_tokens", roles["gateway"])
    return Look(
        attention=len(attention),
        ffn=num_shards,
        missing_shards=tuple(shard for shard, own in shards.items() if not own),
        running=load("sequences") - load("waiting"),
        waiting=load("waiting"),
        places=sum(replica.capacity.get("sequences", 0) for replica in attention),
        kv_use=load("kv_blocks") / blocks if blocks else 0.0,
        steps_per_s=rate("steps"),
        step_s=rate("step_seconds"),
        bubble_s=rate("attention_bubble_seconds"),
        handoff_s=rate("handoff_seconds"),
        queue_s=rate("handoff_ffn_queue_seconds"),
        compute_s=rate("handoff_ffn_compute_seconds"),
        ffn_busy=max(rate("ffn_compute_seconds", own) / len(own) for own in shards.values() if own),
        ttft_ms=1e3 * rate("ttft_seconds", roles["gateway"]) / first_tokens if first_tokens else None,
    )


def advise(seen: Look, goal: Goal = Goal()) -> Advice:
    """What is lost comes first, then who waits, then what is slower than the goal, then what is idle."""
    for verdict in (_lost, _idle, _full, _slow, _late, _one_sided, _spare):
        if advice := verdict(seen, goal):
            return advice
    return _nothing(seen)


def _keep(seen: Look, reason: str) -> Advice:
    return Advice(seen.attention, seen.ffn, reason)


def _more_attention(seen: Look, factor: float, reason: str) -> Advice:
    number = _grown(seen.attention, factor)
    return Advice(number, seen.ffn, f"add attention replicas, {number} instead of {seen.attention}: {reason}")


def _more_ffn(seen: Look, factor: float, reason: str) -> Advice:
    number = _grown(seen.ffn, factor)
    return Advice(seen.attention, number, f"add FFN shards, {number} instead of {seen.ffn}: {reason}")


def _grown(number: int, factor: float) -> int:
    """At least one more, and not more than can be judged from here."""
    return max(number + 1, math.ceil(number * min(factor, _MOST_AT_ONCE)))


def _lost(seen: Look, _: Goal) -> Advice | None:
    if not seen.missing_shards:
        return None
    shards = ", ".join(f"{shard}/{seen.ffn}" for shard in seen.missing_shards)
    return _keep(seen, f"start what is missing first: FFN shard {shards} has no replica, so nothing is decoded")


def _idle(seen: Look, _: Goal) -> Advice | None:
    if seen.steps_per_s or seen.waiting:
        return None
    return _keep(seen, "nothing: nothing is decoded, so there is nothing to judge by; ask again under load")


def _full(seen: Look, _: Goal) -> Advice | None:
    if seen.waiting < 1:
        return None
    wanted = 1 + seen.waiting / max(1.0, seen.running)
    if seen.kv_use >= _FULL:
        reason = f"{seen.kv_use:.0%} of the KV blocks are used and {seen.waiting:.0f} sequences wait"
        return _more_attention(seen, seen.kv_use * wanted / _KV_GOAL, reason)
    if seen.running >= _FULL * seen.places:
        reason = f"all {seen.places} places for sequences are taken and {seen.waiting:.0f} wait"
        return _more_attention(seen, wanted, reason)
    return None


def _slow(seen: Look, goal: Goal) -> Advice | None:
    if goal.tpot_ms is None or not seen.steps_per_s or seen.tpot_ms <= goal.tpot_ms:
        return None
    over = f"a token takes {seen.tpot_ms:.1f} ms instead of {goal.tpot_ms:g}"
    return _busier_side(seen, seen.tpot_ms / goal.tpot_ms, over)


def _late(seen: Look, goal: Goal) -> Advice | None:
    if goal.ttft_ms is None or seen.ttft_ms is None or seen.ttft_ms <= goal.ttft_ms:
        return None
    over = f"the first token takes {seen.ttft_ms:.0f} ms instead of {goal.ttft_ms:g}"
    return _busier_side(seen, seen.ttft_ms / goal.ttft_ms, over)


def _busier_side(seen: Look, factor: float, over: str) -> Advice:
    """Whatever takes the most of a step: attention's own work, the FFN with its queue, or the ways."""
    if seen.waits < 0.5 and seen.ffn_busy < _BUSY:
        return _more_attention(seen, factor, f"{over}, of which attention computes {1 - seen.waits:.0%}")
    if seen.ffn_busy < _BUSY and seen.way > 0.5:
        return _keep(
            seen,
            f"neither side: {over}, and {seen.way:.0%} of a handoff is on the way: look at `afd doctor` and the "
            "transport, or run the FFN inside the attention replicas (--ffn 0)",
        )
    return _more_ffn(seen, factor, f"{over}, and attention waits {_waiting(seen)}")


def _waiting(seen: Look) -> str:
    return (
        f"{seen.waits:.0%} of it for the FFN, whose busiest shard computes {seen.ffn_busy:.0%} of the time and has "
        f"frames queued for {seen.queue_ms:.1f} ms a step"
    )


def _one_sided(seen: Look, goal: Goal) -> Advice | None:
    """Where a goal is kept there is nothing to mend."""
    if goal.tpot_ms is not None or not seen.steps_per_s:
        return None
    if seen.ffn_busy >= _BUSY and seen.waits >= _WAITS:
        return _more_ffn(seen, 1.0, f"attention waits {_waiting(seen)}")
    if seen.decoding >= _BUSY and seen.waits <= 1 - _BUSY and seen.ffn_busy <= 1 - _WAITS:
        computing = seen.decoding * (1 - seen.waits)
        return _more_attention(seen, 1.0, f"they compute {computing:.0%} of the time, the FFN {seen.ffn_busy:.0%}")
    return None


def _spare(seen: Look, goal: Goal) -> Advice | None:
    fewer = seen.attention - 1
    if fewer < 1 or seen.waiting >= 1:
        return None
    slack = goal.tpot_ms is None or seen.tpot_ms <= _SPARE * goal.tpot_ms
    growth = seen.attention / fewer
    if slack and max(seen.kv_use, seen.running / seen.places, seen.decoding) * growth <= _SPARE:
        return Advice(
            fewer,
            seen.ffn,
            f"{fewer} instead of {seen.attention} attention replicas would do: {seen.kv_use:.0%} of the KV blocks are "
            f"used, no sequence waits, and replicas decode {seen.decoding:.0%} of the time",
        )
    return None


def _nothing(seen: Look) -> Advice:
    wait = f"{seen.waiting:.0f} sequences wait" if seen.waiting >= 1 else "no sequence waits"
    token = f", a token takes {seen.tpot_ms:.1f} ms" if seen.steps_per_s else ""
    return _keep(
        seen,
        f"nothing: {seen.kv_use:.0%} of the KV blocks are used, {wait}{token}; "
        f"the busiest FFN shard computes {seen.ffn_busy:.0%} of the time",
    )
