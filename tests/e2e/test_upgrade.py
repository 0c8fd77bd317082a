"""Every container is replaced by one of a newer image, one by one, while requests go on: none is lost."""

from __future__ import annotations

import asyncio
import itertools

import openai
import pytest

from afd import Client
from tests.conftest import Model
from tests.e2e.stack import Stack

pytestmark = pytest.mark.e2e

NUM_STREAMS = 3
NUM_TOKENS = 200
QUESTION = "What is 12 + 68?"
SERVICES = ("gateway", "gateway-2", "attention", "ffn-0", "ffn-1")


def images_in_use(stack: Stack) -> dict[str, set[str]]:
    return {service: {container.image.id for container in stack.containers(service)} for service in SERVICES}


async def keep_streaming(client: Client, nano: Model, seed: int, over: asyncio.Event) -> int:
    """Stream after stream, each held against the oracle; how many there were."""
    for number in itertools.count(1):
        prompt = nano.prompt(9, seed + NUM_STREAMS * number)
        tokens = [t async for t in client.generate(prompt, max_tokens=NUM_TOKENS, ignore_eos=True)]
        assert [token.index for token in tokens] == list(range(NUM_TOKENS))
        nano.check_greedy(prompt, [token.id for token in tokens], [token.logprob for token in tokens])
        if over.is_set():
            return number
    raise AssertionError


async def keep_asking(stack: Stack, over: asyncio.Event) -> int:
    """Question after question over HTTP, at the gateway that answers, as behind a load balancer."""
    urls = itertools.cycle(f"http://localhost:{port}/v1" for port in stack.http_ports)
    url, num_answers = next(urls), 0
    while not over.is_set():
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
            try:
                answer = await client.completions.create(model="step3-nano", prompt=QUESTION, max_tokens=8)
            except (openai.APIConnectionError, openai.InternalServerError):
                url = next(urls)
                await asyncio.sleep(0.2)
                continue
        assert answer.usage is not None
        num_answers += 1
    return num_answers


async def upgraded_under_load(stack: Stack, nano: Model) -> list[int]:
    over = asyncio.Event()
    async with Client(stack.target) as client, asyncio.timeout(500), asyncio.TaskGroup() as group:
        load = [group.create_task(keep_streaming(client, nano, seed, over)) for seed in range(NUM_STREAMS)]
        load.append(group.create_task(keep_asking(stack, over)))
        await asyncio.to_thread(stack.upgrade)
        over.set()
    return [task.result() for task in load]


def test_an_upgrade_of_all_containers_loses_no_request(images: dict[str, str], nano: Model) -> None:
    with Stack(variables=images).running() as stack:
        before = images_in_use(stack)
        stack.variables = {**images, "IMAGE_TAG": "e2e-next", "REVISION": "next"}
        stack.build()
        counts = asyncio.run(upgraded_under_load(stack, nano))
        after = images_in_use(stack)
    assert all(count >= 2 for count in counts), counts
    for service in SERVICES:
        assert len(after[service]) == 1
        assert after[service].isdisjoint(before[service]), service
