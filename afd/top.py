"""`afd top`: the replicas of a mesh, how busy they are, over which transports they hand off; as their leases say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from afd.client import Replica

_ROLES = ("gateway", "attention", "ffn")
_NEARLY_FULL = 0.9
_WIDE = 110  # columns
_WIDTH = 10  # of a bar, characters

Bar = Callable[[float, float], Text]  # of a part and the whole


def picture(replicas: Sequence[Replica], width: int) -> RenderableType:
    """A table for each role, under the sums; with bars where they fit, in so many columns."""
    gateways, attention, ffn = ([each for each in replicas if each.role == role] for role in _ROLES)
    bar = _bar if width >= _WIDE else _percent
    return Group(_sums(attention), "", _gateways(gateways), "", _attention(attention, bar), "", _ffn(ffn, bar))


def _sums(attention: Sequence[Replica]) -> Text:
    tokens = sum(replica.rates.get("generated_tokens", 0.0) for replica in attention)
    sequences, waiting = (sum(replica.load.get(name, 0) for replica in attention) for name in ("sequences", "waiting"))
    return Text.assemble((f"{tokens:.0f}", "bold"), f" tokens/s, {sequences} sequences, {waiting} wait")


def _gateways(replicas: Sequence[Replica]) -> Table:
    table = _table("gateway", "address", "requests", "tokens/s", "sequences at")
    for replica in replicas:
        places = ", ".join(f"{name}: {number}" for name, number in sorted(replica.sequences_at.items()))
        requests = str(replica.load.get("requests", 0))
        tokens = f"{replica.rates.get('output_tokens', 0.0):.0f}"
        table.add_row(replica.replica_id, replica.address, requests, tokens, places)
    return table


def _attention(replicas: Sequence[Replica], bar: Bar) -> Table:
    table = _table("attention", "sequences", "KV use", "tokens/s", "step", "waiting", "handoff", "over")
    for replica in replicas:
        load, capacity, rates = replica.load, replica.capacity, replica.rates
        table.add_row(
            replica.replica_id if replica.is_ready else f"{replica.replica_id} (FFN incomplete)",
            f"{load.get('sequences', 0)} of {capacity.get('sequences', 0)}",
            bar(load.get("kv_blocks", 0), capacity.get("kv_blocks", 0)),
            f"{rates.get('generated_tokens', 0.0):.0f}",
            _milliseconds(rates.get("step_seconds", 0.0), rates.get("steps", 0.0)),
            bar(rates.get("attention_bubble_seconds", 0.0), rates.get("step_seconds", 0.0)),
            _milliseconds(rates.get("handoff_seconds", 0.0), rates.get("handoffs", 0.0)),
            _over(replica),
        )
    return table


def _ffn(replicas: Sequence[Replica], bar: Bar) -> Table:
    table = _table("ffn", "shard", "queue", "batches/s", "rows a batch", "computes")
    for replica in sorted(replicas, key=lambda replica: (replica.shard or (0, 0), replica.replica_id)):
        rates, (shard, num_shards) = replica.rates, replica.shard or (0, 1)
        batches = rates.get("ffn_batches", 0.0)
        table.add_row(
            replica.replica_id,
            f"{shard}/{num_shards}",
            str(replica.load.get("frames", 0)),
            f"{batches:.0f}",
            f"{rates.get('ffn_tokens', 0.0) / batches:.1f}" if batches else "-",
            bar(rates.get("ffn_compute_seconds", 0.0), 1.0),
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _over(replica: Replica) -> str:
    """Each transport with the number of FFN replicas behind it; none where the FFN is in the attention process."""
    pairs = Counter(replica.links.values())
    return ", ".join(f"{transport} x{number}" for transport, number in sorted(pairs.items())) or "in-process"


def _milliseconds(seconds: float, number: float) -> str:
    return f"{1e3 * seconds / number:.2f} ms" if number else "-"


def _percent(part: float, whole: float) -> Text:
    return Text(f"{part / whole if whole else 0.0:.0%}")


def _bar(part: float, whole: float) -> Text:
    share = min(1.0, part / whole) if whole else 0.0
    full = round(share * _WIDTH)
    filled, rest = "█" * full, "░" * (_WIDTH - full)
    return Text.assemble((filled, "red" if share > _NEARLY_FULL else "green"), (rest, "dim"), f" {share:4.0%}")
