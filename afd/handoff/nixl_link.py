"""One side of a NIXL connection: an agent, the memory that it writes from, and the memory that the other one writes to.

NIXL, over UCX, finds the way: RDMA between hosts, one copy by the kernel within a host, TCP if there is nothing better.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import mmap
import os
import struct
import time
import uuid
import weakref
from types import ModuleType
from typing import Any, NamedTuple

from afd.errors import PeerUnavailable, TransportUnavailable
from afd.handoff.slots import Region
from afd.v1 import ffn_pb2 as pb

_MODULES = ("nixl_cu12", "nixl_cu13")
_ENVIRONMENT = {
    "NIXL_LOG_LEVEL": "WARN",  # INFO goes to stdout
    "UCX_MEM_MMAP_HOOK_MODE": "none",  # watches for memory that is unmapped: 0.4 s at the start, and ours never is
    "UCX_TCP_TX_SEG_SIZE": "64k",  # a small frame goes beside its note in one piece
    "UCX_TCP_RX_SEG_SIZE": "64k",
}
_NOTE = struct.Struct("<QI")  # what was written: frame_id, slot
_HOST = "DRAM"
_LONGEST_WRITE_S = 200e-6
MOST_BYTES_BESIDE_A_NOTE = 32 << 10  # beyond, a write of its own is as fast, or faster (docs/performance.md)

_retired: list[Region] = []


def _load(role: str) -> ModuleType:
    """The package for whatever CUDA is installed. Raises TransportUnavailable if none is."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    reasons = []
    for module in _MODULES:
        try:
            return importlib.import_module(module)
        except ImportError as error:
            reasons.append(str(error))
    raise TransportUnavailable(
        f"the {role} has no NIXL ({'; '.join(reasons)}): pip install 'afd[nixl-cu12]', or 'afd[nixl-cu13]' for CUDA 13"
    )


def is_installed() -> bool:
    """Whether there is a NIXL to load. That it works is only seen when it is used."""
    return any(importlib.util.find_spec(module) for module in _MODULES)


class Note(NamedTuple):
    """The other side has filled a slot: of the memory that it writes to, or of that beside."""

    frame_id: int
    slot: int
    region: Region


class NixlLink:
    """Slot i of this side's `outgoing` goes to slot i of the other one's `incoming`, or to that of `beside` if it came
    with its note: the slot's next frame may be on its way to `incoming` already. Used by one thread at a time."""

    def __init__(self, role: str, peer: str, outgoing: Region, incoming: Region, num_slots: int) -> None:
        """`role` and `peer` say in errors who this side and the other one are. Raises TransportUnavailable if this
        side has no NIXL."""
        nixl = _load(role)
        self._role = role
        self._peer = peer
        self._errors = _errors(nixl)
        self._stride = outgoing.bytes.nbytes // num_slots
        self._num_slots = num_slots
        self._outgoing = outgoing
        self._incoming = incoming
        self.beside = Region.private(incoming.bytes.nbytes)
        self._handles: dict[tuple[int, int], Any] = {}  # by slot and number of bytes
        self._moving: dict[int, Any] = {}  # by slot: the handle that is under way
        self._due: dict[int, tuple[int, int]] = {}  # by slot: number of bytes and frame_id that follow it
        try:
            self._agent = nixl.nixl_agent(f"afd-{uuid.uuid4().hex}", nixl.nixl_agent_config(enable_prog_thread=False))
            regions = [(region.address, region.bytes.nbytes, 0, "") for region in (outgoing, incoming)]
            self._agent.register_memory(regions, _HOST)
        except self._errors as error:
            raise TransportUnavailable(f"NIXL does not work for the {role}: {error}") from None
        self.offer = pb.NixlOffer(
            version=importlib.metadata.version(nixl.__name__),
            metadata=self._agent.get_agent_metadata(),
            address=incoming.address,
            num_bytes=incoming.bytes.nbytes,
        )
        weakref.finalize(self, _retire, incoming).atexit = False

    def connect(self, peer: pb.NixlOffer) -> None:
        """Raises TransportUnavailable unless the other side offers registered memory for what this side writes."""
        self._check(peer)
        self._peer_address = peer.address
        try:
            self._peer_agent = self._agent.add_remote_agent(peer.metadata)
            self._agent.prep_xfer_dlist(self._peer_agent, [(peer.address, peer.num_bytes, 0)], _HOST).release()
        except self._errors as error:
            raise TransportUnavailable(f"the offered memory is none that NIXL can write to: {error}") from None

    def write(self, slot: int, num_bytes: int, frame_id: int) -> None:
        """Writes the beginning of a slot and then tells the other side, after what is under way in that slot. Little
        goes along with what tells of it; what takes longer than a moment goes on with later calls. Raises
        PeerUnavailable."""
        self._due[slot] = num_bytes, frame_id
        deadline = time.monotonic() + _LONGEST_WRITE_S
        self._move_on()
        while slot in self._moving and time.monotonic() < deadline:
            self._move_on()

    def poll(self) -> list[Note]:
        """What the other side has written since the last look. Raises PeerUnavailable."""
        if self._moving:
            self._move_on()
        try:
            notes = self._agent.get_new_notifs()
        except self._errors as error:
            raise self._lost(error) from None
        return [self._read(note) for of_agent in notes.values() for note in of_agent]

    def _check(self, peer: pb.NixlOffer) -> None:
        ours, num_bytes = self.offer.version, self._outgoing.bytes.nbytes
        if peer.version != ours:
            theirs = peer.version or "none"
            raise TransportUnavailable(f"NIXL differs: the {self._role} has {ours}, {self._peer} has {theirs}")
        if peer.num_bytes != num_bytes:
            raise TransportUnavailable(f"the offered memory has {peer.num_bytes} bytes, not {num_bytes}")
        if peer.address + num_bytes >= 1 << 64:  # NIXL's own check would run over
            raise TransportUnavailable("the offered memory is none that NIXL can write to: no address is so high")

    def _move_on(self) -> None:
        try:
            for slot, handle in list(self._moving.items()):
                if self._agent.check_xfer_state(handle) == "DONE":
                    del self._moving[slot]
            for slot in self._due.keys() - self._moving.keys():
                self._start(slot, *self._due.pop(slot))
        except self._errors as error:
            raise self._lost(error) from None

    def _start(self, slot: int, num_bytes: int, frame_id: int) -> None:
        note = _NOTE.pack(frame_id, slot)
        if num_bytes <= MOST_BYTES_BESIDE_A_NOTE:
            start = slot * self._stride
            self._agent.send_notif(self._peer_agent, note + self._outgoing.memory[start : start + num_bytes])
            return
        handle = self._handles.get((slot, num_bytes)) or self._make_handle(slot, num_bytes)
        if self._agent.transfer(handle, note) != "DONE":
            self._moving[slot] = handle

    def _make_handle(self, slot: int, num_bytes: int) -> Any:
        offset = slot * self._stride
        ours, theirs = (
            self._agent.get_xfer_descs([(address + offset, num_bytes, 0)], _HOST)
            for address in (self._outgoing.address, self._peer_address)
        )
        handle = self._agent.initialize_xfer("WRITE", ours, theirs, self._peer_agent)
        self._handles[slot, num_bytes] = handle
        return handle

    def _read(self, note: bytes) -> Note:
        frame_id, slot = _NOTE.unpack_from(note) if len(note) >= _NOTE.size else (0, self._num_slots)
        if slot >= self._num_slots:
            raise PeerUnavailable(f"{self._peer} tells by NIXL of a slot that does not exist")
        num_bytes = len(note) - _NOTE.size
        if not num_bytes:
            return Note(frame_id, slot, self._incoming)
        stride = self.beside.bytes.nbytes // self._num_slots
        if num_bytes > stride:
            raise PeerUnavailable(f"{self._peer} sends by NIXL more than a slot holds")
        self.beside.memory[slot * stride : slot * stride + num_bytes] = note[_NOTE.size :]
        return Note(frame_id, slot, self.beside)

    def _lost(self, error: Exception) -> PeerUnavailable:
        return PeerUnavailable(f"{self._peer} is lost to NIXL: {error}")


def _errors(nixl: ModuleType) -> tuple[type[Exception], ...]:
    """NIXL's own, which have no common base."""
    bindings = importlib.import_module(f"{nixl.__name__}._bindings")
    own = tuple(kind for name, kind in vars(bindings).items() if name.endswith("Error"))
    return *own, RuntimeError  # the Python side of it raises that one


def _retire(region: Region) -> None:
    """Empties a region, but never unmaps it: a peer that was given up may still write there, by its address."""
    region.unpin()
    region.memory.madvise(mmap.MADV_REMOVE)
    _retired.append(region)
