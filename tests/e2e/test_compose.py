"""The mesh in containers: it answers right, over the transport that it is to use, and loses nothing with one."""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import Callable
from typing import TypeVar

import pytest
from docker.errors import APIError
from docker.models.containers import Container
from openai import OpenAI

from afd import Client, SyncClient, Token
from tests.conftest import Model
from tests.e2e.stack import PROJECT, Stack

pytestmark = pytest.mark.e2e

Answer = TypeVar("Answer")
QUESTION = [{"role": "user", "content": "What is 12 + 68?"}]
NUM_STREAMS = 4
NUM_TOKENS = 300


def transports(stack: Stack) -> set[str]:
    """That pairs of attention replicas and FFN shards use now."""
    pattern = r'afd_handoff_transport\{replica="[^"]+",shard="(\d)",transport="(\w+)"\} 1'
    found = [re.findall(pattern, stack.metrics(container)) for container in stack.containers("attention")]
    assert [sorted(shard for shard, _ in pairs) for pairs in found] == [["0", "1"], ["0", "1"]]
    return {transport for pairs in found for _, transport in pairs}


def test_the_sdk_and_an_openai_client_are_answered(stack: Stack) -> None:
    with SyncClient(stack.target) as client:
        assert "".join(token.text for token in client.chat(QUESTION)) == "80"
    openai = OpenAI(base_url=f"http://localhost:{stack.http_ports[0]}/v1", api_key="none")
    chunks = openai.chat.completions.create(model="step3-nano", messages=QUESTION, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "80"


def test_tensors_cross_through_shared_memory(stack: Stack) -> None:
    assert transports(stack) == {"shm"}


def test_nothing_in_a_container_can_be_written_or_is_roots(stack: Stack) -> None:
    for service in ("gateway", "attention", "ffn-0", "ffn-1"):
        for container in stack.containers(service):
            host = container.attrs["HostConfig"]
            assert (host["ReadonlyRootfs"], host["CapDrop"], host["Privileged"]) == (True, ["ALL"], False)
            _, user = container.exec_run("id -u")
            assert user.decode().strip() == "10001"


def test_the_gateways_image_has_no_torch_and_the_command_line(stack: Stack) -> None:
    (gateway,) = stack.containers("gateway")
    assert gateway.exec_run(["python", "-c", "import torch"])[0] != 0
    assert gateway.exec_run(["afd", "generate", "--max-tokens", "3", "The"])[0] == 0


async def streams(stack: Stack, nano: Model, at_a_third: Callable[[], object]) -> list[list[Token]]:
    """Some streams at once; something happens when the first of them has a third of its tokens."""
    happens = asyncio.Event()

    async def one(client: Client, seed: int) -> list[Token]:
        tokens = []
        async for token in client.generate(nano.prompt(9, seed), max_tokens=NUM_TOKENS, ignore_eos=True):
            tokens.append(token)
            if len(tokens) == NUM_TOKENS // 3:
                happens.set()
        return tokens

    async def fault() -> None:
        await happens.wait()
        await asyncio.to_thread(at_a_third)

    async with Client(stack.target) as client, asyncio.timeout(120), asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(client, seed)) for seed in range(NUM_STREAMS)]
        group.create_task(fault())
    return [task.result() for task in tasks]


def check(nano: Model, answers: list[list[Token]]) -> None:
    """They are the oracle's, whole and in order."""
    for seed, tokens in enumerate(answers):
        assert [token.index for token in tokens] == list(range(NUM_TOKENS))
        nano.check_greedy(nano.prompt(9, seed), [t.id for t in tokens], [t.logprob for t in tokens])


def eventually(ask: Callable[[], Answer], timeout_s: float = 60.0) -> Answer:
    """Its answer, once it can be asked."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return ask()
        except (AssertionError, APIError):  # its container starts, or looks for its peers
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def killed(container: Container, stack: Stack) -> None:
    container.kill()
    time.sleep(1)
    container.start()


def paused(container: Container, stack: Stack) -> None:
    container.pause()
    time.sleep(3)
    container.unpause()


def cut_off(container: Container, stack: Stack) -> None:
    network = stack.engine.networks.get(f"{PROJECT}_mesh")
    aliases = container.attrs["NetworkSettings"]["Networks"][network.name]["Aliases"]
    network.disconnect(container)
    time.sleep(3)
    network.connect(container, aliases=aliases)


SERVICES = ("gateway", "attention", "ffn-0", "redis")
FAULTS = [*itertools.product((killed, paused, cut_off), SERVICES)]


@pytest.mark.parametrize(("fault", "service"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_no_token_is_lost_or_wrong_when_a_container_is(
    stack: Stack, nano: Model, fault: Callable[[Container, Stack], None], service: str
) -> None:
    container = stack.containers(service)[0]
    check(nano, asyncio.run(streams(stack, nano, lambda: fault(container, stack))))
    assert eventually(lambda: transports(stack)) == {"shm"}, "also afterwards"
