"""A token is shown once it is journaled, once, and in its place, whatever Redis does meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from afd.errors import AfdError, InternalError, JournalGap, PeerUnavailable, StaleEpoch
from afd.model.sampler import SampledToken
from afd.model.sampling_params import SamplingParams
from afd.state.connection import connect
from afd.state.requests import JournalEntry, RequestRecord, RequestStore, SequenceKey
from benchmarks.proxy import Proxy, tcp_proxy
from services.attention import journal as journal_module
from services.attention import servicer
from services.attention.engine import Delivery
from services.attention.journal import Journal
from services.attention.sequence import Sequence
from tests.redis_servers import Server, one_server

RECORD = RequestRecord(prompt_ids=(5,), sampling=b"", owner="attention-1")
PATIENCE_S = 10.0  # a test that waits longer than this hangs


def sequence(name: str, num_generated: int = 0) -> Sequence:
    generated = [100 + index for index in range(num_generated)]
    return Sequence(SequenceKey(name), 1, [5], generated, SamplingParams(), (), 1 << 20)


def tokens(of: Sequence, count: int = 1) -> list[Delivery]:
    """The sequence's next tokens: 100 + index at each index."""
    start = len(of.output_ids)
    return [Delivery(of, of.append(SampledToken(100 + i, -float(i), ()))) for i in range(start, start + count)]


async def shown(of: Sequence, count: int) -> list[int | AfdError]:
    """What its stream sees: token ids and errors."""
    events = [await asyncio.wait_for(of.outbox.get(), PATIENCE_S) for _ in range(count)]
    return [event if isinstance(event, AfdError) else event.token.id for event in events]


def ids(start: int, stop: int) -> list[int]:
    return list(range(100 + start, 100 + stop))


class FakeStore:
    """Takes tokens as Redis does, when it is `there`; `refusals` are of requests."""

    def __init__(self) -> None:
        self.there = asyncio.Event()
        self.there.set()
        self.writes: list[list[JournalEntry]] = []
        self.refusals: dict[str, AfdError] = {}
        self.lengths: dict[str, int] = {}

    async def append(self, entries: list[JournalEntry]) -> list[AfdError | None]:
        if not self.there.is_set():
            raise PeerUnavailable("Redis does not answer: it is away")
        await asyncio.sleep(0)
        self.writes.append(entries)
        return [self._append(entry) for entry in entries]

    def _append(self, entry: JournalEntry) -> AfdError | None:
        name = entry.key.request_id
        if refusal := self.refusals.get(name):
            return refusal
        length = self.lengths.setdefault(name, entry.index)
        if entry.index > length:
            return JournalGap(f"request {name}", length)
        self.lengths[name] = max(length, entry.index + 1)
        return None


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@contextlib.asynccontextmanager
async def running(journal: Journal) -> AsyncIterator[Journal]:
    task = asyncio.create_task(journal.run())
    try:
        yield journal
    finally:
        task.cancel()
        await asyncio.wait([task])


@pytest.fixture
def make_journal(store: FakeStore) -> Callable[..., Journal]:
    return lambda **bounds: Journal(store, **bounds)


async def test_tokens_that_were_held_back_are_shown_in_order_and_in_one_write(
    store: FakeStore, make_journal: Callable[..., Journal]
) -> None:
    one, other = sequence("one"), sequence("other")
    async with running(make_journal()) as journal:
        store.there.clear()
        for _ in range(5):
            journal.put(tokens(one) + tokens(other))
            await asyncio.sleep(0.01)
        assert one.outbox.empty()
        assert journal.num_held == 10
        store.there.set()
        assert await shown(one, 5) == await shown(other, 5) == ids(0, 5)
    assert [len(write) for write in store.writes] == [10]
    assert journal.num_held == 0


async def test_a_write_has_a_bounded_size(
    store: FakeStore, make_journal: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "_MOST_AT_ONCE", 4)
    one = sequence("one")
    journal = make_journal()
    journal.put(tokens(one, 10))
    async with running(journal):
        assert await shown(one, 10) == ids(0, 10)
    assert [len(write) for write in store.writes] == [4, 4, 2]


async def test_fast_steps_share_a_write(store: FakeStore, make_journal: Callable[..., Journal]) -> None:
    one = sequence("one")
    async with running(make_journal(pace_s=0.5)) as journal:
        for _ in range(21):
            journal.put(tokens(one))
            await asyncio.sleep(0.001)
        assert await shown(one, 21) == ids(0, 21)
    assert [len(write) for write in store.writes] == [1, 20]


async def test_first_and_last_tokens_and_errors_are_written_at_once(make_journal: Callable[..., Journal]) -> None:
    one, other = sequence("one"), sequence("other")
    other.params = SamplingParams(max_tokens=3)
    async with running(make_journal(pace_s=10 * PATIENCE_S)) as journal:
        journal.put(tokens(one))
        assert await shown(one, 1) == ids(0, 1)
        journal.put(tokens(one) + tokens(other))
        assert await shown(one, 1) == ids(1, 2)
        assert await shown(other, 1) == ids(0, 1)
        journal.put(tokens(other))
        journal.put(tokens(other))
        assert await shown(other, 2) == ids(1, 3)
        journal.put([Delivery(one, InternalError("it failed"))])
        (error,) = await shown(one, 1)
        assert isinstance(error, InternalError)


async def test_the_patience_counts_from_the_oldest_token_of_each_request(
    store: FakeStore, make_journal: Callable[..., Journal]
) -> None:
    early, late = sequence("early"), sequence("late")
    async with running(make_journal(patience_s=1.0)) as journal:
        store.there.clear()
        journal.put(tokens(early, 3))
        await asyncio.sleep(0.7)
        journal.put(tokens(early) + tokens(late))
        (error,) = await shown(early, 1)
        assert isinstance(error, PeerUnavailable)
        assert str(error) == "tokens could not be journaled for 1 s: Redis does not answer: it is away"
        store.there.set()
        assert await shown(late, 1) == ids(0, 1)
        journal.put(tokens(early))
        await asyncio.sleep(0.05)
        assert early.outbox.empty(), "nothing comes after the error"


async def test_no_more_tokens_are_held_than_may_be(store: FakeStore, make_journal: Callable[..., Journal]) -> None:
    one, other = sequence("one"), sequence("other")
    async with running(make_journal(most_held=6)) as journal:
        store.there.clear()
        journal.put(tokens(one, 5) + tokens(other, 1))
        journal.put(tokens(other, 2))
        (error,) = await shown(other, 1)
        assert isinstance(error, PeerUnavailable)
        assert "tokens could not be journaled: 6 of them wait already" in str(error)
        assert journal.num_held <= 6
        store.there.set()
        assert await shown(one, 5) == ids(0, 5)
        assert other.outbox.empty()


async def test_an_error_does_not_overtake_the_tokens_before_it(
    store: FakeStore, make_journal: Callable[..., Journal]
) -> None:
    one, failure = sequence("one"), InternalError("the step failed")
    async with running(make_journal()) as journal:
        store.there.clear()
        journal.put(tokens(one, 2))
        await asyncio.sleep(0.01)
        journal.put([Delivery(one, failure)])
        await asyncio.sleep(0.01)
        assert one.outbox.empty()
        store.there.set()
        assert await shown(one, 3) == [*ids(0, 2), failure]


async def test_what_waits_crosses_in_messages_of_bounded_size_and_an_error_behind_its_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(servicer, "MOST_TOKENS_AT_ONCE", 4)
    one, failure = sequence("one"), InternalError("the step failed")
    for delivery in [*tokens(one, 6), Delivery(one, failure)]:
        one.outbox.put_nowait(delivery.event)
    messages = [await servicer.next_tokens(one.outbox) for _ in range(2)]
    assert [[event.index for event in message] for message in messages] == [[0, 1, 2, 3], [4, 5]]
    with pytest.raises(InternalError, match="the step failed"):
        await servicer.next_tokens(one.outbox)


async def test_an_error_waits_behind_a_token_that_waits_also_when_both_came_together(
    store: FakeStore, make_journal: Callable[..., Journal]
) -> None:
    one, other, failure = sequence("one"), sequence("other"), InternalError("the step failed")
    store.refusals["one"] = PeerUnavailable("Redis does not answer: node 1")
    async with running(make_journal()) as journal:
        journal.put([*tokens(one), Delivery(one, failure), *tokens(other)])
        assert await shown(other, 1) == ids(0, 1)
        assert one.outbox.empty()
        store.refusals.clear()
        assert await shown(one, 2) == [*ids(0, 1), failure]


async def test_a_refused_token_is_its_own_requests_matter(
    store: FakeStore, make_journal: Callable[..., Journal]
) -> None:
    one, other = sequence("one"), sequence("other")
    store.refusals["one"] = StaleEpoch("its time is over")
    async with running(make_journal()) as journal:
        journal.put(tokens(one, 2) + tokens(other, 2))
        assert await shown(other, 2) == ids(0, 2)
        assert await shown(one, 1) == [store.refusals["one"]]
        assert one.outbox.empty()


async def test_requests_on_a_node_that_is_away_wait_and_the_others_do_not(
    store: FakeStore, make_journal: Callable[..., Journal]
) -> None:
    one, other = sequence("one"), sequence("other")
    store.refusals["one"] = PeerUnavailable("Redis does not answer: node 1")
    async with running(make_journal()) as journal:
        journal.put(tokens(one, 2) + tokens(other, 2))
        assert await shown(other, 2) == ids(0, 2)
        journal.put(tokens(other))
        assert await shown(other, 1) == ids(2, 3)
        assert one.outbox.empty()
        store.refusals.clear()
        assert await shown(one, 2) == ids(0, 2)


async def test_what_redis_has_lost_of_a_running_request_is_written_again(
    store: FakeStore, make_journal: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "_MOST_AT_ONCE", 4)
    one = sequence("one", num_generated=3)  # by another replica
    async with running(make_journal()) as journal:
        journal.put(tokens(one, 9))
        assert await shown(one, 9) == ids(3, 12)
        store.lengths["one"] = 5
        store.writes.clear()
        journal.put(tokens(one, 2))
        assert await shown(one, 2) == ids(12, 14)
    written = [(entry.index, entry.token.id, entry.token.logprob) for write in store.writes[1:] for entry in write]
    assert written == [(index, 100 + index, -float(index)) for index in range(5, 14)]
    assert store.lengths["one"] == 14


async def test_what_another_replica_wrote_is_left_to_the_gateway_to_write_again(
    store: FakeStore, make_journal: Callable[..., Journal]
) -> None:
    one, other = sequence("one", num_generated=3), sequence("other")
    store.lengths["one"] = 1
    async with running(make_journal()) as journal:
        journal.put(tokens(one, 2) + tokens(other))
        assert [type(event) for event in await shown(one, 1)] == [PeerUnavailable]
        assert await shown(other, 1) == ids(0, 1)
        assert one.outbox.empty()


async def test_the_tokens_of_a_client_that_left_are_not_held(
    store: FakeStore, make_journal: Callable[..., Journal]
) -> None:
    one, other = sequence("one"), sequence("other")
    async with running(make_journal()) as journal:
        store.there.clear()
        journal.put(tokens(one, 5) + tokens(other, 2))
        one.cancelled = True
        store.there.set()
        assert await shown(other, 2) == ids(0, 2)
    assert [entry.key.request_id for write in store.writes for entry in write] == ["other", "other"]


# --- with a real Redis ---


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with one_server(tmp_path) as server:
        yield server


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with tcp_proxy(server.port) as proxy:
        yield proxy


def calls(server: Server) -> int:
    """Scripts that were run."""
    with server.client() as client:
        return int(client.info("commandstats")["cmdstat_evalsha"]["calls"])


async def test_a_write_whose_reply_was_lost_is_repeated_and_nothing_is_there_twice(
    server: Server, proxy: Proxy
) -> None:
    one = sequence("one")
    async with connect(f"redis://{proxy.address}") as redis, running(Journal(RequestStore(redis, 60))) as journal:
        await journal.store.create(one.key, RECORD)
        journal.put(tokens(one))
        assert await shown(one, 1) == ids(0, 1)
        executed = calls(server)
        proxy.lose_replies(3)
        journal.put(tokens(one, 5))
        assert await shown(one, 5) == ids(1, 6)
        assert journal.counters.num_failures == 1
        assert calls(server) >= executed + 2, "Redis did it, and then again"
        assert [token.id for token in await journal.store.journal(one.key)] == ids(0, 6)
        assert one.outbox.empty()


@pytest.mark.parametrize(("away", "back"), [("hold", "go_on"), ("refuse", "accept")])
async def test_streams_survive_an_outage_that_is_shorter_than_the_patience(proxy: Proxy, away: str, back: str) -> None:
    sequences = [sequence(f"r{number}") for number in range(20)]
    async with connect(f"redis://{proxy.address}") as redis, running(Journal(RequestStore(redis, 60))) as journal:
        for one in sequences:
            await journal.store.create(one.key, RECORD)
        for step in range(40):
            if step == 10:
                getattr(proxy, away)()
            if step == 30:
                getattr(proxy, back)()
            journal.put([delivery for one in sequences for delivery in tokens(one)])
            await asyncio.sleep(0.03)
        for one in sequences:
            assert await shown(one, 40) == ids(0, 40)
            assert [token.id for token in await journal.store.journal(one.key)] == ids(0, 40)


async def test_a_distant_redis_delays_tokens_and_does_not_make_them_fewer(proxy: Proxy) -> None:
    one = sequence("one")
    async with connect(f"redis://{proxy.address}") as redis, running(Journal(RequestStore(redis, 60))) as journal:
        await journal.store.create(one.key, RECORD)
        proxy.delay_s = 0.05
        for _ in range(100):
            journal.put(tokens(one))
            await asyncio.sleep(0.005)
        assert await shown(one, 100) == ids(0, 100)
        assert journal.counters.num_writes < 25, "a write takes all that waits"
