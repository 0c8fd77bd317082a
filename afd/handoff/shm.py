"""The shm transport: both sides of one host look at the same memory. Nothing is copied on the way.

Needs x86-64, whose processors keep the order of writes; elsewhere Python has no fence to ask for it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import platform
import re
import socket
import stat
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from afd.errors import AfdError, InternalError, StaleEpoch, TransportUnavailable
from afd.handoff.bell import Bell
from afd.handoff.control import HANDSHAKE_TIMEOUT_S, ControlStream, refusal
from afd.handoff.frame import Frame, FrameOutput, FrameRules, Timing
from afd.handoff.slots import AnswerSlots, FrameSlots, Region, SlotShape, aligned
from afd.processes import remove_deserted
from afd.v1 import ffn_pb2 as pb

DIRECTORY = Path("/dev/shm")
_NAME = re.compile(r"afd-[0-9a-f]{32}")
_NUM_FILES = 7  # memory of frames, posts and answers; two pipes


class SharedRegion(Region):
    """A region whose file other processes of this host can be given. It has no name, so nothing of it outlives them;
    and no one can shrink it under the others."""

    def __init__(self, num_bytes: int) -> None:
        """Raises TransportUnavailable where there is no shared memory, or too little."""
        if not _keeps_order():
            raise TransportUnavailable(
                f"shared memory needs Linux, and x86-64's order of writes; this is {sys.platform} on "
                f"{platform.machine()}"
            )
        try:
            self.file = _Descriptor(os.memfd_create("afd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
            if num_bytes > os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE:
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            os.posix_fallocate(self.file.number, 0, num_bytes)  # too little is an error here, not a SIGBUS later
            fcntl.fcntl(self.file.number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            super().__init__(mmap.mmap(self.file.number, num_bytes))
        except OSError as error:
            raise TransportUnavailable(
                f"{num_bytes >> 10} KiB of shared memory cannot be had ({error.strerror}); lower AFD_MAX_SEQUENCES or "
                "AFD_PREFILL_CHUNK_TOKENS"
            ) from None


def is_possible() -> bool:
    """Whether this host has the parts: an order of writes, and a place for sockets."""
    return _keeps_order() and os.access(DIRECTORY, os.W_OK | os.X_OK)


def _keeps_order() -> bool:
    return platform.machine() in ("x86_64", "AMD64") and sys.platform == "linux"


class _Descriptor:
    """An open file, closed with the last look at it."""

    _close = staticmethod(os.close)  # the module may be gone before its last object is

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        self._close(self.number)


@contextlib.contextmanager
def handing_over(files: Sequence[int]) -> Iterator[str]:
    """Gives open files to the one process that connects to a socket in /dev/shm while the block runs; yields the
    socket's name, which cannot be guessed. Raises TransportUnavailable if it cannot be made."""
    remove_deserted(DIRECTORY, "afd-" + 32 * "[0-9a-f]")  # of who was killed while a pair came up
    path = DIRECTORY / f"afd-{uuid.uuid4().hex}"
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(str(path))
            path.chmod(0o600)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise TransportUnavailable(f"no socket can be made in {DIRECTORY} ({error.strerror})") from None
        listener.listen()
        giver = threading.Thread(target=_give, args=(listener, files), daemon=True)
        giver.start()
        try:
            yield path.name
        finally:
            path.unlink(missing_ok=True)
            listener.shutdown(socket.SHUT_RDWR)  # accept returns
            giver.join()


def _give(listener: socket.socket, files: Sequence[int]) -> None:
    """To the first one who asks; a sweep connects, too, and does not."""
    with contextlib.suppress(OSError):  # nobody came
        while not _has_given(listener.accept()[0], files):
            pass


def _has_given(peer: socket.socket, files: Sequence[int]) -> bool:
    with peer, contextlib.suppress(OSError):
        peer.settimeout(HANDSHAKE_TIMEOUT_S)
        if peer.recv(1):
            socket.send_fds(peer, [b"!"], files)
            return True
    return False


def take_over(name: str, num_files: int) -> list[int]:
    """The open files that a peer of this host gives away. Raises TransportUnavailable if this process cannot reach
    it."""
    if not _NAME.fullmatch(name):
        raise TransportUnavailable("the offered name is not one of shared memory")
    try:
        with socket.socket(socket.AF_UNIX) as giver:
            giver.settimeout(HANDSHAKE_TIMEOUT_S)
            giver.connect(str(DIRECTORY / name))
            giver.sendall(b"?")
            _, files, _, _ = socket.recv_fds(giver, 1, num_files, socket.MSG_CMSG_CLOEXEC)
    except OSError as error:
        raise TransportUnavailable(
            f"the FFN cannot open the attention side's socket in {DIRECTORY} ({error.strerror or error}): "
            "another host, another user, or a container with a /dev/shm of its own"
        ) from None
    if len(files) != num_files:
        for file in files:
            os.close(file)
        raise TransportUnavailable(f"{len(files)} files were handed over, not {num_files}")
    return files


def open_region(file: int, num_bytes: int, writable: bool) -> Region:
    """A region that a peer has made. Raises TransportUnavailable if it is not of this size, or might become smaller."""
    try:
        actual, seals = os.fstat(file).st_size, fcntl.fcntl(file, fcntl.F_GET_SEALS)
    except OSError:
        raise TransportUnavailable("what was handed over is no shared memory") from None
    if actual != num_bytes or not seals & fcntl.F_SEAL_SHRINK:
        raise TransportUnavailable(f"the offered memory has {actual} bytes, not {num_bytes} for good")
    try:
        return Region(mmap.mmap(file, num_bytes, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)))
    except OSError as error:
        raise TransportUnavailable(f"the offered memory cannot be had ({error.strerror})") from None


def open_bell(reading: int, writing: int) -> Bell:
    """A bell that a peer has made. Raises TransportUnavailable if it is not both ends of one pipe: whoever sleeps by
    something else wakes up for ever, or fails."""
    ends = [os.fstat(file) for file in (reading, writing)]
    modes = [fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE for file in (reading, writing)]
    is_pipe = stat.S_ISFIFO(ends[0].st_mode) and os.path.samestat(*ends)
    if not is_pipe or modes != [os.O_RDONLY, os.O_WRONLY]:
        raise TransportUnavailable("what was handed over is no bell: both ends of a pipe")
    return Bell.given(reading, writing)


class Posts:
    """A word for each slot of one pair: the id of the frame that the FFN is to compute, 0 for none."""

    def __init__(self, region: Region) -> None:
        self.words = region.words

    @staticmethod
    def num_bytes(shape: SlotShape) -> int:
        return aligned(shape.num_slots * 8, mmap.PAGESIZE)


class ShmTransport:
    """The attention side of a pair."""

    name = "shm"

    def __init__(self, address: str, hello: pb.Hello, frames: FrameSlots) -> None:
        """Raises TransportUnavailable if the two do not share memory."""
        if not isinstance(frames.region, SharedRegion):
            raise TransportUnavailable("this attention replica has no shared memory for its frames")
        shape = frames.shape
        posts, answers = SharedRegion(Posts.num_bytes(shape)), SharedRegion(shape.num_slots * shape.answer_stride)
        self._posts = Posts(posts)
        self._frame_bell, answer_bell = Bell.private(), Bell.private()
        memory = [region.file.number for region in (frames.region, posts, answers)]
        with handing_over([*memory, *self._frame_bell.files, *answer_bell.files]) as name:
            hello.shm.CopyFrom(pb.ShmOffer(socket_name=name))
            self.control = ControlStream(address, hello)
        self.answers = AnswerSlots(answers, shape)
        self.regions = (answers,)
        self.bells = (self.control.bell, answer_bell)

    def send(self, frame: Frame) -> None:
        """The frame is where the FFN looks already."""
        self.control.expect(frame.frame_id)
        self._posts.words[frame.slot] = frame.frame_id
        self._frame_bell.ring()

    def answer(self, frame: Frame) -> FrameOutput | None:
        if self.answers.posted(frame.slot) != frame.frame_id:
            self.control.check(frame.frame_id)
            return None
        self.control.forget(frame.frame_id)
        try:
            return self.answers.read(frame)
        except InternalError as error:
            raise InternalError(f"the FFN at {self.control.address}: {error}") from None

    def drop(self, frame: Frame) -> None:
        """What is still written for it has an id that nobody awaits."""
        self.control.forget(frame.frame_id)
        if self._posts.words[frame.slot] == frame.frame_id:
            self._posts.words[frame.slot] = 0

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
        files = [_Descriptor(number) for number in take_over(hello.shm.socket_name, _NUM_FILES)]
        frames, posts, answers, *bells = (file.number for file in files)
        self.frames = FrameSlots(open_region(frames, shape.num_slots * shape.frame_stride, writable=False), shape)
        self._posts = Posts(open_region(posts, Posts.num_bytes(shape), writable=False))
        self.answers = AnswerSlots(open_region(answers, shape.num_slots * shape.answer_stride, writable=True), shape)
        self.regions = (self.frames.region, self.answers.region)
        self.bell, self._answer_bell = open_bell(*bells[:2]), open_bell(*bells[2:])
        self._seen = list(self._posts.words[: shape.num_slots])

    def poll(self) -> list[Frame]:
        arrived = []
        for slot, seen in enumerate(self._seen):
            frame_id = self._posts.words[slot]
            if frame_id not in (seen, 0):
                self._seen[slot] = frame_id
                try:
                    arrived.append(self._read(slot, frame_id))
                except AfdError as error:
                    self.refuse(frame_id, error)
        return arrived

    def _read(self, slot: int, frame_id: int) -> Frame:
        frame = self.frames.read(slot, self.rules)
        if frame.frame_id != frame_id:
            raise StaleEpoch("another frame lies in its slot by now")
        return frame

    def drop(self, frame_id: int) -> None:
        """Its post was taken down."""

    def awaits(self, frame: Frame) -> bool:
        return self._posts.words[frame.slot] == frame.frame_id

    def buffer(self, frame: Frame) -> Tensor:
        return self.answers.buffer(frame.slot, frame.num_tokens)

    def reply(self, frame: Frame, ffn_output: Tensor, timing: Timing) -> None:
        """ffn_output lies in the frame's buffer."""
        self.answers.post(frame, timing)
        self._answer_bell.ring()

    def refuse(self, frame_id: int, error: AfdError) -> None:
        self.post(refusal(frame_id, error))

    def close(self) -> None:
        """The memory goes with the last look at it."""
