"""Wiring of an attention replica."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
from collections.abc import AsyncIterator

import grpc.aio
import prometheus_client
import torch

from afd.access import Access
from afd.compute import ComputeThread, choose_device, loading_progress, renice_thread
from afd.config import AttentionSettings
from afd.errors import ConfigError
from afd.handoff.frame import FFN
from afd.handoff.local import LocalFFN
from afd.model.checkpoint import Checkpoint
from afd.model.kv_cache import KVCache
from afd.model.stack import AttentionStack
from afd.model.weights import load_attention, load_ffn_shard
from afd.rates import Rates
from afd.rpc import serving
from afd.service import StopSignal, background, run_service, until_none_open
from afd.state.connection import connect
from afd.state.registry import Registry, Replica
from afd.state.requests import RequestStore
from afd.telemetry import serve_metrics
from afd.v1 import attention_pb2 as pb
from afd.v1 import attention_pb2_grpc
from services.attention.block_manager import BlockManager
from services.attention.chunk import ChunkCost
from services.attention.decoder import Decoder
from services.attention.engine import Delivery, Engine
from services.attention.ffn_connector import FfnConnector
from services.attention.journal import Journal
from services.attention.metrics import AttentionCollector, links, totals
from services.attention.microbatch import MicrobatchBuilder
from services.attention.pipeline import Pipeline
from services.attention.scheduler import Scheduler
from services.attention.servicer import AttentionServicer
from services.attention.step_tracer import StepTracer

log = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["AttentionService"].full_name


async def serve(settings: AttentionSettings, stop: StopSignal) -> None:
    dtype, device = choose_device(settings)
    checkpoint = Checkpoint(settings.model)
    num_blocks = settings.num_kv_blocks or _num_blocks(settings, checkpoint, dtype)
    max_context_tokens = min(checkpoint.config.max_context_tokens, num_blocks * settings.block_size)
    if max_context_tokens < checkpoint.config.max_context_tokens:
        log.warning(
            "the KV cache holds %d tokens, so this is the longest context, not the model's %d; raise AFD_KV_CACHE_GIB",
            max_context_tokens,
            checkpoint.config.max_context_tokens,
        )
    loop = asyncio.get_running_loop()
    compute = ComputeThread(settings.threads, settings.cpus)

    async with connect(settings.redis, settings.redis_ca) as redis:
        registry = Registry(redis, settings.lease_s, settings.mesh)
        store = RequestStore(redis, settings.journal_ttl_s, settings.mesh)
        journal = Journal(store, settings.journal_pace_s, settings.journal_patience_s, settings.journal_held_tokens)
        tracer = StepTracer(settings.step_slo_ms, settings.slow_steps_per_s)

        def deliver(deliveries: list[Delivery]) -> None:
            loop.call_soon_threadsafe(journal.put, deliveries)

        stack, cache = await compute.run(_load, settings, checkpoint, num_blocks, dtype, device)
        async with (
            _local_ffn(settings, checkpoint, compute, dtype, device)
            if settings.ffn_shards == 0
            else _remote_ffn(FfnConnector(settings, checkpoint, registry, dtype, device, lambda: tracer.traceparent))
        ) as ffn:
            engine = Engine(
                decoder=Decoder(stack, cache, ffn),
                scheduler=Scheduler(
                    BlockManager(num_blocks, settings.block_size),
                    settings.max_sequences,
                    settings.prefill_chunk_tokens,
                    ChunkCost.of(checkpoint.config, settings.ffn_shards),
                ),
                builder=MicrobatchBuilder(
                    settings.block_size,
                    checkpoint.config.head_dim,
                    checkpoint.config.rope_theta,
                    dtype,
                    device,
                ),
                pipeline=Pipeline(settings.microbatch_counts),
                tracer=tracer,
                deliver=deliver,
                recovery_s=settings.ffn_recovery_s,
            )
            await compute.run(engine.warm_up)
            renice_thread(settings.network_nice)
            engine.start(compute)
            try:
                async with background(journal.run()):
                    await _serve_engine(settings, checkpoint, engine, journal, max_context_tokens, registry, stop)
            finally:
                await asyncio.to_thread(engine.stop)


def _load(
    settings: AttentionSettings, checkpoint: Checkpoint, num_blocks: int, dtype: torch.dtype, device: torch.device
) -> tuple[AttentionStack, KVCache]:
    """This side's weights and the KV cache."""
    config, progress = checkpoint.config, loading_progress("attention")
    stack = load_attention(checkpoint, dtype, device, progress, settings.kernels, settings.cpus)
    num_slots = num_blocks * settings.block_size
    try:
        return stack, KVCache.allocate(config.num_layers, num_slots, config.head_dim, dtype, device)
    except RuntimeError:  # torch's word for memory that is not there
        raise ConfigError(
            f"{device} has no memory for {num_blocks} KV blocks of {settings.block_size} tokens: "
            "lower AFD_NUM_KV_BLOCKS or AFD_KV_CACHE_GIB"
        ) from None


@contextlib.asynccontextmanager
async def _local_ffn(
    settings: AttentionSettings,
    checkpoint: Checkpoint,
    compute: ComputeThread,
    dtype: torch.dtype,
    device: torch.device,
) -> AsyncIterator[FFN]:
    progress = loading_progress("FFN")
    shard = await compute.run(
        load_ffn_shard, checkpoint, 0, 1, dtype, device, progress, settings.kernels, settings.cpus
    )
    yield LocalFFN(shard)


@contextlib.asynccontextmanager
async def _remote_ffn(connector: FfnConnector) -> AsyncIterator[FFN]:
    """Kept up while the block runs."""
    settings = connector.settings
    log.info("waiting for the FFN's shards (AFD_FFN_SHARDS=%d)", settings.ffn_shards)
    async with connector.following():
        await connector.wait_until_whole(settings.startup_timeout_s)
        yield connector.ffn


async def _serve_engine(
    settings: AttentionSettings,
    checkpoint: Checkpoint,
    engine: Engine,
    journal: Journal,
    max_context_tokens: int,
    registry: Registry,
    stop: StopSignal,
) -> None:
    """Serves and holds a lease until it shall stop; then serves what is open."""
    prometheus_client.REGISTRY.register(AttentionCollector(engine, journal))
    metrics_port = serve_metrics(settings.host, settings.metrics_port)
    max_open = settings.max_sequences + settings.max_waiting
    servicer = AttentionServicer(engine, checkpoint.config, max_context_tokens, max_open)

    def add_services(server: grpc.aio.Server) -> None:
        attention_pb2_grpc.add_AttentionServiceServicer_to_server(servicer, server)

    access = Access.for_peers("gateway")
    async with serving(add_services, (SERVICE_NAME,), settings.host, settings.grpc_port, access) as port:
        replica = Replica(
            role="attention",
            replica_id=settings.replica_id,
            address=settings.grpc_address(port),
            fingerprint=checkpoint.fingerprint,
            pid=os.getpid(),
            max_context_tokens=max_context_tokens,
            metrics_address=settings.address(metrics_port),
            capacity={"sequences": settings.max_sequences, "kv_blocks": engine.scheduler.blocks.num_blocks},
        )

        rates = Rates(lambda: totals(engine))

        def described() -> Replica:
            ffn, scheduler = engine.decoder.ffn, engine.scheduler
            return dataclasses.replace(
                replica,
                is_ready=ffn.is_whole,
                transports=tuple(sorted(set(ffn.transport_names))),
                epoch=ffn.epoch,
                load={
                    "sequences": servicer.num_open,
                    "waiting": len(scheduler.waiting),
                    "kv_blocks": scheduler.blocks.num_used,
                },
                rates=rates.per_second(),
                links=links(ffn),
            )

        async with registry.registered(described):
            await stop.wait()
        servicer.draining = True
        await until_none_open(lambda: servicer.num_open, settings.drain_timeout_s)


def _num_blocks(settings: AttentionSettings, checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """How many KV blocks the memory set aside holds: a key and a value vector per token and layer."""
    config = checkpoint.config
    block_bytes = 2 * config.num_layers * settings.block_size * config.head_dim * dtype.itemsize
    num_blocks = int(settings.kv_cache_gib * 2**30) // block_bytes
    if num_blocks == 0:
        raise ConfigError(
            f"AFD_KV_CACHE_GIB={settings.kv_cache_gib} does not hold one KV block of {block_bytes} bytes; raise it"
        )
    longest = -(-config.max_context_tokens // settings.block_size)
    return min(num_blocks, longest * settings.max_sequences)


def main() -> None:
    run_service("attention", AttentionSettings, serve)


if __name__ == "__main__":
    main()
