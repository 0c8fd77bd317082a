"""The one connection to Redis, with every wait bounded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.exceptions import RedisError

from afd.errors import ConfigError, PeerUnavailable

_TIMEOUT_S = 5.0
_MAX_CONNECTIONS = 32  # of one process; more requests wait for their turn


@asynccontextmanager
async def connect(url: str) -> AsyncIterator[Redis]:
    """A Redis client for `url` (redis://, rediss:// or unix://); ConfigError if nothing answers there."""
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=_MAX_CONNECTIONS,
            timeout=_TIMEOUT_S,
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
        )
        redis = Redis.from_pool(pool)
    except ValueError as error:
        raise ConfigError(f"no Redis answers at {without_password(url)}: {error}") from None
    try:
        async with translated_errors():
            await redis.ping()
    except PeerUnavailable as error:
        await redis.aclose()
        raise ConfigError(f"no Redis answers at {without_password(url)}: {error.__cause__}") from None
    try:
        yield redis
    finally:
        await redis.aclose()


@asynccontextmanager
async def translated_errors() -> AsyncIterator[None]:
    """Turns failures of Redis into PeerUnavailable.

    The client can lose a cancellation that comes while it talks, or make a failure of it; here it becomes one again.
    """
    task = asyncio.current_task()
    num_cancels = task.cancelling() if task else 0
    failure: Exception | None = None
    try:
        yield
    except (RedisError, OSError) as error:
        failure = error
    if task and task.cancelling() > num_cancels:
        raise asyncio.CancelledError
    if failure is not None:
        raise PeerUnavailable(f"Redis does not answer: {failure}") from failure


def without_password(url: str) -> str:
    """The URL for logs and errors."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    return parts._replace(netloc=f"{parts.username or ''}:***@{parts.hostname}:{parts.port or 6379}").geturl()
