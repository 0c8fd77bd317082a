"""Finds the FFN's shards in the registry and connects to them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import torch

from afd.config import AttentionSettings
from afd.errors import AfdError, ConfigError, Mismatch, PeerUnavailable
from afd.handoff.handshake import topology
from afd.handoff.inline import InlineTransport
from afd.handoff.remote import RemoteFFN, Transport
from afd.model.checkpoint import Checkpoint
from afd.state.registry import Registry, Replica
from afd.v1 import ffn_pb2 as pb

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

    def connect(self) -> RemoteFFN:
        """One replica of every shard. Raises PeerUnavailable, or Mismatch for a replica that does not belong here."""
        replicas = self._replicas()
        transports: list[Transport] = []
        try:
            for shard in range(self.num_shards):
                transports.append(self._connect_shard(shard, replicas))
        except Exception:
            for transport in transports:
                transport.close()
            raise
        return RemoteFFN(transports, self.settings.ffn_timeout_s, self.traceparent)

    async def connect_within(self, timeout_s: float) -> RemoteFFN:
        """The same at the start, when shards may still be loading; called on the event loop."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return await asyncio.to_thread(self.connect)
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

    def _connect_shard(self, shard: int, replicas: list[Replica]) -> InlineTransport:
        candidates = [replica for replica in replicas if replica.shard == (shard, self.num_shards)]
        failure: AfdError = PeerUnavailable(
            f"no replica of FFN shard {shard}/{self.num_shards} is registered (there are: {_shards(replicas)})"
        )
        for replica in candidates:
            try:
                return self._connect_replica(shard, replica)
            except (PeerUnavailable, Mismatch) as error:
                failure = error
        raise failure

    def _connect_replica(self, shard: int, replica: Replica) -> InlineTransport:
        ours = topology(self.checkpoint.config, self.checkpoint.fingerprint, self.dtype, shard, self.num_shards)
        hello = pb.Hello(replica_id=self.settings.replica_id, topology=ours)
        transport = InlineTransport(replica.address, hello, self.dtype, self.device)
        accepted = transport.welcome.max_frame_tokens
        largest = self.settings.max_sequences + self.settings.prefill_chunk_tokens
        if accepted < largest:
            transport.close()
            raise ConfigError(
                f"FFN replica {replica.replica_id} accepts frames of {accepted} tokens, but AFD_MAX_SEQUENCES and "
                f"AFD_PREFILL_CHUNK_TOKENS allow {largest}: raise AFD_MAX_FRAME_TOKENS or lower these"
            )
        return transport


def _shards(replicas: list[Replica]) -> str:
    return ", ".join(f"{shard}/{num}" for shard, num in (r.shard for r in replicas if r.shard)) or "none"
