"""What a gateway is asked for when Prometheus comes; docs/metrics.md lists it."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.gateway.generation import Generator


class GatewayCollector(Collector):
    """Reads what is known anyway: requests pay nothing for it."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    def collect(self) -> Iterator[Metric]:
        generator, balancer = self.generator, self.generator.balancer
        yield GaugeMetricFamily("afd_requests_open", "requests that run here", value=generator.num_running)
        yield GaugeMetricFamily("afd_requests_max", "open here at most", value=generator.max_requests)
        replicas = GaugeMetricFamily("afd_replicas", "that hold a lease", labels=["role"])
        replicas.add_metric(["gateway"], balancer.num_gateways)
        replicas.add_metric(["attention"], balancer.num_replicas)
        yield replicas
        yield GaugeMetricFamily("afd_attention_replicas_ready", "that can decode now", value=balancer.num_ready)
