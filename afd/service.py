"""What every service's `__main__` does around its own part: settings, telemetry, signals, one sentence at the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from afd import telemetry, tls
from afd.config import ServiceSettings, load_settings, refuse_plain_text
from afd.errors import AfdError
from afd.health import answering_probes
from afd.tasks import end

log = logging.getLogger(__name__)

_DRAIN_POLL_S = 0.05

S = TypeVar("S", bound=ServiceSettings)


class StopSignal:
    """SIGTERM and SIGINT. While a service starts they end it at once; once it waits for them, it drains."""

    def __init__(self) -> None:
        self._received = asyncio.Event()
        self._waits = False

    @property
    def is_serving(self) -> bool:
        """It takes on work: it has started, and is not to stop."""
        return self._waits and not self._received.is_set()

    async def wait(self) -> None:
        """Called by a service that is ready to serve; returns when it shall stop."""
        self._waits = True
        await self._received.wait()

    def handle(self, service: asyncio.Task[None]) -> None:
        if not self.is_serving:
            service.cancel()
        self._received.set()


@contextlib.asynccontextmanager
async def background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs `work` while the block runs. If it fails the service stops: it cannot do without."""
    task = asyncio.create_task(work)
    task.add_done_callback(_stop_if_failed)
    try:
        yield
    finally:
        await end(task)


async def until_none_open(num_open: Callable[[], int], timeout_s: float) -> None:
    """Draining: waits until what is open has ended, but no longer than timeout_s."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while num_open() and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(_DRAIN_POLL_S)


def _stop_if_failed(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        log.critical("a background task failed, so the service stops", exc_info=error)
        signal.raise_signal(signal.SIGTERM)


Serve = Callable[[S, StopSignal], Coroutine[Any, Any, None]]


def run_service(role: str, kind: type[S], serve: Serve[S]) -> None:
    """Runs a service until it is told to stop; on a known error prints its sentence and exits with 1."""
    try:
        settings = load_settings(kind)
        refuse_plain_text(settings)
        telemetry.set_up(role, settings)
        tls.assume(settings.tls)
        asyncio.run(_run(settings, serve))
    except AfdError as error:
        sys.exit(f"afd {role}: {error}")
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        telemetry.shut_down()


async def _run(settings: S, serve: Serve[S]) -> None:
    stop = StopSignal()
    async with answering_probes(settings.host, settings.health_port, lambda: stop.is_serving):
        service = asyncio.create_task(serve(settings, stop))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.handle, service)
        with contextlib.suppress(asyncio.CancelledError):
            await service
