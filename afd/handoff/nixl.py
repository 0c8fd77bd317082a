"""The nixl transport: each side writes straight into memory that the other one has registered, or what is small into
the notification.

Nothing can be slept on: whoever waits has to look, and what is under way moves on while somebody looks (docs/adr/0006).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import Tensor

from afd.errors import AfdError, InternalError, InvalidRequest, PeerUnavailable, TransportUnavailable
from afd.handoff.control import ControlStream, refusal
from afd.handoff.frame import Frame, FrameOutput, FrameRules, Timing
from afd.handoff.nixl_link import NixlLink, Note
from afd.handoff.slots import AnswerSlots, FrameSlots, Region, SlotShape
from afd.v1 import ffn_pb2 as pb

log = logging.getLogger(__name__)


class NixlTransport:
    """The attention side of a pair."""

    name = "nixl"

    def __init__(self, address: str, hello: pb.Hello, frames: FrameSlots) -> None:
        """Raises TransportUnavailable if one side has no NIXL, or they do not fit."""
        shape = frames.shape
        self.shape = shape
        written = Region.private(shape.num_slots * shape.answer_stride)
        self._link = NixlLink("attention replica", f"the FFN at {address}", frames.region, written, shape.num_slots)
        self._answers = {region: AnswerSlots(region, shape) for region in (written, self._link.beside)}
        self.regions = tuple(self._answers)
        self._answered = [Note(0, slot, written) for slot in range(shape.num_slots)]
        hello.nixl.CopyFrom(self._link.offer)
        self.control = ControlStream(address, hello)
        self.bells = (self.control.bell, None)
        try:
            self._link.connect(self.control.welcome.nixl)
        except TransportUnavailable:
            self.control.close()
            raise

    def send(self, frame: Frame) -> None:
        self.control.expect(frame.frame_id)
        self._link.write(frame.slot, self.shape.frame_bytes(frame.num_tokens), frame.frame_id)

    def answer(self, frame: Frame) -> FrameOutput | None:
        for note in self._link.poll():
            self._answered[note.slot] = note
        frame_id, _, region = self._answered[frame.slot]
        if frame_id != frame.frame_id:
            self.control.check(frame.frame_id)
            return None
        self.control.forget(frame.frame_id)
        try:
            return self._answers[region].read(frame)
        except InternalError as error:
            raise InternalError(f"the FFN at {self.control.address}: {error}") from None

    def drop(self, frame: Frame) -> None:
        self.control.drop(frame.frame_id)

    def close(self) -> None:
        self.control.close()


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
        written = Region.private(shape.num_slots * shape.frame_stride)
        self.answers = AnswerSlots(Region.private(shape.num_slots * shape.answer_stride), shape)
        self._held = [0] * shape.num_slots
        self._awaited: set[int] = set()
        self._is_lost = False
        self._link = NixlLink(
            "FFN",
            f"the attention replica {hello.replica_id}",
            self.answers.region,
            written,
            shape.num_slots,
        )
        self._frames = {region: FrameSlots(region, shape) for region in (written, self._link.beside)}
        self.regions = (*self._frames, self.answers.region)
        self._link.connect(hello.nixl)
        self.offer = self._link.offer

    def poll(self) -> list[Frame]:
        frames = [self._take(note) for note in self._notes()]
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
        self.post(refusal(frame_id, error))

    def close(self) -> None:
        """The agent goes with the last look at it, which may be the batcher's."""
        self._awaited.clear()

    def _notes(self) -> list[Note]:
        try:
            return [] if self._is_lost else self._link.poll()
        except PeerUnavailable as error:
            self._give_up(error)
            return []

    def _take(self, note: Note) -> Frame | None:
        frame_id, slot, region = note
        self._awaited.discard(self._held[slot])
        self._awaited.add(frame_id)
        self._held[slot] = frame_id
        try:
            frame = self._frames[region].read(slot, self.rules)
        except InvalidRequest as error:
            self.refuse(frame_id, error)
            return None
        return frame if frame.frame_id == frame_id else None  # the slot's next one is on its way already

    def _give_up(self, error: PeerUnavailable) -> None:
        log.warning("%s", error)
        self._is_lost = True
        self.hang_up()
