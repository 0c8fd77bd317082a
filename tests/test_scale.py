"""A mesh is scaled while it serves: its requests do not notice."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd import Client, Token, control
from afd.errors import ConfigError, PeerUnavailable
from afd.forkserver import ForkServer
from afd.mesh import Mesh, MeshOptions, Seat, Service
from afd.processes import has_listener
from afd.scale import _differences, scale
from afd.scrape import scrape
from afd.state.registry import Registry, Replica
from tests.conftest import Model, StartMesh
from tests.test_cli import AFD, afd, assert_refused, running_up, still_running

PROMPTS = [[5, 6, 7], [7, 6, 5]]
NUM_TOKENS = 150


@pytest.fixture
def model(make_model: Callable[[int], Model]) -> Model:
    return make_model(4)


async def generate(client: Client, prompt: list[int]) -> list[Token]:
    return [token async for token in client.generate(prompt, max_tokens=NUM_TOKENS, ignore_eos=True)]


@contextlib.asynccontextmanager
async def streams(mesh: Mesh, model: Model) -> AsyncIterator[None]:
    """Requests, two at a time, while the block runs; each is held against the oracle at the end."""
    enough = asyncio.Event()

    async def ask() -> list[list[list[Token]]]:
        rounds = []
        async with Client(mesh.gateway.address) as client:
            while not enough.is_set():
                rounds.append(await asyncio.gather(*(generate(client, prompt) for prompt in PROMPTS)))
                await asyncio.sleep(0.4)  # the processes that start want the cores, too
        return rounds

    asking = asyncio.create_task(ask())
    yield
    enough.set()
    for answers in await asking:
        for prompt, tokens in zip(PROMPTS, answers, strict=True):
            assert [token.index for token in tokens] == list(range(NUM_TOKENS))
            model.check_greedy(prompt, [token.id for token in tokens], [token.logprob for token in tokens])


def num_pairs(mesh: Mesh) -> list[int]:
    """Of each attention replica, also for a layout that has not begun."""
    found = [service.replica for service in mesh.services if service.role == "attention" and service.replica]
    samples = [scrape(str(replica.metrics_address)) for replica in found]
    return [sum(name.startswith("afd_handoff_transport") for name in each) for each in samples]


def names(steps: list[str]) -> str:
    """Of what each step was about."""
    return " ".join(text.split()[0] for text in steps)


async def scale_to(mesh: Mesh, attention: int, ffn: int, ffn_replicas: int) -> list[str]:
    """Returns what was said, and with the switch of the layout how many pairs there were."""
    steps: list[str] = []

    def say(text: str) -> None:
        steps.append(f"{text}; pairs: {num_pairs(mesh)}" if text.startswith("the layout") else text)

    before = set(mesh.services)
    wanted = dataclasses.replace(mesh.options, attention=attention, ffn=ffn, ffn_replicas=ffn_replicas)
    await scale(mesh, wanted, say)
    assert mesh.options == wanted
    assert Counter(service.seat for service in mesh.services) == Counter(wanted.seats)
    assert all(service.alive for service in mesh.services)
    assert {service.process.returncode for service in before - set(mesh.services) if service.process} <= {0}
    return steps


@contextlib.contextmanager
def no_layout_is_taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    async def no_answer(self: Registry, num_shards: int) -> None:
        raise PeerUnavailable("Redis does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "set_layout", no_answer)
        patch.setattr("afd.scale._SWITCH_PATIENCE_S", 0.1)
        yield


def test_requests_go_on_while_the_mesh_is_scaled(
    model: Model, start_mesh: StartMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(mesh: Mesh) -> None:
        async with streams(mesh, model):
            await scale_to(mesh, attention=3, ffn=1, ffn_replicas=2)
            await scale_to(mesh, attention=2, ffn=1, ffn_replicas=1)
            with (
                no_layout_is_taken(monkeypatch),
                pytest.raises(PeerUnavailable, match="the old FFN replicas run on beside the new ones: scale again"),
            ):
                await scale_to(mesh, attention=2, ffn=3, ffn_replicas=1)
            assert names(await scale_to(mesh, attention=2, ffn=3, ffn_replicas=1)) == "attention the ffn-0"
            steps = await scale_to(mesh, attention=1, ffn=2, ffn_replicas=1)
            assert names(steps) == "attention ffn-0 ffn-4 the attention-1 ffn-3 ffn-2 ffn-1"
            assert "the layout is 2 FFN shards, in epoch 3; pairs: [5, 5]" in steps

    with start_mesh(model.path, 1, 1, handoff="shm", drain_timeout_s=0.5) as mesh:
        asyncio.run(run(mesh))
        (lost,) = (service for service in mesh.services if service.shard == (1, 2))
        assert lost.process is not None
        lost.process.kill()
        lost.process.wait()
        mesh.watch()
        assert [service.alive for service in mesh.services] == [True] * 4


def test_mesh_is_as_before_when_a_process_does_not_come_up(model: Model, start_mesh: StartMesh, tmp_path: Path) -> None:
    weights = shutil.copytree(model.path, tmp_path / "copy") / "model.safetensors"
    damaged = weights.read_bytes()[:-100]
    steps: list[str] = []

    def damage(text: str) -> None:
        steps.append(text)
        if "is ready" in text:
            weights.unlink()  # what runs has the whole file still open
            weights.write_bytes(damaged)

    async def run(mesh: Mesh) -> None:
        before = mesh.options, [*mesh.services]
        with pytest.raises(ConfigError, match=r"^ffn-2 ended .*; so all is as before: attention 1, ffn 1x1, g"):
            await scale(mesh, dataclasses.replace(mesh.options, ffn=2), damage)
        assert (mesh.options, mesh.services, mesh.passing) == (*before, [])
        async with streams(mesh, model), mesh.registry() as registry:
            assert [replica.replica_id for replica in await registry.replicas("ffn")] == ["ffn-0"]

    with start_mesh(weights.parent, 1, 1, handoff="shm") as mesh:
        asyncio.run(run(mesh))
    assert names(steps) == "attention ffn-1 ffn-2 ffn-1"


@contextlib.contextmanager
def scaling(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """`afd scale` that has begun."""
    command = [*AFD, "scale", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "->" in process.stderr.readline()
        yield process


def test_scale_tells_what_it_does_and_refuses_what_cannot_be(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "ready.json"
    with running_up(model.path, file, "--ffn", 0, "--gateways", 2) as (_, ready):
        target = ("--target", ready["grpc"])
        assert control._socket_path(ready["grpc"].partition(",")[0]).stat().st_mode & 0o777 == 0o600
        assert_refused(afd("scale", *target, "--ffn", 2), "inside its attention replicas (--ffn 0)")
        assert_refused(afd("scale", *target, "--ffn-replicas", 2), "inside its attention replicas (--ffn 0)")
        drained = next(
            entry["pid"] for entry in ready["processes"] if (entry["role"], entry["index"]) == ("gateway", 1)
        )
        os.kill(drained, signal.SIGSTOP)  # the change cannot be over before it goes on
        with scaling(*target, "--attention", 2, "--gateways", 1) as process:
            assert_refused(afd("scale", *target, "--attention", 1), "this mesh is being scaled; ask again when")
            os.kill(drained, signal.SIGCONT)
            out, steps = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, "attention 2, ffn 0x1, gateways 1\n")
        assert names(steps.splitlines()) == "attention-1 gateway-1"
        now = json.loads(file.read_text())
        assert sorted(entry["role"] for entry in now["processes"]) == ["attention", "attention", "gateway"]
        assert now["grpc"] == ready["grpc"].partition(",")[0]


def test_up_that_is_stopped_while_it_scales_leaves_nothing_behind(model: Model, tmp_path: Path) -> None:
    killed = control._socket_path("127.0.0.1:1")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(killed))
    os.utime(killed, times=(0, 0))
    with running_up(model.path, tmp_path / "ready.json", "--ffn", 0) as (up, ready):
        assert not killed.exists()
        before = len(up.children(recursive=True))
        with scaling("--target", ready["grpc"], "--attention", 6) as process:
            while len(children := up.children(recursive=True)) <= before:
                assert process.poll() is None
            up.terminate()
            assert process.wait(60) == 1
            assert process.stderr is not None
            assert "`afd up` has ended before all was done" in process.stderr.read()
        assert up.wait(60) == 0
        assert still_running(children) == []
        assert not control._socket_path(ready["grpc"]).exists()


@pytest.mark.slow
def test_scale_that_was_interrupted_goes_on(model: Model, tmp_path: Path) -> None:
    with running_up(model.path, tmp_path / "ready.json", "--ffn", 0) as (_, ready):
        with scaling("--target", ready["grpc"], "--attention", 2) as process:
            process.kill()
        while (result := afd("scale", "--target", ready["grpc"], "--attention", 2)).returncode:
            assert_refused(result, "this mesh is being scaled")
        assert result.stdout == "attention 2, ffn 0x1, gateways 1\n"
        assert result.stderr == "attention 2, ffn 0x1, gateways 1 -> attention 2, ffn 0x1, gateways 1\n"


@pytest.fixture
def short_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of the socket."""
    monkeypatch.setattr(control, "_socket_path", lambda gateway: tmp_path / "up.sock")
    monkeypatch.setattr(control, "_SIGN_OF_LIFE_S", 0.05)
    monkeypatch.setattr(control, "_PATIENCE_S", 0.5)
    return tmp_path / "up.sock"


async def test_up_that_is_frozen_is_a_sentence(short_patience: Path) -> None:
    async with await asyncio.start_unix_server(lambda reader, writer: None, short_patience):
        with pytest.raises(ConfigError, match=r"has not given a sign of life for 0\.5 s"):
            await control.ask("here", {"attention": 2}, print)


@pytest.mark.usefixtures("short_patience")
async def test_what_takes_long_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def slow_scale(mesh: Mesh, wanted: MeshOptions, say: Callable[[str], None]) -> None:
        await asyncio.sleep(1)
        say(f"attention {wanted.attention}")

    monkeypatch.setattr(control, "scale", slow_scale)
    monkeypatch.setattr(Mesh, "gateway", Replica("gateway", "gateway-0", "here", "", 0))
    heard: list[str] = []
    async with control.listening(Mesh(MeshOptions(Path("model")), "redis://", ForkServer()), heard.append):
        await control.ask("here", {"attention": 2}, heard.append)
    assert heard == ["attention 2"] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "say what shall change"),
        (["--attention", "0"], "--attention"),
        (["--ffn", "0"], "--ffn"),
        (["--ffn-replicas", "0"], "--ffn-replicas"),
        (["--gateways", "-1"], "--gateways"),
        (["--attention", "2", "--target", "127.0.0.1:1"], "no `afd up` of yours serves at 127.0.0.1:1"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_sentence(arguments: list[str], words: str) -> None:
    assert_refused(afd("scale", *arguments), words)


@st.composite
def options(draw: st.DrawFn) -> MeshOptions:
    attention, ffn, ffn_replicas, gateways = (draw(st.integers(1, 4)) for _ in range(4))
    return MeshOptions(Path("model"), attention=attention, ffn=ffn, ffn_replicas=ffn_replicas, gateways=gateways)


@given(options(), options())
def test_every_seat_is_taken_once_and_the_first_gateway_stays(present: MeshOptions, wanted: MeshOptions) -> None:
    services = Mesh(present, "redis://", ForkServer()).services
    kept, surplus, missing = _differences(services, wanted)
    assert Counter([*(service.seat for service in kept), *missing]) == Counter(wanted.seats)
    assert {*kept, *surplus} == {*services}
    assert next(service for service in services if service.role == "gateway") in kept
    roles = [service.role for service in surplus]
    assert roles == sorted(roles, key=["gateway", "attention", "ffn"].index)


def test_new_processes_share_the_cores_by_the_new_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFD_CPUS", "0-7")
    mesh = Mesh(MeshOptions(Path("model")), "redis://", ForkServer())
    assert [service.placement.get("cpus") for service in mesh.services[:2]] == ["0,1,2,3,4,5,6,7"] * 2
    mesh.passing = [mesh.new_service(Seat("attention")), mesh.new_service(Seat("ffn", (0, 1)))]
    everyone: list[Service] = [*mesh.services, *mesh.passing]
    mesh.arrange(everyone, dataclasses.replace(mesh.options, attention=2, ffn_replicas=2))
    halves = {service.replica_id: service.placement["cpus"] for service in everyone if service.role != "gateway"}
    assert halves == {
        f"{role}-{i}": cpus for role in ("attention", "ffn") for i, cpus in enumerate(("0,1,2,3", "4,5,6,7"))
    }


def test_attention_replica_that_is_started_again_is_told_the_shards_there_are() -> None:
    mesh = Mesh(MeshOptions(Path("model")), "redis://", ForkServer())
    mesh.arrange(mesh.services, dataclasses.replace(mesh.options, ffn=3))
    assert [service.settings.get("ffn_shards") for service in mesh.services] == [None, 3, None]


async def test_who_only_looks_whether_afd_up_is_there_leaves_no_traceback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = await asyncio.start_unix_server(control._Control(cast(Any, None), print).answer, tmp_path / "up.sock")
    async with server:
        assert await asyncio.to_thread(has_listener, tmp_path / "up.sock")
        await asyncio.sleep(0.1)
    assert caplog.records == []
