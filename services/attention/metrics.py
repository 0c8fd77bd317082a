"""What an attention replica counts for Prometheus; docs/metrics.md lists it."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from afd.handoff.frame import FFN
from afd.handoff.remote import RemoteFFN
from services.attention.engine import Engine
from services.attention.journal import Journal
from services.attention.slow_steps import CULPRITS
from services.attention.timeline import PARTS


def totals(engine: Engine) -> dict[str, float]:
    """The counters whose rates are in the lease."""
    counters = engine.counters
    of_shards = {
        "handoffs": sum(shard.num_crossings for shard in counters.shards.values()),
        "handoff_seconds": sum(shard.crossing_ns for shard in counters.shards.values()) / 1e9,
        "handoff_ffn_queue_seconds": sum(shard.queue_ns for shard in counters.shards.values()) / 1e9,
        "handoff_ffn_compute_seconds": sum(shard.compute_ns for shard in counters.shards.values()) / 1e9,
    }
    return {
        "generated_tokens": counters.num_generated,
        "step_tokens": counters.num_tokens,
        "steps": counters.num_steps,
        "step_seconds": counters.step_ns / 1e9,
        "attention_bubble_seconds": counters.part_ns["receive"] / 1e9 if counters.shards else 0.0,
        **of_shards,
    }


def links(ffn: FFN) -> dict[str, str]:
    """The transport to each FFN replica."""
    return {pair.replica_id: pair.rung.transport for pair in ffn.table.pairs} if isinstance(ffn, RemoteFFN) else {}


class AttentionCollector(Collector):
    """Reads the engine's counters when Prometheus asks: the steps pay nothing for it."""

    def __init__(self, engine: Engine, journal: Journal) -> None:
        self.engine = engine
        self.journal = journal

    def collect(self) -> Iterator[Metric]:
        yield from self._sequences()
        yield from self._steps()
        yield from self._transports()
        yield from self._handoffs()
        yield from self._journal()

    def _sequences(self) -> Iterator[Metric]:
        scheduler = self.engine.scheduler
        yield GaugeMetricFamily("afd_sequences_running", "sequences decoded", value=len(scheduler.running))
        yield GaugeMetricFamily("afd_sequences_waiting", "sequences that wait", value=len(scheduler.waiting))
        yield GaugeMetricFamily("afd_sequences_max", "decoded at once at most", value=scheduler.max_sequences)
        yield CounterMetricFamily("afd_admissions", "sequences that waited no longer", value=scheduler.num_admitted)
        yield CounterMetricFamily("afd_admission_wait_seconds", "time of all until then", value=scheduler.waited_s)
        yield GaugeMetricFamily("afd_kv_blocks", "KV blocks in all", value=scheduler.blocks.num_blocks)
        yield GaugeMetricFamily("afd_kv_blocks_used", "KV blocks in use", value=scheduler.blocks.num_used)
        yield CounterMetricFamily("afd_preemptions", "sequences preempted", value=scheduler.num_preemptions)
        counters = self.engine.counters
        dropped = CounterMetricFamily("afd_sequences_dropped", "before their end", labels=["reason"])
        saved = CounterMetricFamily("afd_tokens_saved", "of them, not computed", labels=["reason", "phase"])
        for reason, number in counters.num_dropped.items():
            dropped.add_metric([reason], number)
            saved.add_metric([reason, "prefill"], counters.num_prefill_saved[reason])
            saved.add_metric([reason, "decode"], counters.num_decode_saved[reason])
        yield from (dropped, saved)

    def _steps(self) -> Iterator[Metric]:
        counters = self.engine.counters
        yield CounterMetricFamily("afd_steps", "decode steps", value=counters.num_steps)
        yield CounterMetricFamily("afd_microbatches", "microbatches of all steps", value=counters.num_microbatches)
        yield CounterMetricFamily("afd_step_tokens", "tokens computed", value=counters.num_tokens)
        yield CounterMetricFamily(
            "afd_context_tokens", "tokens that these looked at", value=counters.num_context_tokens
        )
        yield CounterMetricFamily("afd_generated_tokens", "tokens sampled", value=counters.num_generated)
        yield CounterMetricFamily("afd_step_seconds", "time of all steps", value=counters.step_ns / 1e9)
        parts = CounterMetricFamily("afd_step_part_seconds", "time of all steps, by part", labels=["part"])
        for part in PARTS:
            parts.add_metric([part], counters.part_ns[part] / 1e9)
        yield parts
        slow = CounterMetricFamily("afd_slow_steps", "steps over the SLO, by why", labels=["culprit"])
        for culprit in CULPRITS:
            slow.add_metric([culprit], self.engine.tracer.num_slow[culprit])
        yield slow
        bubble_ns = 0 if self._is_collocated else counters.part_ns["receive"]
        yield CounterMetricFamily("afd_attention_bubble_seconds", "waiting for the FFN", value=bubble_ns / 1e9)

    def _transports(self) -> Iterator[Metric]:
        labels = ["replica", "shard", "transport"]
        chosen = GaugeMetricFamily("afd_handoff_transport", "1: the pair's frames move so", labels=labels)
        latency = GaugeMetricFamily("afd_handoff_probe_latency_seconds", "round trip of one token", labels=labels)
        bandwidth = GaugeMetricFamily("afd_handoff_probe_bytes_per_second", "both ways together", labels=labels)
        late = GaugeMetricFamily("afd_ffn_replica_late", "1: an answer is overdue", labels=labels)
        replicas = GaugeMetricFamily("afd_ffn_replicas", "that frames can go to", labels=["shard"])
        resent = CounterMetricFamily("afd_frames_resent", "sent to another replica", labels=["shard", "reason"])
        ffn = self.engine.decoder.ffn
        if isinstance(ffn, RemoteFFN):
            for pair in (*ffn.table.pairs, *ffn.table.others):
                values = [pair.replica_id, str(pair.shard), pair.rung.transport]
                chosen.add_metric(values, 1)
                latency.add_metric(values, pair.rung.latency_s)
                bandwidth.add_metric(values, pair.rung.bytes_per_s)
                late.add_metric(values, pair.has_late_answer)
            for shard, pairs in enumerate(ffn.table.shards):
                replicas.add_metric([str(shard)], sum(not pair.is_lost for pair in pairs))
            for (shard, reason), number in ffn.num_resent.items():
                resent.add_metric([str(shard), reason], number)
        yield from (chosen, latency, bandwidth, late, replicas, resent)

    def _handoffs(self) -> Iterator[Metric]:
        frames = _by_shard("afd_handoffs", "frames answered")
        crossing = _by_shard("afd_handoff_seconds", "time of all frames from send to arrival")
        queue = _by_shard("afd_handoff_ffn_queue_seconds", "of that, in the FFN's queue")
        compute = _by_shard("afd_handoff_ffn_compute_seconds", "of that, computing")
        bubble = _by_shard("afd_handoff_ffn_bubble_seconds", "of the steps' time, when the shard computed none of them")
        for shard, counters in sorted(self.engine.counters.shards.items()):
            frames.add_metric([str(shard)], counters.num_crossings)
            crossing.add_metric([str(shard)], counters.crossing_ns / 1e9)
            queue.add_metric([str(shard)], counters.queue_ns / 1e9)
            compute.add_metric([str(shard)], counters.compute_ns / 1e9)
            if not self._is_collocated:
                bubble.add_metric([str(shard)], counters.bubble_ns / 1e9)
        yield from (frames, crossing, queue, compute, bubble)

    def _journal(self) -> Iterator[Metric]:
        counters = self.journal.counters
        yield GaugeMetricFamily("afd_journal_held_tokens", "tokens not shown yet", value=self.journal.num_held)
        yield CounterMetricFamily("afd_journal_writes", "round trips to Redis", value=counters.num_writes)
        yield CounterMetricFamily("afd_journal_write_seconds", "time of all of them", value=counters.write_s)
        yield CounterMetricFamily("afd_journal_failures", "of them, without an answer", value=counters.num_failures)

    @property
    def _is_collocated(self) -> bool:
        return not self.engine.decoder.ffn.transport_names


def _by_shard(name: str, documentation: str) -> CounterMetricFamily:
    return CounterMetricFamily(name, documentation, labels=["shard"])
