"""API keys: who may ask, how often, how much at once, and how many tokens a day. All gateways of a Redis share them.

A key is `afd-<id>-<secret>`. Its keys in Redis have its id in braces, which keeps them on one node of a Redis Cluster.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self, cast

from redis.asyncio import Redis

from afd.errors import AfdError, InvalidRequest, Overloaded, Unauthenticated
from afd.state.connection import translated_errors

SLOT_TTL_S = 30.0  # a killed gateway's slots are free again after so long
_CONCURRENCY_RETRY_S = 1.0  # nobody knows when a running request ends
_KEY = re.compile(r"afd-([0-9a-f]{12})-([0-9a-f]{64})")
_NAMES = "afd:keys"

# Before both scripts: the time by Redis, whose clock all gateways share, and the count of the day's tokens.
_TODAY = """
local time = redis.call('TIME')
local now, day = time[1] * 1000 + math.floor(time[2] / 1000), math.floor(time[1] / 86400)
local function used_today(key)
  local found = redis.call('HMGET', key, 'day', 'tokens')
  return found[1] == tostring(day) and tonumber(found[2]) or 0
end
local function use_today(key, tokens)
  redis.call('HSET', key, 'tokens', used_today(key) + tokens, 'day', day)
  redis.call('EXPIRE', key, 172800)
end
"""
# KEYS: record, times of the last requests, running slots, tokens of the day.
# ARGV: requests, tokens, slot TTL in ms, number of slots, their names, ids of resumed requests, whose earlier slots are
# given up. Takes all of it or nothing; returns what is in the way: its name, for how long in ms (-1: for ever), and the
# limit. The rate is exact: no minute has more, wherever it begins.
_ADMIT = """
if redis.call('EXISTS', KEYS[1]) == 0 then return {'revoked', -1, 0} end
local limits = redis.call('HMGET', KEYS[1], 'requests_per_minute', 'concurrency', 'tokens_per_day')
local rate, concurrency, quota = tonumber(limits[1] or 0), tonumber(limits[2] or 0), tonumber(limits[3] or 0)
local requests, tokens, ttl, slots = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local given_up = {}
if rate > 0 then
  if requests > rate then return {'requests_per_minute', -1, rate} end
  local before = redis.call('LINDEX', KEYS[2], requests - rate - 1)
  local wait = (tonumber(before or 0)) + 60000 - now
  if wait > 0 then return {'requests_per_minute', wait, rate} end
end
if concurrency > 0 then
  if slots > concurrency then return {'concurrency', -1, concurrency} end
  redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now)
  for number = 5 + slots, #ARGV do
    local start = ARGV[number] .. ' '
    for _, slot in ipairs(redis.call('ZRANGE', KEYS[3], 0, -1)) do
      if string.sub(slot, 1, #start) == start then given_up[#given_up + 1] = slot end
    end
  end
  if redis.call('ZCARD', KEYS[3]) - #given_up + slots > concurrency then return {'concurrency', 0, concurrency} end
end
if quota > 0 and tokens > 0 then
  if tokens > quota then return {'tokens_per_day', -1, quota} end
  if used_today(KEYS[4]) + tokens > quota then return {'tokens_per_day', (day + 1) * 86400000 - now, quota} end
end
if rate > 0 then
  for _ = 1, requests do redis.call('RPUSH', KEYS[2], now) end
  redis.call('LTRIM', KEYS[2], -rate, -1)
  redis.call('PEXPIRE', KEYS[2], 60000)
end
if concurrency > 0 then
  for _, slot in ipairs(given_up) do redis.call('ZREM', KEYS[3], slot) end
  for slot = 5, 4 + slots do redis.call('ZADD', KEYS[3], now + ttl, ARGV[slot]) end
  redis.call('PEXPIRE', KEYS[3], ttl)
end
use_today(KEYS[4], tokens)
return {}
"""
# KEYS: tokens of the day, running slots. ARGV: tokens to add, slot TTL in ms (0 gives the slots back), slots.
_SETTLE = """
use_today(KEYS[1], ARGV[1])
for slot = 3, #ARGV do
  if ARGV[2] == '0' then redis.call('ZREM', KEYS[2], ARGV[slot])
  else redis.call('ZADD', KEYS[2], 'XX', now + ARGV[2], ARGV[slot]) end
end
if ARGV[2] ~= '0' and #ARGV > 2 then redis.call('PEXPIRE', KEYS[2], ARGV[2]) end
return 1
"""
# KEYS: whose the request is. ARGV: id of the key, TTL in ms.
_CLAIM = """
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
_SENTENCES = {
    "requests_per_minute": "this API key may send {limit} requests a minute",
    "concurrency": "this API key may have {limit} sequences decoded at once",
    "tokens_per_day": "this API key may use {limit} tokens a day (UTC), prompts and answers together",
}


@dataclass(frozen=True)
class Limits:
    """None is no limit."""

    requests_per_minute: int | None = None  # each prompt of a completion is one
    concurrency: int | None = None  # sequences decoded at once: each of the n choices is one
    tokens_per_day: int | None = None  # of prompts and answers, from midnight to midnight UTC
    min_priority: int | None = None  # lower ones, which go first, are refused


@dataclass(frozen=True)
class ApiKey:
    """What is kept of a key: not its secret."""

    key_id: str
    name: str
    created_s: int  # since the epoch
    limits: Limits
    digest: bytes
    is_operator: bool = False  # may see the mesh, too

    @classmethod
    def decode(cls, key_id: str, record: dict[bytes, bytes]) -> Self:
        values = {each.name: record.get(each.name.encode()) for each in fields(Limits)}
        limits = Limits(**{name: int(value) for name, value in values.items() if value is not None})
        name, created_s, is_operator = record[b"name"].decode(), int(record[b"created_s"]), b"operator" in record
        return cls(key_id, name, created_s, limits, record[b"digest"], is_operator)


@dataclass(frozen=True)
class Demand:
    """What a call wants of its key."""

    num_requests: int  # that begin
    num_prompt_tokens: int
    slots: tuple[str, ...]  # for each of its sequences, by `slot_name`
    resumed: tuple[str, ...] = ()  # ids of requests that had slots before


class ApiKeys:
    """The keys of a Redis; only whose a request is concerns a mesh."""

    def __init__(self, redis: Redis, mesh: str = "default") -> None:
        self.redis = redis
        self.mesh = mesh
        self._admit = redis.register_script(_TODAY + _ADMIT)
        self._settle = redis.register_script(_TODAY + _SETTLE)
        self._claim = redis.register_script(_CLAIM)

    async def create(self, name: str, limits: Limits, is_operator: bool = False) -> str:
        """A new key, which is shown here and never again."""
        key_id, secret = secrets.token_hex(6), secrets.token_hex(32)
        record: dict[str, str | bytes | int] = {"name": name, "created_s": int(time.time()), "digest": _digest(secret)}
        record |= {each.name: value for each in fields(Limits) if (value := getattr(limits, each.name)) is not None}
        record |= {"operator": 1} if is_operator else {}
        async with translated_errors():
            await self.redis.hset(_record(key_id), mapping=record)  # type: ignore[arg-type]
            await self.redis.sadd(_NAMES, key_id)
        return f"afd-{key_id}-{secret}"

    async def find(self, key_id: str) -> ApiKey | None:
        async with translated_errors():
            record = cast(dict[bytes, bytes], await self.redis.hgetall(_record(key_id)))
        return ApiKey.decode(key_id, record) if record else None

    async def all(self) -> list[ApiKey]:
        """Oldest first."""
        async with translated_errors():
            key_ids = [name.decode() for name in cast(set[bytes], await self.redis.smembers(_NAMES))]
        found = await asyncio.gather(*map(self.find, key_ids))
        return sorted((key for key in found if key), key=lambda key: (key.created_s, key.key_id))

    async def revoke(self, key_id: str) -> bool:
        """Whether there was one. Its requests that run go on; gateways remember keys for a few seconds."""
        async with translated_errors():
            await self.redis.srem(_NAMES, key_id)
            return bool(await self.redis.delete(_record(key_id)))

    async def tokens_today(self, key_id: str) -> int:
        async with translated_errors():
            found = await self.redis.hmget(_tokens(key_id), ["day", "tokens"])
        day, tokens = cast(list[bytes | None], found)
        return int(tokens) if day and tokens and int(day) == int(time.time()) // 86400 else 0

    async def admit(self, key_id: str, demand: Demand) -> None:
        """Takes what a call wants from the key's limits, all or nothing.

        Raises Overloaded with when to come again, InvalidRequest for what no waiting helps, or Unauthenticated.
        """
        keys = [_record(key_id), _recent(key_id), _running(key_id), _tokens(key_id)]
        arguments: list[str | int] = [
            demand.num_requests,
            demand.num_prompt_tokens,
            int(SLOT_TTL_S * 1000),
            len(demand.slots),
            *demand.slots,
            *demand.resumed,
        ]
        async with translated_errors():
            reply = cast(list[bytes | int], await self._admit(keys=keys, args=arguments))
        if reply:
            raise _refusal(cast(bytes, reply[0]).decode(), *map(int, reply[1:]))

    async def settle(self, key_id: str, num_tokens: int, slots: Sequence[str], *, release: bool) -> None:
        """Adds tokens to those of the day, and renews the slots, or gives them back."""
        ttl_ms = 0 if release else int(SLOT_TTL_S * 1000)
        async with translated_errors():
            await self._settle(keys=[_tokens(key_id), _running(key_id)], args=[num_tokens, ttl_ms, *slots])

    async def claim(self, key_id: str, request_id: str, ttl_s: float) -> None:
        """Notes whose a request is. Raises InvalidRequest for the id of a request of another key."""
        async with translated_errors():
            if not await self._claim(keys=[self._owner(request_id)], args=[key_id, int(ttl_s * 1000)]):
                raise InvalidRequest(f"the request_id {request_id!r} is taken", "request_id")

    async def owner_of(self, request_id: str) -> str | None:
        """The id of the key whose request it is, or was not long ago."""
        async with translated_errors():
            owner = cast(bytes | None, await self.redis.get(self._owner(request_id)))
        return owner.decode() if owner else None

    def _owner(self, request_id: str) -> str:
        return f"afd:request-key:{{{self.mesh}:{request_id}}}"


def slot_name(request_id: str, call: str, choice: int) -> str:
    """Of one sequence; `call` tells apart calls that have the same request. A request id has no spaces."""
    return f"{request_id} {call} {choice}"


def split(key: str) -> tuple[str, str] | None:
    """Id and secret of what looks like a key."""
    match = _KEY.fullmatch(key)
    return (match[1], match[2]) if match else None


def is_valid(secret: str, key: ApiKey | None) -> bool:
    """Takes as long for a key that does not exist."""
    expected = key.digest if key else _digest("")
    return hmac.compare_digest(_digest(secret), expected) and key is not None


def _digest(secret: str) -> bytes:
    """A plain hash suffices: 256 random bits cannot be guessed however fast the guesses are. Slow hashes are for what
    people think up."""
    return hashlib.sha256(secret.encode()).digest()


def _refusal(limit: str, wait_ms: int, value: int) -> AfdError:
    if limit == "revoked":
        return Unauthenticated("the API key is not valid")
    sentence = _SENTENCES[limit].format(limit=value)
    if wait_ms < 0:
        return InvalidRequest(f"{sentence}, and this call alone wants more")
    return Overloaded(sentence, retry_after_s=wait_ms / 1000 if wait_ms else _CONCURRENCY_RETRY_S)


def _record(key_id: str) -> str:
    return f"afd:key:{{{key_id}}}"


def _recent(key_id: str) -> str:
    return f"afd:key:{{{key_id}}}:recent"


def _running(key_id: str) -> str:
    return f"afd:key:{{{key_id}}}:running"


def _tokens(key_id: str) -> str:
    return f"afd:key:{{{key_id}}}:tokens"
