"""Wiring of the gateway: a gRPC port, an HTTP port, one event loop."""

from __future__ import annotations

import dataclasses
import logging
import os

import grpc.aio
import prometheus_client

from afd.access import Access
from afd.config import GatewaySettings
from afd.model.config import ModelConfig
from afd.rates import Rates
from afd.rpc import serving
from afd.service import StopSignal, background, run_service, until_none_open
from afd.state.api_keys import ApiKeys
from afd.state.connection import connect
from afd.state.registry import Registry, Replica
from afd.state.requests import RequestStore
from afd.tls import Certificate
from afd.v1 import gateway_pb2 as pb
from afd.v1 import gateway_pb2_grpc
from services.gateway import metrics
from services.gateway.auth import Gatekeeper
from services.gateway.balancer import Balancer
from services.gateway.collector import GatewayCollector
from services.gateway.generation import Generator
from services.gateway.http_server import HttpLimits, serving_http
from services.gateway.openai_api import make_app
from services.gateway.servicer import GatewayServicer
from services.gateway.tokenizer import Tokenizer
from services.gateway.topology import Topology

log = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["GatewayService"].full_name


async def serve(settings: GatewaySettings, stop: StopSignal) -> None:
    if not (settings.is_loopback or settings.require_api_key):
        log.warning("everybody who reaches AFD_HOST=%s may ask; AFD_REQUIRE_API_KEY=1 asks for keys", settings.host)
    config = ModelConfig.load(settings.model)
    model_name = settings.served_model_name or settings.model.resolve().name
    tokenizer = Tokenizer(settings.model, config.max_context_tokens)
    async with connect(settings.redis, settings.redis_ca) as redis:
        registry = Registry(redis, settings.lease_s, settings.mesh)
        balancer = Balancer(registry, config.digest, settings.replica_id)
        store = RequestStore(redis, settings.journal_ttl_s, settings.mesh)
        generator = Generator(
            config,
            tokenizer,
            balancer,
            store,
            settings.request_timeout_s,
            settings.failover_timeout_s,
            settings.max_requests,
        )
        gatekeeper = Gatekeeper(
            ApiKeys(redis, settings.mesh),
            settings.require_api_key,
            settings.request_timeout_s + settings.journal_ttl_s,
        )
        topology = Topology(registry, balancer)
        servicer = GatewayServicer(generator, gatekeeper, topology, model_name, settings.max_body_bytes)
        app = make_app(generator, gatekeeper, topology, model_name, settings.max_body_bytes)

        prometheus_client.REGISTRY.register(GatewayCollector(generator))
        certificate = Certificate(settings.public_tls, mutual=False) if settings.public_tls else None
        limits = HttpLimits(settings.max_header_bytes, settings.read_timeout_s)
        access = Access.for_clients(
            certificate, settings.max_body_bytes, settings.max_header_bytes, settings.read_timeout_s
        )

        def add_services(server: grpc.aio.Server) -> None:
            gateway_pb2_grpc.add_GatewayServiceServicer_to_server(servicer, server)

        async with (
            background(balancer.follow()),
            background(balancer.follow_gateways()),
            background(gatekeeper.settle()),
        ):
            await balancer.wait_until_ready(settings.startup_timeout_s)
            async with (
                serving(add_services, (SERVICE_NAME,), settings.host, settings.grpc_port, access) as grpc_port,
                serving_http(app, settings.host, settings.http_port, limits, certificate) as http_port,
            ):
                replica = Replica(
                    role="gateway",
                    replica_id=settings.replica_id,
                    address=settings.grpc_address(grpc_port),
                    fingerprint=balancer.fingerprint,
                    pid=os.getpid(),
                    http_address=settings.address(http_port),
                    metrics_address=settings.address(http_port),
                    capacity={"requests": settings.max_requests},
                )

                rates = Rates(metrics.totals)

                def described() -> Replica:
                    load = {"requests": generator.num_running}
                    return dataclasses.replace(
                        replica, load=load, rates=rates.per_second(), sequences_at=balancer.sequences_at
                    )

                async with registry.registered(described):
                    await stop.wait()
                generator.draining = True
                await until_none_open(lambda: generator.num_running, settings.drain_timeout_s)
                generator.give_up()


def main() -> None:
    run_service("gateway", GatewaySettings, serve)


if __name__ == "__main__":
    main()
