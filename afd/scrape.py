"""Reading another process's Prometheus metrics."""

from __future__ import annotations

import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from afd.errors import PeerUnavailable

_TIMEOUT_S = 10.0


def scrape(address: str) -> dict[str, float]:
    """The samples at http://address/metrics, as `samples` names them.

    Raises PeerUnavailable if nobody answers there in time with metrics.
    """
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=_TIMEOUT_S) as answer:
            return samples(answer.read().decode())
    except (OSError, ValueError) as error:
        raise PeerUnavailable(f"no metrics at http://{address}/metrics: {error}") from None


def samples(text: str) -> dict[str, float]:
    """Of one scrape; without _total, the values of a metric's labels stand behind slashes. Raises ValueError."""
    found = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {"/".join((sample.name.removesuffix("_total"), *sample.labels.values())): sample.value for sample in found}
