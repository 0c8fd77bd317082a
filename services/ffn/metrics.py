"""What an FFN shard counts for Prometheus; docs/metrics.md lists it."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.ffn.batcher import Batcher


def totals(batcher: Batcher) -> dict[str, float]:
    """The counters whose rates are in the lease."""
    counters = batcher.counters
    return {
        "ffn_frames": counters.num_frames,
        "ffn_batches": counters.num_batches,
        "ffn_tokens": counters.num_tokens,
        "ffn_queue_seconds": counters.queue_ns / 1e9,
        "ffn_compute_seconds": counters.compute_ns / 1e9,
    }


class FfnCollector(Collector):
    """Reads the batcher's counters when Prometheus asks: the layers pay nothing for it."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher

    def collect(self) -> Iterator[Metric]:
        counters = self.batcher.counters
        yield GaugeMetricFamily("afd_ffn_queue_frames", "frames waiting", value=self.batcher.num_queued)
        yield CounterMetricFamily("afd_ffn_frames", "frames computed", value=counters.num_frames)
        yield CounterMetricFamily("afd_ffn_batches", "batches computed", value=counters.num_batches)
        yield CounterMetricFamily("afd_ffn_tokens", "rows computed", value=counters.num_tokens)
        yield CounterMetricFamily(
            "afd_ffn_frames_dropped", "frames dropped before they were computed", value=counters.num_frames_dropped
        )
        yield CounterMetricFamily("afd_ffn_tokens_dropped", "their rows", value=counters.num_tokens_dropped)
        yield CounterMetricFamily(
            "afd_ffn_queue_seconds", "time of all frames in the queue", value=counters.queue_ns / 1e9
        )
        yield CounterMetricFamily("afd_ffn_compute_seconds", "time computing", value=counters.compute_ns / 1e9)
        yield CounterMetricFamily(
            "afd_ffn_bubble_seconds",
            "time between two batches, where it is at most 1 s",
            value=counters.bubble_ns / 1e9,
        )
