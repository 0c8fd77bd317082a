"""A stream that a client leaves: its calls end before those who read them are cancelled."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from grpc.aio import Metadata

from afd.model.sampling_params import SamplingParams
from afd.rpc import ACCEPTED
from afd.urgency import NOT_URGENT
from afd.v1 import attention_pb2
from services.gateway.calls import OpenCalls
from services.gateway.generation import Generator, Request
from services.gateway.merge import merged


class EndlessCall:
    """It says something once, and then nothing until it is cancelled; notes how its last read ended."""

    def __init__(self, hears: bool = True) -> None:
        self.hears = hears
        self.end = ""
        self._cancelled = asyncio.Event()
        self._answers = iter([attention_pb2.DecodeResponse(tokens=[attention_pb2.DecodedToken(id=5)])])

    async def initial_metadata(self) -> Metadata:
        return Metadata((ACCEPTED, "1"))

    async def read(self) -> attention_pb2.DecodeResponse:
        if answer := next(self._answers, None):
            return answer
        try:
            await self._cancelled.wait()
        except asyncio.CancelledError:
            self.end = "the read was cancelled"
            raise
        self.end = "the call was cancelled"
        raise asyncio.CancelledError  # as gRPC's

    def cancel(self) -> None:
        if self.hears:
            self._cancelled.set()


@pytest.mark.parametrize(("hears", "end"), [(True, "the call was cancelled"), (False, "the read was cancelled")])
async def test_a_call_ends_before_its_read_is_cancelled_unless_it_does_not_hear(hears: bool, end: str) -> None:
    calls, call = OpenCalls(), EndlessCall(hears)

    async def read() -> AsyncGenerator[object, None]:
        with calls.cancelled_after(call):  # type: ignore[arg-type]
            while True:
                yield await call.read()

    async with contextlib.aclosing(merged([read()], hang_up=calls.hang_up)) as items:
        await anext(items)
        await asyncio.sleep(0.01)
    assert call.end == end


class Replica:
    """An attention replica, as a gateway sees it, whose calls do not end; and the balancer, which has no other one."""

    def __init__(self) -> None:
        self.calls: list[EndlessCall] = []
        self.stub, self.replica, self.replica_id, self.fingerprint = self, self, "attention-0", ""

    def Decode(self, request: Any, **options: Any) -> EndlessCall:
        self.calls.append(EndlessCall())
        return self.calls[-1]

    def choose(self, lost: set[Any]) -> Replica:
        return self

    @contextlib.asynccontextmanager
    async def counted(self, entry: Replica) -> AsyncIterator[None]:
        yield


@pytest.mark.parametrize("how", ["left", "cancelled"])
async def test_a_gateway_ends_all_calls_of_a_request_that_is_left(how: str) -> None:
    async def written(*arguments: Any) -> int:
        return 1

    replica: Any = Replica()
    tokenizer: Any = SimpleNamespace(stream=lambda: SimpleNamespace(push=lambda token: "x", rest=lambda: ""))
    store: Any = SimpleNamespace(create=written, finish=written)
    config: Any = None
    generator = Generator(config, tokenizer, replica, store, timeout_s=10, failover_timeout_s=10, max_requests=10)
    request = Request("r1", [1, 2], SamplingParams(n=2, max_tokens=9, seed=1), NOT_URGENT)

    async def follow() -> None:
        seen = set()
        async with generator.opened(request) as arriving:
            async for tokens in arriving:
                seen |= {token.choice for token in tokens}
                if how == "left" and seen == {0, 1}:
                    await asyncio.sleep(0.01)  # both are at their next read
                    return

    following = asyncio.create_task(follow())
    await asyncio.sleep(0.1)
    following.cancel()
    await asyncio.wait([following], timeout=5)
    assert [call.end for call in replica.calls] == ["the call was cancelled"] * 2
    assert generator.num_running == 0
