"""Who is alive: every replica holds a lease, an entry that expires unless it is renewed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self, cast

from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from afd.errors import PeerUnavailable
from afd.state.connection import RETRY_PAUSE_S, translated_errors
from afd.tasks import end

log = logging.getLogger(__name__)

Role = Literal["gateway", "attention", "ffn"]
_POLL_S = 1.0
_ANSWER_S = 1.0  # a question that takes longer comes too late to be of use
_GONE_S = 60.0  # how long it is remembered that a replica left, or that its lease expired
_LEFT, _EXPIRED = b"left", b"expired"

# KEYS: lease, names, gone. ARGV: name, description, lease in ms. 1 if nobody knew of this replica.
_RENEW = """
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
redis.call('HDEL', KEYS[3], ARGV[1])
return redis.call('SADD', KEYS[2], ARGV[1])
"""
# KEYS: lease, names, gone. ARGV: name, ms to remember it.
_LEAVE = """
redis.call('DEL', KEYS[1])
redis.call('SREM', KEYS[2], ARGV[1])
redis.call('HSET', KEYS[3], ARGV[1], 'left')
redis.call('PEXPIRE', KEYS[3], ARGV[2])
return 1
"""
# KEYS: lease, names, gone. ARGV: name, ms to remember it. A lease that was renewed meanwhile stays.
_EXPIRE = """
if redis.call('EXISTS', KEYS[1]) == 1 or redis.call('SREM', KEYS[2], ARGV[1]) == 0 then return 0 end
redis.call('HSET', KEYS[3], ARGV[1], 'expired')
redis.call('PEXPIRE', KEYS[3], ARGV[2])
return 1
"""
_LAYOUT_LEASES = 10  # how long a layout is known that nobody uses any more
_NO_EPOCH = 0

# KEYS: layout. ARGV: epoch, number of shards, TTL in ms. Writes it where there is none, or an older one.
_KEEP_LAYOUT = """
local epoch = tonumber(redis.call('HGET', KEYS[1], 'epoch') or 0)
if epoch < tonumber(ARGV[1]) then redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'num_shards', ARGV[2]) end
if tonumber(ARGV[1]) > 0 then redis.call('PEXPIRE', KEYS[1], ARGV[3]) end
return redis.call('HMGET', KEYS[1], 'epoch', 'num_shards')
"""
# KEYS: layout. ARGV: number of shards, TTL in ms.
_SET_LAYOUT = """
local epoch = redis.call('HINCRBY', KEYS[1], 'epoch', 1)
redis.call('HSET', KEYS[1], 'num_shards', ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return epoch
"""


@dataclass(frozen=True)
class Layout:
    """Into how many shards the FFN is split, and the epoch that began with it."""

    epoch: int
    num_shards: int


NO_LAYOUT = Layout(_NO_EPOCH, 0)


@dataclass(frozen=True)
class Replica:
    """One running process, as it describes itself in the registry."""

    role: Role
    replica_id: str
    address: str  # gRPC, host:port
    fingerprint: str  # of the model
    pid: int
    shard: tuple[int, int] | None = None  # (i, M) of an FFN replica
    max_context_tokens: int = 0  # of an attention replica: the longest prompt and output it can hold
    is_ready: bool = True  # of an attention replica: every shard of its FFN has a replica
    http_address: str | None = None  # of a gateway
    metrics_address: str | None = None
    transports: tuple[str, ...] = ()  # that an FFN replica's host has the parts for, or an attention replica uses
    epoch: int = 0  # of the layout that it goes by
    capacity: Mapping[str, int] = field(default_factory=dict)  # what it takes on at once: "sequences", "kv_blocks", ...
    load: Mapping[str, int] = field(default_factory=dict)  # what it has of that, when it last renewed its lease
    rates: Mapping[str, float] = field(default_factory=dict)  # its counters, per second
    links: Mapping[str, str] = field(default_factory=dict)  # an attention replica's transports, by FFN replica
    sequences_at: Mapping[str, int] = field(default_factory=dict)  # a gateway's, by the attention replica's incarnation
    incarnation: str = field(default_factory=lambda: uuid.uuid4().hex)  # another one after a restart

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: bytes) -> Self:
        known = {each.name for each in fields(cls)}  # a later version may say more
        values: dict[str, Any] = {name: value for name, value in json.loads(text).items() if name in known}
        values["shard"] = tuple(values["shard"]) if values["shard"] else None
        values["transports"] = tuple(values["transports"])
        return cls(**values)


class _View:
    """What a watcher knows of a role. Gone is who left, and whose lease expired while Redis was there to renew it. Whom
    Redis merely does not know any more, after an outage or a loss of data, has a lease's time to come back."""

    def __init__(self, lease_s: float) -> None:
        self.lease_s = lease_s
        self._known: dict[str, Replica] = {}
        self._missing_since_s: dict[str, float] = {}
        self._answers_since_s: float | None = -math.inf

    @property
    def replicas(self) -> list[Replica]:
        return [self._known[name] for name in sorted(self._known)]

    def outage(self) -> bool:
        """Redis does not answer. True if it did before."""
        is_new = self._answers_since_s is not None
        self._answers_since_s = None
        self._missing_since_s.clear()
        return is_new

    def update(self, entries: dict[str, Replica], gone: dict[str, bytes], now_s: float) -> None:
        """Redis has these entries, and remembers that those names are gone."""
        if self._answers_since_s is None:
            self._answers_since_s = now_s
        for name in entries:
            self._missing_since_s.pop(name, None)
        for name in self._known.keys() - entries.keys():
            missing_s = now_s - self._missing_since_s.setdefault(name, now_s)
            had_time = now_s - self._answers_since_s >= self.lease_s
            if gone.get(name) == _LEFT or (gone.get(name) == _EXPIRED and had_time) or missing_s >= self.lease_s:
                del self._known[name], self._missing_since_s[name]
        self._known |= entries


class Registry:
    """Leases in Redis: a key per replica with an expiry; per role a set of names, and for a while the names of those
    that are gone; a channel that says "look again". The braces keep a mesh's keys on one node of a Redis Cluster."""

    def __init__(self, redis: Redis, lease_s: float, mesh: str = "default") -> None:
        self.redis = redis
        self.lease_s = lease_s
        self.mesh = mesh
        self._answers = True  # as far as its watchers know: one of them tells of an outage
        self._channel = f"afd:membership:{{{mesh}}}"
        self._renew_script = redis.register_script(_RENEW)
        self._leave_script = redis.register_script(_LEAVE)
        self._expire_script = redis.register_script(_EXPIRE)
        self._keep_layout = redis.register_script(_KEEP_LAYOUT)
        self._set_layout = redis.register_script(_SET_LAYOUT)

    @asynccontextmanager
    async def registered(self, describe: Callable[[], Replica]) -> AsyncIterator[None]:
        """Holds a lease while the block runs, renewing it with a fresh description; leaves cleanly at the end."""
        await self._renew(describe())
        await self._notify()
        renewal = asyncio.create_task(self._keep_renewing(describe))
        try:
            yield
        finally:
            await end(renewal)
            with contextlib.suppress(PeerUnavailable):
                await self._leave(describe())

    async def replicas(self, role: Role) -> list[Replica]:
        """The replicas of a role that hold a lease, by name. Raises PeerUnavailable without Redis."""
        entries, _ = await self._look(role)
        return [entries[name] for name in sorted(entries)]

    async def meshes(self) -> list[str]:
        """All on this Redis that have replicas; none where its user may not look for keys."""
        try:
            async with translated_errors():
                keys = [key.decode() async for key in self.redis.scan_iter("afd:replicas:*", count=1000)]
        except PeerUnavailable:
            return []
        return sorted({key.partition("{")[2].partition("}")[0] for key in keys})

    async def watch(self, role: Role) -> AsyncIterator[list[Replica]]:
        """The replicas of a role now, and again after each change: by notification, and by polling behind it.

        While Redis does not answer they are those that were known last. After that, and after a restart without data,
        a replica that is missing has the time of a lease to come back before it counts as gone.
        """
        view, last = _View(self.lease_s), None
        while True:
            async with self.redis.pubsub() as changes:
                try:
                    while True:
                        await self._update(view, role, changes)
                        if view.replicas != last:
                            last = view.replicas
                            yield view.replicas
                        await self._wait_for_change(changes)
                except PeerUnavailable as error:
                    if view.outage() and self._answers:
                        self._answers = False
                        log.warning("membership is what it was, for now: %s", error)
            await asyncio.sleep(RETRY_PAUSE_S)

    async def _update(self, view: _View, role: Role, changes: PubSub) -> None:
        await self._subscribe(changes)
        asked_s = time.monotonic()
        entries, gone = await self._look(role)
        now_s = time.monotonic()
        if now_s - asked_s > max(_POLL_S, self.lease_s / 2):
            view.outage()  # it was frozen: no renewal came through either
        view.update(entries, gone, now_s)
        self._answers = True

    async def _subscribe(self, changes: PubSub) -> None:
        if not changes.subscribed:
            async with translated_errors():
                await changes.subscribe(self._channel)

    async def _wait_for_change(self, changes: PubSub) -> None:
        """Returns when there is one, or when it is time to look anyway."""
        async with translated_errors(_POLL_S + _ANSWER_S):
            await changes.get_message(ignore_subscribe_messages=True, timeout=_POLL_S)

    async def _look(self, role: Role) -> tuple[dict[str, Replica], dict[str, bytes]]:
        """By name, the replicas that hold a lease, and how those went that are gone."""
        async with translated_errors():
            members, left = await asyncio.gather(
                cast(Awaitable[set[bytes]], self.redis.smembers(self._names_key(role))),
                cast(Awaitable[dict[bytes, bytes]], self.redis.hgetall(self._gone_key(role))),
            )
            names = [name.decode() for name in members]
            keys = [self._key(role, name) for name in names]
            found = cast(list[bytes | None], await self.redis.mget(keys) if keys else [])
        entries = {name: Replica.decode(text) for name, text in zip(names, found, strict=True) if text is not None}
        gone = {name.decode(): how for name, how in left.items()}
        for name in set(names) - entries.keys():
            if await self._expire(role, name):
                gone[name] = _EXPIRED
        return entries, gone

    async def keep_layout(self, known: Layout) -> Layout:
        """The layout that counts; `known`, which is written then, where Redis has none or an older one. Raises
        PeerUnavailable without Redis."""
        arguments = [known.epoch, known.num_shards, self._layout_ttl_ms]
        async with translated_errors():
            epoch, num_shards = await self._keep_layout(keys=[self._layout_key], args=arguments)
        return Layout(int(epoch), int(num_shards)) if epoch else NO_LAYOUT

    async def set_layout(self, num_shards: int) -> Layout:
        """Begins a new epoch. Raises PeerUnavailable without Redis."""
        async with translated_errors():
            epoch = await self._set_layout(keys=[self._layout_key], args=[num_shards, self._layout_ttl_ms])
        await self._notify()
        return Layout(int(epoch), num_shards)

    async def watch_layout(self, known: Layout) -> AsyncIterator[Layout]:
        """The layout that counts now, and again after each change."""
        last: Layout | None = None
        while True:
            async with self.redis.pubsub() as changes:
                with contextlib.suppress(PeerUnavailable):
                    while True:
                        await self._subscribe(changes)
                        known = await self.keep_layout(known)
                        if known != last:
                            last = known
                            yield known
                        await self._wait_for_change(changes)
            await asyncio.sleep(RETRY_PAUSE_S)

    async def _keep_renewing(self, describe: Callable[[], Replica]) -> None:
        """Three times in a lease; after a failure at once, so that it is renewed as soon as Redis is back."""
        is_late = False
        while True:
            await asyncio.sleep(min(RETRY_PAUSE_S, self.lease_s / 3) if is_late else self.lease_s / 3)
            try:
                if await self._renew(describe()):
                    await self._notify()
            except PeerUnavailable as error:
                if not is_late:
                    log.warning("the lease could not be renewed: %s", error)
                is_late = True
            else:
                is_late = False

    async def _renew(self, replica: Replica) -> bool:
        """True if Redis did not know of this replica."""
        async with translated_errors(max(_ANSWER_S, self.lease_s / 3)):
            is_new = await self._renew_script(
                keys=self._keys(replica.role, replica.replica_id),
                args=[replica.replica_id, replica.encode(), max(1, int(self.lease_s * 1000))],
            )
        return bool(is_new)

    async def _leave(self, replica: Replica) -> None:
        async with translated_errors():
            await self._leave_script(
                keys=self._keys(replica.role, replica.replica_id), args=[replica.replica_id, self._gone_ms]
            )
        await self._notify()

    async def _expire(self, role: Role, replica_id: str) -> bool:
        """Notes that a lease has expired; False if somebody else has, or if it was renewed just now."""
        async with translated_errors():
            keys = self._keys(role, replica_id)
            return bool(await self._expire_script(keys=keys, args=[replica_id, self._gone_ms]))

    async def _notify(self) -> None:
        async with translated_errors():
            await self.redis.publish(self._channel, "changed")

    @property
    def _gone_ms(self) -> int:
        return int(max(_GONE_S, 2 * self.lease_s) * 1000)

    def _keys(self, role: Role, replica_id: str) -> list[str]:
        return [self._key(role, replica_id), self._names_key(role), self._gone_key(role)]

    @property
    def _layout_ttl_ms(self) -> int:
        return int(self.lease_s * 1000) * _LAYOUT_LEASES

    @property
    def _layout_key(self) -> str:
        return f"afd:layout:{{{self.mesh}}}"

    def _key(self, role: Role, replica_id: str) -> str:
        return f"afd:replica:{{{self.mesh}}}:{role}:{replica_id}"

    def _names_key(self, role: Role) -> str:
        return f"afd:replicas:{{{self.mesh}}}:{role}"

    def _gone_key(self, role: Role) -> str:
        return f"afd:gone:{{{self.mesh}}}:{role}"
