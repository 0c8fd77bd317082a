"""What the gateway counts for Prometheus. The GenAI names are OpenTelemetry's semantic conventions."""

from __future__ import annotations

import time

from prometheus_client import Counter, Histogram

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

TTFT = Histogram("gen_ai_server_time_to_first_token_seconds", "from admission to the first token", buckets=_BUCKETS)
TPOT = Histogram("gen_ai_server_time_per_output_token_seconds", "mean time between a choice's tokens", buckets=_BUCKETS)
DURATION = Histogram("gen_ai_server_request_duration_seconds", "from admission to the last token", buckets=_BUCKETS)
FAILOVER = Histogram("afd_failover_seconds", "a choice's, from a lost replica to its next token", buckets=_BUCKETS)
REQUESTS = Counter("afd_requests", "requests that ended", ["status"])
REFUSED = Counter("afd_refused_requests", "requests that an API key, or none, was not good for", ["reason"])
TOKENS = Counter("afd_output_tokens", "tokens sent to clients")


def totals() -> dict[str, float]:
    """The counters whose rates are in the lease."""
    return {
        "output_tokens": _total(TOKENS),
        "requests": _total(REQUESTS),
        "first_tokens": _total(TTFT, "_count"),
        "ttft_seconds": _total(TTFT, "_sum"),
    }


def _total(metric: Counter | Histogram, kind: str = "_total") -> float:
    samples = (sample for family in metric.collect() for sample in family.samples)
    return sum(sample.value for sample in samples if sample.name.endswith(kind))


class RequestTimes:
    """The times of one request, from its admission. exemplar: what leads from the histograms to its trace, if any."""

    def __init__(self, exemplar: dict[str, str] | None = None) -> None:
        self.exemplar = exemplar
        self.num_tokens = 0
        self._start = time.perf_counter()
        self._first: dict[int, float] = {}
        self._last: dict[int, tuple[float, int]] = {}  # of each choice: when, and how many tokens so far

    def tokens(self, choice: int, num_tokens: int) -> None:
        TOKENS.inc(num_tokens)
        now = time.perf_counter()
        if not self._first:
            TTFT.observe(now - self._start, self.exemplar)
        self._first.setdefault(choice, now)
        self._last[choice] = now, self._last.get(choice, (now, 0))[1] + num_tokens
        self.num_tokens += num_tokens

    def end(self, status: str) -> None:
        for choice, (last, num_tokens) in self._last.items():
            if num_tokens > 1:
                TPOT.observe((last - self._first[choice]) / (num_tokens - 1), self.exemplar)
        DURATION.observe(time.perf_counter() - self._start, self.exemplar)
        REQUESTS.labels(status).inc()
