"""A service that would survive nothing, for benchmarks.reliability_cost.

Tokens are shown at once, nothing is kept of any request, and membership is looked up only when it changes; that leases
are hardly ever renewed is left to AFD_LEASE_S. What cannot be taken away is left in: the epoch that every frame bears.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from afd.config import AttentionSettings, FFNSettings, GatewaySettings, ServiceSettings
from afd.service import run_service
from afd.state import registry
from afd.state.requests import JournaledToken, RequestRecord, RequestStore, SequenceKey, Status

if TYPE_CHECKING:
    from services.attention.engine import Delivery

_POLL_S = 3600.0
_SETTINGS: dict[str, type[ServiceSettings]] = {
    "attention": AttentionSettings,
    "ffn": FFNSettings,
    "gateway": GatewaySettings,
}


class ForgetfulStore(RequestStore):
    async def create(self, key: SequenceKey, record: RequestRecord) -> int:
        return 1

    async def take_over(
        self, key: SequenceKey, record: RequestRecord, claim: bytes, tokens: Sequence[JournaledToken] = ()
    ) -> list[JournaledToken]:
        return list(tokens)

    async def finish(self, key: SequenceKey, epoch: int, status: Status) -> None:
        pass


def show_at_once(journal: Any, deliveries: list[Delivery]) -> None:
    for delivery in deliveries:
        delivery.sequence.outbox.put_nowait(delivery.event)


def main() -> None:
    role, _, _ = os.environ["AFD_REPLICA_ID"].partition("-")
    service = importlib.import_module(f"services.{role}.__main__")  # a gateway imports no more than it does otherwise
    registry._POLL_S = _POLL_S
    if role == "gateway":
        service.RequestStore = ForgetfulStore  # type: ignore[attr-defined]
    elif role == "attention":
        service.Journal.put = show_at_once
    run_service(role, _SETTINGS[role], service.serve)
