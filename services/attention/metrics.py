"""What an attention replica counts for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.attention.engine import Engine
from services.attention.timeline import PARTS


class AttentionCollector(Collector):
    """Reads the engine's counters when Prometheus asks: the steps pay nothing for it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        scheduler, counters = self.engine.scheduler, self.engine.counters
        yield GaugeMetricFamily("afd_sequences_running", "sequences decoded", value=len(scheduler.running))
        yield GaugeMetricFamily("afd_sequences_waiting", "sequences that wait", value=len(scheduler.waiting))
        yield GaugeMetricFamily("afd_kv_blocks", "KV blocks in all", value=scheduler.blocks.num_blocks)
        yield GaugeMetricFamily("afd_kv_blocks_used", "KV blocks in use", value=scheduler.blocks.num_used)
        yield CounterMetricFamily("afd_preemptions", "sequences preempted", value=scheduler.num_preemptions)
        yield CounterMetricFamily("afd_steps", "decode steps", value=counters.num_steps)
        yield CounterMetricFamily("afd_step_tokens", "tokens computed", value=counters.num_tokens)
        yield CounterMetricFamily("afd_generated_tokens", "tokens sampled", value=counters.num_generated)
        yield CounterMetricFamily("afd_step_seconds", "time of all steps", value=counters.step_ns / 1e9)
        parts = CounterMetricFamily("afd_step_part_seconds", "time of all steps, by part", labels=["part"])
        for part in PARTS:
            parts.add_metric([part], counters.part_ns[part] / 1e9)
        yield parts
        yield CounterMetricFamily("afd_handoffs", "frames answered", value=counters.num_crossings)
        yield CounterMetricFamily(
            "afd_handoff_seconds", "time of all frames from send to arrival", value=counters.crossing_ns / 1e9
        )
        yield CounterMetricFamily(
            "afd_handoff_ffn_queue_seconds", "of that, in the FFN's queue", value=counters.ffn_queue_ns / 1e9
        )
        yield CounterMetricFamily(
            "afd_handoff_ffn_compute_seconds", "of that, computing", value=counters.ffn_compute_ns / 1e9
        )
