"""A token is journaled before it is shown, and the journal never holds up the next step: what each step gives is
written behind it, in one round trip, and then passed on to the streams."""

from __future__ import annotations

import asyncio
import logging

from afd.errors import AfdError, PeerUnavailable
from afd.state.requests import JournaledToken, JournalEntry, RequestStore
from services.attention.engine import Delivery
from services.attention.sequence import TokenEvent

log = logging.getLogger(__name__)

_PATIENCE_S = 10.0
_RETRY_PAUSE_S = 0.2


class Journal:
    def __init__(self, store: RequestStore) -> None:
        self.store = store
        self._waiting: list[Delivery] = []
        self._arrived = asyncio.Event()

    def put(self, deliveries: list[Delivery]) -> None:
        """Called on the event loop."""
        self._waiting += deliveries
        self._arrived.set()

    async def run(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            deliveries, self._waiting = self._waiting, []
            refusals = await self._write(deliveries)
            for delivery, refusal in zip(deliveries, refusals, strict=True):
                delivery.sequence.outbox.put_nowait(refusal or delivery.event)

    async def _write(self, deliveries: list[Delivery]) -> list[AfdError | None]:
        """For each delivery None, or why it may not be shown."""
        entries = [
            _entry(delivery, delivery.event) for delivery in deliveries if isinstance(delivery.event, TokenEvent)
        ]
        try:
            refusals = iter(await self._append(entries))
        except PeerUnavailable as error:
            refusals = iter([error] * len(entries))
        return [next(refusals) if isinstance(delivery.event, TokenEvent) else None for delivery in deliveries]

    async def _append(self, entries: list[JournalEntry]) -> list[AfdError | None]:
        """Tries for _PATIENCE_S; raises PeerUnavailable after that."""
        deadline = asyncio.get_running_loop().time() + _PATIENCE_S
        while True:
            try:
                return await self.store.append(entries)
            except PeerUnavailable as error:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                log.warning("tokens are held back: %s", error)
                await asyncio.sleep(_RETRY_PAUSE_S)


def _entry(delivery: Delivery, event: TokenEvent) -> JournalEntry:
    sequence = delivery.sequence
    token = JournaledToken(event.token.id, event.token.logprob, event.token.top_logprobs, event.finish_reason)
    return JournalEntry(sequence.key, sequence.epoch, event.index, token)
