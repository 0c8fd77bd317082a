"""The shm transport: both sides of one host look at the same memory. Nothing is copied on the way.

Needs x86-64, whose processors keep the order of writes; elsewhere Python has no fence to ask for it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import re
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from afd.errors import AfdError, InternalError, InvalidRequest, TransportUnavailable
from afd.handoff.bell import Bell
from afd.handoff.control import ControlStream
from afd.handoff.frame import Frame, FrameOutput, FrameRules, Timing
from afd.handoff.slots import AnswerSlots, FrameSlots, Region, SlotShape
from afd.v1 import ffn_pb2 as pb

DIRECTORY = Path("/dev/shm")
_NAME = re.compile(r"afd-[0-9a-f]{32}")
_SWEEP_AFTER_S = 60.0  # no pair takes so long to come up


class SharedRegion(Region):
    """A region that other processes of this host can open by its name, until it is unlinked."""

    def __init__(self, num_bytes: int) -> None:
        """Raises TransportUnavailable where there is no shared memory, or too little."""
        if platform.machine() not in ("x86_64", "AMD64"):
            raise TransportUnavailable(f"shared memory needs x86-64's order of writes; this is {platform.machine()}")
        self.name = _new_name()
        try:
            super().__init__(_make_file(DIRECTORY / self.name, num_bytes))
        except OSError as error:
            self.unlink()
            raise TransportUnavailable(
                f"{num_bytes >> 10} KiB of shared memory cannot be had in {DIRECTORY} ({error.strerror}); if it is "
                "full, give it more (docker: --shm-size), or lower AFD_MAX_SEQUENCES or AFD_PREFILL_CHUNK_TOKENS"
            ) from None

    def unlink(self) -> None:
        """Takes the name away; the memory lives as long as somebody looks at it."""
        (DIRECTORY / self.name).unlink(missing_ok=True)


def _new_name() -> str:
    return f"afd-{uuid.uuid4().hex}"


def _make_bell(name: str) -> Bell:
    try:
        os.mkfifo(DIRECTORY / name, 0o600)
        return Bell.named(DIRECTORY / name)
    except OSError as error:
        raise TransportUnavailable(f"no FIFO can be made in {DIRECTORY} ({error.strerror})") from None


def _make_file(path: Path, num_bytes: int) -> mmap.mmap:
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(file, 0, num_bytes)  # a full /dev/shm is an error here, not a SIGBUS later
        return mmap.mmap(file, num_bytes)
    finally:
        os.close(file)


def open_region(name: str, num_bytes: int, writable: bool) -> Region:
    """A region that a peer of this host has made. Raises TransportUnavailable if this process cannot see it."""
    with _in_words():
        file = os.open(_path(name), (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if os.fstat(file).st_size != num_bytes:
            raise TransportUnavailable(f"the offered memory has {os.fstat(file).st_size} bytes, not {num_bytes}")
        return Region(mmap.mmap(file, num_bytes, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)))
    finally:
        os.close(file)


def open_bell(name: str) -> Bell:
    """A bell that a peer of this host has made. Raises TransportUnavailable if this process cannot see it."""
    with _in_words():
        return Bell.named(_path(name))


def _path(name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise TransportUnavailable("the offered name is not one of shared memory")
    return DIRECTORY / name


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TransportUnavailable(
            f"the FFN cannot open the attention side's memory in {DIRECTORY} ({error.strerror}): "
            "another host, another user, or a container with a /dev/shm of its own"
        ) from None


def sweep() -> None:
    """Removes what a process that was killed while a pair came up has left."""
    for path in DIRECTORY.glob("afd-*"):
        try:
            if _NAME.fullmatch(path.name) and time.time() - path.stat().st_mtime > _SWEEP_AFTER_S:
                path.unlink()
        except OSError:
            continue  # another one was faster, or it is somebody else's


class ShmTransport:
    """The attention side of a pair."""

    name = "shm"

    def __init__(self, address: str, hello: pb.Hello, frames: FrameSlots, spin_s: float) -> None:
        """Raises TransportUnavailable if the two do not share memory."""
        if not isinstance(frames.region, SharedRegion):
            raise TransportUnavailable("this attention replica has no shared memory for its frames")
        shape = frames.shape
        answers = SharedRegion(shape.num_slots * shape.answer_stride)
        frame_bell, answer_bell = _new_name(), _new_name()
        try:
            self._frame_bell = _make_bell(frame_bell)
            hello.shm.CopyFrom(
                pb.ShmOffer(
                    frames_name=frames.region.name,
                    answers_name=answers.name,
                    frame_bell_name=frame_bell,
                    answer_bell_name=answer_bell,
                )
            )
            self.control = ControlStream(address, hello, spin_s, [_make_bell(answer_bell)])
        finally:
            for name in (answers.name, frame_bell, answer_bell):
                (DIRECTORY / name).unlink(missing_ok=True)
        self.answers = AnswerSlots(answers, shape)
        self.regions = (answers,)

    def send(self, frame: Frame) -> None:
        """The frame is where the FFN looks already."""
        self._frame_bell.ring()

    def receive(self, frame: Frame, timeout_s: float) -> FrameOutput:
        posted, slot, frame_id = self.answers.posted, frame.slot, frame.frame_id
        self.control.wait(lambda: posted(slot) == frame_id, frame_id, timeout_s)
        try:
            return self.answers.read(slot, frame.num_tokens)
        except InternalError as error:
            raise InternalError(f"the FFN at {self.control.address}: {error}") from None

    def drop(self, frame: Frame) -> None:
        """The frame was withdrawn from its slot; what is still written for it has an id that nobody awaits."""

    def close(self) -> None:
        self.control.close()


class ShmEndpoint:
    """The FFN side of a pair. Used by the batcher's thread."""

    def __init__(
        self, hello: pb.Hello, post: Callable[[pb.ConnectResponse], None], rules: FrameRules, shape: SlotShape
    ) -> None:
        """Raises TransportUnavailable if the two do not share memory."""
        self.post = post
        self.rules = rules
        frames = open_region(hello.shm.frames_name, shape.num_slots * shape.frame_stride, writable=False)
        answers = open_region(hello.shm.answers_name, shape.num_slots * shape.answer_stride, writable=True)
        self.bell = open_bell(hello.shm.frame_bell_name)
        self.frames = FrameSlots(frames, shape)
        self.answers = AnswerSlots(answers, shape)
        self.regions = (frames, answers)
        self._answer_bell = open_bell(hello.shm.answer_bell_name)
        self._seen = [self.frames.posted(slot) for slot in range(shape.num_slots)]

    def poll(self) -> list[Frame]:
        arrived = []
        for slot, seen in enumerate(self._seen):
            frame_id = self.frames.posted(slot)
            if frame_id not in (seen, 0):
                self._seen[slot] = frame_id
                try:
                    arrived.append(self.frames.read(slot, self.rules))
                except InvalidRequest as error:
                    self.refuse(frame_id, error)
        return arrived

    def drop(self, frame_id: int) -> None:
        """The frame was withdrawn from its slot."""

    def awaits(self, frame: Frame) -> bool:
        return self.frames.posted(frame.slot) == frame.frame_id

    def buffer(self, frame: Frame) -> Tensor:
        return self.answers.buffer(frame.slot, frame.num_tokens)

    def reply(self, frame: Frame, ffn_output: Tensor, timing: Timing) -> None:
        """ffn_output lies in the frame's buffer."""
        self.answers.post(frame, timing)
        self._answer_bell.ring()

    def refuse(self, frame_id: int, error: AfdError) -> None:
        self.post(pb.ConnectResponse(frame_error=pb.FrameError(frame_id=frame_id, message=str(error))))

    def close(self) -> None:
        """The memory goes with the last look at it."""
