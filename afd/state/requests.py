"""What must outlive a process: each request's record and, for each of its sequences, the journal of its tokens."""

from __future__ import annotations

import logging
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from redis.asyncio import Redis
from redis.exceptions import NoScriptError, ResponseError

from afd.errors import AfdError, JournalGap, PeerUnavailable, StaleEpoch
from afd.state.connection import patiently, translated_errors

log = logging.getLogger(__name__)

_PATIENCE_S = 2.0  # of a request that begins

Status = Literal["running", "finished", "cancelled", "failed"]

# KEYS: record, journal. ARGV: epoch, TTL in ms, fields and values.
# An epoch older than a running record's is refused; the first epoch begins anew, with an empty journal.
_CREATE = """
local epoch = redis.call('HGET', KEYS[1], 'epoch')
local running = redis.call('HGET', KEYS[1], 'status') == 'running'
if running and tonumber(epoch) > tonumber(ARGV[1]) then return redis.error_reply('STALE ' .. epoch) end
if ARGV[1] == '1' then redis.call('DEL', KEYS[1], KEYS[2]) end
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], unpack(ARGV, 3))
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""
# KEYS: record, journal. ARGV: epoch, index of the token, its packed value, TTL in ms.
# An older epoch is refused, and so is a gap; a token that is already there stays as it is.
_APPEND = """
local epoch = redis.call('HGET', KEYS[1], 'epoch')
if epoch and tonumber(epoch) > tonumber(ARGV[1]) then return redis.error_reply('STALE ' .. epoch) end
local length = redis.call('XLEN', KEYS[2])
if length < tonumber(ARGV[2]) then return redis.error_reply('GAP ' .. length) end
if length == tonumber(ARGV[2]) then redis.call('XADD', KEYS[2], (ARGV[2] + 1) .. '-0', 't', ARGV[3]) end
redis.call('PEXPIRE', KEYS[2], ARGV[4])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return 1
"""
# KEYS: record. ARGV: epoch, TTL in ms, status.
_FINISH = """
local epoch = redis.call('HGET', KEYS[1], 'epoch')
if not epoch or tonumber(epoch) > tonumber(ARGV[1]) then return 0 end
redis.call('HSET', KEYS[1], 'status', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""
_TOKEN = struct.Struct("<If")  # id, logprob


@dataclass(frozen=True)
class SequenceKey:
    """One of a request's choices."""

    request_id: str
    choice: int = 0


@dataclass(frozen=True)
class RequestRecord:
    """What a request needs to be taken up by another replica, beside its journal."""

    prompt_ids: tuple[int, ...]
    sampling: bytes  # afd.v1.SamplingParams, serialised, with the seed that was drawn
    owner: str  # replica_id of the attention replica
    epoch: int = 1
    status: Status = "running"


@dataclass(frozen=True)
class JournalEntry:
    key: SequenceKey
    epoch: int
    index: int
    token_id: int
    logprob: float


@dataclass(frozen=True)
class JournaledToken:
    token_id: int
    logprob: float


class RequestStore:
    """Records and journals in Redis; both expire `ttl_s` after the last write."""

    def __init__(self, redis: Redis, ttl_s: float) -> None:
        self.redis = redis
        self.ttl_ms = int(ttl_s * 1000)
        self._create = redis.register_script(_CREATE)
        self._append = redis.register_script(_APPEND)
        self._finish = redis.register_script(_FINISH)

    async def is_reachable(self) -> bool:
        try:
            async with translated_errors():
                return bool(await self.redis.ping())
        except PeerUnavailable:
            return False

    async def create(self, key: SequenceKey, record: RequestRecord) -> None:
        """Writes the record of a sequence that begins, or that a new owner takes over with a higher epoch.

        While Redis does not answer it is asked again for a short time. Raises StaleEpoch if a newer owner already has,
        and PeerUnavailable when that time is over.
        """
        fields: dict[str, str | bytes] = {
            "prompt_ids": struct.pack(f"<{len(record.prompt_ids)}I", *record.prompt_ids),
            "sampling": record.sampling,
            "owner": record.owner,
            "status": record.status,
        }
        pairs = [part for pair in fields.items() for part in pair]

        async def ask() -> None:
            async with translated_errors():
                try:
                    await self._create(
                        keys=[_record_key(key), _journal_key(key)], args=[record.epoch, self.ttl_ms, *pairs]
                    )
                except ResponseError as error:
                    if _is_refusal(error) and (refusal := _refusal(key, record.epoch, error)):
                        raise refusal from None
                    raise

        await patiently(ask, _PATIENCE_S)

    async def append(self, entries: Sequence[JournalEntry]) -> list[AfdError | None]:
        """Journals tokens, all in one round trip; for each entry None, or why it is not there: StaleEpoch for an owner
        whose time is over, JournalGap where tokens before it are missing, PeerUnavailable if it may be tried again.

        Writing a token again is harmless. Raises PeerUnavailable where none could be written.
        """
        async with translated_errors():
            replies = await self._append_all(entries)
            if any(isinstance(reply, NoScriptError) for reply in replies):
                await self.redis.script_load(_APPEND)
                replies = await self._append_all(entries)
        results = [_refusal(entry.key, entry.epoch, reply) for entry, reply in zip(entries, replies, strict=True)]
        if entries and all(isinstance(result, PeerUnavailable) for result in results):
            raise cast(PeerUnavailable, results[0])
        return results

    async def _append_all(self, entries: Sequence[JournalEntry]) -> list[object]:
        async with self.redis.pipeline(transaction=False) as pipe:
            for entry in entries:
                pipe.evalsha(
                    self._append.sha,
                    2,
                    _record_key(entry.key),
                    _journal_key(entry.key),
                    entry.epoch,
                    entry.index,
                    _TOKEN.pack(entry.token_id, entry.logprob),
                    self.ttl_ms,
                )
            return cast(list[object], await pipe.execute(raise_on_error=False))

    async def finish(self, key: SequenceKey, epoch: int, status: Status) -> None:
        """Notes how a sequence ended, unless a newer owner has it or its record has expired."""
        async with translated_errors():
            await self._finish(keys=[_record_key(key)], args=[epoch, self.ttl_ms, status])

    async def record(self, key: SequenceKey) -> RequestRecord | None:
        """The record, or None once it has expired."""
        async with translated_errors():
            fields = cast(dict[bytes, bytes], await self.redis.hgetall(_record_key(key)))
        if b"prompt_ids" not in fields:
            return None
        packed = fields[b"prompt_ids"]
        return RequestRecord(
            prompt_ids=struct.unpack(f"<{len(packed) // 4}I", packed),
            sampling=fields[b"sampling"],
            owner=fields[b"owner"].decode(),
            epoch=int(fields[b"epoch"]),
            status=cast(Status, fields[b"status"].decode()),
        )

    async def journal(self, key: SequenceKey, start: int = 0) -> list[JournaledToken]:
        """The tokens from index `start` on."""
        async with translated_errors():
            found = await self.redis.xrange(_journal_key(key), min=f"{start + 1}-0")
            entries = cast(list[tuple[bytes, dict[bytes, bytes]]], found)
        return [JournaledToken(*_TOKEN.unpack(fields[b"t"])) for _, fields in entries]


def _refusal(key: SequenceKey, epoch: int, reply: object) -> AfdError | None:
    """What a reply of the scripts refuses, if it does."""
    if not isinstance(reply, Exception):
        return None
    if not _is_refusal(reply):
        return PeerUnavailable(f"Redis does not answer: {reply}")
    kind, value = str(reply).split()
    if kind == "GAP":
        return JournalGap(f"request {key.request_id}: its journal was lost, it has {value} tokens", int(value))
    return StaleEpoch(f"request {key.request_id}: epoch {epoch} is over, its owner is at epoch {value}")


def _is_refusal(reply: object) -> bool:
    return isinstance(reply, ResponseError) and str(reply).startswith(("STALE ", "GAP "))


def _record_key(key: SequenceKey) -> str:
    return f"afd:request:{_tag(key)}:{key.choice}"


def _journal_key(key: SequenceKey) -> str:
    return f"afd:journal:{_tag(key)}:{key.choice}"


def _tag(key: SequenceKey) -> str:
    """The braces keep a request's keys on one node of a Redis Cluster."""
    return "{" + key.request_id.replace("%", "%25").replace("}", "%7D") + "}"
