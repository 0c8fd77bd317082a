"""The nixl transport: each side writes straight into memory that the other one has registered.

NIXL, over UCX, finds the way: RDMA between hosts, one copy by the kernel within a host, TCP if there is nothing better.

Nothing can be slept on: whoever waits has to look, and what is under way moves on while somebody looks (docs/adr/0006).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import mmap
import os
import struct
import time
import uuid
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from afd.errors import AfdError, InternalError, InvalidRequest, PeerUnavailable, TransportUnavailable
from afd.handoff.control import ControlStream
from afd.handoff.frame import Frame, FrameOutput, FrameRules, Timing
from afd.handoff.slots import AnswerSlots, FrameSlots, Region, SlotShape
from afd.v1 import ffn_pb2 as pb

log = logging.getLogger(__name__)

_MODULES = ("nixl_cu12", "nixl_cu13")
_ENVIRONMENT = {
    "NIXL_LOG_LEVEL": "WARN",  # INFO goes to stdout
    "UCX_MEM_MMAP_HOOK_MODE": "none",  # watches for memory that is unmapped: 0.4 s at the start, and ours never is
}
_NOTE = struct.Struct("<QI")  # what was written: frame_id, slot
_HOST = "DRAM"
_LONGEST_WRITE_S = 200e-6

_retired: list[Region] = []


def _load_nixl(role: str) -> ModuleType:
    """The package for whatever CUDA is installed. Raises TransportUnavailable if none is."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    reasons = []
    for module in _MODULES:
        try:
            return importlib.import_module(module)
        except ImportError as error:
            reasons.append(str(error))
    raise TransportUnavailable(f"the {role} has no NIXL ({'; '.join(reasons)}): pip install 'afd[nixl-cu12]'")


class NixlLink:
    """One side of a pair: its agent, what it writes from, and what the other side writes to. Used by one thread at a
    time. Slot i of the one side's `outgoing` goes to slot i of the other one's `incoming`."""

    def __init__(self, role: str, peer: str, outgoing: Region, incoming: Region, num_slots: int) -> None:
        """`role` and `peer` say in errors who this side and the other one are. Raises TransportUnavailable if this
        side has no NIXL."""
        nixl = _load_nixl(role)
        self._role = role
        self._peer = peer
        self._errors = _errors(nixl)
        self._stride = outgoing.bytes.nbytes // num_slots
        self._num_slots = num_slots
        self._outgoing = outgoing
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
        if peer.version != self.offer.version:
            raise TransportUnavailable(
                f"NIXL differs: the {self._role} has {self.offer.version}, {self._peer} has {peer.version or 'none'}"
            )
        if peer.num_bytes != self._outgoing.bytes.nbytes:
            raise TransportUnavailable(
                f"the offered memory has {peer.num_bytes} bytes, not {self._outgoing.bytes.nbytes}"
            )
        self._peer_address = peer.address
        try:
            if peer.address + peer.num_bytes >= 1 << 64:  # NIXL's own check runs over
                raise RuntimeError("it ends beyond all addresses")
            self._peer_agent = self._agent.add_remote_agent(peer.metadata)
            self._agent.prep_xfer_dlist(self._peer_agent, [(peer.address, peer.num_bytes, 0)], _HOST).release()
        except self._errors as error:
            raise TransportUnavailable(f"the offered memory is none that NIXL can write to: {error}") from None

    def write(self, slot: int, num_bytes: int, frame_id: int) -> None:
        """Writes the beginning of a slot and then tells the other side, after what is under way in that slot. What
        takes longer than a moment goes on with later calls. Raises PeerUnavailable."""
        self._due[slot] = num_bytes, frame_id
        deadline = time.monotonic() + _LONGEST_WRITE_S
        self._move_on()
        while slot in self._moving and time.monotonic() < deadline:
            self._move_on()

    def poll(self) -> list[tuple[int, int]]:
        """The frame_id and slot of what the other side has written since the last look. Raises PeerUnavailable."""
        if self._moving:
            self._move_on()
        try:
            notes = self._agent.get_new_notifs()
        except self._errors as error:
            raise self._lost(error) from None
        return [self._read(note) for of_agent in notes.values() for note in of_agent]

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
        handle = self._handles.get((slot, num_bytes)) or self._make_handle(slot, num_bytes)
        if self._agent.transfer(handle, _NOTE.pack(frame_id, slot)) != "DONE":
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

    def _read(self, note: bytes) -> tuple[int, int]:
        frame_id, slot = _NOTE.unpack(note) if len(note) == _NOTE.size else (0, self._num_slots)
        if slot >= self._num_slots:
            raise PeerUnavailable(f"{self._peer} tells by NIXL of a slot that does not exist")
        return frame_id, slot

    def _lost(self, error: Exception) -> PeerUnavailable:
        return PeerUnavailable(f"{self._peer} is lost to NIXL: {error}")


def _errors(nixl: ModuleType) -> tuple[type[Exception], ...]:
    """NIXL's own, which have no common base."""
    bindings = importlib.import_module(f"{nixl.__name__}._bindings")
    own = tuple(kind for name, kind in vars(bindings).items() if name.endswith("Error"))
    return *own, RuntimeError  # the Python side of it raises that one


def _retire(region: Region) -> None:
    """Empties a region, but never unmaps it: a peer that was given up may still write there, by its address."""
    region.memory.madvise(mmap.MADV_REMOVE)
    _retired.append(region)


class NixlTransport:
    """The attention side of a pair."""

    name = "nixl"

    def __init__(self, address: str, hello: pb.Hello, frames: FrameSlots, spin_s: float) -> None:
        """Raises TransportUnavailable if one side has no NIXL, or they do not fit."""
        shape = frames.shape
        self.shape = shape
        self.answers = AnswerSlots(Region.private(shape.num_slots * shape.answer_stride), shape)
        self._answered = [0] * shape.num_slots
        self._link = NixlLink(
            "attention replica", f"the FFN at {address}", frames.region, self.answers.region, shape.num_slots
        )
        hello.nixl.CopyFrom(self._link.offer)
        self.control = ControlStream(address, hello, spin_s, [None])
        try:
            self._link.connect(self.control.welcome.nixl)
        except TransportUnavailable:
            self.control.close()
            raise

    def send(self, frame: Frame) -> None:
        self._link.write(frame.slot, self.shape.frame_bytes(frame.num_tokens), frame.frame_id)

    def receive(self, frame: Frame, timeout_s: float) -> FrameOutput:
        self.control.wait(lambda: self._has_answer(frame), frame.frame_id, timeout_s)
        try:
            return self.answers.read(frame.slot, frame.num_tokens)
        except InternalError as error:
            raise InternalError(f"the FFN at {self.control.address}: {error}") from None

    def drop(self, frame: Frame) -> None:
        self.control.drop(frame.frame_id)

    def close(self) -> None:
        self.control.close()

    def _has_answer(self, frame: Frame) -> bool:
        for frame_id, slot in self._link.poll():
            self._answered[slot] = frame_id
        return self._answered[frame.slot] == frame.frame_id


class NixlEndpoint:
    """The FFN side of a pair. Made on the network's thread, then used by the batcher's."""

    bell = None

    def __init__(
        self,
        hello: pb.Hello,
        post: Callable[[pb.ConnectResponse], None],
        hang_up: Callable[[], None],
        rules: FrameRules,
        shape: SlotShape,
    ) -> None:
        """Raises TransportUnavailable if this side has no NIXL, or the two do not fit."""
        self.post = post
        self.hang_up = hang_up
        self.rules = rules
        self.shape = shape
        self.frames = FrameSlots(Region.private(shape.num_slots * shape.frame_stride), shape)
        self.answers = AnswerSlots(Region.private(shape.num_slots * shape.answer_stride), shape)
        self._held = [0] * shape.num_slots
        self._awaited: set[int] = set()
        self._is_lost = False
        self._link = NixlLink(
            "FFN",
            f"the attention replica {hello.replica_id}",
            self.answers.region,
            self.frames.region,
            shape.num_slots,
        )
        self._link.connect(hello.nixl)
        self.offer = self._link.offer

    def poll(self) -> list[Frame]:
        frames = [self._take(frame_id, slot) for frame_id, slot in self._notes()]
        return [frame for frame in frames if frame is not None]

    def drop(self, frame_id: int) -> None:
        self._awaited.discard(frame_id)

    def awaits(self, frame: Frame) -> bool:
        return frame.frame_id in self._awaited

    def buffer(self, frame: Frame) -> Tensor:
        return self.answers.buffer(frame.slot, frame.num_tokens)

    def reply(self, frame: Frame, ffn_output: Tensor, timing: Timing) -> None:
        """ffn_output lies in the frame's buffer."""
        self._awaited.discard(frame.frame_id)
        self.answers.post(frame, timing)
        try:
            self._link.write(frame.slot, self.shape.answer_bytes(frame.num_tokens), frame.frame_id)
        except PeerUnavailable as error:
            self._give_up(error)

    def refuse(self, frame_id: int, error: AfdError) -> None:
        self._awaited.discard(frame_id)
        self.post(pb.ConnectResponse(frame_error=pb.FrameError(frame_id=frame_id, message=str(error))))

    def close(self) -> None:
        """The agent goes with the last look at it, which may be the batcher's."""
        self._awaited.clear()

    def _notes(self) -> list[tuple[int, int]]:
        try:
            return [] if self._is_lost else self._link.poll()
        except PeerUnavailable as error:
            self._give_up(error)
            return []

    def _take(self, frame_id: int, slot: int) -> Frame | None:
        self._awaited.discard(self._held[slot])
        self._awaited.add(frame_id)
        self._held[slot] = frame_id
        try:
            frame = self.frames.read(slot, self.rules)
        except InvalidRequest as error:
            self.refuse(frame_id, error)
            return None
        return frame if frame.frame_id == frame_id else None  # the slot's next one is on its way already

    def _give_up(self, error: PeerUnavailable) -> None:
        log.warning("%s", error)
        self._is_lost = True
        self.hang_up()
