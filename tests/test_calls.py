"""A stream that a client leaves: its calls end before those who read them are cancelled."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc.aio import Metadata

from afd.model.sampling_params import SamplingParams
from afd.rpc import ACCEPTED, read
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
        self.is_awaited = asyncio.Event()
        self._cancelled = asyncio.Event()
        self._answers = iter([attention_pb2.DecodeResponse(tokens=[attention_pb2.DecodedToken(id=5)])])

    async def initial_metadata(self) -> Metadata:
        return Metadata((ACCEPTED, "1"))

    async def read(self) -> attention_pb2.DecodeResponse:
        if answer := next(self._answers, None):
            return answer
        self.is_awaited.set()
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

    async def reads() -> AsyncGenerator[object, None]:
        with calls.cancelled_after(call):  # type: ignore[arg-type]
            while True:
                yield await call.read()

    async with contextlib.aclosing(merged([reads()], hang_up=calls.hang_up)) as items:
        await anext(items)
        await call.is_awaited.wait()
    assert call.end == end


async def test_a_read_of_grpc_ends_as_cancelled_when_its_call_is_hung_up() -> None:
    """At whatever point, and as nothing that looks like a lost replica."""

    async def answer(request: bytes, context: Any) -> AsyncGenerator[bytes, None]:
        await context.send_initial_metadata(((ACCEPTED, "1"),))
        yield b"once"
        await asyncio.sleep(60)

    server = grpc.aio.server()
    handlers = {"Decode": grpc.unary_stream_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("stub", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        for number in range(50):
            calls, call = OpenCalls(), channel.unary_stream("/stub/Decode")(b"", timeout=30)
            reading = asyncio.create_task(read_on(calls, call))
            await asyncio.sleep(number / 10_000)
            await calls.hang_up()
            await asyncio.wait([reading], timeout=5)
            assert reading.cancelled()
    await server.stop(None)


async def read_on(calls: OpenCalls, call: Any) -> None:
    with calls.cancelled_after(call):
        await call.initial_metadata()
        while await read(call):
            pass


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
                    await until_both_are_awaited()
                    return

    async def until_both_are_awaited() -> None:
        async with asyncio.timeout(5):
            while len(replica.calls) < 2:
                await asyncio.sleep(0.01)
            for call in replica.calls:
                await call.is_awaited.wait()

    following = asyncio.create_task(follow())
    await until_both_are_awaited()
    if how == "cancelled":
        following.cancel()
    await asyncio.wait([following], timeout=5)
    assert [call.end for call in replica.calls] == ["the call was cancelled"] * 2
    assert generator.num_running == 0
