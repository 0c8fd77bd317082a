"""One side of a pair dies or freezes with a frame under way: the other one lives, says so, and keeps nothing."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from afd.errors import PeerUnavailable
from afd.handoff import nixl_link
from afd.handoff.negotiate import TransportName
from afd.handoff.shm import DIRECTORY
from afd.model.checkpoint import Checkpoint
from tests.conftest import Model, needs_nixl
from tests.test_handoff import Pair, Shard, running_shard, until_no_pair_is_left

START_S = 30.0

# The transport, and what nixl sends beside its notes: small frames, as they are here, or nothing.
each_way = pytest.mark.parametrize(
    ("kind", "bytes_beside_a_note"),
    [
        pytest.param("nixl", 32 << 10, marks=needs_nixl, id="nixl"),
        pytest.param("nixl", 0, marks=needs_nixl, id="nixl-writes"),
        pytest.param("shm", 0, id="shm"),
        pytest.param("inline", 0, id="inline"),
    ],
)


@pytest.fixture
def model(make_model: Callable[[int], Model]) -> Model:
    return make_model(4)


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Files of ours or of UCX."""
    before = set(DIRECTORY.iterdir())
    yield
    deadline = time.monotonic() + 5
    while (left := set(DIRECTORY.iterdir()) - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


@pytest.fixture(autouse=True)
def use_notes(monkeypatch: pytest.MonkeyPatch, bytes_beside_a_note: int) -> None:
    monkeypatch.setattr(nixl_link, "MOST_BYTES_BESIDE_A_NOTE", bytes_beside_a_note)


def serve(path: Path, bytes_beside_a_note: int, pipe: Connection) -> None:
    """An FFN shard, until the process is killed."""
    nixl_link.MOST_BYTES_BESIDE_A_NOTE = bytes_beside_a_note

    async def run() -> None:
        async with running_shard(Model(path, None)) as shard:
            pipe.send(shard.address)
            await asyncio.sleep(3600)

    torch.set_num_threads(1)
    asyncio.run(run())


def attend(path: Path, address: str, kind: TransportName, bytes_beside_a_note: int, pipe: Connection) -> None:
    """An attention replica that sends frame after frame and takes no answer, until the process is killed."""
    nixl_link.MOST_BYTES_BESIDE_A_NOTE = bytes_beside_a_note

    async def run() -> None:
        shard = Shard(None, address, Checkpoint(path), 0, 1)
        pair = await shard.connect(kind)
        for frame_id in range(1, 1_000_000):
            await pair.send(shard.frame(frame_id))
            if frame_id == 100:
                pipe.send("busy")

    asyncio.run(run())


@contextlib.contextmanager
def process(target: Callable[..., None], *args: Any) -> Iterator[tuple[BaseProcess, Any]]:
    """A process of its own, and the first thing that it says."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    child = spawn.Process(target=target, args=(*args, theirs), daemon=True)
    child.start()
    try:
        assert ours.poll(START_S), "it does not start"
        yield child, ours.recv()
    finally:
        child.kill()
        child.join(START_S)


def send_signal(child: BaseProcess, number: signal.Signals) -> None:
    assert child.pid is not None
    os.kill(child.pid, number)


def seen_from_here(model: Model, address: str) -> Shard:
    return Shard(None, address, Checkpoint(model.path), 0, 1)


async def check_answers(shard: Shard, pair: Pair, expecting: Shard) -> None:
    frame = shard.frame(12345)
    await pair.send(frame)
    torch.testing.assert_close((await pair.receive(frame)).ffn_output, expecting.expected(frame))


@each_way
async def test_kill_9_of_the_ffn_is_a_sentence_while_its_answer_is_awaited(
    model: Model, kind: TransportName, bytes_beside_a_note: int
) -> None:
    with process(serve, model.path, bytes_beside_a_note) as (ffn, address):
        shard = seen_from_here(model, address)
        pair, frame = await shard.connect(kind), shard.frame()
        send_signal(ffn, signal.SIGSTOP)
        await pair.send(frame)
        send_signal(ffn, signal.SIGKILL)
        with pytest.raises(PeerUnavailable, match="the FFN at"):
            await pair.receive(frame)
        pair.close()


@each_way
async def test_ffn_that_was_given_up_while_frozen_harms_nobody_when_it_wakes(
    model: Model, kind: TransportName, bytes_beside_a_note: int
) -> None:
    async with running_shard(model) as oracle:
        with process(serve, model.path, bytes_beside_a_note) as (ffn, address):
            shard = seen_from_here(model, address)
            pair, frame = await shard.connect(kind), shard.frame()
            send_signal(ffn, signal.SIGSTOP)
            await pair.send(frame)
            with pytest.raises(PeerUnavailable, match="in time"):
                await pair.receive(frame, 0.3)
            pair.close()
            del pair
            send_signal(ffn, signal.SIGCONT)
            pair = await shard.connect(kind)
            await check_answers(shard, pair, oracle)
            pair.close()


@each_way
async def test_kill_9_of_attention_with_frames_under_way_leaves_the_ffn_to_the_others(
    model: Model, kind: TransportName, bytes_beside_a_note: int
) -> None:
    async with running_shard(model) as shard:
        other = await shard.connect(kind)
        with contextlib.ExitStack() as stack:
            attention, _ = await asyncio.to_thread(
                stack.enter_context, process(attend, model.path, shard.address, kind, bytes_beside_a_note)
            )
            send_signal(attention, signal.SIGKILL)
            await check_answers(shard, other, shard)
        other.close()
        await until_no_pair_is_left(shard)
        again = await shard.connect(kind)
        await check_answers(shard, again, shard)
        again.close()
