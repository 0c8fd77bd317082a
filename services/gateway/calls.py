"""A request's calls to attention replicas, and how they end before their time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import grpc.aio

Call = grpc.aio.UnaryStreamCall[Any, Any]
_HANG_UP_S = 0.1


class OpenCalls:
    """Those that are read just now.

    They are to be cancelled before the tasks that read them: a read that is cancelled itself never gives its memory
    back (grpcio 1.85), and one that ends because its call was cancelled does.
    """

    def __init__(self) -> None:
        self._calls: set[Call] = set()
        self._none_left = asyncio.Event()

    @contextlib.contextmanager
    def cancelled_after(self, call: Call) -> Iterator[None]:
        """It is open while the block runs."""
        self._calls.add(call)
        try:
            yield
        finally:
            call.cancel()
            self._calls.discard(call)
            if not self._calls:
                self._none_left.set()

    async def hang_up(self) -> None:
        """Cancels them, and gives those who read them the time to see it, which takes about a millisecond."""
        self._none_left.clear()
        for call in tuple(self._calls):
            call.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_HANG_UP_S):
                while self._calls:
                    await self._none_left.wait()
