"""The attention side of a pair's gRPC stream: handshake, refusals, rings, the inline transport's frames, and its end,
which is how the loss of the peer is seen."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc

from afd.errors import AfdError, InternalError, Mismatch, PeerUnavailable, StaleEpoch, TransportUnavailable
from afd.handoff.bell import Bell, Lookout
from afd.handoff.handshake import refuse_mismatch
from afd.rpc import connect_peer, to_peer_error
from afd.v1 import ffn_pb2 as pb
from afd.v1 import ffn_pb2_grpc

HANDSHAKE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Arrival:
    """An output that came in the stream."""

    output: pb.FrameOutput
    at_ns: int


class ControlStream:
    """Used by one thread; another one reads the stream behind it, and rings the bell for all that comes."""

    def __init__(self, address: str, hello: pb.Hello) -> None:
        """Connects and shakes hands. Raises PeerUnavailable, Mismatch naming what differs, or TransportUnavailable."""
        self.address = address
        self.bell = Bell.private()
        self.arrivals: dict[int, Arrival] = {}
        self._refusals: dict[int, pb.FrameError] = {}
        self._awaited: set[int] = set()
        self._error: AfdError | None = None
        self._outbox: queue.SimpleQueue[pb.ConnectRequest | None] = queue.SimpleQueue()
        self._welcomes: queue.SimpleQueue[pb.Welcome] = queue.SimpleQueue()
        self._channel = connect_peer(address, "ffn")
        self.put(pb.ConnectRequest(hello=hello))
        self._stream = ffn_pb2_grpc.FfnServiceStub(self._channel).Connect(self._requests())
        threading.Thread(target=self._read, name=f"handoff {address}", daemon=True).start()
        try:
            self.welcome = self._shake_hands(hello)
        except AfdError:
            self.close()
            raise

    @property
    def is_lost(self) -> bool:
        return self._error is not None

    def put(self, request: pb.ConnectRequest) -> None:
        self._outbox.put(request)

    def expect(self, frame_id: int) -> None:
        """A frame is under way: what the FFN says of it is of interest."""
        self._awaited.add(frame_id)

    def check(self, frame_id: int) -> None:
        """Raises PeerUnavailable if the pair is lost; StaleEpoch or InternalError if the frame was refused."""
        if self._error is not None:
            raise self._error
        if frame_id in self._refusals:
            refusal = self._refusals[frame_id]
            self.forget(frame_id)
            if refusal.stale:
                raise StaleEpoch(f"the FFN at {self.address}: {refusal.message}")
            raise InternalError(f"the FFN at {self.address} refused a frame: {refusal.message}")

    def forget(self, frame_id: int) -> None:
        """Nothing more is awaited for a frame."""
        self._awaited.discard(frame_id)
        self.arrivals.pop(frame_id, None)
        self._refusals.pop(frame_id, None)

    def drop(self, frame_id: int) -> None:
        """Tells the FFN, too."""
        self.forget(frame_id)
        self.put(pb.ConnectRequest(drop_frame=pb.DropFrame(frame_id=frame_id)))

    def close(self) -> None:
        self._outbox.put(None)
        self._stream.cancel()
        self._channel.close()

    def _requests(self) -> Iterator[pb.ConnectRequest]:
        while (request := self._outbox.get()) is not None:
            yield request

    def _read(self) -> None:
        try:
            for response in self._stream:
                self._take(response)
            self._error = PeerUnavailable(f"the FFN at {self.address} ended the stream")
        except grpc.RpcError as error:
            reason = to_peer_error(error)
            kind = Mismatch if isinstance(reason, Mismatch) else PeerUnavailable
            self._error = kind(f"the FFN at {self.address}: {reason}")
        self.bell.ring()

    def _take(self, response: pb.ConnectResponse) -> None:
        kind = response.WhichOneof("message")
        if kind == "output" and response.output.frame_id in self._awaited:
            self.arrivals[response.output.frame_id] = Arrival(response.output, time.perf_counter_ns())
        elif kind == "frame_error" and response.frame_error.frame_id in self._awaited:
            self._refusals[response.frame_error.frame_id] = response.frame_error
        elif kind == "welcome":
            self._welcomes.put(response.welcome)
        self.bell.ring()

    def _shake_hands(self, hello: pb.Hello) -> pb.Welcome:
        self._wait(lambda: not self._welcomes.empty())
        welcome = self._welcomes.get()
        refuse_mismatch(hello.topology, welcome.topology)
        if welcome.declined:
            raise TransportUnavailable(welcome.declined)
        return welcome

    def _wait(self, is_there: Callable[[], bool]) -> None:
        lookout, deadline = Lookout(0, [self.bell]), time.monotonic() + HANDSHAKE_TIMEOUT_S
        while not is_there():
            if self._error is not None:
                raise self._error
            if time.monotonic() > deadline:
                raise PeerUnavailable(f"the FFN at {self.address} does not answer in time")
            lookout.pause(0, deadline - time.monotonic())


def refusal(frame_id: int, error: AfdError) -> pb.ConnectResponse:
    """What the FFN says of a frame that it does not answer."""
    stale = isinstance(error, StaleEpoch)
    return pb.ConnectResponse(frame_error=pb.FrameError(frame_id=frame_id, message=str(error), stale=stale))
