"""What operators see of the mesh: every replica as its lease says, and a recent decode step of one of them."""

from __future__ import annotations

import asyncio
import time

import grpc.aio

from afd.errors import NotFound
from afd.rpc import to_peer_error
from afd.state.registry import Registry, Replica, Role
from afd.trace_view import Handoff, Interval, Step
from afd.trace_view.steps import PART_OF_SPAN
from afd.v1 import attention_pb2, gateway_pb2
from services.gateway.balancer import Balancer

_ROLES: tuple[Role, ...] = ("gateway", "attention", "ffn")
_FRESH_S = 0.5  # leases are renewed less often, however many look
_STEP_TIMEOUT_S = 5.0


class Topology:
    def __init__(self, registry: Registry, balancer: Balancer) -> None:
        self.registry = registry
        self.balancer = balancer
        self._read_at_s = -_FRESH_S
        self._mesh = gateway_pb2.GetMeshResponse()
        self._reading = asyncio.Lock()

    async def mesh(self) -> gateway_pb2.GetMeshResponse:
        """Raises PeerUnavailable without Redis."""
        async with self._reading:
            if time.monotonic() - self._read_at_s >= _FRESH_S:
                found = await asyncio.gather(*map(self.registry.replicas, _ROLES))
                self._mesh = _described([replica for replicas in found for replica in replicas])
                self._read_at_s = time.monotonic()
        return self._mesh

    async def step(self, replica_id: str, slowest: bool) -> Step:
        """Of an attention replica. Raises NotFound, or PeerUnavailable."""
        entry = self.balancer.find(replica_id)
        if entry is None:
            raise NotFound(f"there is no attention replica {replica_id!r}")
        try:
            request = attention_pb2.GetStepRequest(slowest=slowest)
            return _step(replica_id, await entry.stub.GetStep(request, timeout=_STEP_TIMEOUT_S))
        except grpc.aio.AioRpcError as error:
            raise to_peer_error(error) from None


def _described(replicas: list[Replica]) -> gateway_pb2.GetMeshResponse:
    names = {replica.incarnation: replica.replica_id for replica in replicas}
    return gateway_pb2.GetMeshResponse(replicas=[_replica(replica, names) for replica in replicas])


def _replica(replica: Replica, names: dict[str, str]) -> gateway_pb2.Replica:
    shard, num_shards = replica.shard or (0, 0)
    return gateway_pb2.Replica(
        role=replica.role,
        replica_id=replica.replica_id,
        address=replica.address,
        shard=shard,
        num_shards=num_shards,
        is_ready=replica.is_ready,
        links=replica.links,
        sequences_at={names[at]: number for at, number in replica.sequences_at.items() if at in names},
        capacity=replica.capacity,
        load=replica.load,
        rates=replica.rates,
    )


def _step(replica_id: str, found: attention_pb2.GetStepResponse) -> Step:
    """As `afd trace` reads it from a file."""
    return Step(
        index=None,
        replica=replica_id,
        start_ns=0,
        duration_ns=found.duration_ns,
        attributes={
            "afd.num_sequences": found.num_sequences,
            "afd.num_tokens": found.num_tokens,
            "afd.num_ffn_shards": len(found.transports),
            "afd.handoff.transports": tuple(found.transports),
        },
        intervals=tuple(
            Interval(PART_OF_SPAN[each.part], each.layer_idx, each.microbatch, each.start_ns, each.end_ns)
            for each in found.intervals
        ),
        handoffs=tuple(
            Handoff(
                each.shard,
                each.layer_idx,
                each.microbatch,
                each.sent_ns,
                each.arrived_ns,
                each.queue_ns,
                each.compute_ns,
            )
            for each in found.handoffs
        ),
    )
