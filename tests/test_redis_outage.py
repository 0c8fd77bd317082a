"""Redis is lost in the middle of streams of a real mesh: every stream ends with the oracle's tokens, none lost and none
twice, or with one clear error."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from afd import Client, Token
from afd.bench import counters
from afd.errors import DeadlineExceeded, PeerUnavailable
from afd.mesh import Mesh
from afd.state import requests
from benchmarks.proxy import Proxy, tcp_proxy
from tests.conftest import Model, StartMesh
from tests.redis_servers import Server, cluster_servers, cluster_url, one_server, watched_servers

NUM_TOKENS = 200
NUM_STREAMS = 4
PATIENCE_S = 5
HANG_S = 60.0


async def stream(mesh: Mesh, prompt: list[int], at_token: dict[int, Callable[[], object]]) -> list[Token]:
    """The tokens of a request, with things that happen while it runs."""
    tokens = []
    async with Client(mesh.gateway.address) as client:
        async for token in client.generate(prompt, max_tokens=NUM_TOKENS, ignore_eos=True):
            tokens.append(token)
            if token.index in at_token:
                at_token[token.index]()
    return tokens


async def streams(
    mesh: Mesh, prompts: list[list[int]], at_token: dict[int, Callable[[], object]]
) -> list[list[Token] | BaseException]:
    """What came of several requests at once; things happen when the first of them is so far."""
    work = [stream(mesh, prompt, at_token if prompt is prompts[0] else {}) for prompt in prompts]
    return await asyncio.wait_for(asyncio.gather(*work, return_exceptions=True), HANG_S)


def check_streams(model: Model, mesh: Mesh, at_token: dict[int, Callable[[], object]]) -> None:
    """Asserts that all requests end with the oracle's tokens, whatever happens meanwhile."""
    prompts = [model.prompt(5, seed) for seed in range(NUM_STREAMS)]
    for prompt, tokens in zip(prompts, asyncio.run(streams(mesh, prompts, at_token)), strict=True):
        if isinstance(tokens, BaseException):
            raise tokens
        assert [token.index for token in tokens] == list(range(NUM_TOKENS))
        model.check_greedy(prompt, [token.id for token in tokens], [token.logprob for token in tokens])


def later(delay_s: float, function: Callable[[], object]) -> None:
    threading.Timer(delay_s, function).start()


@pytest.fixture(scope="module")
def model(make_model: Callable[[int], Model]) -> Model:
    return make_model(4)


@dataclass(frozen=True)
class Setup:
    """A mesh with a Redis that appends to a file, and a proxy between them."""

    mesh: Mesh
    server: Server
    proxy: Proxy

    def away_for(self, away_s: float, go: Callable[[], object], come_back: Callable[[], object]) -> Callable[[], None]:
        def act() -> None:
            go()
            later(away_s, come_back)

        return act


@pytest.fixture(scope="module")
def setup(model: Model, start_mesh: StartMesh, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    directory = tmp_path_factory.mktemp("redis")
    with (
        one_server(directory, "--appendonly", "yes", "--appendfsync", "always") as server,
        tcp_proxy(server.port) as proxy,
        start_mesh(
            model.path,
            redis=f"redis://{proxy.address}",
            lease_s=2,
            journal_patience_s=PATIENCE_S,
            failover_timeout_s=1,
        ) as mesh,
    ):
        yield Setup(mesh, server, proxy)


def test_streams_go_on_after_a_frozen_redis(model: Model, setup: Setup) -> None:
    server = setup.server
    outage = setup.away_for(3.0, lambda: server.signal(signal.SIGSTOP), lambda: server.signal(signal.SIGCONT))
    check_streams(model, setup.mesh, {20: outage})


def test_streams_go_on_after_a_redis_that_was_killed_and_has_its_file(model: Model, setup: Setup) -> None:
    outage = setup.away_for(3.0, setup.server.kill, setup.server.start)
    check_streams(model, setup.mesh, {20: outage})


def test_streams_go_on_after_a_redis_that_was_killed_and_lost_everything(model: Model, setup: Setup) -> None:
    check_streams(model, setup.mesh, {20: setup.server.restart_empty})
    check_streams(model, setup.mesh, {})


def test_an_outage_longer_than_the_patience_ends_each_stream_with_a_sentence_and_the_next_request_works(
    model: Model, setup: Setup
) -> None:
    mesh, proxy = setup.mesh, setup.proxy
    started_s: list[float] = []

    def go_away() -> None:
        started_s.append(time.monotonic())
        proxy.refuse()

    prompts = [model.prompt(5, seed) for seed in range(NUM_STREAMS)]
    results = asyncio.run(streams(mesh, prompts, {20: go_away}))
    took_s = time.monotonic() - started_s[0]
    for result in results:
        assert isinstance(result, DeadlineExceeded)
        assert "nobody could go on with the request for 1 s: Redis does not answer" in str(result)
    assert PATIENCE_S < took_s < PATIENCE_S + 7
    with pytest.raises(PeerUnavailable, match="Redis does not answer"):
        asyncio.run(stream(mesh, prompts[0], {}))
    assert counters(mesh, "attention-0")["afd_journal_held_tokens"] == 0
    assert counters(mesh, "attention-0")["afd_sequences_running"] == 0
    proxy.accept()
    check_streams(model, mesh, {})


def test_a_redis_100_ms_away_makes_nothing_slower_but_the_first_token(model: Model, setup: Setup) -> None:
    before = counters(setup.mesh, "attention-0")
    setup.proxy.delay_s = 0.05
    try:
        check_streams(model, setup.mesh, {})
    finally:
        setup.proxy.delay_s = 0.0
    after = counters(setup.mesh, "attention-0")
    num_writes = after["afd_journal_writes"] - before["afd_journal_writes"]
    num_steps = after["afd_steps"] - before["afd_steps"]
    assert num_writes < num_steps / 2, "steps did not wait for the journal"


@pytest.mark.slow
def test_streams_go_on_where_redis_is_frozen_while_their_attention_replica_is_lost(
    model: Model, start_mesh: StartMesh, tmp_path: Path
) -> None:
    with one_server(tmp_path) as server, start_mesh(model.path, 2, 1, redis=server.url, lease_s=2) as mesh:

        def lose() -> None:
            later(4.0, lambda: server.signal(signal.SIGCONT))
            server.signal(signal.SIGSTOP)
            process = next(each for each in mesh.services if each.role == "attention").process
            assert process is not None
            process.kill()

        server.ask("SCRIPT", "LOAD", requests._TAKE_OVER)  # a script that Redis does not know does nothing too late
        check_streams(model, mesh, {20: lose})


@pytest.mark.parametrize("loss", ["killed", pytest.param("replaced", marks=pytest.mark.slow)])
def test_streams_survive_the_loss_of_the_master(model: Model, start_mesh: StartMesh, tmp_path: Path, loss: str) -> None:
    with (
        watched_servers(tmp_path) as servers,
        start_mesh(model.path, 1, 1, redis=servers.url, lease_s=2) as mesh,
    ):
        lose = servers.master.kill if loss == "killed" else servers.replace_master
        check_streams(model, mesh, {20: lose})
        check_streams(model, mesh, {})


@pytest.mark.parametrize("num_replicas", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_streams_are_journaled_in_a_cluster(
    model: Model, start_mesh: StartMesh, tmp_path: Path, num_replicas: int
) -> None:
    with (
        cluster_servers(tmp_path, 3, num_replicas) as servers,
        start_mesh(model.path, 1, 1, redis=cluster_url(servers), lease_s=2) as mesh,
    ):
        check_streams(model, mesh, {20: servers[0].kill} if num_replicas else {})
