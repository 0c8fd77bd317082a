"""The running mesh, in real processes, yields the oracle's tokens: every topology, alone and crowded."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable

import pytest

from afd import Client
from afd.bench import counters
from tests.conftest import Model, StartMesh, needs_nixl, on_gpu, wait_for_zero

TOPOLOGIES = [(1, 0), (1, 1), (2, 1), (1, 2), (2, 3)]

# How frames cross, attention replicas, FFN shards, microbatches.
CROSSINGS = list(itertools.product(("nixl", "shm", "inline"), ((1, 1), (2, 1), (1, 3), (3, 2)), (1, 2, 3, 4)))
SOME_CROSSINGS = [  # every value of each, beside those of the tests above, where shm is what is negotiated
    ("nixl", (2, 1), 3),
    ("nixl", (3, 2), 4),
    ("shm", (1, 3), 4),
    ("inline", (2, 1), 1),
]


async def ask(client: Client, model: Model, length: int, max_tokens: int, seed: int) -> None:
    """One greedy request, held against the oracle."""
    prompt = model.prompt(length, seed)
    tokens = [token async for token in client.generate(prompt, max_tokens=max_tokens, ignore_eos=True)]
    assert [token.index for token in tokens] == list(range(max_tokens))
    assert [token.finish_reason for token in tokens] == [None] * (max_tokens - 1) + ["length"]
    model.check_greedy(prompt, [token.id for token in tokens], [token.logprob for token in tokens])


async def ask_many(address: str, model: Model, number: int) -> None:
    chooser = random.Random(number)
    async with Client(address) as client:
        await asyncio.gather(
            *(ask(client, model, chooser.randint(1, 120), chooser.randint(1, 20), seed) for seed in range(number))
        )


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("attention", "ffn"), TOPOLOGIES)
def test_tokens_equal_the_oracle_on_every_topology(
    make_model: Callable[[int], Model], start_mesh: StartMesh, attention: int, ffn: int, seed: int
) -> None:
    model = make_model(10 * seed + ffn)
    with start_mesh(model.path, attention, ffn, prefill_chunk_tokens=48, microbatches=seed + 1) as mesh:
        asyncio.run(ask_many(mesh.gateway.address, model, 1))
        asyncio.run(ask_many(mesh.gateway.address, model, 32))


def test_tokens_equal_the_oracle_while_auto_tries_numbers_of_microbatches(
    make_model: Callable[[int], Model], start_mesh: StartMesh
) -> None:
    model = make_model(5)
    with start_mesh(model.path, 1, 2, microbatches="auto") as mesh:
        asyncio.run(ask_many(mesh.gateway.address, model, 32))
        counted = counters(mesh)
    assert counted["afd_steps"] < counted["afd_microbatches"] < 4 * counted["afd_steps"]


def marked(crossing: tuple[str, tuple[int, int], int]) -> object:
    marks = [needs_nixl] if crossing[0] == "nixl" else []
    return pytest.param(*crossing, marks=marks if crossing in SOME_CROSSINGS else [*marks, pytest.mark.slow])


@pytest.mark.parametrize(("handoff", "topology", "microbatches"), [marked(crossing) for crossing in CROSSINGS])
def test_tokens_equal_the_oracle_over_every_transport(
    make_model: Callable[[int], Model],
    start_mesh: StartMesh,
    handoff: str,
    topology: tuple[int, int],
    microbatches: int,
) -> None:
    model = make_model(10 + topology[1])
    settings = {"handoff": handoff, "microbatches": microbatches, "prefill_chunk_tokens": 48}
    with start_mesh(model.path, *topology, **settings) as mesh:
        asyncio.run(ask_many(mesh.gateway.address, model, 16))


@pytest.mark.parametrize(
    ("handoff", "topology"),
    [
        *(pytest.param("shm", topology, marks=on_gpu) for topology in TOPOLOGIES),
        pytest.param("nixl", (2, 3), marks=[*on_gpu, needs_nixl]),
        pytest.param("inline", (2, 3), marks=on_gpu),
    ],
)
def test_tokens_equal_the_oracle_on_a_gpu(
    make_model: Callable[[int], Model], start_mesh: StartMesh, handoff: str, topology: tuple[int, int]
) -> None:
    model = make_model(10 + topology[1])
    settings = {"handoff": handoff, "prefill_chunk_tokens": 48}
    with start_mesh(model.path, *topology, device="cuda", **settings) as mesh:
        asyncio.run(ask_many(mesh.gateway.address, model, 32))


def test_preempted_sequences_yield_the_same_tokens(make_model: Callable[[int], Model], start_mesh: StartMesh) -> None:
    model = make_model(5)
    settings = {"num_kv_blocks": 40, "block_size": 4, "prefill_chunk_tokens": 32, "max_sequences": 16}
    with start_mesh(model.path, 1, 2, **settings) as mesh:
        asyncio.run(ask_many(mesh.gateway.address, model, 32))
        assert counters(mesh)["afd_preemptions"] > 0
        assert counters(mesh)["afd_kv_blocks_used"] == 0


def test_every_attention_replica_takes_its_share(make_model: Callable[[int], Model], start_mesh: StartMesh) -> None:
    model = make_model(5)
    with start_mesh(model.path, 2, 1) as mesh:
        asyncio.run(ask_many(mesh.gateway.address, model, 16))
        shares = [counters(mesh, f"attention-{index}")["afd_generated_tokens"] for index in (0, 1)]
    assert min(shares) > 0.2 * sum(shares)


def test_clients_that_leave_free_everything(make_model: Callable[[int], Model], start_mesh: StartMesh) -> None:
    model = make_model(6)

    async def leave_at_random(client: Client, seed: int) -> None:
        after = random.Random(seed).randint(0, 30)
        async for token in client.generate(model.prompt(1 + seed, seed), max_tokens=400, ignore_eos=True):
            if token.index == after:
                return

    async def run(address: str) -> None:
        async with Client(address) as client:
            await asyncio.gather(*(leave_at_random(client, seed) for seed in range(64)))

    with start_mesh(model.path, 1, 2) as mesh:
        asyncio.run(run(mesh.gateway.address))
        names = ("afd_sequences_running", "afd_sequences_waiting", "afd_kv_blocks_used", "afd_ffn_queue_frames")
        assert wait_for_zero(mesh, names) == dict.fromkeys(names, 0)
        generated = counters(mesh)["afd_generated_tokens"]
        assert generated < 64 * 200, "sequences went on after their clients had left"
        asyncio.run(ask_many(mesh.gateway.address, model, 4))
