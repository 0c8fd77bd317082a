"""gRPC as services use it."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from collections.abc import AsyncIterator

import grpc
import pytest

from afd import rpc
from afd.errors import InvalidRequest, PeerUnavailable
from afd.v1 import attention_pb2 as pb
from afd.v1 import attention_pb2_grpc


class Burden:
    """What a method has in its hands."""


class Refusing(attention_pb2_grpc.AttentionServiceServicer):
    def __init__(self) -> None:
        self.burdens: list[weakref.ref[Burden]] = []

    async def Decode(self, request: pb.DecodeRequest, context: rpc.Context) -> AsyncIterator[pb.DecodeResponse]:
        async with rpc.aborting(context):
            burden = Burden()
            self.burdens.append(weakref.ref(burden))
            yield pb.DecodeResponse()
            raise InvalidRequest("no more of it")

    async def GetLoad(self, request: pb.GetLoadRequest, context: rpc.Context) -> pb.GetLoadResponse:
        async with rpc.aborting(context):
            burden = Burden()
            self.burdens.append(weakref.ref(burden))
            raise InvalidRequest("not this")


async def test_call_that_a_peer_cuts_off_is_no_cancellation() -> None:
    class Stopping(attention_pb2_grpc.AttentionServiceServicer):
        async def GetLoad(self, request: pb.GetLoadRequest, context: rpc.Context) -> pb.GetLoadResponse:
            await context.abort(grpc.StatusCode.CANCELLED)
            raise AssertionError

    def add_services(server: grpc.aio.Server) -> None:
        attention_pb2_grpc.add_AttentionServiceServicer_to_server(Stopping(), server)

    async with (
        rpc.serving(add_services, (), "127.0.0.1", 0) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await attention_pb2_grpc.AttentionServiceStub(channel).GetLoad(pb.GetLoadRequest())
        assert isinstance(rpc.to_peer_error(raised.value), PeerUnavailable)


async def test_call_that_was_refused_keeps_nothing() -> None:
    servicer = Refusing()

    def add_services(server: grpc.aio.Server) -> None:
        attention_pb2_grpc.add_AttentionServiceServicer_to_server(servicer, server)

    async with rpc.serving(add_services, (), "127.0.0.1", 0) as port:
        gc.collect()
        gc.disable()  # nothing waits for it
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = attention_pb2_grpc.AttentionServiceStub(channel)
                with pytest.raises(grpc.aio.AioRpcError, match="no more of it"):
                    assert [response async for response in stub.Decode(pb.DecodeRequest())]
                with pytest.raises(grpc.aio.AioRpcError, match="not this"):
                    await stub.GetLoad(pb.GetLoadRequest())
            async with asyncio.timeout(10):
                while any(burden() for burden in servicer.burdens):
                    await asyncio.sleep(0.05)
            assert len(servicer.burdens) == 2
        finally:
            gc.enable()


async def test_what_callers_do_is_not_logged_as_a_fault(caplog: pytest.LogCaptureFixture) -> None:
    async with rpc.serving(lambda server: None, (), "127.0.0.1", 0):
        log = logging.getLogger("grpc._cython.cygrpc")
        log.error("ExecuteBatchError raised in core by servicer method [/afd.v1.AttentionService/Decode]")
        log.error("Invalid encoding on metadata")
        log.error("Unexpected [ValueError] raised by servicer method")
    assert [record.message for record in caplog.records] == ["Unexpected [ValueError] raised by servicer method"]
