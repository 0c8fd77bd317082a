"""Handshakes that lie, and frames that cannot be, thrown at an FFN shard over each transport."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import mmap
import os
import socket
import struct
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from random import Random
from typing import Any

import grpc
import grpc.aio
import torch

from afd.errors import InternalError, PeerUnavailable, StaleEpoch
from afd.handoff.frame import Frame
from afd.handoff.nixl import NixlTransport
from afd.handoff.nixl_link import NixlLink
from afd.handoff.shm import DIRECTORY, Posts, SharedRegion, ShmTransport
from afd.handoff.slots import FrameSlots, SlotShape
from afd.handoff.tensors import dtype_from_proto, to_proto
from afd.handoff.transport import Transport, receive
from afd.model.config import ModelConfig
from afd.model.moe import Routing
from afd.v1 import ffn_pb2 as pb
from afd.v1 import ffn_pb2_grpc
from benchmarks.fuzzing.answers import HANG_S, Answer
from benchmarks.fuzzing.grpc_inputs import FAULTS
from benchmarks.fuzzing.mutations import mutated_bytes, mutated_message

_PATH = "/afd.v1.FfnService/Connect"
FRAMES_A_STREAM = 32
_MAX_TOKENS, _NUM_SLOTS = 8, 2
_HEADER_BYTES = 116  # of a slot's, that mean something
_TIME_LEFT_AT = 36  # in the header
_BEYOND_ALL_EPOCHS = (1 << 32) - 1
_CLIENTS_OWN = "Internal error from Core"  # grpcio's word for a stream that ended while it was written to
_FFN_FAILED = "the FFN failed"
_frame_ids = count(1)


class Shard:
    """An FFN shard, and what a caller that means well would say to it."""

    def __init__(self, address: str, config: ModelConfig) -> None:
        self.address = address
        self.config = config
        with grpc.insecure_channel(address) as channel:
            topology = ffn_pb2_grpc.FfnServiceStub(channel).GetTopology(pb.GetTopologyRequest()).topology
        self.dtype = dtype_from_proto(topology.dtype)
        self.hello = pb.Hello(
            replica_id="fuzz",
            topology=topology,
            frame_dtype=topology.dtype,
            output_dtype=topology.dtype,
            num_slots=_NUM_SLOTS,
            max_tokens=_MAX_TOKENS,
        )
        self.shape = SlotShape(
            _NUM_SLOTS, _MAX_TOKENS, config.hidden_size, config.top_k, self.dtype, self.dtype, self.dtype
        )

    def frame(self, chooser: Random) -> Frame:
        """One that can be computed."""
        num_tokens, layer_idx = chooser.randint(1, _MAX_TOKENS), chooser.randrange(self.config.num_layers)
        ffn_input = torch.full((num_tokens, self.config.hidden_size), chooser.uniform(-1, 1), dtype=self.dtype)
        routing = self._routing(num_tokens) if self.config.is_moe(layer_idx) else None
        return Frame(next(_frame_ids), 0, layer_idx, ffn_input, routing, epoch=_BEYOND_ALL_EPOCHS)

    def _routing(self, num_tokens: int) -> Routing:
        ids = torch.arange(self.config.top_k, dtype=torch.int32).expand(num_tokens, -1).contiguous()
        return Routing(ids, torch.full(ids.shape, 0.5))


class HandshakeThrower:
    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self._channel = grpc.aio.insecure_channel(shard.address)
        self._nixl_offer: pb.NixlOffer | None = None

    async def throw(self, chooser: Random) -> list[Answer]:
        kind = chooser.choices(("lie", "order", "shm", "nixl"), (45, 30, 24, 1))[0]
        if kind == "lie":
            return [await self._said(_said(mutated_message(self.shard.hello, chooser)))]
        if kind == "order":
            return [await self._said(*_out_of_order(self.shard.hello, chooser))]
        if kind == "shm":
            return [await self._throw_files(chooser)]
        return [await self._throw_nixl(chooser)]

    async def close(self) -> None:
        await self._channel.close()

    async def _throw_files(self, chooser: Random) -> Answer:
        with _given_away(self.shard.shape, chooser) as name:
            hello = _copy(self.shard.hello)
            hello.shm.socket_name = name
            return await self._said(_said(hello))

    async def _throw_nixl(self, chooser: Random) -> Answer:
        if self._nixl_offer is None:
            self._nixl_offer = await asyncio.to_thread(_nixl_offer, self.shard.shape)
        hello = _copy(self.shard.hello)
        hello.nixl.CopyFrom(mutated_message(self._nixl_offer, chooser))
        if chooser.random() < 0.5:
            hello.nixl.metadata = mutated_bytes(self._nixl_offer.metadata, chooser)
        return await self._said(_said(hello))

    async def _said(self, *messages: bytes) -> Answer:
        """All messages, and then the end of the stream, which has to end the other way too."""

        call: Any = self._channel.stream_stream(_PATH)()
        welcome = pb.Welcome()
        try:
            async with asyncio.timeout(HANG_S):
                with contextlib.suppress(asyncio.InvalidStateError):  # it has ended already
                    for message in messages:
                        await call.write(message)
                    await call.done_writing()
                while (response := await call.read()) is not grpc.aio.EOF:
                    welcome.MergeFrom(pb.ConnectResponse.FromString(response).welcome)
            return Answer("declined" if welcome.declined else "OK")
        except grpc.aio.AioRpcError as error:
            code = "ended" if error.details() == _CLIENTS_OWN else error.code().name
            return Answer(code, code in FAULTS, f"{messages!r}: {error.details()}" if code in FAULTS else "")
        finally:
            call.cancel()


def _said(hello: pb.Hello) -> bytes:
    return pb.ConnectRequest(hello=hello).SerializeToString()


def _copy(hello: pb.Hello) -> pb.Hello:
    copy = pb.Hello()
    copy.CopyFrom(hello)
    return copy


def _out_of_order(hello: pb.Hello, chooser: Random) -> list[bytes]:
    said = _said(hello)
    frame = pb.ConnectRequest(frame=pb.Frame(frame_id=1)).SerializeToString()
    drop = pb.ConnectRequest(drop_frame=pb.DropFrame(frame_id=1)).SerializeToString()
    parts = [said, frame, drop, b"", b"\xff" * 9, mutated_bytes(said, chooser), chooser.randbytes(20)]
    return [chooser.choice(parts) for _ in range(chooser.choice((0, 1, 2, 3, 5)))]


def _nixl_offer(shape: SlotShape) -> pb.NixlOffer:
    """One that is in order but for its agent, which is gone by then."""
    frames, answers = (SharedRegion(shape.num_slots * stride) for stride in (shape.frame_stride, shape.answer_stride))
    return NixlLink("fuzz", "the FFN", frames, answers, shape.num_slots).offer


# Files that are handed over and are not what they should be.


@contextlib.contextmanager
def _given_away(shape: SlotShape, chooser: Random) -> Iterator[str]:
    """The name of a socket that gives whoever comes a choice of files."""
    files = _files(shape, chooser)
    path = DIRECTORY / f"afd-{uuid.uuid4().hex}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        says, is_slow = chooser.choice((b"!", b"!", b"!", b"", b"x" * 100)), chooser.random() < 0.002
        giver = threading.Thread(target=_give, args=(listener, files, says, is_slow), daemon=True)
        giver.start()
        try:
            yield path.name
        finally:
            path.unlink(missing_ok=True)
            listener.shutdown(socket.SHUT_RDWR)
            giver.join()
            for file in files:
                os.close(file)


def _give(listener: socket.socket, files: list[int], says: bytes, is_slow: bool) -> None:
    with contextlib.suppress(OSError):
        peer, _ = listener.accept()
        with peer:
            if is_slow:
                peer.recv(1)  # says nothing until the other one has enough
            elif says:
                socket.send_fds(peer, [says], files)


def _files(shape: SlotShape, chooser: Random) -> list[int]:
    """The right ones with one to three of them replaced, left out or in each other's place."""
    sizes = (shape.num_slots * shape.frame_stride, Posts.num_bytes(shape), shape.num_slots * shape.answer_stride)
    files = [*(_memory(size) for size in sizes), *os.pipe(), *os.pipe()]
    for _ in range(chooser.choice((0, 1, 1, 2, 3))):
        at, change = chooser.randrange(len(files)), chooser.randrange(4)
        if change == 0:
            other = chooser.randrange(len(files))
            files[at], files[other] = files[other], files[at]
        elif change == 1 and len(files) > 1:
            os.close(files.pop(at))
        elif change == 2:
            files.append(os.dup(files[at]))
        else:
            os.close(files[at])
            files[at] = chooser.choice(_ODD_FILES)(sizes[at % len(sizes)])
    return files


def _memory(num_bytes: int, seals: int = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW) -> int:
    file = os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(file, num_bytes)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


def _read_only(num_bytes: int) -> int:
    file = _memory(num_bytes)
    with contextlib.closing(os.fdopen(file)):
        return os.open(f"/proc/self/fd/{file}", os.O_RDONLY)


def _opened(path: str, flags: int, num_bytes: int) -> int:
    return os.open(path, flags)


def _temporary(num_bytes: int) -> int:
    with tempfile.TemporaryFile() as file:
        file.truncate(num_bytes)
        return os.dup(file.fileno())


def _socket(num_bytes: int) -> int:
    return socket.socket().detach()


def _pipe_end(which: int, num_bytes: int) -> int:
    ends = os.pipe()
    os.close(ends[1 - which])
    return ends[which]


_ODD_FILES: tuple[Callable[[int], int], ...] = (
    _read_only,
    _temporary,
    _socket,
    partial(_pipe_end, 0),
    partial(_pipe_end, 1),
    lambda num_bytes: _memory(num_bytes + mmap.PAGESIZE),
    lambda num_bytes: _memory(max(0, num_bytes - 1)),
    lambda num_bytes: _memory(num_bytes, seals=0),
    lambda num_bytes: _memory(num_bytes, seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE),
    lambda num_bytes: _memory(num_bytes, seals=fcntl.F_SEAL_SHRINK | 0x10),  # F_SEAL_FUTURE_WRITE
    partial(_opened, "/", os.O_RDONLY),
    partial(_opened, "/dev/null", os.O_RDWR),
    partial(_opened, "/dev/zero", os.O_RDWR),
)


# Frames.


class FrameThrower:
    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self._channel = grpc.aio.insecure_channel(shard.address)

    async def throw(self, chooser: Random) -> list[Answer]:
        kind = chooser.choices(("inline", "shm", "nixl"), (80, 17, 3))[0]
        if kind == "inline":
            return await self._throw_inline(chooser)
        return await asyncio.to_thread(
            self._throw_into_slots, ShmTransport if kind == "shm" else NixlTransport, chooser
        )

    async def close(self) -> None:
        await self._channel.close()

    async def _throw_inline(self, chooser: Random) -> list[Answer]:
        call: Any = self._channel.stream_stream(_PATH)()
        try:
            async with asyncio.timeout(HANG_S):
                await call.write(_said(self.shard.hello))
                await call.read()
                frames = {request.frame.frame_id: request for request in self._inline_frames(chooser)}
                for request in frames.values():
                    await call.write(request.SerializeToString())
                answers = [await self._next(call, frames) for _ in list(frames)]
                await call.done_writing()
                while await call.read() is not grpc.aio.EOF:
                    pass
            return answers
        except grpc.aio.AioRpcError as error:
            return [Answer(error.code().name, is_fault=True, detail=f"frames ended the stream: {error.details()}")]
        finally:
            call.cancel()

    async def _next(self, call: Any, frames: dict[int, pb.ConnectRequest]) -> Answer:
        message = await call.read()
        if message is grpc.aio.EOF:
            raise asyncio.InvalidStateError("the FFN ended the stream of a pair that stands")
        response = pb.ConnectResponse.FromString(message)
        if response.WhichOneof("message") == "output":
            frames.pop(response.output.frame_id)
            return Answer("computed")
        request = frames.pop(response.frame_error.frame_id)
        is_fault = _FFN_FAILED in response.frame_error.message
        return Answer("failed" if is_fault else "refused", is_fault, str(request)[:3000] if is_fault else "")

    def _inline_frames(self, chooser: Random) -> Iterator[pb.ConnectRequest]:
        for _ in range(FRAMES_A_STREAM):
            frame = self.shard.frame(chooser)
            message = pb.Frame(layer_idx=frame.layer_idx, epoch=frame.epoch, ffn_input=to_proto(frame.ffn_input))
            if frame.routing:
                message.topk_ids.CopyFrom(to_proto(frame.routing.topk_ids))
                message.topk_weights.CopyFrom(to_proto(frame.routing.topk_weights))
            changed = mutated_message(message, chooser)
            _change_numbers(changed, chooser)
            changed.frame_id = frame.frame_id
            changed.time_left_us = 0  # a frame whose time is over has no answer
            yield pb.ConnectRequest(frame=changed)

    def _throw_into_slots(
        self, kind: Callable[[str, pb.Hello, FrameSlots], Transport], chooser: Random
    ) -> list[Answer]:
        shape = self.shard.shape
        slots = FrameSlots(SharedRegion(shape.num_slots * shape.frame_stride), shape)
        transport = kind(self.shard.address, _copy(self.shard.hello), slots)
        try:
            return [self._throw_slot(transport, slots, chooser) for _ in range(FRAMES_A_STREAM)]
        finally:
            transport.close()

    def _throw_slot(self, transport: Transport, slots: FrameSlots, chooser: Random) -> Answer:
        frame = self.shard.frame(chooser)
        slots.write(frame)
        changes = mutated_slot(slots, frame, chooser, may_lie_of_its_id=transport.name == "shm")
        transport.send(frame)
        try:
            receive(transport, frame, HANG_S, 0)
            return Answer("computed")
        except PeerUnavailable as error:
            if "in time" in str(error):
                raise TimeoutError from None
            return Answer("lost", is_fault=True, detail=f"{transport.name} {changes}: {error}")
        except (StaleEpoch, InternalError) as error:
            is_fault = _FFN_FAILED in str(error)
            return Answer(
                "failed" if is_fault else "refused", is_fault, f"{transport.name} {changes}" if is_fault else ""
            )


def _change_numbers(message: pb.Frame, chooser: Random) -> None:
    """Of the tensors' elements, a few."""
    for tensor in (message.ffn_input, message.topk_ids, message.topk_weights):
        if tensor.inline and chooser.random() < 0.3:
            tensor.inline = _with_odd_word(tensor.inline, chooser)


def _with_odd_word(data: bytes, chooser: Random) -> bytes:
    at = chooser.randrange(max(1, len(data) // 4)) * 4
    return data[:at] + odd_word(chooser) + data[at + 4 :]


def odd_word(chooser: Random) -> bytes:
    """Four bytes that are extreme as a float or as an integer."""
    floats = (float("nan"), float("inf"), -float("inf"), 3e38, 1e-45)
    integers = (-1, 0, 1, 5, 255, 1 << 20, (1 << 31) - 1, -(1 << 31))
    return (
        struct.pack("<f", chooser.choice(floats))
        if chooser.random() < 0.5
        else struct.pack("<i", chooser.choice(integers))
    )


def mutated_slot(slots: FrameSlots, frame: Frame, chooser: Random, may_lie_of_its_id: bool) -> list[str]:
    """Changes words of the header, or of what follows; says which."""
    start, changes = frame.slot * slots.shape.frame_stride, []
    for _ in range(chooser.choice((1, 1, 2, 4))):
        in_header = chooser.random() < 0.6
        last = _HEADER_BYTES if in_header else slots.shape.frame_bytes(frame.num_tokens)
        at = chooser.randrange(0 if may_lie_of_its_id else 8, last - 4)
        at -= at % 4
        word = odd_word(chooser) if chooser.random() < 0.7 else chooser.randbytes(4)
        slots.region.memory[start + at : start + at + 4] = word
        changes.append(f"{at}: {word.hex()}")
    slots.region.memory[start + _TIME_LEFT_AT : start + _TIME_LEFT_AT + 4] = bytes(4)  # as above
    return changes
