"""The crossing between attention and FFN: the handshake, good frames, and every kind of bad one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import pytest
import torch

from afd.compute import ComputeThread
from afd.errors import AfdError, Cancelled, ConfigError, InternalError, Mismatch, PeerUnavailable, TransportUnavailable
from afd.handoff.bell import Bell, Lookout
from afd.handoff.control import ControlStream
from afd.handoff.fp8 import FP8
from afd.handoff.frame import Frame, FrameOutput, Timing
from afd.handoff.handshake import topology
from afd.handoff.inline import frame_to_proto
from afd.handoff.negotiate import LADDER, Rung, TransportName, connect_pair
from afd.handoff.remote import RemoteFFN
from afd.handoff.replicas import Pair as ReplicaPair
from afd.handoff.replicas import RoutingTable
from afd.handoff.shm import (
    DIRECTORY,
    SharedRegion,
    ShmTransport,
    handing_over,
    open_bell,
    open_region,
    take_over,
)
from afd.handoff.slots import FrameSlots, Region, SlotShape
from afd.handoff.tensors import dtype_to_proto
from afd.handoff.transport import Transport, receive
from afd.model.checkpoint import Checkpoint
from afd.model.moe import Routing
from afd.model.weights import load_ffn_shard
from afd.rpc import serving
from afd.urgency import NOT_URGENT, Urgency
from afd.v1 import ffn_pb2 as pb
from afd.v1 import ffn_pb2_grpc
from services.ffn.batcher import Batcher, QueuedFrame
from services.ffn.servicer import FfnServicer
from tests.conftest import Model, needs_nixl

CPU = torch.device("cpu")
MAX_FRAME_TOKENS = 64
NUM_SLOTS = 3
SPIN_S = 0.001

each_transport = pytest.mark.parametrize(
    "kind", [pytest.param(name, marks=needs_nixl if name == "nixl" else ()) for name in LADDER]
)


@dataclass
class Pair:
    """A transport and the slots that its frames lie in."""

    transport: Transport
    frames: FrameSlots

    async def send(self, frame: Frame) -> None:
        self.frames.write(frame)
        await asyncio.to_thread(self.transport.send, frame)

    async def receive(self, frame: Frame, timeout_s: float = 5.0) -> FrameOutput:
        return await asyncio.to_thread(receive, self.transport, frame, timeout_s, SPIN_S)

    def close(self) -> None:
        self.transport.close()


class StubEndpoint:
    """A pair without a network: frames are put in, answers are looked up."""

    def __init__(self, *frames: Frame) -> None:
        self.bell = Bell.private()
        self.regions = ()
        self.arriving = list(frames)
        self.awaited = {frame.frame_id for frame in frames}
        self.answers: dict[int, tuple[torch.Tensor, Timing]] = {}
        self.refusals: dict[int, str] = {}
        self.is_closed = False

    def poll(self) -> list[Frame]:
        arrived, self.arriving = self.arriving, []
        return arrived

    def drop(self, frame_id: int) -> None:
        self.awaited.discard(frame_id)

    def awaits(self, frame: Frame) -> bool:
        return frame.frame_id in self.awaited

    def buffer(self, frame: Frame) -> torch.Tensor:
        return torch.empty_like(frame.ffn_input)

    def reply(self, frame: Frame, ffn_output: torch.Tensor, timing: Timing) -> None:
        self.answers[frame.frame_id] = ffn_output, timing

    def refuse(self, frame_id: int, error: AfdError) -> None:
        self.refusals[frame_id] = str(error)

    def close(self) -> None:
        self.is_closed = True


@dataclass
class Shard:
    """An FFN shard that serves, and what fits it."""

    servicer: FfnServicer
    address: str
    checkpoint: Checkpoint
    shard: int
    num_shards: int

    def hello(self, frame_dtype: torch.dtype = torch.float32, **changes: Any) -> pb.Hello:
        ours = topology(self.checkpoint.config, self.checkpoint.fingerprint, torch.float32, self.shard, self.num_shards)
        for name, value in changes.items():
            setattr(ours, name, value)
        return pb.Hello(
            replica_id="test",
            topology=ours,
            frame_dtype=dtype_to_proto(frame_dtype),
            output_dtype=dtype_to_proto(torch.bfloat16 if frame_dtype is FP8 else torch.float32),
            num_slots=NUM_SLOTS,
            max_tokens=MAX_FRAME_TOKENS,
        )

    def shape(self, frame_dtype: torch.dtype = torch.float32) -> SlotShape:
        config = self.checkpoint.config
        return SlotShape(
            NUM_SLOTS,
            MAX_FRAME_TOKENS,
            config.hidden_size,
            config.top_k,
            torch.float32,
            frame_dtype,
            torch.bfloat16 if frame_dtype is FP8 else torch.float32,
        )

    def frames(self, frame_dtype: torch.dtype = torch.float32) -> FrameSlots:
        shape = self.shape(frame_dtype)
        return FrameSlots(SharedRegion(NUM_SLOTS * shape.frame_stride), shape)

    def private_frames(self) -> FrameSlots:
        """As on another host: shared memory cannot be had."""
        shape = self.shape()
        return FrameSlots(Region.private(NUM_SLOTS * shape.frame_stride), shape)

    async def connect(
        self, kind: TransportName = "inline", frame_dtype: torch.dtype = torch.float32, **changes: Any
    ) -> Pair:
        frames = self.frames(frame_dtype)
        transport = await asyncio.to_thread(LADDER[kind], self.address, self.hello(frame_dtype, **changes), frames)
        return Pair(transport, frames)

    def layer(self, moe: bool) -> int:
        config = self.checkpoint.config
        return next(layer for layer in range(config.num_layers) if config.is_moe(layer) == moe)

    def frame(self, frame_id: int = 1, num_tokens: int = 3, moe: bool = True) -> Frame:
        config = self.checkpoint.config
        generator = torch.Generator().manual_seed(frame_id)
        routing = Routing(
            torch.randint(config.num_experts, (num_tokens, config.top_k), generator=generator, dtype=torch.int32),
            torch.rand((num_tokens, config.top_k), generator=generator),
        )
        ffn_input = torch.randn((num_tokens, config.hidden_size), generator=generator)
        return Frame(frame_id, 0, self.layer(moe), ffn_input, routing if moe else None)

    def expected(self, frame: Frame) -> torch.Tensor:
        return self.servicer.batcher.shard(frame.layer_idx, frame.ffn_input, frame.routing)


@contextlib.asynccontextmanager
async def running_shard(model: Model, shard: int = 0, num_shards: int = 1) -> AsyncIterator[Shard]:
    checkpoint = Checkpoint(model.path)
    loaded = load_ffn_shard(checkpoint, shard, num_shards, torch.float32, CPU, lambda done, total: None)
    batcher = Batcher(loaded, MAX_FRAME_TOKENS, spin_s=SPIN_S, device=CPU)
    batcher.start(ComputeThread())
    welcome = pb.Welcome(
        replica_id="ffn",
        topology=topology(checkpoint.config, checkpoint.fingerprint, torch.float32, shard, num_shards),
        max_frame_tokens=MAX_FRAME_TOKENS,
    )
    servicer = FfnServicer(batcher, welcome, torch.float32)

    def add(server: grpc.aio.Server) -> None:
        ffn_pb2_grpc.add_FfnServiceServicer_to_server(servicer, server)

    try:
        async with serving(add, ("afd.v1.FfnService",), "127.0.0.1", 0) as port:
            yield Shard(servicer, f"127.0.0.1:{port}", checkpoint, shard, num_shards)
    finally:
        batcher.stop()


@contextlib.asynccontextmanager
async def raw_stream(shard: Shard) -> AsyncIterator[grpc.aio.StreamStreamCall[Any, Any]]:
    """A stream that has shaken hands, to write anything on."""
    async with grpc.aio.insecure_channel(shard.address) as channel:
        call = ffn_pb2_grpc.FfnServiceStub(channel).Connect()
        await call.write(pb.ConnectRequest(hello=shard.hello()))
        assert (await call.read()).WhichOneof("message") == "welcome"
        yield call
        call.cancel()


@pytest.fixture
def model(make_model: Callable[[int], Model]) -> Model:
    return make_model(4)


@dataclass
class Batch:
    slot: int
    num_tokens: int
    urgency: Urgency = NOT_URGENT
    abandoned: bool = False


@each_transport
@pytest.mark.parametrize("moe", [True, False])
async def test_frame_comes_back_as_the_shards_partial_sum(model: Model, moe: bool, kind: TransportName) -> None:
    async with running_shard(model) as shard:
        pair = await shard.connect(kind)
        frame = shard.frame(moe=moe)
        await pair.send(frame)
        output = await pair.receive(frame)
        assert torch.equal(output.ffn_output, shard.expected(frame))
        assert output.timing.compute_ns > 0
        pair.close()


@each_transport
async def test_fp8_frames_are_half_the_bytes_and_nearly_the_same(model: Model, kind: TransportName) -> None:
    async with running_shard(model) as shard:
        pair = await shard.connect(kind, FP8)
        frame = shard.frame(num_tokens=40)
        await pair.send(frame)
        output = (await pair.receive(frame)).ffn_output
        assert output.dtype is torch.bfloat16
        expected = shard.expected(frame)
        assert 0 < (output.float() - expected).abs().mean() < 0.05 * expected.abs().mean()
        pair.close()


@each_transport
async def test_frames_of_all_sizes_and_slots_follow_one_another(model: Model, kind: TransportName) -> None:
    async with running_shard(model) as shard:
        pair = await shard.connect(kind)
        for number in range(1, 40):
            frame = shard.frame(number, num_tokens=1 + number * 7 % MAX_FRAME_TOKENS)._replace(slot=number % NUM_SLOTS)
            await pair.send(frame)
            assert torch.equal((await pair.receive(frame)).ffn_output, shard.expected(frame))
        pair.close()


async def test_partial_sums_of_all_shards_are_the_whole(model: Model) -> None:
    async with contextlib.AsyncExitStack() as stack:
        shards = [await stack.enter_async_context(running_shard(model, i, 3)) for i in range(3)]
        whole = await stack.enter_async_context(running_shard(model))
        frames = whole.frames()
        pairs = [
            await asyncio.to_thread(connect_pair, shard.address, shard.hello(), frames, kind, SPIN_S)
            for shard, kind in zip(shards, ("shm", "inline", "auto"), strict=True)
        ]
        ffn = RemoteFFN(frames, CPU, timeout_s=5.0, spin_s=SPIN_S)
        ffn.table = RoutingTable(1, tuple((ReplicaPair(f"ffn-{i}", i, 3, *pairs[i]),) for i in range(3)))
        assert ffn.transport_names[:2] == ("shm", "inline")
        frame = whole.frame()
        batch = Batch(0, frame.num_tokens)
        await asyncio.to_thread(ffn.send, batch, frame.layer_idx, frame.ffn_input, frame.routing)
        total = await asyncio.to_thread(ffn.receive, batch)
        torch.testing.assert_close(total, whole.expected(frame), atol=1e-5, rtol=1e-5)
        assert [crossing.shard for crossing in ffn.take_crossings()] == [0, 1, 2]
        ffn.close()


async def test_frame_that_is_sent_while_the_layout_changes_is_sent_again(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_shard(model) as old, running_shard(model) as new:
        frames, frame = old.frames(), old.frame()
        pairs = [
            ReplicaPair(name, 0, 1, *await asyncio.to_thread(connect_pair, s.address, s.hello(), frames, "shm", SPIN_S))
            for name, s in (("old", old), ("new", new))
        ]
        ffn = RemoteFFN(frames, CPU, timeout_s=5.0, spin_s=SPIN_S)
        ffn.table = RoutingTable(1, ((pairs[0],),))
        old.servicer.batcher.oldest_epoch = 2
        write = frames.write

        def write_meanwhile(sent: Frame) -> None:
            ffn.table = RoutingTable(2, ((pairs[1],),))
            write(sent)

        monkeypatch.setattr(frames, "write", write_meanwhile)
        batch = Batch(0, frame.num_tokens)
        await asyncio.to_thread(ffn.send, batch, frame.layer_idx, frame.ffn_input, frame.routing)
        total = await asyncio.to_thread(ffn.receive, batch)
        assert torch.equal(total, new.expected(frame))
        assert ffn.num_resent == {(0, "stale"): 1}
        for pair in pairs:
            pair.transport.close()


async def test_frames_of_a_layer_from_several_replicas_are_one_batch(model: Model) -> None:
    async with running_shard(model) as shard:
        batcher = Batcher(shard.servicer.batcher.shard, MAX_FRAME_TOKENS, spin_s=SPIN_S, device=CPU)
        frames = [shard.frame(frame_id=i, num_tokens=i) for i in (1, 2, 3)]
        replicas = [StubEndpoint(frames[0]), StubEndpoint(*frames[1:], shard.frame(frame_id=4, moe=False))]
        for replica in replicas:
            batcher.attach(replica)
        batcher.start(ComputeThread())
        answers: dict[int, tuple[torch.Tensor, Timing]] = {}
        async with asyncio.timeout(10):
            while len(answers) < 4:
                await asyncio.sleep(0.01)
                answers = replicas[0].answers | replicas[1].answers
        batcher.stop()
        assert [answers[i][1].num_batch_tokens for i in (1, 2, 3, 4)] == [6, 6, 6, 3]
        assert batcher.counters.num_batches == 2
        for frame in frames:
            torch.testing.assert_close(answers[frame.frame_id][0], shard.expected(frame), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("protocol_version", 99, "protocol version differs: attention has 99, the FFN has 3"),
        ("model_fingerprint", "other", "model fingerprint differs: attention has other, the FFN has"),
        ("hidden_size", 7168, "hidden size differs: attention has 7168"),
        ("num_layers", 61, "num layers differs: attention has 61"),
        ("dtype", 2, "dtype differs: attention has bfloat16, the FFN has float32"),
        ("shard", 1, "shard differs: attention has 1, the FFN has 0"),
        ("num_shards", 2, "num shards differs: attention has 2, the FFN has 1"),
    ],
)
async def test_mismatch_is_refused_within_a_second_naming_both_values(
    model: Model, field: str, value: Any, words: str
) -> None:
    async with running_shard(model) as shard:
        start = time.monotonic()
        with pytest.raises(Mismatch, match=words):
            await shard.connect(**{field: value})
        assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frame_dtype": 2}, "bfloat16 out and torch.float32 back cannot be had from an FFN in torch.float32"),
        ({"output_dtype": 3}, "int32 back cannot be had"),
        ({"frame_dtype": 77}, "dtype 77 is not a dtype of frames"),
        ({"num_slots": 0}, "cannot have 0 slots of 64 tokens"),
        ({"num_slots": 4_000_000_000}, "cannot have 4000000000 slots"),
        ({"max_tokens": 0}, "cannot have 3 slots of 0 tokens"),
        ({"max_tokens": 65}, "accepts frames of 64 tokens, .* raise AFD_MAX_FRAME_TOKENS"),
    ],
)
async def test_slots_that_cannot_be_are_refused_in_the_handshake(
    model: Model, changes: dict[str, Any], words: str
) -> None:
    async with running_shard(model) as shard:
        hello = shard.hello()
        for name, value in changes.items():
            setattr(hello, name, value)
        with pytest.raises(Mismatch, match=words):
            await asyncio.to_thread(ControlStream, shard.address, hello)


def lost_probe(monkeypatch: pytest.MonkeyPatch, losing: TransportName) -> None:
    def probe(name: TransportName, *others: Any) -> Rung:
        if name == losing:
            raise PeerUnavailable("lost")
        return Rung(name)

    monkeypatch.setattr("afd.handoff.negotiate.probe", probe)


async def until_no_pair_is_left(shard: Shard) -> None:
    async with asyncio.timeout(5):
        while shard.servicer.num_streams or shard.servicer.batcher.endpoints:
            await asyncio.sleep(0.01)


async def test_pair_that_fails_while_it_comes_up_leaves_no_stream(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost_probe(monkeypatch, "inline")
    async with running_shard(model) as shard:
        frames = shard.private_frames()
        with pytest.raises(PeerUnavailable, match="lost"):
            await asyncio.to_thread(connect_pair, shard.address, shard.hello(), frames, "auto", SPIN_S)
        await until_no_pair_is_left(shard)


@pytest.mark.parametrize("losing", ["shm", pytest.param("nixl", marks=needs_nixl)])
async def test_transport_whose_probe_stays_away_is_passed_over(
    model: Model, monkeypatch: pytest.MonkeyPatch, losing: TransportName
) -> None:
    lost_probe(monkeypatch, losing)
    async with running_shard(model) as shard:
        frames = shard.frames() if losing == "shm" else shard.private_frames()
        with pytest.raises(ConfigError, match=f"AFD_HANDOFF={losing} cannot be had .*: lost"):
            await asyncio.to_thread(connect_pair, shard.address, shard.hello(), frames, losing, SPIN_S)
        transport, _ = await asyncio.to_thread(connect_pair, shard.address, shard.hello(), frames, "auto", SPIN_S)
        assert transport.name != losing
        transport.close()
        await until_no_pair_is_left(shard)


async def test_auto_takes_shared_memory_where_it_can_be_had_and_else_the_fastest(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def probe(name: TransportName, *others: Any) -> Rung:
        tried.append(name)
        return Rung(name, latency_s={"shm": 0.003, "inline": 0.001, "nixl": 0.002}[name])

    monkeypatch.setattr("afd.handoff.negotiate.probe", probe)
    async with running_shard(model) as shard:
        for frames, name in ((shard.frames(), "shm"), (shard.private_frames(), "inline")):
            transport, _ = await asyncio.to_thread(connect_pair, shard.address, shard.hello(), frames, "auto", SPIN_S)
            assert transport.name == name
            transport.close()
    assert tried[:2] == ["shm", "inline"], "where it can be had no other is tried"


async def test_stream_without_a_hello_is_refused(model: Model) -> None:
    async with running_shard(model) as shard, grpc.aio.insecure_channel(shard.address) as channel:
        call = ffn_pb2_grpc.FfnServiceStub(channel).Connect()
        await call.write(pb.ConnectRequest(drop_frame=pb.DropFrame(frame_id=1)))
        with pytest.raises(grpc.aio.AioRpcError, match="must begin with a hello"):
            await call.read()


async def test_nobody_at_the_address_is_an_error_in_bounded_time() -> None:
    with pytest.raises(PeerUnavailable):
        await asyncio.to_thread(ControlStream, "127.0.0.1:1", pb.Hello())


def encoded(frame: Frame) -> pb.Frame:
    num_tokens, hidden_size = frame.ffn_input.shape
    top_k = frame.routing.topk_ids.shape[1] if frame.routing else 1
    shape = SlotShape(1, num_tokens, hidden_size, top_k, torch.float32, torch.float32, torch.float32)
    frames = FrameSlots(Region.private(shape.frame_stride), shape)
    frames.write(frame)
    return frame_to_proto(frame, frames)


def bad_frames(shard: Shard) -> dict[str, pb.Frame]:
    """Frames that cannot be, by the words of their refusal."""
    moe, dense = encoded(shard.frame()), encoded(shard.frame(moe=False))

    def changed(frame: pb.Frame, change: Callable[[pb.Frame], Any]) -> pb.Frame:
        copy = pb.Frame()
        copy.CopyFrom(frame)
        change(copy)
        return copy

    hidden = shard.checkpoint.config.hidden_size
    return {
        "layer 1000 does not exist": changed(moe, lambda f: setattr(f, "layer_idx", 1000)),
        "bytes, but its shape asks for": changed(moe, lambda f: setattr(f.ffn_input, "inline", b"short")),
        "has 0 tokens": changed(moe, lambda f: f.ffn_input.ClearField("shape")),
        "has 4000000000 tokens": changed(moe, lambda f: f.ffn_input.shape.__setitem__(0, 4_000_000_000)),
        f"not [3, {hidden}]": changed(moe, lambda f: f.ffn_input.shape.__setitem__(1, hidden + 1)),
        "ffn_input is bfloat16, not float32": changed(moe, lambda f: setattr(f.ffn_input, "dtype", 2)),
        "ffn_input is dtype 77": changed(moe, lambda f: setattr(f.ffn_input, "dtype", 77)),
        "topk_ids is": changed(moe, lambda f: f.ClearField("topk_ids")),
        "topk_weights has": changed(moe, lambda f: setattr(f.topk_weights, "inline", b"")),
        "expert 2147483647 does not exist": changed(
            moe, lambda f: setattr(f.topk_ids, "inline", b"\xff\xff\xff\x7f" * (len(f.topk_ids.inline) // 4))
        ),
        "expert -1 does not exist": changed(
            moe, lambda f: setattr(f.topk_ids, "inline", b"\xff" * len(f.topk_ids.inline))
        ),
        "dense, but the frame chooses experts": changed(dense, lambda f: f.topk_ids.CopyFrom(moe.topk_ids)),
        "65 tokens": encoded(shard.frame(num_tokens=MAX_FRAME_TOKENS + 1)),
    }


async def test_bad_frame_is_refused_and_the_stream_goes_on(model: Model) -> None:
    async with running_shard(model) as shard, raw_stream(shard) as call:
        for words, bad in bad_frames(shard).items():
            bad.frame_id = 666
            await call.write(pb.ConnectRequest(frame=bad))
            error = (await call.read()).frame_error
            assert error.frame_id == 666
            assert words in error.message
        await call.write(pb.ConnectRequest())
        assert (await call.read()).frame_error.message == "a frame was expected"
        await call.write(pb.ConnectRequest(frame=encoded(shard.frame(frame_id=2))))
        assert (await call.read()).output.frame_id == 2
        assert shard.servicer.num_frames_refused == len(bad_frames(shard)) + 1


@each_transport
async def test_refused_frame_is_an_error_for_its_sender_and_the_pair_goes_on(model: Model, kind: TransportName) -> None:
    async with running_shard(model) as shard:
        pair = await shard.connect(kind)
        bad, good = shard.frame(1)._replace(layer_idx=1000), shard.frame(2)
        await pair.send(bad)
        with pytest.raises(InternalError, match="layer 1000 does not exist"):
            await pair.receive(bad)
        await pair.send(good)
        assert torch.equal((await pair.receive(good)).ffn_output, shard.expected(good))
        pair.close()


def damage(frames: FrameSlots, offset: int, damaged: bytes) -> None:
    """Overwrites some of the first slot after its frame was written."""
    frames.region.memory[offset : offset + len(damaged)] = damaged


@pytest.mark.parametrize(
    ("offset", "damaged", "words"),
    [
        (8, b"\1\0\0\0\0\0\0\0", "says it has 1 bytes, but 3 tokens take"),
        (16, b"\xff\xff\xff\xff", "layer -1 does not exist"),
        (20, b"\0\0\0\0", "has 0 tokens"),
        (20, b"\xff\xff\xff\xff", "has 4294967295 tokens"),
        (24, b"\0\0\0\0", "has experts, but the frame chooses none"),
        (128, b"\xff\xff\xff\x7f", "expert 2147483647 does not exist"),
        (128, b"\xff\xff\xff\xff", "expert -1 does not exist"),
    ],
)
async def test_damaged_slot_is_refused_and_the_pair_goes_on(
    model: Model, offset: int, damaged: bytes, words: str
) -> None:
    async with running_shard(model) as shard:
        pair, bad, good = await shard.connect("shm"), shard.frame(1), shard.frame(2)
        pair.frames.write(bad)
        damage(pair.frames, offset, damaged)
        pair.transport.send(bad)
        with pytest.raises(InternalError, match=words):
            await pair.receive(bad)
        await pair.send(good)
        assert torch.equal((await pair.receive(good)).ffn_output, shard.expected(good))
        assert shard.servicer.num_frames_refused == 1
        pair.close()


async def test_late_answer_to_an_older_frame_is_not_taken_for_the_awaited_one(model: Model) -> None:
    async with running_shard(model) as shard:
        pair, frame = await shard.connect("shm"), shard.frame(7)
        assert isinstance(pair.transport, ShmTransport)
        pair.transport.answers.post(shard.frame(6), Timing(0, 0, 3))
        with pytest.raises(PeerUnavailable, match="in time"):
            await pair.receive(frame, 0.05)
        pair.transport.answers.post(shard.frame(7, num_tokens=5), Timing(0, 0, 3))
        with pytest.raises(InternalError, match="the answer has 5 tokens"):
            await pair.receive(frame, 0.05)
        pair.close()


async def test_no_shared_memory_is_left_behind(model: Model) -> None:
    before = set(DIRECTORY.iterdir())
    async with running_shard(model) as shard:
        pair = await shard.connect("shm")
        assert set(DIRECTORY.iterdir()) == before
        pair.close()
        with pytest.raises(Mismatch):
            await shard.connect("shm", hidden_size=7168)
    assert set(DIRECTORY.iterdir()) == before


async def test_memory_that_the_ffn_cannot_see_is_declined_in_words(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def elsewhere(files: list[int]) -> Iterator[str]:
        with handing_over(files) as name:
            (DIRECTORY / name).unlink()
            yield name

    monkeypatch.setattr("afd.handoff.shm.handing_over", elsewhere)
    async with running_shard(model) as shard:
        frames = shard.frames()
        with pytest.raises(ConfigError, match=r"AFD_HANDOFF=shm cannot be had .* cannot open .* another host"):
            await asyncio.to_thread(connect_pair, shard.address, shard.hello(), frames, "shm", SPIN_S)
        transport, rung = await asyncio.to_thread(connect_pair, shard.address, shard.hello(), frames, "auto", SPIN_S)
        assert transport.name == rung.transport != "shm"
        transport.close()


def test_memory_that_cannot_be_had_is_a_sentence() -> None:
    with pytest.raises(TransportUnavailable, match=r"KiB of shared memory cannot be had .* lower AFD_MAX_SEQUENCES"):
        SharedRegion(1 << 50)


@pytest.mark.parametrize("name", ["../etc/passwd", "afd-", "afd-" + "0" * 31 + "/", ""])
def test_only_names_of_shared_memory_are_opened(name: str) -> None:
    with pytest.raises(TransportUnavailable, match="not one of shared memory"):
        take_over(name, 1)


def test_memory_of_another_size_is_declined() -> None:
    region = SharedRegion(8192)
    with pytest.raises(TransportUnavailable, match="has 8192 bytes, not 4096"):
        open_region(region.file.number, 4096, writable=False)


def test_memory_that_could_be_taken_away_under_the_other_side_is_declined() -> None:
    file = os.memfd_create("shrinks", os.MFD_ALLOW_SEALING)
    os.truncate(file, 4096)
    with pytest.raises(TransportUnavailable, match="not 4096 for good"):
        open_region(file, 4096, writable=False)
    os.close(file)
    region = SharedRegion(4096)
    with pytest.raises(OSError, match="not permitted"):
        os.truncate(region.file.number, 0)


def read_only(number: int) -> int:
    """The same file, opened anew."""
    return os.open(f"/proc/self/fd/{number}", os.O_RDONLY)


def test_memory_that_cannot_be_written_is_declined() -> None:
    region = SharedRegion(4096)
    file = read_only(region.file.number)
    with pytest.raises(TransportUnavailable, match="cannot be had"):
        open_region(file, 4096, writable=True)
    os.close(file)


def test_a_bell_that_is_no_pipe_is_declined() -> None:
    """The FFN's thread would sleep by it: it would wake up for ever, or fail, and all pairs with it."""
    (reading, writing), (other, _) = pipes = os.pipe(), os.pipe()
    region = SharedRegion(4096)
    for files in ((writing, reading), (reading, reading), (other, writing), (region.file.number, writing)):
        with pytest.raises(TransportUnavailable, match="no bell"):
            open_bell(*files)
    bell = open_bell(reading, writing)
    bell.ring()
    assert os.read(reading, 9) == b"!"
    for number in (*pipes[0], *pipes[1]):
        os.close(number)


def test_fewer_files_than_there_should_be_are_declined_and_closed() -> None:
    num_open = len(os.listdir("/proc/self/fd"))
    region = SharedRegion(4096)
    with handing_over([region.file.number]) as name, pytest.raises(TransportUnavailable, match="1 files were handed"):
        take_over(name, 2)
    del region
    assert len(os.listdir("/proc/self/fd")) == num_open


def test_nobody_else_may_open_what_is_handed_over() -> None:
    with handing_over([0]) as name:
        assert stat.S_IMODE((DIRECTORY / name).stat().st_mode) == 0o600
    assert not (DIRECTORY / name).exists()


def test_a_pair_that_comes_up_removes_what_a_killed_process_left_and_nothing_else() -> None:
    names = {kind: f"afd-{number:032x}" for number, kind in enumerate(("killed", "just made", "no socket's"))}
    long_ago = time.time() - 3600
    try:
        for kind in ("killed", "just made"):
            with socket.socket(socket.AF_UNIX) as left:
                left.bind(str(DIRECTORY / names[kind]))
        (DIRECTORY / names["no socket's"]).with_suffix(".other").touch()
        os.utime(DIRECTORY / names["killed"], (long_ago, long_ago))
        region = SharedRegion(4096)
        with handing_over([region.file.number]) as alive:
            os.utime(DIRECTORY / alive, (long_ago, long_ago))
            with handing_over([0]):
                there = {path.name for path in DIRECTORY.iterdir()}
            assert {alive, names["just made"], names["no socket's"] + ".other"} <= there
            assert names["killed"] not in there
            (file,) = take_over(alive, 1)  # who looked has taken nothing
            open_region(file, 4096, writable=True)
    finally:
        for path in DIRECTORY.glob(f"afd-{'0' * 31}?*"):
            path.unlink()


def test_what_nobody_rings_for_is_looked_at_again_after_a_share_of_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []
    monkeypatch.setattr("afd.handoff.bell.time.sleep", naps.append)
    for waited_s in (0.0001, 0.001, 0.004, 100.0):
        Lookout(50e-6, [None]).pause(waited_s, longest_s=0.0009)
    assert naps == [0.000125, 0.0005, 0.0009]


async def test_frame_that_names_no_expert_is_refused_and_its_neighbours_in_the_batch_are_computed(model: Model) -> None:
    async with running_shard(model) as shard:
        batcher = Batcher(shard.servicer.batcher.shard, MAX_FRAME_TOKENS, spin_s=SPIN_S, device=CPU)
        bad, good = StubEndpoint(shard.frame(1)), StubEndpoint(shard.frame(2))
        routing = bad.arriving[0].routing
        assert routing is not None
        routing.topk_ids[1, 0] = 99
        batcher.attach(bad)
        batcher.attach(good)
        batcher.start(ComputeThread())
        async with asyncio.timeout(10):
            while not (bad.refusals and good.answers):
                await asyncio.sleep(0.01)
        batcher.stop()
        assert "expert 99 does not exist" in bad.refusals[1]
        assert torch.equal(good.answers[2][0], shard.expected(shard.frame(2)))
        assert not bad.answers
        assert not good.refusals


async def test_dropped_frame_is_not_computed(model: Model) -> None:
    async with running_shard(model) as shard:
        batcher = Batcher(shard.servicer.batcher.shard, MAX_FRAME_TOKENS, spin_s=SPIN_S, device=CPU)
        mine, other = StubEndpoint(shard.frame(1), shard.frame(2)), StubEndpoint(shard.frame(3))
        mine.awaited.discard(1)
        batcher.attach(mine)
        batcher.attach(other)
        batcher.start(ComputeThread())
        async with asyncio.timeout(10):
            while not (mine.answers and other.answers):
                await asyncio.sleep(0.01)
        batcher.stop()
        assert mine.answers.keys() == {2}
        assert batcher.counters.num_frames_dropped == 1


async def test_frame_past_its_deadline_is_not_computed(model: Model) -> None:
    async with running_shard(model) as shard:
        batcher = Batcher(shard.servicer.batcher.shard, MAX_FRAME_TOKENS, spin_s=SPIN_S, device=CPU)
        late, timely = (shard.frame(number, num_tokens=number) for number in (2, 3))
        endpoint = StubEndpoint(
            late._replace(urgency=Urgency.within(-0.001)), timely._replace(urgency=Urgency.within(60.0))
        )
        batcher.attach(endpoint)
        batcher.start(ComputeThread())
        async with asyncio.timeout(10):
            while not endpoint.answers:
                await asyncio.sleep(0.01)
        batcher.stop()
        assert endpoint.answers.keys() == {3}
        assert (batcher.counters.num_frames_dropped, batcher.counters.num_tokens_dropped) == (1, 2)


async def test_urgent_frames_are_computed_first_unless_others_have_waited_for_long(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def frame(number: int, priority: int, moe: bool) -> Frame:
        return shard.frame(number, moe=moe)._replace(urgency=Urgency(priority))

    def order() -> list[list[int]]:
        batcher._queue = [QueuedFrame(endpoint, frame, time.perf_counter_ns()) for frame in frames]
        return [[queued.frame.frame_id for queued in batcher._next_batch()] for _ in range(3)]

    async with running_shard(model) as shard:
        batcher = Batcher(shard.servicer.batcher.shard, MAX_FRAME_TOKENS, spin_s=SPIN_S, device=CPU)
        frames = [frame(1, 0, moe=True), frame(2, 0, moe=True), frame(3, -1, moe=False), frame(4, 1, moe=False)]
        frames[3] = frames[3]._replace(layer_idx=99)
        endpoint = StubEndpoint(*frames)
        assert order() == [[3], [1, 2], [4]]
        frames = frames[::-1]
        assert order() == [[3], [2, 1], [4]]
        monkeypatch.setattr("services.ffn.batcher._LONGEST_PASSED_OVER_S", 0.0)
        assert order() == [[4], [3], [2, 1]]


@each_transport
async def test_urgency_crosses_with_the_frame(
    model: Model, kind: TransportName, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived: list[Urgency] = []
    async with running_shard(model) as shard:
        compute = shard.servicer.batcher._compute
        monkeypatch.setattr(
            shard.servicer.batcher,
            "_compute",
            lambda batch: (arrived.extend(queued.frame.urgency for queued in batch), compute(batch)),
        )
        pair = await shard.connect(kind)
        now = time.monotonic()
        for number, urgency in enumerate((Urgency(-7, now + 100), Urgency(1 << 30), Urgency(0, now + 1e6))):
            frame = shard.frame(number + 1)._replace(urgency=urgency)
            await pair.send(frame)
            await pair.receive(frame)
        pair.close()
    assert [urgency.priority for urgency in arrived] == [-7, 1 << 30, 0]
    assert arrived[0].deadline == pytest.approx(now + 100, abs=1)
    assert [urgency.time_left_s for urgency in arrived[1:]] == [None, None], "too far away to matter"


async def test_answer_that_nobody_waits_for_is_not_awaited(model: Model) -> None:
    async with running_shard(model) as shard:
        pair = await shard.connect("inline")
        shard.servicer.batcher.stop()  # frozen
        pairs = (ReplicaPair("ffn", 0, 1, pair.transport, Rung("inline", 0.0, 0.0)),)
        ffn = RemoteFFN(pair.frames, CPU, timeout_s=30.0, spin_s=SPIN_S)
        ffn.table = RoutingTable(1, (pairs,))
        frame = shard.frame()
        batch = Batch(0, frame.num_tokens)
        ffn.send(batch, frame.layer_idx, frame.ffn_input, frame.routing)
        waiting = asyncio.create_task(asyncio.to_thread(ffn.receive, batch))
        await asyncio.sleep(0.1)
        batch.abandoned = True
        with pytest.raises(Cancelled):
            await asyncio.wait_for(waiting, 5)
        ffn.close()


@pytest.mark.parametrize(("no_work_s", "is_bubble"), [(60.0, True), (0.05, False)])
async def test_the_ffn_counts_time_between_batches_as_a_bubble_unless_there_was_no_work(
    model: Model, monkeypatch: pytest.MonkeyPatch, no_work_s: float, is_bubble: bool
) -> None:
    monkeypatch.setattr("services.ffn.batcher._NO_WORK_S", no_work_s)
    async with running_shard(model) as shard:
        batcher = Batcher(shard.servicer.batcher.shard, MAX_FRAME_TOKENS, spin_s=SPIN_S, device=CPU)
        batcher.start(ComputeThread())
        for replica in (StubEndpoint(shard.frame(1)), StubEndpoint(shard.frame(2))):
            await asyncio.sleep(0.1)
            batcher.attach(replica)
            async with asyncio.timeout(10):
                while not replica.answers:
                    await asyncio.sleep(0.005)
        batcher.stop()
        assert batcher.counters.num_batches == 2
        assert (batcher.counters.bubble_ns >= 0.1e9) == is_bubble
        assert is_bubble or batcher.counters.bubble_ns == 0


async def test_withdrawn_frame_is_not_answered(model: Model) -> None:
    async with running_shard(model) as shard:
        pair, frame = await shard.connect("shm"), shard.frame(5)
        pair.frames.write(frame)
        pair.transport.drop(frame)
        with pytest.raises(PeerUnavailable, match="in time"):
            await pair.receive(frame, 0.2)
        assert shard.servicer.batcher.counters.num_frames == 0
        pair.close()


@each_transport
async def test_peer_that_leaves_is_detached(model: Model, kind: TransportName) -> None:
    async with running_shard(model) as shard:
        pair = await shard.connect(kind)
        async with asyncio.timeout(5):
            while shard.servicer.num_streams == 0:
                await asyncio.sleep(0.01)
        pair.close()
        await until_no_pair_is_left(shard)


@each_transport
async def test_lost_ffn_is_noticed_while_waiting_for_it(model: Model, kind: TransportName) -> None:
    async with contextlib.AsyncExitStack() as stack:
        shard = await stack.enter_async_context(running_shard(model))
        pair, frame = await shard.connect(kind), shard.frame()
        await stack.aclose()
        with pytest.raises(PeerUnavailable, match="the FFN at"):
            await pair.receive(frame)
        pair.close()


@each_transport
async def test_answer_that_does_not_come_is_not_awaited_for_ever(model: Model, kind: TransportName) -> None:
    async with running_shard(model) as shard:
        pair = await shard.connect(kind)
        with pytest.raises(PeerUnavailable, match="in time"):
            await pair.receive(shard.frame(12345), 0.05)
        pair.close()
