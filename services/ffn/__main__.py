"""Wiring of an FFN shard."""

from __future__ import annotations

import asyncio
import dataclasses
import os

import grpc.aio
import prometheus_client
import torch

from afd.access import Access
from afd.compute import ComputeThread, choose_device, loading_progress, renice_thread
from afd.config import FFNSettings
from afd.handoff.handshake import topology
from afd.handoff.negotiate import possible_transports
from afd.model.checkpoint import Checkpoint
from afd.model.weights import load_ffn_shard
from afd.rates import Rates
from afd.rpc import serving
from afd.service import StopSignal, background, run_service, until_none_open
from afd.state.connection import connect
from afd.state.registry import NO_LAYOUT, Registry, Replica
from afd.telemetry import serve_metrics
from afd.v1 import ffn_pb2 as pb
from afd.v1 import ffn_pb2_grpc
from services.ffn.batcher import Batcher
from services.ffn.metrics import FfnCollector, totals
from services.ffn.servicer import FfnServicer

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["FfnService"].full_name


async def serve(settings: FFNSettings, stop: StopSignal) -> None:
    dtype, device = choose_device(settings)
    checkpoint = Checkpoint(settings.model)
    shard, num_shards = settings.shard
    progress = loading_progress(f"FFN shard {shard}/{num_shards}")
    compute = ComputeThread(settings.threads, settings.cpus)
    ffn_shard = await compute.run(
        load_ffn_shard, checkpoint, shard, num_shards, dtype, device, progress, settings.kernels, settings.cpus
    )
    batcher = Batcher(ffn_shard, settings.max_frame_tokens, settings.handoff_spin_us / 1e6, device)
    batcher.start(compute)
    renice_thread(settings.network_nice)
    try:
        await _serve_batcher(settings, checkpoint, batcher, dtype, stop)
    finally:
        await asyncio.to_thread(batcher.stop)


async def _serve_batcher(
    settings: FFNSettings, checkpoint: Checkpoint, batcher: Batcher, dtype: torch.dtype, stop: StopSignal
) -> None:
    """Serves and holds a lease until it shall stop; then serves those who have not yet heard of it."""
    prometheus_client.REGISTRY.register(FfnCollector(batcher))
    metrics_port = serve_metrics(settings.host, settings.metrics_port)
    welcome = pb.Welcome(
        replica_id=settings.replica_id,
        topology=topology(checkpoint.config, checkpoint.fingerprint, dtype, *settings.shard),
        max_frame_tokens=settings.max_frame_tokens,
    )
    servicer = FfnServicer(batcher, welcome, dtype)

    def add_services(server: grpc.aio.Server) -> None:
        ffn_pb2_grpc.add_FfnServiceServicer_to_server(servicer, server)

    access = Access.for_peers("attention")
    async with (
        connect(settings.redis, settings.redis_ca) as redis,
        serving(add_services, (SERVICE_NAME,), settings.host, settings.grpc_port, access) as port,
    ):
        replica = Replica(
            role="ffn",
            replica_id=settings.replica_id,
            address=settings.grpc_address(port),
            fingerprint=checkpoint.fingerprint,
            pid=os.getpid(),
            shard=settings.shard,
            metrics_address=settings.address(metrics_port),
            transports=possible_transports(),
            capacity={"frame_tokens": settings.max_frame_tokens},
        )

        rates = Rates(lambda: totals(batcher))

        def described() -> Replica:
            load = {"pairs": servicer.num_streams, "frames": batcher.num_queued}
            return dataclasses.replace(replica, epoch=batcher.oldest_epoch, load=load, rates=rates.per_second())

        registry = Registry(redis, settings.lease_s, settings.mesh)
        async with background(_refuse_stale_frames(registry, batcher)), registry.registered(described):
            await stop.wait()
        await until_none_open(lambda: servicer.num_streams, settings.drain_timeout_s)


async def _refuse_stale_frames(registry: Registry, batcher: Batcher) -> None:
    async for layout in registry.watch_layout(NO_LAYOUT):
        batcher.oldest_epoch = layout.epoch


def main() -> None:
    run_service("ffn", FFNSettings, serve)


if __name__ == "__main__":
    main()
