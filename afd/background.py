"""The event loop of those who have none: all SyncClients of a process run on one, on a thread of its own.

It is never closed: gRPC still has events for a client that was closed, and prints an error where their loop is no more.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_starting = threading.Lock()


def loop() -> asyncio.AbstractEventLoop:
    """Starts it, where nobody has."""
    with _starting:
        return _started()


@functools.cache
def _started() -> asyncio.AbstractEventLoop:
    started = asyncio.new_event_loop()
    threading.Thread(target=started.run_forever, name="afd-client", daemon=True).start()
    return started


def run(work: Coroutine[Any, Any, T]) -> T:
    """The result of the work, which is cancelled where the wait for it is interrupted."""
    running = asyncio.run_coroutine_threadsafe(work, loop())
    try:
        return running.result()
    except BaseException:
        running.cancel()
        raise
