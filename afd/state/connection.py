"""The one connection to Redis, with every wait bounded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TypeVar

from redis.asyncio import Redis
from redis.exceptions import RedisClusterException, RedisError

from afd.errors import ConfigError, PeerUnavailable
from afd.state.clients import opened
from afd.state.url import RedisUrl, without_password

__all__ = ["RETRY_PAUSE_S", "connect", "patiently", "translated_errors", "without_password"]

_TIMEOUT_S = 5.0  # of one question, with finding out whom to ask
RETRY_PAUSE_S = 0.2

T = TypeVar("T")


@asynccontextmanager
async def connect(url: str, ca: Path | None = None) -> AsyncIterator[Redis]:
    """A client for the Redis behind `url`: one server, the master that Sentinels name, or a Cluster, which its users
    need not tell apart. `ca` has the certificates that a server with TLS is known by; default: the system's.

    Raises ConfigError if nothing answers there.
    """
    try:
        where = RedisUrl.parse(url)
        if ca and not ca.is_file():
            raise ValueError(f"there are no certificates in {ca}")
    except ValueError as error:
        raise ConfigError(f"no Redis answers at {without_password(url)}: {error}") from None
    async with AsyncExitStack() as stack:
        try:
            redis = await stack.enter_async_context(opened(where, ca, _TIMEOUT_S / 2))
            async with translated_errors():
                await redis.ping()
        except (PeerUnavailable, RedisClusterException, TypeError) as error:  # TypeError: an option that is none
            reason = str(error.__cause__ or error)
            if "HELLO must be called with the client already authenticated" in reason or "NOAUTH" in reason:
                raise ConfigError(
                    f"the Redis at {without_password(url)} wants a password: redis://USER:PASSWORD@HOST:PORT"
                ) from None
            raise ConfigError(f"no Redis answers at {without_password(url)}: {reason}") from None
        yield redis


@asynccontextmanager
async def translated_errors(timeout_s: float | None = None) -> AsyncIterator[None]:
    """Turns failures of Redis, and no answer within `timeout_s`, into PeerUnavailable.

    The client can lose a cancellation that comes while it talks, or make a failure of it; here it becomes one again.
    """
    task = asyncio.current_task()
    num_cancels = task.cancelling() if task else 0
    failure: Exception | None = None
    timeout_s = _TIMEOUT_S if timeout_s is None else timeout_s
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except (RedisError, RedisClusterException, OSError) as error:
        failure = error
    if task and task.cancelling() > num_cancels:
        raise asyncio.CancelledError
    if failure is not None:
        reason = str(failure) or f"nothing came within {timeout_s:g} s"
        raise PeerUnavailable(f"Redis does not answer: {reason}") from failure


async def patiently(ask: Callable[[], Awaitable[T]], patience_s: float) -> T:
    """Asks until there is an answer; raises PeerUnavailable once that has taken longer than `patience_s`."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + patience_s
    reason = "Redis does not answer"
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                return await ask()
        except TimeoutError:
            break
        except PeerUnavailable as error:
            reason = str(error)
        if loop.time() + RETRY_PAUSE_S > deadline:
            break
        await asyncio.sleep(RETRY_PAUSE_S)
    raise PeerUnavailable(f"{reason} (asked for {patience_s:g} s)")
