"""How tensors could cross from this host to an FFN shard: every transport is tried, as when a pair comes up."""

from __future__ import annotations

import socket
from dataclasses import dataclass

import grpc

from afd.errors import AfdError, DeadlineExceeded, Mismatch, PeerUnavailable, TransportUnavailable
from afd.handoff.negotiate import LADDER, Rung, TransportName, climb, slowness
from afd.handoff.shm import SharedRegion
from afd.handoff.slots import FrameSlots, Region, SlotShape
from afd.handoff.tensors import dtype_from_proto
from afd.rpc import connect_peer, to_error
from afd.v1 import ffn_pb2 as pb
from afd.v1 import ffn_pb2_grpc

_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Diagnosis:
    """The ladder between this host and an FFN shard."""

    address: str
    ffn: pb.GetTopologyResponse
    max_tokens: int  # of the largest frame that was tried
    rungs: tuple[Rung, ...]
    remark: str  # what is amiss on this host, if anything

    @property
    def chosen(self) -> TransportName | None:
        """What `auto` takes."""
        usable = [rung for rung in self.rungs if not rung.reason]
        return min(usable, key=slowness).transport if usable else None


def diagnose(address: str, max_tokens: int, spin_s: float) -> Diagnosis:
    """Tries every transport with frames of up to max_tokens, or as many as the FFN takes.

    Raises PeerUnavailable if no FFN answers in time, or Mismatch if it is none.
    """
    ffn = _ask(address)
    max_tokens = min(max_tokens, ffn.max_frame_tokens)
    frames, remark = _frames(ffn.topology, max_tokens)
    rungs = tuple(_try(name, address, ffn.topology, frames, spin_s) for name in LADDER)
    return Diagnosis(address, ffn, max_tokens, rungs, remark)


def _ask(address: str) -> pb.GetTopologyResponse:
    """What the FFN wants to agree on."""
    with connect_peer(address, "ffn") as channel:
        try:
            return ffn_pb2_grpc.FfnServiceStub(channel).GetTopology(pb.GetTopologyRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            raise _explained(address, to_error(error)) from None


def _explained(address: str, error: AfdError) -> AfdError:
    if isinstance(error, PeerUnavailable | DeadlineExceeded):
        return PeerUnavailable(
            f"no FFN shard answers at {address}; give the gRPC address of a running one, as the ready file of `afd up` "
            "has it, and --tls if it wants TLS"
        )
    return Mismatch(f"{address} is no FFN shard that can tell what it is ({error}); give the gRPC address of one")


def _frames(topology: pb.Topology, max_tokens: int) -> tuple[FrameSlots, str]:
    """One slot as an attention replica here would have it, and why it is not in shared memory if it is not."""
    dtype = dtype_from_proto(topology.dtype)
    shape = SlotShape(1, max_tokens, topology.hidden_size, topology.top_k, dtype, dtype, dtype)
    try:
        return FrameSlots(SharedRegion(shape.frame_stride), shape), ""
    except TransportUnavailable as reason:
        return FrameSlots(Region.private(shape.frame_stride), shape), str(reason)


def _try(name: TransportName, address: str, topology: pb.Topology, frames: FrameSlots, spin_s: float) -> Rung:
    hello = pb.Hello(
        replica_id=f"doctor on {socket.gethostname()}",
        topology=topology,
        frame_dtype=topology.dtype,
        output_dtype=topology.dtype,
        num_slots=frames.shape.num_slots,
        max_tokens=frames.shape.max_tokens,
    )
    transport, rung = climb(name, address, hello, frames, spin_s)
    if transport:
        transport.close()
    return rung
