"""The gRPC face of an FFN shard: translates, and does not think."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import torch

from afd import rpc
from afd.errors import InvalidRequest, Mismatch, TransportUnavailable
from afd.handoff.control import HANDSHAKE_TIMEOUT_S
from afd.handoff.fp8 import FP8
from afd.handoff.frame import FrameRules
from afd.handoff.handshake import refuse_mismatch
from afd.handoff.inline import InlineEndpoint
from afd.handoff.nixl import NixlEndpoint
from afd.handoff.shm import ShmEndpoint
from afd.handoff.slots import SlotShape
from afd.handoff.tensors import dtype_from_proto
from afd.v1 import ffn_pb2 as pb
from afd.v1 import ffn_pb2_grpc
from services.ffn.batcher import Batcher, Endpoint

log = logging.getLogger(__name__)

_MOST_SLOTS = 65  # a microbatch each, and one for probes


class FfnServicer(ffn_pb2_grpc.FfnServiceServicer):
    def __init__(self, batcher: Batcher, welcome: pb.Welcome, dtype: torch.dtype) -> None:
        self.batcher = batcher
        self.welcome = welcome
        self.rules = FrameRules(batcher.shard.config, dtype, welcome.max_frame_tokens)
        self.num_streams = 0
        self.num_frames_refused = 0

    async def Connect(
        self, requests: AsyncIterator[pb.ConnectRequest | None], context: rpc.Context
    ) -> AsyncIterator[pb.ConnectResponse]:
        async with rpc.aborting(context):
            hello = await self._shake_hands(requests)
            pair = _Pair(self, hello)
            try:
                endpoint = await pair.make_endpoint()
            except TransportUnavailable as reason:
                yield self._welcome(pb.Welcome(declined=str(reason)))
                return
            yield self._welcome(pb.Welcome(nixl=endpoint.offer if isinstance(endpoint, NixlEndpoint) else None))
            log.info(
                "attention replica %s connected over %s", hello.replica_id, hello.WhichOneof("transport") or "inline"
            )
            async with pair.open(endpoint, requests):
                while (response := await pair.outbox.get()) is not None:
                    yield response

    async def GetTopology(self, request: pb.GetTopologyRequest, context: rpc.Context) -> pb.GetTopologyResponse:
        return pb.GetTopologyResponse(
            replica_id=self.welcome.replica_id,
            topology=self.welcome.topology,
            max_frame_tokens=self.welcome.max_frame_tokens,
        )

    async def GetFfnLoad(self, request: pb.GetFfnLoadRequest, context: rpc.Context) -> pb.GetFfnLoadResponse:
        counters = self.batcher.counters
        return pb.GetFfnLoadResponse(
            num_streams=self.num_streams,
            num_frames_queued=self.batcher.num_queued,
            num_frames=counters.num_frames,
            num_batches=counters.num_batches,
            num_frames_dropped=counters.num_frames_dropped,
            num_frames_refused=self.num_frames_refused,
            compute_seconds=counters.compute_ns / 1e9,
        )

    async def _shake_hands(self, requests: AsyncIterator[pb.ConnectRequest | None]) -> pb.Hello:
        try:
            first = await asyncio.wait_for(anext(aiter(requests)), HANDSHAKE_TIMEOUT_S)
        except (TimeoutError, StopAsyncIteration):
            raise Mismatch("the stream did not begin with a hello in time") from None
        if first is None:
            raise InvalidRequest(rpc.UNDECODABLE)
        if first.WhichOneof("message") != "hello":
            raise Mismatch("the stream must begin with a hello")
        refuse_mismatch(first.hello.topology, self.welcome.topology)
        return first.hello

    def _welcome(self, welcome: pb.Welcome) -> pb.ConnectResponse:
        welcome.MergeFrom(self.welcome)
        return pb.ConnectResponse(welcome=welcome)


class _Pair:
    """One attention replica's frames in, and their answers out."""

    def __init__(self, servicer: FfnServicer, hello: pb.Hello) -> None:
        self.servicer = servicer
        self.hello = hello
        self.outbox: asyncio.Queue[pb.ConnectResponse | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    async def make_endpoint(self) -> Endpoint:
        """Raises TransportUnavailable, or Mismatch for a hello that cannot be."""
        rules, shape = self.servicer.rules, self._slot_shape()
        if self.hello.HasField("shm"):
            return await asyncio.to_thread(ShmEndpoint, self.hello, self.post, rules, shape)
        if self.hello.HasField("nixl"):
            return await asyncio.to_thread(NixlEndpoint, self.hello, self.post, self.hang_up, rules, shape)
        return InlineEndpoint(self.post, rules, shape)

    @contextlib.asynccontextmanager
    async def open(self, endpoint: Endpoint, requests: AsyncIterator[pb.ConnectRequest | None]) -> AsyncIterator[None]:
        """Takes frames while the block runs."""
        self.servicer.batcher.attach(endpoint)
        self.servicer.num_streams += 1
        reader = asyncio.create_task(self._read(endpoint, requests))
        try:
            yield
        finally:
            reader.cancel()
            self.servicer.num_streams -= 1
            self.servicer.batcher.detach(endpoint)
            log.info("attention replica %s left", self.hello.replica_id)

    def post(self, response: pb.ConnectResponse) -> None:
        """Called on any thread."""
        if response.WhichOneof("message") == "frame_error":
            self.servicer.num_frames_refused += 1
        self._put(response)

    def hang_up(self) -> None:
        """Ends the stream; called on any thread."""
        self._put(None)

    def _put(self, response: pb.ConnectResponse | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to answer
            self._loop.call_soon_threadsafe(self.outbox.put_nowait, response)

    async def _read(self, endpoint: Endpoint, requests: AsyncIterator[pb.ConnectRequest | None]) -> None:
        try:
            async for request in requests:
                self._take(endpoint, request)
        finally:
            self.outbox.put_nowait(None)

    def _take(self, endpoint: Endpoint, request: pb.ConnectRequest | None) -> None:
        kind = request and request.WhichOneof("message")
        if request is None:
            endpoint.refuse(0, InvalidRequest(rpc.UNDECODABLE))
        elif kind == "drop_frame":
            endpoint.drop(request.drop_frame.frame_id)
        elif kind == "frame" and isinstance(endpoint, InlineEndpoint):
            try:
                endpoint.put(request.frame)
            except InvalidRequest as error:
                endpoint.refuse(request.frame.frame_id, error)
        else:
            endpoint.refuse(0, InvalidRequest("a frame was expected"))

    def _slot_shape(self) -> SlotShape:
        hello, config = self.hello, self.servicer.rules.config
        try:
            frame_dtype, output_dtype = dtype_from_proto(hello.frame_dtype), dtype_from_proto(hello.output_dtype)
        except InvalidRequest as error:
            raise Mismatch(f"the hello: {error}") from None
        dtype = self.servicer.rules.dtype
        if frame_dtype not in (dtype, FP8) or output_dtype not in (dtype, torch.bfloat16):
            raise Mismatch(f"{frame_dtype} out and {output_dtype} back cannot be had from an FFN in {dtype}")
        if not (1 <= hello.num_slots <= _MOST_SLOTS and hello.max_tokens >= 1):
            raise Mismatch(f"a pair cannot have {hello.num_slots} slots of {hello.max_tokens} tokens")
        if hello.max_tokens > self.servicer.welcome.max_frame_tokens:
            accepted = self.servicer.welcome.max_frame_tokens
            raise Mismatch(
                f"this FFN accepts frames of {accepted} tokens, but the attention replica's AFD_MAX_SEQUENCES and "
                f"AFD_PREFILL_CHUNK_TOKENS allow {hello.max_tokens}: raise AFD_MAX_FRAME_TOKENS or lower these"
            )
        return SlotShape(
            num_slots=hello.num_slots,
            max_tokens=hello.max_tokens,
            hidden_size=config.hidden_size,
            top_k=config.top_k,
            dtype=dtype,
            frame_dtype=frame_dtype,
            output_dtype=output_dtype,
        )
