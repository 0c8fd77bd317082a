"""The one connection to Redis, with every wait bounded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.exceptions import RedisError

from afd.errors import ConfigError, PeerUnavailable

_TIMEOUT_S = 5.0


@asynccontextmanager
async def connect(url: str) -> AsyncIterator[Redis]:
    """A Redis client for `url` (redis://, rediss:// or unix://); ConfigError if nothing answers there."""
    try:
        redis = Redis.from_url(url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S)
        await redis.ping()
    except (RedisError, OSError, ValueError) as error:
        raise ConfigError(f"no Redis answers at {without_password(url)}: {error}") from None
    try:
        yield redis
    finally:
        await redis.aclose()


@asynccontextmanager
async def translated_errors() -> AsyncIterator[None]:
    """Turns failures of Redis into PeerUnavailable.

    The client can lose a cancellation, or make a failure of it; here it becomes one again.
    """
    try:
        yield
    except (RedisError, OSError) as error:
        _raise_if_cancelled()
        raise PeerUnavailable(f"Redis does not answer: {error}") from error
    _raise_if_cancelled()


def _raise_if_cancelled() -> None:
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def without_password(url: str) -> str:
    """The URL for logs and errors."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    return parts._replace(netloc=f"{parts.username or ''}:***@{parts.hostname}:{parts.port or 6379}").geturl()
