"""How one choice goes from one attention replica to the next."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from afd.errors import DeadlineExceeded, Overloaded, PeerUnavailable
from services.gateway import metrics
from services.gateway.balancer import AttentionReplica, Balancer

log = logging.getLogger(__name__)

_PAUSE_S = 0.3


class Failover:
    """One whose request has begun goes on trying for timeout_s; one whose has not is tried once with everybody."""

    def __init__(self, balancer: Balancer, timeout_s: float, begun: asyncio.Event) -> None:
        self.balancer = balancer
        self.timeout_s = timeout_s
        self._begun = begun
        self._lost: set[AttentionReplica] = set()
        self._reason: PeerUnavailable | Overloaded = PeerUnavailable("no attention replica is ready")
        self._failing_since: float | None = None

    @asynccontextmanager
    async def picked(self) -> AsyncIterator[AttentionReplica]:
        """The replica to try next, counted while the block runs. Raises PeerUnavailable when there is none, or
        DeadlineExceeded when one was awaited in vain."""
        entry = await self._choose()
        async with self.balancer.counted(entry):
            yield entry

    def failed(self, entry: AttentionReplica | None, reason: PeerUnavailable | Overloaded) -> None:
        """That replica is lost to the choice, or, if it is None, something else that is needed."""
        if entry is not None:
            log.info("a sequence leaves attention replica %s: %s", entry.replica.replica_id, reason)
            self._lost.add(entry)
        if self._failing_since is None:
            self._failing_since = time.monotonic()
        self._reason = reason

    def succeeded(self) -> None:
        """A token came."""
        if self._failing_since is not None:
            metrics.FAILOVER.observe(time.monotonic() - self._failing_since)
            self._failing_since = None

    async def _choose(self) -> AttentionReplica:
        self._check_time()
        while (entry := self.balancer.choose(self._lost)) is None:
            if not self._begun.is_set():
                raise self._reason
            self._failing_since = self._failing_since or time.monotonic()
            await self.balancer.wait_for_change(_PAUSE_S)
            self._lost.clear()  # who was lost may be back
            self._check_time()
        return entry

    def _check_time(self) -> None:
        if self._failing_since is not None and time.monotonic() > self._failing_since + self.timeout_s:
            raise DeadlineExceeded(f"nobody could go on with the request for {self.timeout_s:g} s: {self._reason}")
