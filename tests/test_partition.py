"""Real partitions: a replica in a network namespace of its own, whose link goes down under load. Root only."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from afd import Client, Token
from afd.forkserver import ForkServer
from afd.mesh import Mesh, MeshOptions, Service
from afd.scrape import scrape
from tests.conftest import Model
from tests.redis_servers import Server

NEAR, FAR = "198.18.7.1", "198.18.7.2"  # of the range for tests of networks
PROMPT = [5, 6, 7]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@dataclass(frozen=True)
class Link:
    """Between this network and a namespace."""

    namespace: str

    @property
    def device(self) -> str:
        return f"{self.namespace}-near"

    def down(self) -> None:
        ip("link", "set", self.device, "down")

    def up(self) -> None:
        ip("link", "set", self.device, "up")


@pytest.fixture
def link() -> Iterator[Link]:
    link = Link(f"afd{os.getpid() % 100000}")
    try:
        ip("netns", "add", link.namespace)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs ip(8), and the right to make network namespaces")
    try:
        far = f"{link.namespace}-far"
        ip("link", "add", link.device, "type", "veth", "peer", "name", far, "netns", link.namespace)
        ip("addr", "add", f"{NEAR}/30", "dev", link.device)
        link.up()
        within = ("-n", link.namespace)
        ip(*within, "addr", "add", f"{FAR}/30", "dev", far)
        ip(*within, "link", "set", far, "up")
        ip(*within, "link", "set", "lo", "up")
        yield link
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("link", "del", link.device)
        ip("netns", "del", link.namespace)


@pytest.fixture
def redis(link: Link, tmp_path: Path) -> Iterator[str]:
    server = Server(tmp_path / "redis", arguments=("--bind", f"127.0.0.1 {NEAR}", "--protected-mode", "no"))
    server.start()
    yield f"redis://{NEAR}:{server.port}"
    server.kill()


class FarService(Service):
    @property
    def main(self) -> str:
        return "tests.far_service:main"


StartPartitioned = Callable[..., contextlib.AbstractContextManager[Mesh]]


@pytest.fixture
def start_partitioned(
    redis: str, link: Link, fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> StartPartitioned:
    """Runs a mesh with the replica `far` behind the link."""

    @contextlib.contextmanager
    def start(model: Path, far: str, **options: Any) -> Iterator[Mesh]:
        monkeypatch.setenv("LINK_NAMESPACE", link.namespace)
        settings = {"handoff": "inline", "insecure": "1", "lease_s": "2"}
        all_options = MeshOptions(model=model, dtype="float32", threads=1, settings=settings, **options)
        mesh = Mesh(all_options, redis, fork_server)
        for place, service in enumerate(mesh.services):
            if service.replica_id == far:
                mesh.services[place] = FarService(**vars(service))
            mesh.services[place].settings["host"] = FAR if service.replica_id == far else NEAR
        try:
            mesh.start()
            yield mesh
        finally:
            mesh.stop()

    return start


async def generate(
    client: Client, times: list[float] | None = None, at: Mapping[int, Callable[[], None]] | None = None
) -> list[Token]:
    tokens = []
    async for token in client.generate(PROMPT, max_tokens=150, ignore_eos=True):
        tokens.append(token)
        if times is not None:
            times.append(time.monotonic())
        if at and token.index in at:
            at[token.index]()
    return tokens


def count(mesh: Mesh, replica_id: str, name: str) -> float:
    replica = next(service.replica for service in mesh.services if service.replica_id == replica_id)
    assert replica is not None
    return scrape(replica.metrics_address)[name]


def longest(times: Sequence[float]) -> float:
    return max(after - before for before, after in itertools.pairwise(times))


def test_streams_go_on_while_an_ffn_replica_is_cut_off_and_use_it_again_afterwards(
    make_model: Callable[[int], Model], link: Link, start_partitioned: StartPartitioned
) -> None:
    model = make_model(4)

    async def run(mesh: Mesh) -> None:
        async with Client(mesh.target) as client:
            asking = generate(client, at={40: link.down}), generate(client)  # a microbatch for each replica
            for tokens in await asyncio.gather(*asking):
                model.check_greedy(PROMPT, [token.id for token in tokens], [token.logprob for token in tokens])
            assert count(mesh, "attention-0", "afd_frames_resent/late/0") >= 1
            await asyncio.sleep(3)  # longer than its lease
            link.up()
            before = count(mesh, "ffn-1", "afd_ffn_frames")
            async with asyncio.timeout(30):
                while count(mesh, "ffn-1", "afd_ffn_frames") == before:
                    await asyncio.gather(generate(client), generate(client))

    with start_partitioned(model.path, "ffn-1", ffn_replicas=2) as mesh:
        asyncio.run(run(mesh))


@pytest.mark.slow
def test_a_sequence_of_an_attention_replica_that_is_cut_off_goes_on_elsewhere_and_nothing_comes_twice(
    make_model: Callable[[int], Model], link: Link, start_partitioned: StartPartitioned
) -> None:
    model = make_model(4)

    async def run(mesh: Mesh) -> None:
        async with Client(mesh.target) as client:
            times: tuple[list[float], list[float]] = ([], [])
            asking = [asyncio.create_task(generate(client, own)) for own in times]  # one at each
            while min(map(len, times)) < 20:
                await asyncio.sleep(0.01)
            link.down()
            await asyncio.sleep(6)
            link.up()
            for tokens in await asyncio.gather(*asking):
                assert [token.index for token in tokens] == list(range(150))
                model.check_greedy(PROMPT, [token.id for token in tokens], [token.logprob for token in tokens])
            assert 1 < max(map(longest, times)) < 10, "one of them was cut off, and noticed by a ping"

    with start_partitioned(model.path, "attention-1", attention=2) as mesh:
        asyncio.run(run(mesh))
