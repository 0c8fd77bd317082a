"""Wiring of the gateway: a gRPC port, an HTTP port, one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator

import grpc.aio
import uvicorn
from fastapi import FastAPI

from afd.config import GatewaySettings
from afd.errors import ConfigError
from afd.model.config import ModelConfig
from afd.rpc import serving
from afd.service import StopSignal, background, run_service, until_none_open
from afd.state.connection import connect
from afd.state.registry import Registry, Replica
from afd.state.requests import RequestStore
from afd.v1 import gateway_pb2 as pb
from afd.v1 import gateway_pb2_grpc
from services.gateway.balancer import Balancer
from services.gateway.generation import Generator
from services.gateway.openai_api import make_app
from services.gateway.servicer import GatewayServicer
from services.gateway.tokenizer import Tokenizer

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["GatewayService"].full_name


async def serve(settings: GatewaySettings, stop: StopSignal) -> None:
    config = ModelConfig.load(settings.model)
    model_name = settings.served_model_name or settings.model.resolve().name
    tokenizer = Tokenizer(settings.model, config.max_context_tokens)
    async with connect(settings.redis, settings.redis_ca) as redis:
        registry = Registry(redis, settings.lease_s, settings.mesh)
        balancer = Balancer(registry, config.digest)
        store = RequestStore(redis, settings.journal_ttl_s)
        generator = Generator(
            config, tokenizer, balancer, store, settings.request_timeout_s, settings.failover_timeout_s
        )
        servicer = GatewayServicer(generator, model_name, settings.max_body_bytes)
        app = make_app(generator, model_name, settings.max_body_bytes)

        def add_services(server: grpc.aio.Server) -> None:
            gateway_pb2_grpc.add_GatewayServiceServicer_to_server(servicer, server)

        async with background(balancer.follow()):
            await balancer.wait_until_ready(settings.startup_timeout_s)
            async with (
                serving(add_services, (SERVICE_NAME,), settings.host, settings.grpc_port) as grpc_port,
                _serving_http(app, settings.host, settings.http_port) as http_port,
            ):
                replica = Replica(
                    role="gateway",
                    replica_id=settings.replica_id,
                    address=f"{settings.advertised_host}:{grpc_port}",
                    fingerprint=balancer.fingerprint,
                    pid=os.getpid(),
                    http_address=f"{settings.advertised_host}:{http_port}",
                    metrics_address=f"{settings.advertised_host}:{http_port}",
                )
                async with registry.registered(lambda: replica):
                    await stop.wait()
                generator.draining = True
                await until_none_open(lambda: generator.num_running, settings.drain_timeout_s)


class _Server(uvicorn.Server):
    """Signals are this process's, not the HTTP server's."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


@contextlib.asynccontextmanager
async def _serving_http(app: FastAPI, host: str, port: int) -> AsyncIterator[int]:
    """Runs the HTTP server while the block runs; yields its port. Raises ConfigError if it is taken."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port} for HTTP: {error.strerror}") from None
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=2)
    server = _Server(config)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield int(listener.getsockname()[1])
    finally:
        server.should_exit = True
        await running


if __name__ == "__main__":
    run_service("gateway", GatewaySettings, serve)
