"""What a crossing costs: round trips of equal payloads over each transport, `python -m benchmarks.handoff`.

A second process runs an FFN shard as it is served: servicer, batcher, endpoints. This one sends it probe frames, which
the batcher answers with their own ffn_input. A round trip begins with the payload outside the slot and ends when the
answer can be read in place: it has the write into the slot, the FFN's copy into its answer, and whatever the transport
does beside. `memcpy` is what it is held against: one process copies the same bytes into a buffer and out of it, there
and back again, two copies each way. `grpc` is a stream of gRPC that echoes the payload as one message of bytes.

Each process keeps to a core of its own. Transports alternate within a round; figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import multiprocessing
import os
import queue
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
import grpc.aio
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from afd.compute import ComputeThread
from afd.errors import TransportUnavailable
from afd.handoff.frame import Frame
from afd.handoff.handshake import topology
from afd.handoff.negotiate import LADDER, TransportName
from afd.handoff.shm import SharedRegion
from afd.handoff.slots import FrameSlots, SlotShape
from afd.handoff.tensors import dtype_to_proto
from afd.handoff.transport import receive
from afd.model.checkpoint import Checkpoint
from afd.model.random_checkpoint import ModelSizes, make_checkpoint
from afd.model.weights import load_ffn_shard
from afd.rpc import CHANNEL_OPTIONS, serving
from afd.v1 import ffn_pb2 as pb
from afd.v1 import ffn_pb2_grpc
from services.ffn.batcher import Batcher
from services.ffn.servicer import FfnServicer

DTYPE, CPU = torch.float32, torch.device("cpu")
_ECHO = "/benchmarks.Echo/Echo"
_FFN_STARTS_S = 60.0
_FFN_STOPS_S = 10.0
_ANSWER_TIMEOUT_S = 10.0
_LONGEST_STREAM_S = 600.0
_NUM_WARM_UPS = 20


@dataclass(frozen=True)
class Payload:
    """A frame of num_tokens tokens."""

    name: str
    num_tokens: int
    hidden_size: int

    @property
    def num_bytes(self) -> int:
        return self.num_tokens * self.hidden_size * DTYPE.itemsize


PAYLOADS = (
    Payload("64 B", 1, 16),
    Payload("16 KiB", 1, 4096),
    Payload("256 KiB", 16, 4096),
    Payload("1.75 MiB", 112, 4096),
)


@dataclass(frozen=True)
class Plan:
    """How it is measured."""

    rounds: int
    round_trips: int
    spin_us: float
    cores: tuple[int, ...]  # one for each process; none: not pinned


@dataclass(frozen=True)
class Result:
    """One way of one payload."""

    payload: str
    way: str
    p50_us: float
    p99_us: float


RoundTrip = Callable[[], None]


def pin(process: int, plan: Plan) -> None:
    if plan.cores:
        os.sched_setaffinity(0, {plan.cores[process]})


# The other process.


def run_ffn(payload: Payload, model_dir: str, plan: Plan, pipe: Connection) -> None:
    """Serves one shard until the pipe ends; sends the address."""
    pin(1, plan)
    torch.set_num_threads(1)
    asyncio.run(_serve(payload, Path(model_dir), plan, pipe))


async def _serve(payload: Payload, model_dir: Path, plan: Plan, pipe: Connection) -> None:
    checkpoint = Checkpoint(model_dir)
    shard = load_ffn_shard(checkpoint, 0, 1, DTYPE, CPU, lambda done, total: None)
    batcher = Batcher(shard, payload.num_tokens, plan.spin_us / 1e6, CPU)
    batcher.start(ComputeThread())
    welcome = pb.Welcome(
        replica_id="ffn",
        topology=topology(checkpoint.config, checkpoint.fingerprint, DTYPE, 0, 1),
        max_frame_tokens=payload.num_tokens,
    )
    servicer = FfnServicer(batcher, welcome, DTYPE)

    def add_services(server: grpc.aio.Server) -> None:
        ffn_pb2_grpc.add_FfnServiceServicer_to_server(servicer, server)
        echo: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(_echo)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("benchmarks.Echo", {"Echo": echo}),))

    async with serving(add_services, (), "127.0.0.1", 0) as port:
        pipe.send(f"127.0.0.1:{port}")
        with contextlib.suppress(EOFError):
            await asyncio.to_thread(pipe.recv)
    batcher.stop()


async def _echo(requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


@contextlib.contextmanager
def ffn_process(payload: Payload, model_dir: Path, plan: Plan) -> Iterator[str]:
    """Its address."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=run_ffn, args=(payload, str(model_dir), plan, theirs))
    process.start()
    try:
        if not ours.poll(_FFN_STARTS_S):
            raise SystemExit("the FFN process does not start")
        yield ours.recv()
    finally:
        ours.close()
        theirs.close()
        process.join(_FFN_STOPS_S)
        process.kill()


# The ways across.


@contextlib.contextmanager
def transport_way(
    name: TransportName, payload: Payload, checkpoint: Checkpoint, address: str, plan: Plan
) -> Iterator[RoundTrip]:
    """Probe frames of the payload over a transport. Raises TransportUnavailable."""
    shape = SlotShape(1, payload.num_tokens, payload.hidden_size, checkpoint.config.top_k, DTYPE, DTYPE, DTYPE)
    frames = FrameSlots(SharedRegion(shape.frame_stride), shape)
    hello = pb.Hello(
        replica_id="benchmark",
        topology=topology(checkpoint.config, checkpoint.fingerprint, DTYPE, 0, 1),
        frame_dtype=dtype_to_proto(DTYPE),
        output_dtype=dtype_to_proto(DTYPE),
        num_slots=1,
        max_tokens=payload.num_tokens,
    )
    transport = LADDER[name](address, hello, frames)
    ids = itertools.count(1)
    frame = Frame(0, 0, 0, _tensor(payload), None, is_probe=True)

    def round_trip() -> None:
        sent = frame._replace(frame_id=next(ids))
        frames.write(sent)
        transport.send(sent)
        receive(transport, sent, _ANSWER_TIMEOUT_S, plan.spin_us / 1e6)

    try:
        yield round_trip
    finally:
        transport.close()


@contextlib.contextmanager
def grpc_way(payload: Payload, address: str) -> Iterator[RoundTrip]:
    message = bytes(payload.num_bytes)
    outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        echo: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(_ECHO)
        echoes = echo(iter(outbox.get, None), timeout=_LONGEST_STREAM_S)

        def round_trip() -> None:
            outbox.put(message)
            next(echoes)

        yield round_trip
        outbox.put(None)


@contextlib.contextmanager
def memcpy_way(payload: Payload) -> Iterator[RoundTrip]:
    """The same bytes copied into a buffer and out of it, there and back again: two copies each way."""
    hops = [_tensor(payload) for _ in range(5)]

    def round_trip() -> None:
        for source, target in itertools.pairwise(hops):
            target.copy_(source)

    yield round_trip


def _tensor(payload: Payload) -> Tensor:
    return torch.ones((payload.num_tokens, payload.hidden_size), dtype=DTYPE)


def ways(
    payload: Payload, checkpoint: Checkpoint, address: str, plan: Plan
) -> dict[str, Callable[[], contextlib.AbstractContextManager[RoundTrip]]]:
    def over(name: TransportName) -> Callable[[], contextlib.AbstractContextManager[RoundTrip]]:
        return lambda: transport_way(name, payload, checkpoint, address, plan)

    return {
        **{name: over(name) for name in LADDER},
        "grpc": lambda: grpc_way(payload, address),
        "memcpy": lambda: memcpy_way(payload),
    }


# Measuring.


def measure(payload: Payload, plan: Plan, console: Console) -> list[Result]:
    """All ways of one payload."""
    with tempfile.TemporaryDirectory() as folder:
        model_dir = Path(folder) / "model"
        make_checkpoint(model_dir, _sizes(payload))
        with ffn_process(payload, model_dir, plan) as address:
            return _measure_ways(payload, Checkpoint(model_dir), address, plan, console)


def _measure_ways(payload: Payload, checkpoint: Checkpoint, address: str, plan: Plan, console: Console) -> list[Result]:
    rounds: dict[str, list[tuple[float, float]]] = {}
    for number in range(plan.rounds):
        for name, way in ways(payload, checkpoint, address, plan).items():
            try:
                with way() as round_trip:
                    rounds.setdefault(name, []).append(_percentiles_us(round_trip, plan))
            except TransportUnavailable as error:
                if number == 0:
                    console.print(f"{name}: {error}", soft_wrap=True)
    return [
        Result(payload.name, name, *(statistics.median(column) for column in zip(*pairs, strict=True)))
        for name, pairs in rounds.items()
    ]


def _percentiles_us(round_trip: RoundTrip, plan: Plan) -> tuple[float, float]:
    for _ in range(_NUM_WARM_UPS):
        round_trip()
    times = []
    for _ in range(plan.round_trips):
        start = time.perf_counter_ns()
        round_trip()
        times.append((time.perf_counter_ns() - start) / 1e3)
    times.sort()
    return statistics.median(times), times[int(0.99 * (len(times) - 1))]


def _sizes(payload: Payload) -> ModelSizes:
    return ModelSizes(
        num_hidden_layers=2,
        hidden_size=payload.hidden_size,
        num_attention_heads=1,
        intermediate_size=8,
        moe_num_experts=2,
        moe_top_k=1,
        moe_intermediate_size=8,
        share_expert_dim=8,
        moe_layers_enum="1",
        vocab_size=300,
    )


def table(results: list[Result], plan: Plan) -> Table:
    cores = "a core for each process" if plan.cores else "not pinned"
    made = Table(title=f"round trips, µs, p50 / p99; looks out for {plan.spin_us:g} µs; {cores}")
    names = list(dict.fromkeys(result.way for result in results))
    by_place = {(result.payload, result.way): result for result in results}
    for column in ("each way", *names, "shm / memcpy"):
        made.add_column(column, justify="right")
    for payload in dict.fromkeys(result.payload for result in results):
        row = {name: by_place[payload, name] for name in names}
        ratio = row["shm"].p50_us / row["memcpy"].p50_us if "shm" in row else float("nan")
        cells = (f"{result.p50_us:.0f} / {result.p99_us:.0f}" for result in row.values())
        made.add_row(payload, *cells, f"{ratio:.2f}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="Round trips between attention and FFN over each transport.")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--round-trips", type=int, default=200, help="of each way in each round")
    parser.add_argument("--spin-us", type=float, default=1000, help="as AFD_HANDOFF_SPIN_US")
    parser.add_argument("--unpinned", action="store_true", help="let the scheduler place the two processes")
    options = parser.parse_args()
    cores = () if options.unpinned else tuple(sorted(os.sched_getaffinity(0))[:2])
    if len(cores) == 1:
        parser.error("there is one core for two processes; use --unpinned")
    plan = Plan(options.rounds, options.round_trips, options.spin_us, cores)
    pin(0, plan)
    torch.set_num_threads(1)
    console = Console()
    results = [result for payload in PAYLOADS for result in measure(payload, plan, console)]
    console.print(table(results, plan))
    if options.json:
        figures = {"plan": asdict(plan), "results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
