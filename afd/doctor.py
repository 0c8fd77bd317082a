"""`afd doctor`: the ladder of transports between this host and an FFN shard, for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from afd.errors import ConfigError
from afd.handoff.diagnosis import Diagnosis
from afd.handoff.negotiate import LADDER, Rung
from afd.scrape import scrape
from afd.v1 import ffn_pb2 as pb


@dataclass(frozen=True)
class InUse:
    """What a running attention replica uses with the FFN replica, by its metrics; no transport: it has no pair."""

    attention: str
    transport: str | None

    @classmethod
    def of(cls, attention: str, ffn: pb.GetTopologyResponse) -> InUse:
        """Raises PeerUnavailable if there are no metrics."""
        metrics, pair = scrape(attention), f"afd_handoff_transport/{ffn.replica_id}/{ffn.topology.shard}"
        return cls(attention, next((name for name in LADDER if f"{pair}/{name}" in metrics), None))


def report(diagnosis: Diagnosis, in_use: InUse | None) -> Iterator[Table | Text]:
    topology = diagnosis.ffn.topology
    table = Table(
        title=Text(
            f"from here to {diagnosis.ffn.replica_id} at {diagnosis.address}, "
            f"shard {topology.shard}/{topology.num_shards}, frames of up to {diagnosis.max_tokens} tokens"
        )
    )
    for heading in ("transport", "latency", "bandwidth"):
        table.add_column(heading, justify="left" if heading == "transport" else "right", no_wrap=True)
    table.add_column("")
    for rung in diagnosis.rungs:
        table.add_row(*map(Text, _row(rung, rung.transport == diagnosis.chosen)))
    yield table
    if diagnosis.remark:
        yield Text(f"On this host: {diagnosis.remark}.")
    if in_use:
        used = in_use.transport or "no transport"
        yield Text(f"The attention replica at {in_use.attention} uses {used} with this replica.")


def _row(rung: Rung, is_chosen: bool) -> tuple[str, ...]:
    if rung.reason:
        return rung.transport, "-", "-", f"cannot be had: {rung.reason}"
    speed = f"{rung.latency_s * 1e6:.0f} µs", f"{rung.bytes_per_s / 1e9:.2f} GB/s"
    return rung.transport, *speed, "what auto takes" if is_chosen else "can be had"


def as_json(diagnosis: Diagnosis, in_use: InUse | None) -> dict[str, Any]:
    """Seconds and bytes per second; a transport that cannot be had has a reason instead."""
    topology = diagnosis.ffn.topology
    return {
        "ffn": diagnosis.address,
        "replica_id": diagnosis.ffn.replica_id,
        "shard": f"{topology.shard}/{topology.num_shards}",
        "max_tokens": diagnosis.max_tokens,
        "chosen": diagnosis.chosen,
        "in_use": in_use.transport if in_use else None,
        "transports": [_rung_json(rung) for rung in diagnosis.rungs],
    }


def _rung_json(rung: Rung) -> dict[str, Any]:
    if rung.reason:
        return {"transport": rung.transport, "usable": False, "reason": rung.reason}
    speed = {"latency_s": rung.latency_s, "bytes_per_s": rung.bytes_per_s}
    return {"transport": rung.transport, "usable": True, **speed}


def check(diagnosis: Diagnosis, required: str) -> None:
    """Raises ConfigError if the transport that is required cannot be had."""
    rung = next(rung for rung in diagnosis.rungs if rung.transport == required)
    if rung.reason:
        raise ConfigError(f"{required} cannot be had with the FFN at {diagnosis.address}: {rung.reason}")
