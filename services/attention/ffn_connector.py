"""Finds the FFN's shards in the registry and connects to them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import torch

from afd.compute import ComputeThread
from afd.config import AttentionSettings
from afd.errors import AfdError, ConfigError, Mismatch, PeerUnavailable, TransportUnavailable
from afd.handoff.fp8 import FP8
from afd.handoff.handshake import topology
from afd.handoff.negotiate import Rung, connect_pair
from afd.handoff.remote import RemoteFFN, Transport
from afd.handoff.shm import SharedRegion
from afd.handoff.slots import FrameSlots, Region, SlotShape
from afd.handoff.tensors import dtype_to_proto
from afd.model.checkpoint import Checkpoint
from afd.state.registry import Registry, Replica
from afd.v1 import ffn_pb2 as pb

log = logging.getLogger(__name__)

_LOOKUP_TIMEOUT_S = 10.0
_PAUSE_S = 0.05


class FfnConnector:
    """`connect` blocks; it is called outside the event loop."""

    def __init__(
        self,
        settings: AttentionSettings,
        checkpoint: Checkpoint,
        registry: Registry,
        loop: asyncio.AbstractEventLoop,
        dtype: torch.dtype,
        device: torch.device,
        traceparent: Callable[[], str],
    ) -> None:
        self.settings = settings
        self.num_shards = settings.ffn_shards
        self.checkpoint = checkpoint
        self.registry = registry
        self.loop = loop
        self.dtype = dtype
        self.device = device
        self.traceparent = traceparent
        self.rungs: tuple[Rung, ...] = ()  # what was measured of each shard's transport when it was chosen

    def connect(self) -> RemoteFFN:
        """One replica of every shard. Raises PeerUnavailable, Mismatch for a replica that does not belong here, or
        ConfigError if the transport that is wanted cannot be had."""
        replicas = self._replicas()
        frames = self._frame_slots()
        pairs: list[tuple[Transport, Rung]] = []
        try:
            for shard in range(self.num_shards):
                pairs.append(self._connect_shard(shard, replicas, frames))
            for region in (frames.region, *(region for transport, _ in pairs for region in transport.regions)):
                region.pin(self.device)
        except Exception:
            for transport, _ in pairs:
                transport.close()
            raise
        finally:
            if isinstance(frames.region, SharedRegion):
                frames.region.unlink()
        self.rungs = tuple(rung for _, rung in pairs)
        transports = [transport for transport, _ in pairs]
        return RemoteFFN(transports, frames, self.device, self.settings.ffn_timeout_s, self.traceparent)

    async def connect_within(self, timeout_s: float, compute: ComputeThread) -> RemoteFFN:
        """The same at the start, when shards may still be loading; called on the event loop."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return await compute.run(self.connect)
            except PeerUnavailable as error:
                if time.monotonic() > deadline:
                    raise PeerUnavailable(f"{error}, after {timeout_s:g} s of waiting") from None
            await asyncio.sleep(_PAUSE_S)

    def _replicas(self) -> list[Replica]:
        future = asyncio.run_coroutine_threadsafe(self.registry.replicas("ffn"), self.loop)
        try:
            return future.result(_LOOKUP_TIMEOUT_S)
        except TimeoutError:
            raise PeerUnavailable("the registry does not answer") from None

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
            num_slots=settings.microbatch_counts[-1],
            max_tokens=settings.max_sequences + settings.prefill_chunk_tokens,
            hidden_size=config.hidden_size,
            top_k=config.top_k,
            dtype=self.dtype,
            frame_dtype=FP8 if is_fp8 else self.dtype,
            output_dtype=torch.bfloat16 if is_fp8 else self.dtype,
        )

    def _connect_shard(self, shard: int, replicas: list[Replica], frames: FrameSlots) -> tuple[Transport, Rung]:
        candidates = [replica for replica in replicas if replica.shard == (shard, self.num_shards)]
        failure: AfdError = PeerUnavailable(
            f"no replica of FFN shard {shard}/{self.num_shards} is registered (there are: {_shards(replicas)})"
        )
        for replica in candidates:
            try:
                hello, spin_s = self._hello(shard, frames.shape), self.settings.handoff_spin_us / 1e6
                return connect_pair(replica.address, hello, frames, self.settings.handoff, spin_s)
            except (PeerUnavailable, Mismatch) as error:
                failure = error
        raise failure

    def _hello(self, shard: int, shape: SlotShape) -> pb.Hello:
        config, fingerprint = self.checkpoint.config, self.checkpoint.fingerprint
        return pb.Hello(
            replica_id=self.settings.replica_id,
            topology=topology(config, fingerprint, self.dtype, shard, self.num_shards),
            frame_dtype=dtype_to_proto(shape.frame_dtype),
            output_dtype=dtype_to_proto(shape.output_dtype),
            num_slots=shape.num_slots,
            max_tokens=shape.max_tokens,
        )


def _shards(replicas: list[Replica]) -> str:
    return ", ".join(f"{shard}/{num}" for shard, num in (r.shard for r in replicas if r.shard)) or "none"
