"""What the gateway costs: streams held, tokens/s, and the time it adds to a token, `python -m benchmarks.gateway`.

A stub of an attention replica, in a process of its own, is registered like a real one and answers Decode with tokens at
the rate that is asked for. Each token bears the moment of its emission, in microseconds of the host's monotonic clock,
where its log-probability would be: a float32 holds 24 bits exactly. This process reads the streams, once through the
real gateway process and once from the stub directly; the difference is the gateway's. Stub and reader share one core in
both cases, and the gateway has another one to itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal, get_args

import grpc.aio
import psutil
from rich.console import Console
from rich.table import Table

from afd.bench import Percentiles
from afd.forkserver import ForkServer
from afd.mesh import Service
from afd.model.checkpoint import Checkpoint
from afd.model.random_checkpoint import ModelSizes, make_checkpoint
from afd.rpc import CHANNEL_OPTIONS, serving
from afd.state.connection import connect
from afd.state.embedded import EmbeddedRedis
from afd.state.registry import Registry, Replica, Role
from afd.v1 import attention_pb2, attention_pb2_grpc, gateway_pb2, gateway_pb2_grpc, sampling_pb2

_MESH = "benchmark"
_LEASE_S = 5.0
_STARTS_S = 60.0
_STOPS_S = 10.0
_LONGEST_LOAD_S = 120.0
_STAMPS = 1 << 24  # microseconds, after which stamps begin anew
_WARM_UP_PART = 4  # the first 1 in 4 tokens are not timed
_PROMPT = [2, 3, 4, 5]
_FIRST_LETTER, _NUM_LETTERS = 2 + ord("a"), 26  # of the byte tokeniser

Way = Literal["gateway", "direct"]
Stamps = AsyncIterator[float]


@dataclass(frozen=True)
class Load:
    """Streams at once, each with a token every interval_s, all at the same moment if `together`, as an engine's step
    gives them; interval_s 0: as fast as they are taken."""

    name: str
    streams: int
    interval_s: float
    tokens: int  # of each stream
    together: bool = False


LOADS = (
    Load("200, 5/s", 200, 0.2, 40),
    Load("200, 5/s, at once", 200, 0.2, 40, together=True),
    Load("1000, 0.5/s", 1000, 2.0, 8),
    Load("32, no pause", 32, 0.0, 400),
)


@dataclass(frozen=True)
class Result:
    """Of one load: the time from a token's emission to its arrival, and what it took."""

    load: Load
    way: Way
    num_tokens: int
    num_errors: int
    tokens_per_s: float
    delay_ms: Percentiles
    gateway_cpu_us: float  # of a token


def now_stamp() -> int:
    return time.monotonic_ns() // 1000 % _STAMPS


def stamp_age_s(stamp: float) -> float:
    return (now_stamp() - int(stamp)) % _STAMPS / 1e6


@contextlib.contextmanager
def on_core(core: int | None) -> Iterator[None]:
    """Keeps this thread to a core while the block runs, and so for good what it starts there."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before if core is None else {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# The stub.


class StubAttention(attention_pb2_grpc.AttentionServiceServicer):
    """Says letters. The seed of a request is its interval in microseconds, as temperature it has whether its tokens
    come together with those of all others."""

    async def Decode(
        self, request: attention_pb2.DecodeRequest, context: object
    ) -> AsyncIterator[attention_pb2.DecodeResponse]:
        interval_s, last = request.sampling.seed / 1e6, request.sampling.max_tokens - 1
        phase = 0.0 if request.sampling.temperature else random.random()
        due = (time.monotonic() // interval_s + 1 + phase) * interval_s if interval_s else 0.0
        for index in range(last + 1):
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            due += interval_s
            yield attention_pb2.DecodeResponse(tokens=[_token(index, is_last=index == last)])

    async def GetStep(self, request: attention_pb2.GetStepRequest, context: object) -> attention_pb2.GetStepResponse:
        return attention_pb2.GetStepResponse()

    async def GetLoad(self, request: attention_pb2.GetLoadRequest, context: object) -> attention_pb2.GetLoadResponse:
        return attention_pb2.GetLoadResponse()


def _token(index: int, *, is_last: bool) -> attention_pb2.DecodedToken:
    return attention_pb2.DecodedToken(
        index=index,
        id=_FIRST_LETTER + index % _NUM_LETTERS,
        logprob=now_stamp(),
        finish_reason=sampling_pb2.FINISH_REASON_LENGTH if is_last else sampling_pb2.FINISH_REASON_UNSPECIFIED,
    )


def run_stub(model_dir: str, redis_url: str, pipe: Connection) -> None:
    """Serves until the pipe ends; sends the address."""
    asyncio.run(_serve_stub(Checkpoint(Path(model_dir)), redis_url, pipe))


async def _serve_stub(checkpoint: Checkpoint, redis_url: str, pipe: Connection) -> None:
    def add_services(server: grpc.aio.Server) -> None:
        attention_pb2_grpc.add_AttentionServiceServicer_to_server(StubAttention(), server)

    async with connect(redis_url) as redis, serving(add_services, (), "127.0.0.1", 0) as port:
        replica = Replica(
            role="attention",
            replica_id="stub",
            address=f"127.0.0.1:{port}",
            fingerprint=checkpoint.fingerprint,
            pid=os.getpid(),
            max_context_tokens=checkpoint.config.max_context_tokens,
        )
        async with Registry(redis, _LEASE_S, _MESH).registered(lambda: replica):
            pipe.send(replica.address)
            with contextlib.suppress(EOFError):
                await asyncio.to_thread(pipe.recv)


@contextlib.contextmanager
def stub_process(model_dir: Path, redis_url: str) -> Iterator[str]:
    """Its address."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=run_stub, args=(str(model_dir), redis_url, theirs))
    process.start()
    try:
        if not ours.poll(_STARTS_S):
            raise SystemExit("the stub does not start")
        yield ours.recv()
    finally:
        ours.close()
        theirs.close()
        process.join(_STOPS_S)
        process.kill()


# The gateway.


@contextlib.contextmanager
def gateway_process(model_dir: Path, redis_url: str) -> Iterator[Replica]:
    """A gateway as `afd up` starts it."""
    settings = {"mesh": _MESH, "model": model_dir, "redis": redis_url, "trace_sample": 0, "log_level": "warning"}
    with ForkServer() as fork_server:
        service = Service("gateway", 0, settings, fork_server)
        service.start()
        try:
            yield asyncio.run(_registered(redis_url, "gateway"))
        finally:
            service.terminate()
            service.wait(_STOPS_S)


async def _registered(redis_url: str, role: Role) -> Replica:
    """The replica of a role, once there is one."""
    async with connect(redis_url) as redis, asyncio.timeout(_STARTS_S):
        registry = Registry(redis, _LEASE_S, _MESH)
        while not (replicas := await registry.replicas(role)):
            await asyncio.sleep(0.05)
        return replicas[0]


# The reader.


def _sampling(load: Load) -> sampling_pb2.SamplingParams:
    return sampling_pb2.SamplingParams(
        seed=int(load.interval_s * 1e6), temperature=float(load.together), max_tokens=load.tokens, ignore_eos=True
    )


async def through_gateway(channel: grpc.aio.Channel, load: Load) -> Stamps:
    prompt = gateway_pb2.TokenIds(ids=_PROMPT)
    request = gateway_pb2.GenerateRequest(token_ids=prompt, sampling=_sampling(load))
    async for response in gateway_pb2_grpc.GatewayServiceStub(channel).Generate(request, timeout=_LONGEST_LOAD_S):
        for token in response.tokens:
            yield token.logprob


async def directly(channel: grpc.aio.Channel, load: Load) -> Stamps:
    request = attention_pb2.DecodeRequest(token_ids=_PROMPT, epoch=1, sampling=_sampling(load))
    async for response in attention_pb2_grpc.AttentionServiceStub(channel).Decode(request, timeout=_LONGEST_LOAD_S):
        for token in response.tokens:
            yield token.logprob


READERS: dict[Way, Callable[[grpc.aio.Channel, Load], Stamps]] = {"gateway": through_gateway, "direct": directly}


async def run_load(load: Load, way: Way, address: str, gateway: psutil.Process) -> Result:
    delays: list[float] = []
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        await asyncio.wait_for(channel.channel_ready(), _STARTS_S)
        cpu_s, start = _cpu_s(gateway), time.perf_counter()

        async def follow() -> None:
            async for stamp in READERS[way](channel, load):
                delays.append(stamp_age_s(stamp))

        ends = await asyncio.gather(*(follow() for _ in range(load.streams)), return_exceptions=True)
        seconds, cpu_s = time.perf_counter() - start, _cpu_s(gateway) - cpu_s
    return Result(
        load=load,
        way=way,
        num_tokens=len(delays),
        num_errors=sum(end is not None for end in ends),
        tokens_per_s=len(delays) / seconds,
        delay_ms=Percentiles.of(delays[len(delays) // _WARM_UP_PART :]),
        gateway_cpu_us=1e6 * cpu_s / len(delays),
    )


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


# Measuring.


def measure(loads: Sequence[Load], cores: Sequence[int | None]) -> list[Result]:
    """Every load both ways; the first core is the stub's and this process's, the second one the gateway's."""
    with contextlib.ExitStack() as stack:
        model_dir = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_checkpoint(model_dir, ModelSizes())
        with on_core(cores[1]):
            redis = stack.enter_context(EmbeddedRedis())
        stack.enter_context(on_core(cores[0]))
        stub = stack.enter_context(stub_process(model_dir, redis.url))
        with on_core(cores[1]):
            gateway = stack.enter_context(gateway_process(model_dir, redis.url))
        addresses: dict[Way, str] = {"gateway": gateway.address, "direct": stub}
        process = psutil.Process(gateway.pid)
        return [asyncio.run(run_load(load, way, addresses[way], process)) for load in loads for way in get_args(Way)]


def table(results: Sequence[Result]) -> Table:
    made = Table(title="from the emission of a token to its arrival, ms; CPU time of the gateway for a token")
    for column in ("streams", "way", "errors", "tokens/s", "p50", "p99", "CPU, µs"):
        made.add_column(column, justify="right")
    for row in results:
        delays = f"{row.delay_ms.p50:.2f}", f"{row.delay_ms.p99:.2f}"
        cpu = f"{row.gateway_cpu_us:.0f}" if row.way == "gateway" else ""
        made.add_row(row.load.name, row.way, str(row.num_errors), f"{row.tokens_per_s:.0f}", *delays, cpu)
    return made


def two_cores() -> tuple[int, int]:
    """Raises SystemExit where there is only one."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("there is one core for three processes; use --unpinned")
    return cores[0], cores[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="What the gateway costs, behind it a stub of an attention replica.")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--unpinned", action="store_true", help="let the scheduler place the processes")
    options = parser.parse_args()
    cores = (None, None) if options.unpinned else two_cores()
    results = measure(LOADS, cores)
    Console().print(table(results))
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
