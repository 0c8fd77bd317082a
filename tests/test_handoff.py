"""The crossing between attention and FFN: the handshake, good frames, and every kind of bad one."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import pytest
import torch

from afd.errors import AfdError, InternalError, Mismatch, PeerUnavailable
from afd.handoff.frame import Crossing, Frame
from afd.handoff.handshake import topology
from afd.handoff.inline import InlineTransport, frame_to_proto
from afd.handoff.remote import RemoteFFN
from afd.model.checkpoint import Checkpoint
from afd.model.moe import Routing
from afd.model.weights import load_ffn_shard
from afd.rpc import serving
from afd.v1 import ffn_pb2 as pb
from afd.v1 import ffn_pb2_grpc
from services.ffn.batcher import Batcher, QueuedFrame
from services.ffn.servicer import FfnServicer
from tests.conftest import Model

CPU = torch.device("cpu")
MAX_FRAME_TOKENS = 64


@dataclass
class Shard:
    """An FFN shard that serves, and what fits it."""

    servicer: FfnServicer
    address: str
    checkpoint: Checkpoint
    shard: int
    num_shards: int

    def hello(self, **changes: Any) -> pb.Hello:
        ours = topology(self.checkpoint.config, self.checkpoint.fingerprint, torch.float32, self.shard, self.num_shards)
        for name, value in changes.items():
            setattr(ours, name, value)
        return pb.Hello(replica_id="test", topology=ours)

    async def connect(self, **changes: Any) -> InlineTransport:
        return await asyncio.to_thread(InlineTransport, self.address, self.hello(**changes), torch.float32, CPU)

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
        return Frame(frame_id, self.layer(moe), ffn_input, routing if moe else None)

    def expected(self, frame: Frame) -> torch.Tensor:
        return self.servicer.batcher.shard(frame.layer_idx, frame.ffn_input, frame.routing)


@contextlib.asynccontextmanager
async def running_shard(model: Model, shard: int = 0, num_shards: int = 1) -> AsyncIterator[Shard]:
    checkpoint = Checkpoint(model.path)
    loaded = load_ffn_shard(checkpoint, shard, num_shards, torch.float32, CPU, lambda done, total: None)
    batcher = Batcher(loaded, MAX_FRAME_TOKENS)
    batcher.start()
    welcome = pb.Welcome(
        replica_id="ffn",
        topology=topology(checkpoint.config, checkpoint.fingerprint, torch.float32, shard, num_shards),
        max_frame_tokens=MAX_FRAME_TOKENS,
    )
    servicer = FfnServicer(batcher, welcome, torch.float32, CPU)

    def add(server: grpc.aio.Server) -> None:
        ffn_pb2_grpc.add_FfnServiceServicer_to_server(servicer, server)

    async with serving(add, ("afd.v1.FfnService",), "127.0.0.1", 0) as port:
        yield Shard(servicer, f"127.0.0.1:{port}", checkpoint, shard, num_shards)
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
    crossings: list[Crossing]


@pytest.mark.parametrize("moe", [True, False])
async def test_frame_comes_back_as_the_shards_partial_sum(model: Model, moe: bool) -> None:
    async with running_shard(model) as shard:
        transport = await shard.connect()
        frame = shard.frame(moe=moe)
        await asyncio.to_thread(transport.send, frame)
        output = await asyncio.to_thread(transport.receive, frame.frame_id, 5.0)
        assert torch.equal(output.ffn_output, shard.expected(frame))
        assert output.compute_ns > 0
        transport.close()


async def test_partial_sums_of_all_shards_are_the_whole(model: Model) -> None:
    async with contextlib.AsyncExitStack() as stack:
        shards = [await stack.enter_async_context(running_shard(model, i, 3)) for i in range(3)]
        whole = await stack.enter_async_context(running_shard(model))
        ffn = RemoteFFN([await shard.connect() for shard in shards], timeout_s=5.0)
        frame, batch = whole.frame(), Batch(0, [])
        await asyncio.to_thread(ffn.send, batch, frame.layer_idx, frame.ffn_input, frame.routing)
        total = await asyncio.to_thread(ffn.receive, batch)
        torch.testing.assert_close(total, whole.expected(frame), atol=1e-5, rtol=1e-5)
        assert [crossing.shard for crossing in batch.crossings] == [0, 1, 2]
        ffn.close()


async def test_frames_of_a_layer_from_several_replicas_are_one_batch(model: Model) -> None:
    async with running_shard(model) as shard:
        answers: dict[int, Any] = {}
        batcher = Batcher(shard.servicer.batcher.shard, MAX_FRAME_TOKENS)
        frames = [shard.frame(frame_id=i, num_tokens=i) for i in (1, 2, 3)]
        for frame in [*frames, shard.frame(frame_id=4, moe=False)]:
            batcher.submit(QueuedFrame(object(), frame, lambda answer, f=frame: answers.update({f.frame_id: answer})))
        batcher.start()
        async with asyncio.timeout(10):
            while len(answers) < 4:
                await asyncio.sleep(0.01)
        batcher.stop()
        assert [answers[i].num_batch_tokens for i in (1, 2, 3, 4)] == [6, 6, 6, 3]
        assert batcher.counters.num_batches == 2
        for frame in frames:
            torch.testing.assert_close(answers[frame.frame_id].ffn_output, shard.expected(frame), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("protocol_version", 99, "protocol version differs: attention has 99, the FFN has 1"),
        ("model_fingerprint", "other", "model fingerprint differs: attention has other, the FFN has"),
        ("hidden_size", 7168, "hidden size differs: attention has 7168"),
        ("num_layers", 61, "num layers differs: attention has 61"),
        ("dtype", 2, "dtype differs: attention has DTYPE_BFLOAT16, the FFN has DTYPE_FLOAT32"),
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


async def test_stream_without_a_hello_is_refused(model: Model) -> None:
    async with running_shard(model) as shard, grpc.aio.insecure_channel(shard.address) as channel:
        call = ffn_pb2_grpc.FfnServiceStub(channel).Connect()
        await call.write(pb.ConnectRequest(drop_frame=pb.DropFrame(frame_id=1)))
        with pytest.raises(grpc.aio.AioRpcError, match="must begin with a hello"):
            await call.read()


async def test_nobody_at_the_address_is_an_error_in_bounded_time() -> None:
    with pytest.raises(PeerUnavailable):
        await asyncio.to_thread(InlineTransport, "127.0.0.1:1", pb.Hello(), torch.float32, CPU)


def bad_frames(shard: Shard) -> dict[str, pb.Frame]:
    """Frames that cannot be, by the words of their refusal."""
    moe, dense = frame_to_proto(shard.frame()), frame_to_proto(shard.frame(moe=False))

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
        "65 tokens": frame_to_proto(shard.frame(num_tokens=MAX_FRAME_TOKENS + 1)),
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
        await call.write(pb.ConnectRequest(frame=frame_to_proto(shard.frame(frame_id=2))))
        assert (await call.read()).output.frame_id == 2
        assert shard.servicer.num_frames_refused == len(bad_frames(shard))


async def test_refused_frame_is_an_error_for_its_sender(model: Model) -> None:
    async with running_shard(model) as shard:
        transport = await shard.connect()
        await asyncio.to_thread(transport.send, shard.frame(num_tokens=MAX_FRAME_TOKENS + 1))
        with pytest.raises(InternalError, match="from 1 to 64 are allowed"):
            await asyncio.to_thread(transport.receive, 1, 5.0)
        transport.close()


async def test_dropped_frame_is_not_computed(model: Model) -> None:
    async with running_shard(model) as shard:
        batcher = Batcher(shard.servicer.batcher.shard, MAX_FRAME_TOKENS)
        answers: list[AfdError | Any] = []
        mine, other = object(), object()
        for stream, frame_id in ((mine, 1), (mine, 2), (other, 1)):
            batcher.submit(QueuedFrame(stream, shard.frame(frame_id), answers.append))
        batcher.drop(mine, 1)
        assert batcher.num_queued == 2
        batcher.drop(mine)
        assert batcher.num_queued == 1
        batcher.start()
        async with asyncio.timeout(10):
            while not answers:
                await asyncio.sleep(0.01)
        batcher.stop()
        assert batcher.counters.num_frames == 1
        assert batcher.counters.num_frames_dropped == 2


async def test_peer_that_leaves_takes_its_queued_frames_along(model: Model) -> None:
    async with running_shard(model) as shard:
        async with raw_stream(shard):
            assert shard.servicer.num_streams == 1
        for _ in range(500):
            if shard.servicer.num_streams == 0:
                break
            await asyncio.sleep(0.01)
        assert shard.servicer.num_streams == 0


async def test_lost_ffn_is_noticed_while_waiting_for_it(model: Model) -> None:
    async with contextlib.AsyncExitStack() as stack:
        shard = await stack.enter_async_context(running_shard(model))
        transport = await shard.connect()
        await stack.aclose()
        with pytest.raises(PeerUnavailable):
            await asyncio.to_thread(transport.receive, 1, 5.0)
        transport.close()


async def test_answer_that_does_not_come_is_not_awaited_for_ever(model: Model) -> None:
    async with running_shard(model) as shard:
        transport = await shard.connect()
        with pytest.raises(PeerUnavailable, match="in time"):
            await asyncio.to_thread(transport.receive, 12345, 0.05)
        transport.close()
