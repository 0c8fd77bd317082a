"""The gRPC face of an FFN shard: translates, and does not think."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import torch

from afd import rpc
from afd.errors import AfdError, InvalidRequest, Mismatch
from afd.handoff.frame import Frame, FrameOutput
from afd.handoff.handshake import refuse_mismatch
from afd.handoff.inline import HANDSHAKE_TIMEOUT_S, frame_from_proto, output_to_proto
from afd.telemetry import record_ffn_spans
from afd.v1 import ffn_pb2 as pb
from afd.v1 import ffn_pb2_grpc
from services.ffn.batcher import Batcher, QueuedFrame

log = logging.getLogger(__name__)


class FfnServicer(ffn_pb2_grpc.FfnServiceServicer):
    def __init__(self, batcher: Batcher, welcome: pb.Welcome, dtype: torch.dtype, device: torch.device) -> None:
        self.batcher = batcher
        self.welcome = welcome
        self.dtype = dtype
        self.device = device
        self.num_streams = 0
        self.num_frames_refused = 0

    async def Connect(
        self, requests: AsyncIterator[pb.ConnectRequest], context: rpc.Context
    ) -> AsyncIterator[pb.ConnectResponse]:
        async with rpc.aborting(context):
            hello = await self._shake_hands(requests)
            yield pb.ConnectResponse(welcome=self.welcome)
            stream = _Stream(self, hello.replica_id)
            log.info("attention replica %s connected", hello.replica_id)
            async with stream.reading(requests):
                while (response := await stream.outbox.get()) is not None:
                    yield response

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

    async def _shake_hands(self, requests: AsyncIterator[pb.ConnectRequest]) -> pb.Hello:
        try:
            first = await asyncio.wait_for(anext(aiter(requests)), HANDSHAKE_TIMEOUT_S)
        except (TimeoutError, StopAsyncIteration):
            raise Mismatch("the stream did not begin with a hello in time") from None
        if first.WhichOneof("message") != "hello":
            raise Mismatch("the stream must begin with a hello")
        refuse_mismatch(first.hello.topology, self.welcome.topology)
        return first.hello


class _Stream:
    """One attention replica's frames in, and their answers out."""

    def __init__(self, servicer: FfnServicer, peer: str) -> None:
        self.servicer = servicer
        self.peer = peer
        self.outbox: asyncio.Queue[pb.ConnectResponse | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    @contextlib.asynccontextmanager
    async def reading(self, requests: AsyncIterator[pb.ConnectRequest]) -> AsyncIterator[None]:
        """Reads frames while the block runs; at its end the peer's queued frames are dropped."""
        self.servicer.num_streams += 1
        reader = asyncio.create_task(self._read(requests))
        try:
            yield
        finally:
            reader.cancel()
            self.servicer.num_streams -= 1
            self.servicer.batcher.drop(self)
            log.info("attention replica %s left", self.peer)

    async def _read(self, requests: AsyncIterator[pb.ConnectRequest]) -> None:
        try:
            async for request in requests:
                self._take(request)
        finally:
            self.outbox.put_nowait(None)

    def _take(self, request: pb.ConnectRequest) -> None:
        kind = request.WhichOneof("message")
        if kind == "frame":
            self._submit(request.frame)
        elif kind == "drop_frame":
            self.servicer.batcher.drop(self, request.drop_frame.frame_id)
        else:
            self._answer(0, InvalidRequest("a frame was expected"))

    def _submit(self, message: pb.Frame) -> None:
        servicer = self.servicer
        try:
            frame = frame_from_proto(
                message,
                servicer.batcher.shard.config,
                servicer.dtype,
                servicer.device,
                servicer.welcome.max_frame_tokens,
            )
        except InvalidRequest as error:
            servicer.num_frames_refused += 1
            self._answer(message.frame_id, error)
            return

        def reply(answer: FrameOutput | AfdError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to answer
                self._loop.call_soon_threadsafe(self._finish, frame, answer)

        servicer.batcher.submit(QueuedFrame(self, frame, reply))

    def _finish(self, frame: Frame, answer: FrameOutput | AfdError) -> None:
        self._answer(frame.frame_id, answer)
        if isinstance(answer, FrameOutput):
            shard = self.servicer.batcher.shard.shard
            record_ffn_spans(frame, shard, answer.queue_ns, answer.compute_ns, answer.num_batch_tokens)

    def _answer(self, frame_id: int, answer: FrameOutput | AfdError) -> None:
        if isinstance(answer, FrameOutput):
            self.outbox.put_nowait(pb.ConnectResponse(output=output_to_proto(answer)))
        else:
            error: Any = pb.FrameError(frame_id=frame_id, message=str(answer))
            self.outbox.put_nowait(pb.ConnectResponse(frame_error=error))
