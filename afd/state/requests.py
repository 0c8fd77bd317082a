"""What must outlive a process: each request's record and, for each of its sequences, the journal of its tokens."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, Self, cast

from redis.asyncio import Redis, RedisCluster
from redis.exceptions import NoScriptError, ResponseError

from afd.errors import AfdError, JournalGap, PeerUnavailable, StaleEpoch
from afd.state.connection import patiently, translated_errors

_PATIENCE_S = 2.0  # of a request that begins, or moves

# `left`: its client has gone, and may come back; `failed`: it may be tried again, too.
Status = Literal["running", "finished", "cancelled", "left", "failed"]
FinishReason = Literal["stop", "length"]

# A call that nobody waits for any more may still be carried out: a Redis that was frozen does what it finds. Calls that
# change whose a request is bear a name, so that the same one again, before it or after it, does no harm.

# KEYS: record, journal. ARGV: TTL in ms, a name for this creation, fields and values.
# Begins anew, with an empty journal and an epoch of its own: whoever had it before can write no more.
_CREATE = """
local epoch = tonumber(redis.call('HGET', KEYS[1], 'epoch') or 0)
if redis.call('HGET', KEYS[1], 'creation') == ARGV[2] then return epoch end
epoch = epoch + 1
redis.call('DEL', KEYS[1], KEYS[2])
redis.call('HSET', KEYS[1], 'epoch', epoch, 'creation', ARGV[2], unpack(ARGV, 3))
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return epoch
"""
# KEYS: of each token the record and the journal. ARGV: TTL in ms; of each token epoch, index, length and packed value.
# Returns "" for each, or why it is not there: its epoch is over, tokens before it are missing, or what Redis says. One
# that is there already stays as it is.
_APPEND = """
local function append(record, journal, epoch, index, token)
  local current = redis.call('HGET', record, 'epoch')
  if current and tonumber(current) > epoch then return 'STALE ' .. current end
  local length = redis.call('XLEN', journal)
  if length < index then return 'GAP ' .. length end
  if length == index then redis.call('XADD', journal, (index + 1) .. '-0', 't', token) end
  redis.call('PEXPIRE', journal, ARGV[1])
  redis.call('PEXPIRE', record, ARGV[1])
  return ''
end
local replies, position = {}, 1
for number = 1, #KEYS / 2 do
  local epoch, index, length, start = struct.unpack('<I8I8I2', ARGV[2], position)
  position = start + length
  local token = string.sub(ARGV[2], start, position - 1)
  local ok, reply = pcall(append, KEYS[2 * number - 1], KEYS[2 * number], epoch, index, token)
  if not ok then reply = 'ERROR ' .. (type(reply) == 'table' and reply.err or reply) end
  replies[number] = reply
end
return replies
"""
_ENTRY = struct.Struct("<QQH")  # epoch, index, length of the packed token
# KEYS: record, journal. ARGV: the epoch known, TTL in ms, a name for this claim, owner, prompt_ids, sampling, the
# fingerprint, then the packed tokens known. Begins a new epoch, unless somebody else already has; what was lost is
# written again.
_TAKE_OVER = """
local epoch = tonumber(redis.call('HGET', KEYS[1], 'epoch') or 0)
local is_own = epoch == ARGV[1] + 1 and redis.call('HGET', KEYS[1], 'claim') == ARGV[3]
if epoch > tonumber(ARGV[1]) and not is_own then return redis.error_reply('STALE ' .. epoch) end
redis.call('HSET', KEYS[1], 'epoch', ARGV[1] + 1, 'claim', ARGV[3], 'status', 'running', 'owner', ARGV[4])
redis.call('HSET', KEYS[1], 'prompt_ids', ARGV[5], 'sampling', ARGV[6], 'fingerprint', ARGV[7])
for index = redis.call('XLEN', KEYS[2]), #ARGV - 8 do
  redis.call('XADD', KEYS[2], (index + 1) .. '-0', 't', ARGV[index + 8])
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return redis.call('XRANGE', KEYS[2], '-', '+')
"""
# KEYS: record. ARGV: epoch, TTL in ms, status.
_FINISH = """
local epoch = redis.call('HGET', KEYS[1], 'epoch')
if not epoch or tonumber(epoch) > tonumber(ARGV[1]) then return 0 end
redis.call('HSET', KEYS[1], 'status', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""
# KEYS: record. ARGV: TTL in ms. Whose it is can write no more.
_CANCEL = """
if redis.call('HGET', KEYS[1], 'status') ~= 'running' then return 0 end
redis.call('HINCRBY', KEYS[1], 'epoch', 1)
redis.call('HSET', KEYS[1], 'status', 'cancelled')
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 1
"""
_TOKEN = struct.Struct("<IfB")  # id, logprob, finish reason; then, for each of its top_logprobs:
_TOP_LOGPROB = struct.Struct("<If")  # id, logprob
_FINISH_REASONS: tuple[FinishReason | None, ...] = (None, "stop", "length")


@dataclass(frozen=True)
class SequenceKey:
    """One of a request's choices."""

    request_id: str
    choice: int = 0

    @cached_property
    def name(self) -> bytes:
        """In Redis, behind that of its mesh. The braces around both keep a request's keys on one node of a Cluster."""
        quoted = self.request_id.replace("%", "%25").replace("}", "%7D")
        return f"{quoted}}}:{self.choice}".encode()


@dataclass(frozen=True)
class RequestRecord:
    """What a request needs to be taken up by another replica, beside its journal."""

    prompt_ids: tuple[int, ...]
    sampling: bytes  # afd.v1.SamplingParams of the request, serialised, with the seed that was drawn
    owner: str  # replica_id of the attention replica
    fingerprint: str = ""  # of the model that it began with
    epoch: int = 1
    status: Status = "running"


class JournaledToken(NamedTuple):
    """All that is shown of a token but its text; the last one has a finish reason."""

    id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None

    def pack(self) -> bytes:
        head = _TOKEN.pack(self.id, self.logprob, _FINISH_REASONS.index(self.finish_reason))
        return head + b"".join(_TOP_LOGPROB.pack(*top) for top in self.top_logprobs)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        token_id, logprob, reason = _TOKEN.unpack_from(data)
        tops = tuple(_TOP_LOGPROB.iter_unpack(data[_TOKEN.size :]))
        return cls(token_id, logprob, tops, _FINISH_REASONS[reason])


@dataclass(frozen=True)
class JournalEntry:
    key: SequenceKey
    epoch: int
    index: int
    token: JournaledToken


class RequestStore:
    """A mesh's records and journals in Redis; both expire `ttl_s` after the last write."""

    def __init__(self, redis: Redis, ttl_s: float, mesh: str = "default") -> None:
        self.redis = redis
        self.ttl_ms = int(ttl_s * 1000)
        self._records, self._journals = (f"afd:{kind}:{{{mesh}:".encode() for kind in ("request", "journal"))
        self._is_cluster = isinstance(redis, RedisCluster)
        self._create = redis.register_script(_CREATE)
        self._append = redis.register_script(_APPEND)
        self._take_over = redis.register_script(_TAKE_OVER)
        self._finish = redis.register_script(_FINISH)
        self._cancel = redis.register_script(_CANCEL)

    async def is_reachable(self) -> bool:
        try:
            async with translated_errors():
                return bool(await self.redis.ping())
        except PeerUnavailable:
            return False

    async def create(self, key: SequenceKey, record: RequestRecord) -> int:
        """Writes the record of a sequence that begins, in place of an earlier one's; returns its epoch.

        While Redis does not answer it is asked again for a short time; PeerUnavailable when that is over.
        """
        fields: dict[str, str | bytes] = {
            "prompt_ids": _pack_ids(record.prompt_ids),
            "sampling": record.sampling,
            "owner": record.owner,
            "fingerprint": record.fingerprint,
            "status": record.status,
        }
        arguments = [self.ttl_ms, uuid.uuid4().bytes, *(part for pair in fields.items() for part in pair)]

        async def ask() -> int:
            async with translated_errors():
                return int(await self._create(keys=self._keys(key), args=arguments))

        return await patiently(ask, _PATIENCE_S)

    async def take_over(
        self, key: SequenceKey, record: RequestRecord, claim: bytes, tokens: Sequence[JournaledToken] = ()
    ) -> list[JournaledToken]:
        """Makes record.owner the owner, in the epoch that follows record.epoch, so that an earlier one can write no
        more; returns what is journaled. `tokens`, which are known to be in the journal, and the record are written
        again if Redis has lost them. `claim` names this takeover: who tries again with the same name has not been
        overtaken by the first attempt.

        Raises StaleEpoch if somebody else has taken it over since record.epoch, and PeerUnavailable as `create` does.
        """
        known: list[int | str | bytes] = [record.epoch, self.ttl_ms, claim, record.owner]
        known += [_pack_ids(record.prompt_ids), record.sampling, record.fingerprint]
        known += [token.pack() for token in tokens]

        async def ask() -> list[JournaledToken]:
            async with translated_errors():
                try:
                    found = await self._take_over(keys=self._keys(key), args=known)
                except ResponseError as error:
                    if str(error).startswith("STALE "):
                        raise _refusal(key, record.epoch, str(error)) from None
                    raise
            return [JournaledToken.unpack(fields[1]) for _, fields in found]

        return await patiently(ask, _PATIENCE_S)

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
        results = [
            _refusal(entry.key, entry.epoch, str(reply)) if reply else None
            for entry, reply in zip(entries, replies, strict=True)
        ]
        if entries and all(isinstance(result, PeerUnavailable) for result in results):
            raise cast(PeerUnavailable, results[0])
        return results

    async def _append_all(self, entries: Sequence[JournalEntry]) -> list[str | Exception]:
        """A reply for each. Keys of different requests are on different nodes of a Cluster."""
        groups: dict[str, list[int]] = {}  # positions of those that one call of the script takes
        for position, entry in enumerate(entries):
            groups.setdefault(entry.key.request_id if self._is_cluster else "", []).append(position)
        async with self.redis.pipeline(transaction=False) as pipe:
            for group in groups.values():
                keys = [key for i in group for key in self._keys(entries[i].key)]
                packed = b"".join([_pack(entries[i]) for i in group])
                pipe.evalsha(self._append.sha, len(keys), *keys, self.ttl_ms, packed)
            answers = await pipe.execute(raise_on_error=False)
        replies: list[str | Exception] = [""] * len(entries)
        for group, answer in zip(groups.values(), answers, strict=True):
            for number, position in enumerate(group):
                replies[position] = answer if isinstance(answer, Exception) else answer[number].decode()
        return replies

    async def finish(self, key: SequenceKey, epoch: int, status: Status) -> None:
        """Notes how a sequence ended, unless a newer owner has it or its record has expired."""
        async with translated_errors():
            await self._finish(keys=self._keys(key)[:1], args=[epoch, self.ttl_ms, status])

    async def cancel(self, key: SequenceKey) -> bool:
        """Ends a sequence that runs, wherever: its owner's epoch is over. Whether it did."""
        async with translated_errors():
            return bool(await self._cancel(keys=self._keys(key)[:1], args=[self.ttl_ms]))

    async def record(self, key: SequenceKey) -> RequestRecord | None:
        """The record, or None once it has expired."""
        async with translated_errors():
            fields = cast(dict[bytes, bytes], await self.redis.hgetall(self._records + key.name))
        if b"prompt_ids" not in fields:
            return None
        packed = fields[b"prompt_ids"]
        return RequestRecord(
            prompt_ids=struct.unpack(f"<{len(packed) // 4}I", packed),
            sampling=fields[b"sampling"],
            owner=fields[b"owner"].decode(),
            fingerprint=fields[b"fingerprint"].decode(),
            epoch=int(fields[b"epoch"]),
            status=cast(Status, fields[b"status"].decode()),
        )

    async def journal(self, key: SequenceKey, start: int = 0) -> list[JournaledToken]:
        """The tokens from index `start` on."""
        async with translated_errors():
            found = await self.redis.xrange(self._journals + key.name, min=f"{start + 1}-0")
            entries = cast(list[tuple[bytes, dict[bytes, bytes]]], found)
        return [JournaledToken.unpack(fields[b"t"]) for _, fields in entries]

    def _keys(self, key: SequenceKey) -> list[bytes]:
        """Of the record, and of the journal."""
        return [self._records + key.name, self._journals + key.name]


def _refusal(key: SequenceKey, epoch: int, reply: str) -> AfdError:
    """What a reply of the scripts refuses."""
    kind, _, value = reply.partition(" ")
    if kind == "GAP":
        return JournalGap(f"request {key.request_id}: its journal was lost, it has {value} tokens", int(value))
    if kind == "STALE":
        return StaleEpoch(
            f"request {key.request_id} was resumed or begun anew in another stream: "
            f"epoch {epoch} is over, its owner's is {value}"
        )
    return PeerUnavailable(f"Redis does not answer: {reply.removeprefix('ERROR ')}")


def _pack(entry: JournalEntry) -> bytes:
    token = entry.token.pack()
    return _ENTRY.pack(entry.epoch, entry.index, len(token)) + token


def _pack_ids(ids: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(ids)}I", *ids)
