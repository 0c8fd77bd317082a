"""Who counts as alive while Redis is away, and after it came back with or without its data."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from afd.state import registry as registry_module
from afd.state.connection import connect
from afd.state.registry import _EXPIRED, _LEFT, Registry, Replica, _View
from afd.tasks import end
from benchmarks.proxy import Proxy, tcp_proxy
from tests.redis_servers import Server, one_server

LEASE_S = 0.6
ONE = Replica("ffn", "ffn-1", "127.0.0.1:1", "fingerprint", pid=1, shard=(0, 2))
OTHER = replace(ONE, replica_id="ffn-2", shard=(1, 2))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with one_server(tmp_path) as server:
        yield server


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    """The way of a replica to Redis; the watcher has another one."""
    with tcp_proxy(server.port) as proxy:
        yield proxy


@contextlib.asynccontextmanager
async def registry(url: str, lease_s: float = LEASE_S) -> AsyncIterator[Registry]:
    async with connect(url) as redis:
        yield Registry(redis, lease_s)


class Watcher:
    """What a watcher saw, and when."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, set[str]]] = []

    @property
    def names(self) -> set[str]:
        return self.seen[-1][1] if self.seen else set()

    async def follow(self, registry: Registry) -> None:
        async for replicas in registry.watch("ffn"):
            self.seen.append((time.monotonic(), {replica.replica_id for replica in replicas}))

    async def until(self, *names: str, timeout_s: float = 10.0) -> None:
        async with asyncio.timeout(timeout_s):
            while self.names != set(names):
                await asyncio.sleep(0.01)

    def missed(self, name: str, since_s: float) -> bool:
        """Whether it was gone at any time after that."""
        return any(name not in names for at_s, names in self.seen if at_s >= since_s)


@contextlib.asynccontextmanager
async def watching(url: str, lease_s: float = LEASE_S) -> AsyncIterator[Watcher]:
    watcher = Watcher()
    async with registry(url, lease_s) as watched:
        task = asyncio.create_task(watcher.follow(watched))
        try:
            yield watcher
        finally:
            task.cancel()
            await asyncio.wait([task])


@pytest.mark.parametrize("how", ["frozen", "restarted without data"])
async def test_an_outage_longer_than_a_lease_removes_nobody(server: Server, how: str) -> None:
    async with (
        registry(server.url) as holder,
        watching(server.url) as watcher,
        holder.registered(lambda: ONE),
        holder.registered(lambda: OTHER),
    ):
        await watcher.until("ffn-1", "ffn-2")
        since_s = time.monotonic()
        if how == "frozen":
            server.signal(signal.SIGSTOP)
        else:
            server.kill()
        await asyncio.sleep(2.5 * LEASE_S)
        if how == "frozen":
            server.signal(signal.SIGCONT)
        else:
            await asyncio.to_thread(server.start)
        await asyncio.sleep(2 * LEASE_S)
        assert watcher.names == {"ffn-1", "ffn-2"}
        assert not watcher.missed("ffn-1", since_s)
        assert len(await holder.replicas("ffn")) == 2, "the leases were renewed"


async def test_data_that_is_lost_without_an_outage_removes_nobody(server: Server) -> None:
    async with registry(server.url) as holder, watching(server.url) as watcher, holder.registered(lambda: ONE):
        await watcher.until("ffn-1")
        since_s = time.monotonic()
        for _ in range(4):
            server.ask("FLUSHALL")
            await asyncio.sleep(0.4 * LEASE_S)
        assert not watcher.missed("ffn-1", since_s)


async def test_who_does_not_come_back_after_an_outage_is_gone_a_lease_later(server: Server, proxy: Proxy) -> None:
    async with (
        registry(server.url) as holder,
        watching(server.url) as watcher,
        holder.registered(lambda: ONE),
        registry(f"redis://{proxy.address}") as cut_off,
        cut_off.registered(lambda: OTHER),
    ):
        await watcher.until("ffn-1", "ffn-2")
        server.kill()
        proxy.refuse()
        await asyncio.sleep(1.5 * LEASE_S)
        await asyncio.to_thread(server.start)
        back_s = time.monotonic()
        await watcher.until("ffn-1")
        assert time.monotonic() - back_s >= LEASE_S
        assert not watcher.missed("ffn-1", back_s)


async def test_who_leaves_is_gone_at_once_also_after_an_outage(server: Server) -> None:
    async with (
        registry(server.url, 60) as holder,
        watching(server.url, 60) as watcher,
        holder.registered(lambda: ONE),
    ):
        async with holder.registered(lambda: OTHER):
            await watcher.until("ffn-1", "ffn-2")
            server.signal(signal.SIGSTOP)
            await asyncio.sleep(1.5)
            server.signal(signal.SIGCONT)
        await watcher.until("ffn-1", timeout_s=5.0)


async def test_a_lease_that_expires_while_redis_answers_is_a_removal_within_a_second(
    server: Server, proxy: Proxy
) -> None:
    async with (
        watching(server.url) as watcher,
        watching(server.url) as second,
        registry(f"redis://{proxy.address}") as cut_off,
        cut_off.registered(lambda: ONE),
    ):
        await watcher.until("ffn-1")
        await second.until("ffn-1")
        proxy.refuse()
        await watcher.until(timeout_s=LEASE_S + 2.0)
        await second.until(timeout_s=1.5)
        proxy.accept()
        await watcher.until("ffn-1")


async def test_leases_are_renewed_as_soon_as_redis_is_back(
    server: Server, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    renewals: list[float] = []
    renew = Registry._renew

    async def noted(self: Registry, replica: Replica) -> bool:
        is_new = await renew(self, replica)
        renewals.append(time.monotonic())
        return is_new

    monkeypatch.setattr(Registry, "_renew", noted)
    async with registry(f"redis://{proxy.address}", lease_s=3) as holder, holder.registered(lambda: ONE):
        proxy.refuse()
        await asyncio.sleep(1.3)  # a renewal was due after 1 s, the next one would be after 2
        assert len(renewals) == 1
        proxy.accept()
        back_s = time.monotonic()
        while len(renewals) < 2:
            assert time.monotonic() < back_s + 0.6
            await asyncio.sleep(0.01)


async def test_a_lease_that_is_renewed_while_somebody_finds_it_expired_stays(server: Server) -> None:
    async with registry(server.url, 60) as one:
        await one._renew(ONE)
        assert not await one._expire("ffn", "ffn-1")
        assert await one.replicas("ffn") == [ONE]


async def test_watchers_find_the_channel_again_after_a_restart(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        registry(server.url, 60) as holder,
        watching(server.url, 60) as watcher,
        holder.registered(lambda: ONE),
    ):
        await watcher.until("ffn-1")
        server.kill()
        await asyncio.to_thread(server.start)
        await asyncio.sleep(1.0)
        monkeypatch.setattr(registry_module, "_POLL_S", 10.0)  # no change would be seen by polling
        await asyncio.sleep(1.5)
        async with holder.registered(lambda: OTHER):
            await watcher.until("ffn-1", "ffn-2", timeout_s=3.0)


async def test_an_outage_is_told_once_by_all_watchers_of_a_registry(
    server: Server, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    async with registry(f"redis://{proxy.address}") as cut_off:
        watches = [asyncio.create_task(Watcher().follow(cut_off)) for _ in range(2)]
        for outage in (1, 2):
            await asyncio.sleep(0.5)
            proxy.refuse()
            await asyncio.sleep(0.5)
            assert caplog.text.count("membership is what it was") == outage
            proxy.accept()
        for watch in watches:
            await end(watch)


def test_a_lease_that_expired_in_an_outage_has_a_leases_time_to_be_renewed() -> None:
    view = _View(lease_s=5)
    view.update({"ffn-1": ONE, "ffn-2": OTHER}, {}, 100.0)
    view.outage()
    view.update({}, {"ffn-1": _EXPIRED, "ffn-2": _LEFT}, 110.0)
    assert view.replicas == [ONE]
    view.update({"ffn-1": ONE}, {}, 112.0)
    view.update({}, {"ffn-1": _EXPIRED}, 114.9)
    assert view.replicas == [ONE]
    view.update({}, {"ffn-1": _EXPIRED}, 115.0)
    assert view.replicas == []


async def test_an_answer_that_took_too_long_tells_of_an_outage(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([(0.0, {"ffn-1": ONE}, {}), (1.2, {}, {"ffn-1": _EXPIRED}), (0.0, {"ffn-1": ONE}, {})])

    async def look(self: Registry, role: str) -> tuple[dict[str, Replica], dict[str, bytes]]:
        delay_s, entries, gone = next(answers, (0.0, {"ffn-1": ONE}, {}))
        await asyncio.sleep(delay_s)
        return entries, gone

    monkeypatch.setattr(Registry, "_look", look)
    monkeypatch.setattr(registry_module, "_POLL_S", 0.3)
    monkeypatch.setattr(registry_module, "_ANSWER_S", 2.0)
    async with watching(server.url) as watcher:
        await watcher.until("ffn-1")
        await asyncio.sleep(2.0)
        assert len(watcher.seen) == 1
