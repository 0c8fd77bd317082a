"""Keeps a pair with every replica of the FFN that holds a lease, and the routing table made of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable

import torch

from afd.config import AttentionSettings
from afd.errors import AfdError, ConfigError, Mismatch, PeerUnavailable, TransportUnavailable
from afd.handoff.fp8 import FP8
from afd.handoff.handshake import topology
from afd.handoff.negotiate import connect_pair
from afd.handoff.remote import RemoteFFN
from afd.handoff.replicas import Pair, RoutingTable
from afd.handoff.shm import SharedRegion
from afd.handoff.slots import FrameSlots, Region, SlotShape
from afd.handoff.tensors import dtype_to_proto
from afd.model.checkpoint import Checkpoint
from afd.service import background
from afd.state.registry import NO_LAYOUT, Layout, Registry, Replica
from afd.v1 import ffn_pb2 as pb

log = logging.getLogger(__name__)

_START_POLL_S = 0.02
_LOOK_S = 0.2  # how soon a lost pair is seen
_RETRY_S = 0.5
_RETIRE_S = 2.0


class FfnConnector:
    """`ffn` is the engine's; what is here runs on the event loop, and comes up in threads beside it."""

    def __init__(
        self,
        settings: AttentionSettings,
        checkpoint: Checkpoint,
        registry: Registry,
        dtype: torch.dtype,
        device: torch.device,
        traceparent: Callable[[], str],
    ) -> None:
        """Raises ConfigError if the transport that is wanted cannot be had on this host."""
        self.settings = settings
        self.checkpoint = checkpoint
        self.registry = registry
        self.dtype = dtype
        self.device = device
        self.frames = self._frame_slots()
        self.frames.region.pin(device)
        spin_s = settings.handoff_spin_us / 1e6
        self.ffn = RemoteFFN(self.frames, device, settings.ffn_timeout_s, spin_s, traceparent)
        self._layout = NO_LAYOUT
        self._replicas: dict[str, Replica] = {}  # by incarnation
        self._pairs: dict[str, Pair] = {}
        self._coming_up: dict[str, asyncio.Task[None]] = {}
        self._failures: dict[str, AfdError] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Keeps up with the registry while the block runs."""
        async with (
            background(self._follow_layout()),
            background(self._follow_replicas()),
            background(self._follow_rank()),
            background(self._keep_pairs()),
        ):
            yield

    async def wait_until_whole(self, timeout_s: float) -> None:
        """At the start, when shards may still be loading. Raises what keeps one away that cannot be mended by waiting,
        or PeerUnavailable when the time is over."""
        deadline = time.monotonic() + timeout_s
        while not self.ffn.is_whole:
            for error in self._failures.values():
                if isinstance(error, Mismatch | ConfigError):
                    raise error
            if time.monotonic() > deadline:
                raise PeerUnavailable(f"{self._what_is_missing()}, after {timeout_s:g} s of waiting")
            await asyncio.sleep(_START_POLL_S)

    async def _follow_layout(self) -> None:
        async for layout in self.registry.watch_layout(Layout(1, self.settings.ffn_shards)):
            self._layout = layout
            self._changed.set()

    async def _follow_replicas(self) -> None:
        async for replicas in self.registry.watch("ffn"):
            self._replicas = {replica.incarnation: replica for replica in replicas}
            self._changed.set()

    async def _follow_rank(self) -> None:
        async for replicas in self.registry.watch("attention"):
            names = sorted({self.settings.replica_id, *(replica.replica_id for replica in replicas)})
            self.ffn.rank = names.index(self.settings.replica_id)

    async def _keep_pairs(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._changed.wait()
            self._changed.clear()
            for incarnation in self._replicas.keys() - self._pairs.keys() - self._coming_up.keys():
                task = asyncio.create_task(self._come_up(self._replicas[incarnation]))
                self._coming_up[incarnation] = task
            gone = [pair for name, pair in self._pairs.items() if pair.is_lost or name not in self._replicas]
            self._pairs = {name: pair for name, pair in self._pairs.items() if pair not in gone}
            self._failures = {name: error for name, error in self._failures.items() if name in self._replicas}
            self._route()
            for pair in gone:
                self._retire(pair)

    async def _come_up(self, replica: Replica) -> None:
        try:
            pair = await asyncio.to_thread(self._connect, replica)
        except AfdError as error:
            if str(error) != str(self._failures.get(replica.incarnation)):
                log.warning("no pair with FFN replica %s: %s", replica.replica_id, error)
            self._failures[replica.incarnation] = error
            self._changed.set()
            await asyncio.sleep(_RETRY_S)
        else:
            log.info("FFN replica %s joined over %s", replica.replica_id, pair.rung)
            self._failures.pop(replica.incarnation, None)
            self._pairs[replica.incarnation] = pair
        finally:
            del self._coming_up[replica.incarnation]
            self._changed.set()

    def _route(self) -> None:
        """The table in force from the next frame on. A new layout begins once it is whole, or the old one is not."""
        num_shards = self._layout.num_shards
        pairs = [pair for _, pair in sorted(self._pairs.items())]
        mine = [pair for pair in pairs if pair.num_shards == num_shards]
        others = tuple(pair for pair in pairs if pair.num_shards != num_shards)
        shards = tuple(tuple(pair for pair in mine if pair.shard == shard) for shard in range(num_shards))
        table, present = RoutingTable(self._layout.epoch, shards, others), self.ffn.table
        is_too_early = table.epoch != present.epoch and present.is_whole and not table.is_whole
        if table != present and not is_too_early:
            self.ffn.table = table

    def _retire(self, pair: Pair) -> None:
        log.info("FFN replica %s is gone", pair.replica_id)

        async def retire() -> None:
            """What is under way there may still be answered."""
            deadline = time.monotonic() + _RETIRE_S
            while pair.in_flight and not pair.is_lost and time.monotonic() < deadline:
                await asyncio.sleep(_LOOK_S / 10)
            await asyncio.to_thread(pair.transport.close)

        task = asyncio.create_task(retire())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    def _connect(self, replica: Replica) -> Pair:
        assert replica.shard is not None
        shard, num_shards = replica.shard
        wanted, spin_s = self.settings.handoff, self.settings.handoff_spin_us / 1e6
        transport, rung = connect_pair(replica.address, self._hello(shard, num_shards), self.frames, wanted, spin_s)
        try:
            for region in transport.regions:
                region.pin(self.device)
        except AfdError:
            transport.close()
            raise
        return Pair(replica.replica_id, shard, num_shards, transport, rung)

    def _frame_slots(self) -> FrameSlots:
        """Memory for the frames of all pairs; shared where this host can, unless that is not wanted."""
        shape, wanted = self._slot_shape(), self.settings.handoff
        num_bytes = shape.num_slots * shape.frame_stride
        region: Region
        try:
            region = SharedRegion(num_bytes) if wanted in ("shm", "auto") else Region.private(num_bytes)
        except TransportUnavailable as error:
            if wanted == "shm":
                raise ConfigError(f"AFD_HANDOFF=shm cannot be had: {error}") from None
            log.warning("no handoff through shared memory: %s", error)
            region = Region.private(num_bytes)
        return FrameSlots(region, shape)

    def _slot_shape(self) -> SlotShape:
        settings, config = self.settings, self.checkpoint.config
        is_fp8 = settings.handoff_dtype == "fp8"
        return SlotShape(
            num_slots=settings.microbatch_counts[-1] + 1,  # the last one is for probes
            max_tokens=settings.max_sequences + settings.prefill_chunk_tokens,
            hidden_size=config.hidden_size,
            top_k=config.top_k,
            dtype=self.dtype,
            frame_dtype=FP8 if is_fp8 else self.dtype,
            output_dtype=torch.bfloat16 if is_fp8 else self.dtype,
        )

    def _hello(self, shard: int, num_shards: int) -> pb.Hello:
        config, fingerprint, shape = self.checkpoint.config, self.checkpoint.fingerprint, self.frames.shape
        return pb.Hello(
            replica_id=self.settings.replica_id,
            topology=topology(config, fingerprint, self.dtype, shard, num_shards),
            frame_dtype=dtype_to_proto(shape.frame_dtype),
            output_dtype=dtype_to_proto(shape.output_dtype),
            num_slots=shape.num_slots,
            max_tokens=shape.max_tokens,
        )

    def _what_is_missing(self) -> str:
        num_shards = self._layout.num_shards
        there = {pair.shard for pair in self._pairs.values() if pair.num_shards == num_shards}
        missing = next((shard for shard in range(num_shards) if shard not in there), 0)
        failure = next(iter(self._failures.values()), None)
        registered = _shards(self._replicas.values())
        reason = f": {failure}" if failure else f" is registered (there are: {registered})"
        return f"no replica of FFN shard {missing}/{num_shards}{reason}"


def _shards(replicas: Iterable[Replica]) -> str:
    return ", ".join(f"{shard}/{num}" for shard, num in (r.shard for r in replicas if r.shard)) or "none"
