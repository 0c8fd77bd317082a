"""A token is journaled before it is shown, and the journal never holds up the next step: what the steps gave is written
behind them, all that waits in one round trip, and then passed on to the streams. Steps that are fast share a round
trip, which costs more than the tokens in it; first and last tokens do not wait for company.

While Redis does not take tokens they are held back, within two bounds: for how long, and how many. A sequence beyond
them ends with an error. What Redis has lost of a running sequence's journal is written again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakSet

from afd.errors import AfdError, JournalGap, PeerUnavailable
from afd.state.requests import JournaledToken, JournalEntry, RequestStore
from services.attention.engine import Delivery
from services.attention.sequence import Sequence, TokenEvent

log = logging.getLogger(__name__)

_MOST_AT_ONCE = 1024  # deliveries, and tokens, in one round trip
_RETRY_PAUSE_S = 0.2
_SHORTEST_TRY_S = 1.0


class _Held(NamedTuple):
    """What is not shown yet, what is to be journaled before, and since when."""

    delivery: Delivery
    entry: JournalEntry | None
    since_s: float


@dataclass
class _Shown:
    """What may have to be written again of a sequence."""

    start: int  # index of the first token; the ones before it are of another owner
    tokens: list[JournaledToken] = field(default_factory=list)


@dataclass
class JournalCounters:
    num_writes: int = 0
    num_failures: int = 0
    write_s: float = 0.0


class Journal:
    def __init__(
        self, store: RequestStore, pace_s: float = 0.02, patience_s: float = 10.0, most_held: int = 100_000
    ) -> None:
        self.store = store
        self.pace_s = pace_s
        self.patience_s = patience_s
        self.most_held = most_held
        self.counters = JournalCounters()
        self._held: deque[_Held] = deque()
        self._num_writing = 0
        self._arrived = asyncio.Event()
        self._pressing = asyncio.Event()  # something is there that does not wait for company
        self._began_s = -math.inf  # the last round trip
        self._failed: WeakSet[Sequence] = WeakSet()  # nothing more of them is shown
        self._shown: WeakKeyDictionary[Sequence, _Shown] = WeakKeyDictionary()

    @property
    def num_held(self) -> int:
        return len(self._held) + self._num_writing

    def put(self, deliveries: list[Delivery]) -> None:
        """Called on the event loop."""
        now_s = time.monotonic()
        for delivery in deliveries:
            if self.num_held >= self.most_held:
                self._fail([delivery.sequence], PeerUnavailable(
                    f"tokens could not be journaled: {self.num_held} of them wait already, and no more may"
                ))  # fmt: skip
            elif delivery.sequence not in self._failed:
                self._held.append(_Held(delivery, _entry(delivery), now_s))
                if _is_pressing(delivery.event):
                    self._pressing.set()
        self._arrived.set()

    async def run(self) -> None:
        was_away = False
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._held:
                await self._wait_for_company()
                failure = await self._pass_on()
                if failure:
                    if not was_away:
                        log.warning("tokens are held back: %s", failure)
                    self._give_up(failure)
                    await asyncio.sleep(_RETRY_PAUSE_S)
                elif was_away:
                    log.info("tokens are journaled again")
                was_away = failure is not None

    async def _wait_for_company(self) -> None:
        """Until pace_s after the last round trip began, or something is there that is not to wait."""
        due_s = self._began_s + self.pace_s
        if time.monotonic() < due_s and not self._pressing.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(due_s - time.monotonic()):
                    await self._pressing.wait()
        self._pressing.clear()
        self._began_s = time.monotonic()

    async def _pass_on(self) -> PeerUnavailable | None:
        """Writes the oldest tokens that wait, and shows those that are journaled. Returns why some have to wait on."""
        batch = self._take()
        if not batch:
            return None
        entries = [held.entry for held in batch if held.entry]
        self._num_writing = len(batch)
        refusals = iter(await self._append(entries, batch[0].since_s))
        self._num_writing = 0
        reasons: dict[Sequence, AfdError] = {}  # of the sequences that wait on
        waiting: list[_Held] = []
        for held in batch:
            sequence = held.delivery.sequence
            refusal = next(refusals) if held.entry else None
            if sequence in self._failed:
                continue
            if isinstance(refusal, PeerUnavailable | JournalGap):
                reasons.setdefault(sequence, refusal)
            if sequence in reasons:
                waiting.append(held)
            else:
                self._show(held, refusal)
        self._held.extendleft(reversed(waiting))
        await self._restore({s: reason for s, reason in reasons.items() if isinstance(reason, JournalGap)})
        return next((reason for reason in reasons.values() if isinstance(reason, PeerUnavailable)), None)

    def _take(self) -> list[_Held]:
        """The oldest of what waits. Nobody wants the tokens of a sequence that was cancelled."""
        taken = [self._held.popleft() for _ in range(min(len(self._held), _MOST_AT_ONCE))]
        return [held for held in taken if not held.delivery.sequence.cancelled]

    def _show(self, held: _Held, refusal: AfdError | None) -> None:
        sequence = held.delivery.sequence
        if refusal:
            self._fail([sequence], refusal)
            return
        if held.entry:
            shown = self._shown.get(sequence)
            if shown is None:
                shown = self._shown[sequence] = _Shown(held.entry.index)
            shown.tokens.append(held.entry.token)
        sequence.outbox.put_nowait(held.delivery.event)

    async def _append(self, entries: list[JournalEntry], since_s: float) -> list[AfdError | None]:
        """For each entry None, or why it is not journaled; PeerUnavailable if it may be tried again. The oldest of them
        waits since `since_s`."""
        if not entries:
            return []
        started_s = time.monotonic()
        try:
            async with asyncio.timeout(max(since_s + self.patience_s - started_s, _SHORTEST_TRY_S)):
                return await self.store.append(entries)
        except (PeerUnavailable, TimeoutError) as error:
            self.counters.num_failures += 1
            reason = error if isinstance(error, PeerUnavailable) else PeerUnavailable("Redis does not answer")
            return [reason] * len(entries)
        finally:
            self.counters.num_writes += 1
            self.counters.write_s += time.monotonic() - started_s

    async def _restore(self, gaps: dict[Sequence, JournalGap]) -> None:
        """Writes again what Redis has lost of journals, where it was this replica that wrote it; elsewhere the gateway
        can, when it moves the sequence."""
        lost: list[JournalEntry] = []
        for sequence, gap in gaps.items():
            shown = self._shown.get(sequence)
            if shown is None or gap.num_tokens < shown.start:
                self._fail([sequence], PeerUnavailable(str(gap)))
                continue
            lost += _entries_again(sequence, shown, gap.num_tokens)
        if lost:
            log.warning("Redis has lost %d tokens of %d requests; they are written again", len(lost), len(gaps))
        for start in range(0, len(lost), _MOST_AT_ONCE):
            await self._append(lost[start : start + _MOST_AT_ONCE], time.monotonic())

    def _give_up(self, reason: PeerUnavailable) -> None:
        """Ends the sequences whose tokens have waited too long."""
        too_old_s = time.monotonic() - self.patience_s
        late = {held.delivery.sequence for held in self._held if held.since_s <= too_old_s}
        self._fail(late, PeerUnavailable(f"tokens could not be journaled for {self.patience_s:g} s: {reason}"))

    def _fail(self, sequences: Iterable[Sequence], error: AfdError) -> None:
        """Ends sequences with an error; their tokens that wait are never shown."""
        failing = set(sequences) - set(self._failed)
        if not failing:
            return
        self._failed |= failing
        self._held = deque(held for held in self._held if held.delivery.sequence not in failing)
        for sequence in failing:
            sequence.outbox.put_nowait(error)


def _is_pressing(event: TokenEvent | AfdError) -> bool:
    return isinstance(event, AfdError) or event.index == 0 or event.finish_reason is not None


def _entry(delivery: Delivery) -> JournalEntry | None:
    sequence, event = delivery.sequence, delivery.event
    if not isinstance(event, TokenEvent):
        return None
    token = JournaledToken(event.token.id, event.token.logprob, event.token.top_logprobs, event.finish_reason)
    return JournalEntry(sequence.key, sequence.epoch, event.index, token)


def _entries_again(sequence: Sequence, shown: _Shown, start: int) -> Iterable[JournalEntry]:
    """The tokens from index `start` on that were shown."""
    for index, token in enumerate(shown.tokens[start - shown.start :], start):
        yield JournalEntry(sequence.key, sequence.epoch, index, token)
