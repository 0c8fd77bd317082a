"""What outlives a process, held by the embedded redis-server, by an ordinary one, and by a Cluster."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis, RedisCluster

from afd.errors import AfdError, ConfigError, PeerUnavailable, StaleEpoch
from afd.state import connection, requests
from afd.state.connection import connect, without_password
from afd.state.embedded import redis_server_binary
from afd.state.registry import Registry, Replica
from afd.state.requests import JournaledToken, JournalEntry, RequestRecord, RequestStore, SequenceKey
from tests.conftest import embedded_redis
from tests.redis_servers import cluster_servers, cluster_url

KEY = SequenceKey("r1")
RECORD = RequestRecord((5, 6, 2**32 - 1), sampling=b"\x00\xff", owner="attention-1", fingerprint="c-w")
CLAIM, OTHER_CLAIM = b"one", b"another"
REPLICA = Replica("ffn", "ffn-1", "127.0.0.1:1", "fingerprint", pid=1, shard=(1, 3))
PATIENCE_S = 10.0  # a test that waits longer than this hangs


@contextlib.contextmanager
def tcp_redis() -> Iterator[str]:
    """An ordinary redis-server on a TCP port: the one on PATH, else the embedded one's binary."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    binary = shutil.which("redis-server") or redis_server_binary()
    with tempfile.TemporaryDirectory() as directory:
        process = subprocess.Popen(
            [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", directory],
            stdout=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + PATIENCE_S
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.01)
            yield f"redis://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


@contextlib.contextmanager
def cluster_redis() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as directory, cluster_servers(Path(directory)) as servers:
        yield cluster_url(servers)


SERVERS = {"embedded": embedded_redis, "redis-server": tcp_redis}
KINDS = {**SERVERS, "cluster": cluster_redis}


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    with KINDS[request.param]() as url:
        yield url


@pytest.fixture
async def redis(server: str) -> AsyncIterator[Redis]:
    async with connect(server) as client:
        await client.flushall()
        yield client


@pytest.fixture(params=SERVERS)
async def mortal_redis(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Redis]:
    """A client of a server of the test's own, with short timeouts."""
    monkeypatch.setattr(connection, "_TIMEOUT_S", 0.3)
    with SERVERS[request.param]() as url:
        async with connect(url) as client:
            yield client


async def send_signal(redis: Redis, number: signal.Signals) -> None:
    os.kill((await redis.info("server"))["process_id"], number)


async def wait_for(registry: Registry, expected: list[Replica]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while await registry.replicas("ffn") != expected:
            await asyncio.sleep(0.01)


async def all_keys(redis: Redis) -> list[bytes]:
    """Of all nodes."""
    return [key async for key in redis.scan_iter("*")]


async def lasting_keys(redis: Redis) -> list[bytes]:
    return [key for key in await all_keys(redis) if await redis.pttl(key) < 0]


# --- who is alive ---


async def test_a_replica_is_seen_at_once_and_gone_at_once_when_it_leaves(redis: Redis) -> None:
    registry = Registry(redis, lease_s=60)
    async with registry.registered(lambda: REPLICA):
        assert await registry.replicas("ffn") == [REPLICA]
        assert await registry.replicas("attention") == []
    assert await registry.replicas("ffn") == []
    assert await lasting_keys(redis) == []


async def test_a_replica_that_does_not_renew_its_lease_is_gone(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(redis, lease_s=0.5)
    monkeypatch.setattr(registry, "_keep_renewing", lambda describe: asyncio.sleep(PATIENCE_S))
    async with registry.registered(lambda: REPLICA):
        assert await registry.replicas("ffn") == [REPLICA]
        await wait_for(registry, [])
        assert await lasting_keys(redis) == []


async def test_a_living_replica_is_never_gone(redis: Redis) -> None:
    registry = Registry(redis, lease_s=1)
    async with registry.registered(lambda: REPLICA):
        for _ in range(26):
            assert await registry.replicas("ffn") == [REPLICA]
            await asyncio.sleep(0.05)


async def test_a_renewal_tells_what_has_changed(redis: Redis) -> None:
    registry, now = Registry(redis, lease_s=0.1), [REPLICA]
    async with registry.registered(lambda: now[0]):
        now[0] = replace(REPLICA, address="127.0.0.1:2", transports=("shm", "inline"))
        await wait_for(registry, now)


async def test_a_replica_that_was_forgotten_comes_back_by_its_renewal(redis: Redis) -> None:
    registry = Registry(redis, lease_s=0.1)
    async with registry.registered(lambda: REPLICA):
        await redis.flushall()
        await wait_for(registry, [REPLICA])


async def test_replicas_are_listed_by_name(redis: Redis) -> None:
    registry = Registry(redis, lease_s=60)
    async with contextlib.AsyncExitStack() as stack:
        for name in ("b", "c", "a"):
            await stack.enter_async_context(
                registry.registered(lambda name=name: replace(REPLICA, replica_id=name, shard=None))
            )
        assert [replica.replica_id for replica in await registry.replicas("ffn")] == ["a", "b", "c"]


async def test_watchers_see_changes_by_notification(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afd.state.registry._POLL_S", PATIENCE_S)  # no change would be seen by polling
    registry = Registry(redis, lease_s=60)
    async with asyncio.timeout(PATIENCE_S / 2), contextlib.aclosing(registry.watch("ffn")) as changes:
        assert await anext(changes) == []
        change = asyncio.ensure_future(anext(changes))
        await asyncio.sleep(0.1)  # it has looked again after subscribing
        async with registry.registered(lambda: REPLICA):
            assert await change == [REPLICA]
        assert await anext(changes) == []


async def test_watchers_see_changes_by_polling_when_the_notification_is_lost(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("afd.state.registry._POLL_S", 0.05)
    monkeypatch.setattr(Registry, "_notify", lambda self: asyncio.sleep(0))
    registry = Registry(redis, lease_s=60)
    async with asyncio.timeout(PATIENCE_S), contextlib.aclosing(registry.watch("ffn")) as changes:
        assert await anext(changes) == []
        async with registry.registered(lambda: REPLICA):
            assert await anext(changes) == [REPLICA]
        assert await anext(changes) == []


async def test_watchers_notice_a_replica_that_died(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afd.state.registry._POLL_S", 0.05)
    registry = Registry(redis, lease_s=0.5)
    await registry._renew(REPLICA)
    async with asyncio.timeout(PATIENCE_S), contextlib.aclosing(registry.watch("ffn")) as changes:
        assert await anext(changes) == [REPLICA]
        assert await anext(changes) == []


async def test_watchers_go_on_after_their_connections_were_cut(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afd.state.registry._POLL_S", 0.05)
    registry = Registry(redis, lease_s=60)
    async with asyncio.timeout(PATIENCE_S), contextlib.aclosing(registry.watch("ffn")) as changes:
        assert await anext(changes) == []
        everywhere = {"target_nodes": RedisCluster.ALL_NODES} if isinstance(redis, RedisCluster) else {}
        await redis.execute_command("CLIENT KILL", "TYPE", "pubsub", **everywhere)
        await redis.execute_command("CLIENT KILL", "TYPE", "normal", "SKIPME", "yes", **everywhere)
        async with registry.registered(lambda: REPLICA):
            assert await anext(changes) == [REPLICA]


# --- requests and their journals ---


@pytest.fixture
def store(redis: Redis) -> RequestStore:
    return RequestStore(redis, ttl_s=60)


def entries(*indices: int, key: SequenceKey = KEY, epoch: int = 1) -> list[JournalEntry]:
    """Token 100 + index at each index."""
    return [JournalEntry(key, epoch, index, JournaledToken(100 + index, -0.5 * index)) for index in indices]


async def token_ids(store: RequestStore, key: SequenceKey = KEY, start: int = 0) -> list[int]:
    return [token.id for token in await store.journal(key, start)]


async def test_a_record_reads_as_it_was_written(store: RequestStore) -> None:
    assert await store.record(KEY) is None
    await store.create(KEY, RECORD)
    assert await store.record(KEY) == RECORD


async def test_meshes_on_one_redis_know_nothing_of_each_others_requests(redis: Redis, store: RequestStore) -> None:
    other = RequestStore(redis, 60, mesh="other")
    await store.create(KEY, RECORD)
    await store.append(entries(0, 1))
    assert (await other.record(KEY), await other.journal(KEY)) == (None, [])
    assert await other.create(KEY, replace(RECORD, owner="attention-2")) == 1
    assert await other.take_over(KEY, RECORD, CLAIM) == []
    await other.finish(KEY, 2, "cancelled")
    assert (await store.record(KEY), await token_ids(store)) == (RECORD, [100, 101])
    assert await store.append(entries(2)) == [None]


async def test_the_status_is_written_at_the_end(store: RequestStore) -> None:
    await store.create(KEY, RECORD)
    await store.finish(KEY, 1, "cancelled")
    assert await store.record(KEY) == replace(RECORD, status="cancelled")


async def test_what_is_cancelled_takes_no_tokens_and_is_not_cancelled_again(store: RequestStore) -> None:
    await store.create(KEY, RECORD)
    assert await store.append(entries(0)) == [None]
    assert [await store.cancel(KEY) for _ in range(2)] == [True, False]
    assert [type(refusal) for refusal in await store.append(entries(1))] == [StaleEpoch]
    await store.finish(KEY, 1, "finished")
    assert await store.record(KEY) == replace(RECORD, epoch=2, status="cancelled")
    assert not await store.cancel(SequenceKey("unknown"))


async def test_an_end_after_the_record_has_expired_makes_no_new_one(store: RequestStore) -> None:
    await store.finish(KEY, 1, "finished")
    assert await store.record(KEY) is None


async def test_tokens_are_journaled_in_order_with_their_logprobs(store: RequestStore) -> None:
    await store.create(KEY, RECORD)
    first = JournaledToken(2**32 - 1, -0.25, ((7, -0.5), (2**32 - 1, -0.25)))
    last = JournaledToken(102, -1.0, finish_reason="stop")
    assert await store.append([JournalEntry(KEY, 1, 0, first), *entries(1)]) == [None, None]
    assert await store.append([JournalEntry(KEY, 1, 2, last)]) == [None]
    expected = [first, JournaledToken(101, -0.5), last]
    assert await store.journal(KEY) == expected


async def test_a_stream_can_be_read_from_any_token_on(store: RequestStore) -> None:
    await store.create(KEY, RECORD)
    await store.append(entries(*range(12)))
    for start in (0, 1, 9, 11, 12, 99):
        assert await token_ids(store, start=start) == list(range(100 + start, 112))


async def test_a_token_written_twice_is_there_once_and_as_it_was_first(store: RequestStore) -> None:
    await store.create(KEY, RECORD)
    await store.append(entries(0, 1, 2))
    again = [replace(entry, token=JournaledToken(7, 0.0)) for entry in entries(1, 2)]
    assert await store.append([*again, *entries(3)]) == [None] * 3
    assert await token_ids(store) == [100, 101, 102, 103]


async def test_a_token_after_a_gap_is_refused_and_its_neighbours_are_not(store: RequestStore) -> None:
    other = SequenceKey("r2")
    await store.create(KEY, RECORD)
    await store.append(entries(0))
    refusal, accepted = await store.append([*entries(2), *entries(0, key=other)])
    assert isinstance(refusal, AfdError)
    assert accepted is None
    assert (await token_ids(store), await token_ids(store, other)) == ([100], [100])


async def test_sequences_and_choices_have_journals_of_their_own(store: RequestStore) -> None:
    other = SequenceKey("r1", choice=1)
    await store.create(KEY, RECORD)
    await store.create(other, RECORD)
    await store.append([*entries(0), *entries(0, 1, key=other)])
    assert (await token_ids(store), await token_ids(store, other)) == ([100], [100, 101])


@pytest.mark.parametrize("request_id", ["}", "{}", "a}b", "{a}{b", "%7D"])
async def test_a_request_id_may_have_braces(store: RequestStore, request_id: str) -> None:
    key = SequenceKey(request_id)
    await store.create(key, RECORD)
    assert await store.append(entries(0, key=key)) == [None]
    await store.finish(key, 1, "finished")
    assert await store.record(key) == replace(RECORD, status="finished")
    assert await token_ids(store, key) == [100]


async def test_a_new_owner_takes_over_and_the_old_ones_writes_are_refused(store: RequestStore) -> None:
    assert await store.create(KEY, RECORD) == 1
    await store.append(entries(0))
    assert await store.take_over(KEY, replace(RECORD, owner="attention-2"), CLAIM) == [JournaledToken(100, -0.0)]
    assert await store.record(KEY) == replace(RECORD, owner="attention-2", epoch=2)
    await store.append(entries(1, epoch=2))
    refusals = await store.append(entries(1, 2))
    assert [type(refusal) for refusal in refusals] == [StaleEpoch, StaleEpoch]
    assert (
        str(refusals[0]) == "request r1 was resumed or begun anew in another stream: epoch 1 is over, its owner's is 2"
    )
    assert await token_ids(store) == [100, 101]


async def test_a_refusal_leaves_the_other_sequences_alone(store: RequestStore) -> None:
    other = SequenceKey("r2")
    await store.take_over(KEY, replace(RECORD, epoch=9), CLAIM)
    await store.create(other, RECORD)
    refused, accepted = await store.append([*entries(0, epoch=9), *entries(0, key=other)])
    assert (type(refused), accepted) == (StaleEpoch, None)
    assert (await token_ids(store), await token_ids(store, other)) == ([], [100])


async def test_an_epoch_may_be_as_large_as_the_protocol_has_them(store: RequestStore) -> None:
    await store.create(KEY, RECORD)
    assert await store.append(entries(0, epoch=2**64 - 1)) == [None]


async def test_a_stale_owner_cannot_take_a_request_back(store: RequestStore) -> None:
    await store.create(KEY, RECORD)
    await store.take_over(KEY, replace(RECORD, owner="attention-2"), CLAIM)
    with pytest.raises(StaleEpoch, match="epoch 1 is over, its owner's is 2"):
        await store.take_over(KEY, RECORD, OTHER_CLAIM)
    record = await store.record(KEY)
    assert record == replace(RECORD, owner="attention-2", epoch=2)


async def test_a_takeover_that_nobody_waited_for_does_not_stand_in_the_way_of_its_repetition(
    mortal_redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "_PATIENCE_S", 0.3)
    store, pid = RequestStore(mortal_redis, 60), (await mortal_redis.info("server"))["process_id"]
    await store.take_over(SequenceKey("first"), RECORD, CLAIM)  # Redis knows the script
    await store.create(KEY, RECORD)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(PeerUnavailable):
        await store.take_over(KEY, RECORD, CLAIM)
    os.kill(pid, signal.SIGCONT)
    async with asyncio.timeout(PATIENCE_S):
        while (await store.record(KEY)) == RECORD:
            await asyncio.sleep(0.01)
    assert await store.take_over(KEY, RECORD, CLAIM) == []
    assert await store.record(KEY) == replace(RECORD, epoch=2)
    await store.take_over(KEY, replace(RECORD, epoch=2), OTHER_CLAIM)
    with pytest.raises(StaleEpoch, match="its owner's is 3"):
        await store.take_over(KEY, RECORD, CLAIM)
    await store.take_over(KEY, replace(RECORD, epoch=3), CLAIM)
    with pytest.raises(StaleEpoch, match="its owner's is 4"):
        await store.take_over(KEY, RECORD, CLAIM)


async def test_a_creation_that_comes_again_too_late_undoes_nothing(
    store: RequestStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    create = store._create

    async def noting(**call: Any) -> Any:
        calls.append(call)
        return await create(**call)

    monkeypatch.setattr(store, "_create", noting)
    await store.create(KEY, RECORD)
    await store.append(entries(0))
    assert await create(**calls[0]) == 1
    assert await store.take_over(KEY, RECORD, CLAIM) == [entries(0)[0].token]
    assert await create(**calls[0]) == 2
    assert await store.append(entries(1, epoch=2)) == [None]
    assert await token_ids(store) == [100, 101]


async def test_a_request_that_begins_anew_has_nothing_of_the_earlier_one_of_its_name(store: RequestStore) -> None:
    await store.create(KEY, RECORD)
    await store.append(entries(0))
    assert await store.create(KEY, RECORD) == 2
    assert await token_ids(store) == []
    (refusal,) = await store.append(entries(0, epoch=1))
    assert isinstance(refusal, StaleEpoch)


async def test_who_takes_over_writes_again_what_redis_has_lost(redis: Redis, store: RequestStore) -> None:
    shown = [entry.token for entry in entries(0, 1, 2)]
    await store.create(KEY, RECORD)
    await store.append(entries(0, 1, 2))
    await redis.flushall()
    assert await store.take_over(KEY, RECORD, CLAIM, shown) == shown
    assert await store.record(KEY) == replace(RECORD, epoch=2)
    assert await store.append(entries(3, epoch=2)) == [None]
    assert await token_ids(store) == [100, 101, 102, 103]


async def test_who_takes_over_learns_of_tokens_that_were_journaled_but_not_shown(store: RequestStore) -> None:
    await store.create(KEY, RECORD)
    await store.append(entries(0, 1, 2))
    assert len(await store.take_over(KEY, RECORD, CLAIM, [entries(0)[0].token])) == 3


async def test_records_and_journals_expire_after_the_last_write(redis: Redis, store: RequestStore) -> None:
    await store.create(KEY, RECORD)
    await store.append(entries(0))
    keys = await all_keys(redis)
    assert len(keys) == 2
    for key in keys:
        await redis.pexpire(key, 1000)
    await store.append(entries(1))
    assert all([50_000 < await redis.pttl(key) <= 60_000 for key in keys])
    for key in keys:
        await redis.persist(key)
    await store.finish(KEY, 1, "finished")
    await store.append(entries(2))
    assert all([50_000 < await redis.pttl(key) <= 60_000 for key in keys])


async def test_nothing_is_kept_without_an_end(redis: Redis, store: RequestStore) -> None:
    await store.create(KEY, RECORD)
    await store.append([*entries(0), *entries(0, key=SequenceKey("without-record"))])
    await store.finish(KEY, 1, "finished")
    await store.finish(SequenceKey("unknown"), 1, "failed")
    assert all([await redis.pttl(key) > 0 for key in await all_keys(redis)])


async def test_a_flushed_script_cache_costs_nothing(redis: Redis, store: RequestStore) -> None:
    await store.create(KEY, RECORD)
    for index in range(3):
        await redis.script_flush()
        assert await store.append(entries(index)) == [None]
    assert await token_ids(store) == [100, 101, 102]


async def test_a_token_that_could_not_be_journaled_is_not_passed_off_as_journaled(
    redis: Redis, store: RequestStore
) -> None:
    await store.create(KEY, RECORD)
    await store.append(entries(0))
    everywhere = {"target_nodes": RedisCluster.ALL_NODES} if isinstance(redis, RedisCluster) else {}
    await redis.execute_command("CONFIG SET", "maxmemory", 1, **everywhere)
    try:
        with pytest.raises(PeerUnavailable):
            await store.append(entries(1))
    finally:
        await redis.execute_command("CONFIG SET", "maxmemory", 0, **everywhere)
    assert await store.append(entries(1)) == [None]
    assert await token_ids(store) == [100, 101]


async def test_an_empty_step_writes_nothing(redis: Redis, store: RequestStore) -> None:
    assert await store.append([]) == []
    assert await all_keys(redis) == []


async def test_prompt_ids_are_kept_four_bytes_each(redis: Redis, store: RequestStore) -> None:
    await store.create(KEY, RECORD)
    (key,) = await all_keys(redis)
    assert await redis.hget(key, "prompt_ids") == struct.pack("<3I", *RECORD.prompt_ids)


async def test_a_task_that_is_cancelled_while_it_talks_to_redis_ends(redis: Redis, store: RequestStore) -> None:
    async def talk() -> None:
        while True:
            await store.create(KEY, RECORD)
            await store.append(entries(0))

    for num_turns in range(60):  # of the event loop; somewhere among them lies every point of the talk
        task = asyncio.create_task(talk())
        for _ in range(num_turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=1)
        ended = task.done()
        task.cancel()
        assert ended, f"cancelled after {num_turns} turns, it goes on"


async def test_a_cancelled_task_can_still_clean_up_in_redis(store: RequestStore) -> None:
    async def work() -> None:
        try:
            await asyncio.sleep(PATIENCE_S)
        finally:
            await store.create(KEY, RECORD)
            await store.append(entries(0))
            await store.finish(KEY, 1, "cancelled")

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert await store.record(KEY) == replace(RECORD, status="cancelled")
    assert await token_ids(store) == [100]


# --- when Redis is gone ---


async def ask_everything(redis: Redis) -> None:
    """Every question to a Redis that does not answer is PeerUnavailable, and never a hang."""
    store, registry = RequestStore(redis, 60), Registry(redis, 60)
    questions = (
        store.create(KEY, RECORD),
        store.append(entries(0)),
        store.record(KEY),
        store.journal(KEY),
        store.finish(KEY, 1, "finished"),
        registry.replicas("ffn"),
        registry.registered(lambda: REPLICA).__aenter__(),
    )
    answers = await asyncio.wait_for(asyncio.gather(*questions, return_exceptions=True), PATIENCE_S)
    assert [type(answer) for answer in answers] == [PeerUnavailable] * len(questions)


async def test_a_dead_redis_is_an_unavailable_peer(mortal_redis: Redis) -> None:
    await send_signal(mortal_redis, signal.SIGKILL)
    await ask_everything(mortal_redis)


async def test_a_frozen_redis_is_an_unavailable_peer_and_may_wake_up(mortal_redis: Redis) -> None:
    pid = (await mortal_redis.info("server"))["process_id"]
    os.kill(pid, signal.SIGSTOP)
    try:
        await ask_everything(mortal_redis)
    finally:
        os.kill(pid, signal.SIGCONT)
    store = RequestStore(mortal_redis, 60)
    await store.create(KEY, RECORD)
    await store.append(entries(0))
    assert await token_ids(store) == [100]


async def test_a_master_that_became_a_replica_is_an_unavailable_peer_until_it_is_one_again(mortal_redis: Redis) -> None:
    store = RequestStore(mortal_redis, 60)
    await store.create(KEY, RECORD)
    await mortal_redis.execute_command("REPLICAOF", "127.0.0.1", "1")
    for refused in (store.append(entries(0)), store.finish(KEY, 1, "failed"), store.create(KEY, RECORD)):
        with pytest.raises(PeerUnavailable):
            await refused
    await mortal_redis.execute_command("REPLICAOF", "NO", "ONE")
    assert await store.append(entries(0)) == [None]


async def test_a_request_that_begins_waits_a_short_time_for_redis(
    mortal_redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "_PATIENCE_S", 1.0)
    store, pid = RequestStore(mortal_redis, 60), (await mortal_redis.info("server"))["process_id"]
    os.kill(pid, signal.SIGSTOP)
    asyncio.get_running_loop().call_later(0.5, os.kill, pid, signal.SIGCONT)
    await store.create(KEY, RECORD)
    assert await store.record(KEY) == RECORD
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(PeerUnavailable, match=r"Redis does not answer: .* \(asked for 1 s\)"):
            await asyncio.wait_for(store.create(SequenceKey("r2"), RECORD), 2.0)
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_a_replica_leaves_quietly_when_redis_is_gone(mortal_redis: Redis) -> None:
    async with asyncio.timeout(PATIENCE_S), Registry(mortal_redis, 60).registered(lambda: REPLICA):
        await send_signal(mortal_redis, signal.SIGKILL)


@pytest.mark.parametrize(
    "url", ["redis://:secret@127.0.0.1:1", "unix:///nowhere/redis.sock", "redis://127.0.0.1:x", "rediss://127.0.0.1:1"]
)
async def test_a_url_without_a_redis_behind_it_is_one_sentence_without_the_password(url: str) -> None:
    with pytest.raises(ConfigError, match="no Redis answers at") as caught:
        async with connect(url):
            pass
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:pw@host:7000/1?timeout=3", "redis://user:***@host:7000/1?timeout=3"),
        ("rediss://:pw@host", "rediss://:***@host"),
        ("redis://u:p@ss/w#rd%2@host:1/0", "redis://u:***@host:1/0"),
        ("unix://u:pw@/tmp/redis.sock", "unix://u:***@/tmp/redis.sock"),
        ("redis+sentinel://u:p/w@a:1,b:2/main", "redis+sentinel://u:***@a:1,b:2/main"),
        ("rediss+sentinel://a/main?sentinel_password=pw&x=1", "rediss+sentinel://a/main?sentinel_password=***&x=1"),
        ("redis+cluster://:pw@a:1,b:2", "redis+cluster://:***@a:1,b:2"),
        ("redis://host:1", "redis://host:1"),
        ("unix:///tmp/redis.sock", "unix:///tmp/redis.sock"),
    ],
)
def test_passwords_are_not_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown


# --- the embedded server ---


@pytest.fixture
def temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


async def test_the_embedded_server_leaves_no_process_and_no_directory(temporary_directory: Path) -> None:
    with embedded_redis() as url:
        async with connect(url) as client:
            pid = (await client.info("server"))["process_id"]
            assert await client.set("key", "value")
        assert list(temporary_directory.iterdir())
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert list(temporary_directory.iterdir()) == []


def test_the_embedded_server_leaves_nothing_when_its_user_fails(temporary_directory: Path) -> None:
    with pytest.raises(RuntimeError, match="user"), embedded_redis():
        raise RuntimeError("user")
    assert list(temporary_directory.iterdir()) == []


async def test_two_embedded_servers_share_nothing(temporary_directory: Path) -> None:
    with embedded_redis() as first, embedded_redis() as second:
        async with connect(first) as one, connect(second) as other:
            await one.set("key", "value")
            assert await other.get("key") is None


@pytest.mark.parametrize("binary", ["/bin/false", "/nowhere/redis-server", "/"])
def test_a_server_that_does_not_start_is_one_sentence_and_leaves_nothing(
    temporary_directory: Path, binary: str
) -> None:
    with pytest.raises(ConfigError, match="redis-server"), embedded_redis(binary):
        pass
    assert list(temporary_directory.iterdir()) == []
