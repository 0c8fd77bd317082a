"""What is lost for a while does not cost tokens: the step is run again."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from afd import Client, Token
from afd.errors import DeadlineExceeded, PeerUnavailable
from afd.handoff.shm import DIRECTORY
from afd.mesh import Mesh, Service
from tests.conftest import Model, StartMesh, needs_nixl

PROMPT = [5, 6, 7]


async def generate(
    mesh: Mesh, num_tokens: int, at_token: dict[int, Callable[[], Any]], prompt: list[int] | None = None
) -> list[Token]:
    """The tokens of a request, with things that happen while it runs."""
    tokens = []
    async with Client(mesh.gateway.address) as client:
        async for token in client.generate(prompt or PROMPT, max_tokens=num_tokens, ignore_eos=True):
            tokens.append(token)
            if token.index in at_token:
                at_token[token.index]()
    return tokens


def service(mesh: Mesh, name: str) -> Service:
    return next(service for service in mesh.services if service.replica_id == name)


def kill(mesh: Mesh, name: str, number: signal.Signals = signal.SIGKILL) -> None:
    process = service(mesh, name).process
    assert process is not None
    process.send_signal(number)
    with contextlib.suppress(Exception):
        process.wait(10)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_request_survives_a_lost_ffn_shard_that_comes_back(
    make_model: Callable[[int], Model], start_mesh: StartMesh, number: signal.Signals
) -> None:
    model = make_model(4)
    with start_mesh(model.path, 1, 2, lease_s=1) as mesh:

        def lose_a_shard() -> None:
            kill(mesh, "ffn-1", number)
            mesh.watch()

        tokens = asyncio.run(generate(mesh, 60, {20: lose_a_shard}))
    model.check_greedy(PROMPT, [token.id for token in tokens], [token.logprob for token in tokens])


LOSSES = list(itertools.product((signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM), ("nixl", "shm", "inline")))
SOME_LOSSES = [(signal.SIGKILL, "nixl"), (signal.SIGSTOP, "shm"), (signal.SIGTERM, "inline")]


def marked(loss: tuple[signal.Signals, str]) -> object:
    marks = [needs_nixl] if loss[1] == "nixl" else []
    return pytest.param(*loss, marks=marks if loss in SOME_LOSSES else [*marks, pytest.mark.slow])


@pytest.mark.parametrize(("number", "handoff"), [marked(loss) for loss in LOSSES])
def test_lost_ffn_replica_costs_its_frames_a_moment_while_another_one_of_the_shard_lives(
    make_model: Callable[[int], Model], start_mesh: StartMesh, number: signal.Signals, handoff: str
) -> None:
    model = make_model(4)
    with start_mesh(model.path, 1, 2, ffn_replicas=2, handoff=handoff) as mesh:
        process = service(mesh, "ffn-0").process
        assert process is not None
        times: list[float] = []

        def lose() -> None:
            process.send_signal(number)
            times.append(time.monotonic())

        tokens = asyncio.run(
            generate(mesh, 120, {40: lose, **dict.fromkeys(range(41, 120), lambda: times.append(time.monotonic()))})
        )
        process.kill()
    model.check_greedy(PROMPT, [token.id for token in tokens], [token.logprob for token in tokens])
    assert max(after - before for before, after in itertools.pairwise(times)) < 2


@pytest.mark.parametrize(
    "handoff", [pytest.param("nixl", marks=needs_nixl), pytest.param("shm", marks=pytest.mark.slow)]
)
def test_kill_9_of_either_side_leaves_nothing_in_shared_memory(
    make_model: Callable[[int], Model], start_mesh: StartMesh, handoff: str
) -> None:
    model, before = make_model(4), set(DIRECTORY.iterdir())
    with start_mesh(model.path, 1, 1, lease_s=1, handoff=handoff) as mesh:

        def lose_the_ffn() -> None:
            kill(mesh, "ffn-0")
            mesh.watch()

        tokens = asyncio.run(generate(mesh, 40, {10: lose_the_ffn}))
        model.check_greedy(PROMPT, [token.id for token in tokens], [token.logprob for token in tokens])
        kill(mesh, "attention-0")
        mesh.watch()
        deadline = time.monotonic() + 20
        while True:
            try:
                assert len(asyncio.run(generate(mesh, 5, {}))) == 5
                break
            except PeerUnavailable:
                assert time.monotonic() < deadline
        assert set(DIRECTORY.iterdir()) <= before


def test_mesh_goes_on_after_its_embedded_redis_was_killed(
    make_model: Callable[[int], Model], start_mesh: StartMesh
) -> None:
    with start_mesh(make_model(4).path, 1, 1, lease_s=1) as mesh:
        assert mesh.embedded is not None
        mesh.embedded.process.kill()
        mesh.embedded.process.wait()
        mesh.watch()
        deadline = time.monotonic() + 20
        while True:
            try:
                assert len(asyncio.run(generate(mesh, 5, {}))) == 5
                break
            except PeerUnavailable:
                assert time.monotonic() < deadline


def test_ffn_shard_that_stays_away_ends_requests_with_a_sentence(
    make_model: Callable[[int], Model], start_mesh: StartMesh
) -> None:
    with start_mesh(make_model(4).path, 1, 2, lease_s=1, ffn_recovery_s=1, failover_timeout_s=2) as mesh:
        with pytest.raises(DeadlineExceeded, match=r"nobody could go on .* FFN shard 1/2 has no replica"):
            asyncio.run(generate(mesh, 500, {20: lambda: kill(mesh, "ffn-1")}))
        mesh.watch()
        model = make_model(4)
        deadline = time.monotonic() + 20
        while True:
            try:
                tokens = asyncio.run(generate(mesh, 5, {}))
                break
            except PeerUnavailable:
                assert time.monotonic() < deadline
        model.check_greedy(PROMPT, [token.id for token in tokens], [token.logprob for token in tokens])


def test_without_an_ffn_shard_what_runs_waits_and_what_begins_is_told_when_to_come_again(
    make_model: Callable[[int], Model], start_mesh: StartMesh
) -> None:
    model = make_model(4)

    async def refusal(mesh: Mesh) -> PeerUnavailable:
        async with asyncio.timeout(20):
            while True:
                await asyncio.sleep(0.1)
                with contextlib.suppress(urllib.error.HTTPError):
                    urllib.request.urlopen(f"{mesh.http_url}/health", timeout=5)
                    continue
                with pytest.raises(PeerUnavailable) as raised:
                    await generate(mesh, 5, {})
                return raised.value

    async def run(mesh: Mesh) -> list[Token]:
        running = asyncio.create_task(generate(mesh, 100, {20: lambda: kill(mesh, "ffn-1")}))
        error = await refusal(mesh)
        assert str(error) == "an FFN shard has no replica"
        assert error.retry_after_s == 2
        assert not running.done()
        await asyncio.to_thread(mesh.watch)
        return await running

    with start_mesh(model.path, 1, 2, lease_s=1) as mesh:
        tokens = asyncio.run(run(mesh))
    model.check_greedy(PROMPT, [token.id for token in tokens], [token.logprob for token in tokens])


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGSTOP]
)
def test_lost_attention_replica_is_followed_by_another_one_with_the_same_tokens(
    make_model: Callable[[int], Model], start_mesh: StartMesh, number: signal.Signals
) -> None:
    model = make_model(4)
    prompts = [PROMPT, PROMPT[::-1], [7], [9, 9]]

    async def run(mesh: Mesh) -> list[list[Token]]:
        process = service(mesh, "attention-0").process
        assert process is not None
        lose = {20: lambda: process.send_signal(number)}
        return await asyncio.gather(*(generate(mesh, 150, lose if not i else {}, prompts[i]) for i in range(4)))

    with start_mesh(model.path, 2, 1, lease_s=1, drain_timeout_s=0.1) as mesh:
        for prompt, tokens in zip(prompts, asyncio.run(run(mesh)), strict=True):
            assert [token.index for token in tokens] == list(range(150))
            model.check_greedy(prompt, [token.id for token in tokens], [token.logprob for token in tokens])
        kill(mesh, "attention-0")


def test_request_waits_for_its_only_attention_replica_to_come_back(
    make_model: Callable[[int], Model], start_mesh: StartMesh
) -> None:
    model = make_model(4)
    with start_mesh(model.path, 1, 1, lease_s=1) as mesh:

        def lose() -> None:
            kill(mesh, "attention-0")
            mesh.watch()

        tokens = asyncio.run(generate(mesh, 100, {20: lose}))
    model.check_greedy(PROMPT, [token.id for token in tokens], [token.logprob for token in tokens])
