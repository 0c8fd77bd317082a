"""Picks the attention replica for a sequence: the one with the most room, among those alive. How many sequences it has
from this gateway is known at once, how many from the others by their leases."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc.aio

from afd.errors import PeerUnavailable
from afd.rpc import PeerChannel
from afd.state.registry import Registry, Replica
from afd.v1 import attention_pb2_grpc

log = logging.getLogger(__name__)


@dataclass(eq=False)
class AttentionReplica:
    """A replica with its channel, and how many sequences it has from here."""

    replica: Replica
    channel: PeerChannel
    num_sequences: int = 0

    @property
    def stub(self) -> attention_pb2_grpc.AttentionServiceAsyncStub:
        return self.channel.stub(_stub)


class Balancer:
    def __init__(self, registry: Registry, config_digest: str, replica_id: str) -> None:
        """replica_id: this gateway's."""
        self.registry = registry
        self.config_digest = config_digest
        self.replica_id = replica_id
        self._replicas: dict[str, AttentionReplica] = {}  # by incarnation
        self._others: Counter[str] = Counter()  # sequences of the other gateways, by incarnation
        self.num_gateways = 0  # this one among them
        self._changed = asyncio.Event()

    def find(self, replica_id: str) -> AttentionReplica | None:
        return next((entry for entry in self._replicas.values() if entry.replica.replica_id == replica_id), None)

    @property
    def num_replicas(self) -> int:
        return len(self._replicas)

    @property
    def num_ready(self) -> int:
        return sum(entry.replica.is_ready for entry in self._replicas.values())

    @property
    def max_context_tokens(self) -> int:
        """What every replica can hold; 0 without any."""
        return min((entry.replica.max_context_tokens for entry in self._replicas.values()), default=0)

    @property
    def fingerprint(self) -> str:
        return next((entry.replica.fingerprint for entry in self._replicas.values()), "")

    @property
    def sequences_at(self) -> dict[str, int]:
        """How many sequences each attention replica has from here, by incarnation."""
        return {name: entry.num_sequences for name, entry in self._replicas.items() if entry.num_sequences}

    async def follow_gateways(self) -> None:
        """Keeps up with what the other gateways have, as their leases say, until cancelled."""
        async for gateways in self.registry.watch("gateway"):
            self.num_gateways = len(gateways)
            others = (gateway for gateway in gateways if gateway.replica_id != self.replica_id)
            self._others = sum((Counter(gateway.sequences_at) for gateway in others), Counter())

    async def follow(self) -> None:
        """Keeps up with the registry until cancelled."""
        async for replicas in self.registry.watch("attention"):
            current = {replica.incarnation: replica for replica in replicas if self._belongs(replica)}
            for incarnation in self._replicas.keys() - current.keys():
                gone = self._replicas.pop(incarnation)
                log.info("attention replica %s is gone", gone.replica.replica_id)
                if gone.num_sequences == 0:
                    await gone.channel.close()
            for incarnation in current.keys() & self._replicas.keys():
                self._replicas[incarnation].replica = current[incarnation]
            for incarnation in current.keys() - self._replicas.keys():
                replica = current[incarnation]
                self._replicas[incarnation] = _connect(replica)
                log.info("attention replica %s joined at %s", replica.replica_id, replica.address)
            self._changed.set()
            self._changed = asyncio.Event()

    async def wait_until_ready(self, timeout_s: float) -> None:
        """Raises PeerUnavailable if no attention replica shows up in time."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self._replicas:
                    await self._changed.wait()
        except TimeoutError:
            raise PeerUnavailable(f"no attention replica of this model is registered, after {timeout_s:g} s") from None

    async def wait_for_change(self, timeout_s: float) -> None:
        """Until replicas come or go, but no longer than timeout_s."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()

    def choose(self, lost: Set[AttentionReplica] = frozenset()) -> AttentionReplica | None:
        """The replica for one sequence, if there is one."""
        candidates = [entry for entry in self._replicas.values() if entry not in lost]
        candidates = [entry for entry in candidates if entry.replica.is_ready] or candidates
        return min(candidates, key=self._fullness, default=None)

    @asynccontextmanager
    async def counted(self, entry: AttentionReplica) -> AsyncIterator[None]:
        """A replica has one sequence more while the block runs."""
        entry.num_sequences += 1
        try:
            yield
        finally:
            entry.num_sequences -= 1
            if entry.num_sequences == 0 and entry not in self._replicas.values():
                await entry.channel.close()

    def _fullness(self, entry: AttentionReplica) -> float:
        """Sequences, of those that it can decode at once."""
        num_sequences = entry.num_sequences + self._others[entry.replica.incarnation]
        return num_sequences / entry.replica.capacity.get("sequences", 1)

    def _belongs(self, replica: Replica) -> bool:
        digest = replica.fingerprint.partition("-")[0]
        if digest != self.config_digest:
            log.error(
                "attention replica %s serves another model: its configuration is %s, this gateway's is %s",
                replica.replica_id, digest, self.config_digest,
            )  # fmt: skip
        return digest == self.config_digest


def _connect(replica: Replica) -> AttentionReplica:
    return AttentionReplica(replica, PeerChannel(replica.address, "attention"))


def _stub(channel: grpc.aio.Channel) -> attention_pb2_grpc.AttentionServiceAsyncStub:
    return attention_pb2_grpc.AttentionServiceStub(channel)
