"""Who is alive: every replica holds a lease, an entry that expires unless it is renewed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self, cast

from redis.asyncio import Redis

from afd.errors import PeerUnavailable
from afd.state.connection import translated_errors

log = logging.getLogger(__name__)

Role = Literal["gateway", "attention", "ffn"]
_POLL_S = 1.0
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
    http_address: str | None = None  # of a gateway
    metrics_address: str | None = None
    transports: tuple[str, ...] = field(default=("inline",))
    incarnation: str = field(default_factory=lambda: uuid.uuid4().hex)  # another one after a restart

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: bytes) -> Self:
        values: dict[str, Any] = json.loads(text)
        values["shard"] = tuple(values["shard"]) if values["shard"] else None
        values["transports"] = tuple(values["transports"])
        return cls(**values)


class Registry:
    """Leases in Redis: a key per replica with an expiry, a set of names per role, a channel that says "look again"."""

    def __init__(self, redis: Redis, lease_s: float, mesh: str = "default") -> None:
        self.redis = redis
        self.lease_s = lease_s
        self.mesh = mesh
        self._channel = f"afd:membership:{mesh}"
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
            renewal.cancel()
            await asyncio.wait([renewal])
            with contextlib.suppress(PeerUnavailable):
                await self._leave(describe())

    async def replicas(self, role: Role) -> list[Replica]:
        """The replicas of a role that hold a lease, by name. Raises PeerUnavailable without Redis."""
        async with translated_errors():
            members = cast(set[bytes], await self.redis.smembers(self._names_key(role)))
            names = sorted(name.decode() for name in members)
            found = await asyncio.gather(*(self.redis.get(self._key(role, name)) for name in names))
            entries = cast(list[bytes | None], found)
            gone = [name for name, entry in zip(names, entries, strict=True) if entry is None]
            if gone:
                await self.redis.srem(self._names_key(role), *gone)
        return [Replica.decode(entry) for entry in entries if entry is not None]

    async def watch(self, role: Role) -> AsyncIterator[list[Replica]]:
        """The replicas of a role now, and again after each change: by notification, and by polling behind it."""
        last: list[Replica] | None = None
        async with self.redis.pubsub() as changes:
            while True:
                try:
                    async with translated_errors():
                        if not changes.subscribed:
                            await changes.subscribe(self._channel)
                    current = await self.replicas(role)
                except PeerUnavailable as error:
                    log.warning("membership is not known for now: %s", error)
                    await asyncio.sleep(_POLL_S)
                    continue
                if current != last:
                    last = current
                    yield current
                with contextlib.suppress(PeerUnavailable):
                    async with translated_errors():
                        await changes.get_message(ignore_subscribe_messages=True, timeout=_POLL_S)

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
        """The layout that counts, and again after each change."""
        last: Layout | None = None
        async for _ in self._changes():
            with contextlib.suppress(PeerUnavailable):
                known = await self.keep_layout(known)
                if known != last:
                    last = known
                    yield known

    async def _changes(self) -> AsyncIterator[None]:
        """When it may be time to look again: at each notification, and every now and then."""
        async with self.redis.pubsub() as changes:
            while True:
                try:
                    async with translated_errors():
                        if not changes.subscribed:
                            await changes.subscribe(self._channel)
                            yield
                        await changes.get_message(ignore_subscribe_messages=True, timeout=_POLL_S)
                    yield
                except PeerUnavailable:
                    await asyncio.sleep(_POLL_S)

    async def _keep_renewing(self, describe: Callable[[], Replica]) -> None:
        while True:
            await asyncio.sleep(self.lease_s / 3)
            try:
                await self._renew(describe())
            except PeerUnavailable as error:
                log.warning("the lease could not be renewed: %s", error)

    async def _renew(self, replica: Replica) -> None:
        async with translated_errors():
            await self.redis.set(
                self._key(replica.role, replica.replica_id), replica.encode(), px=max(1, int(self.lease_s * 1000))
            )
            await self.redis.sadd(self._names_key(replica.role), replica.replica_id)

    async def _leave(self, replica: Replica) -> None:
        async with translated_errors():
            await self.redis.delete(self._key(replica.role, replica.replica_id))
            await self.redis.srem(self._names_key(replica.role), replica.replica_id)
            await self._notify()

    async def _notify(self) -> None:
        async with translated_errors():
            await self.redis.publish(self._channel, "changed")

    @property
    def _layout_ttl_ms(self) -> int:
        return int(self.lease_s * 1000) * _LAYOUT_LEASES

    @property
    def _layout_key(self) -> str:
        return f"afd:layout:{self.mesh}"

    def _key(self, role: Role, replica_id: str) -> str:
        return f"afd:replica:{self.mesh}:{role}:{replica_id}"

    def _names_key(self, role: Role) -> str:
        return f"afd:replicas:{self.mesh}:{role}"
