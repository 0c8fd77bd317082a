"""The attention side of a pair's gRPC stream: handshake, refusals, rings, the inline transport's frames, and its end,
which is how the loss of the peer is seen."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import grpc

from afd.errors import AfdError, InternalError, Mismatch, PeerUnavailable, TransportUnavailable
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
    """Used by one thread; another one reads the stream behind it."""

    def __init__(self, address: str, hello: pb.Hello, spin_s: float, bells: Sequence[Bell | None] = ()) -> None:
        """Connects and shakes hands. Raises PeerUnavailable, Mismatch naming what differs, or TransportUnavailable.

        `bells` ring for what comes outside the stream, None if nobody rings; spin_s is how long to look out for it
        before sleeping.
        """
        self.address = address
        self.arrivals: dict[int, Arrival] = {}
        self._refusals: dict[int, str] = {}
        self._error: AfdError | None = None
        self._stream_bell = Bell.private()
        self._lookout = Lookout(spin_s, [self._stream_bell, *bells])
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

    def drop(self, frame_id: int) -> None:
        self.arrivals.pop(frame_id, None)
        self._refusals.pop(frame_id, None)
        self.put(pb.ConnectRequest(drop_frame=pb.DropFrame(frame_id=frame_id)))

    def wait(self, is_there: Callable[[], bool], frame_id: int, timeout_s: float) -> None:
        """Returns when is_there says so: looks out for a while, giving way to others, and then sleeps in between.

        Raises PeerUnavailable if the pair is lost or the time is over, InternalError if the frame is refused.
        """
        started = time.monotonic()
        while not is_there():
            if self._error is not None:
                raise self._error
            if frame_id in self._refusals:
                message = self._refusals.pop(frame_id)
                raise InternalError(f"the FFN at {self.address} refused a frame: {message}")
            waited_s = time.monotonic() - started
            if waited_s > timeout_s:
                raise PeerUnavailable(f"the FFN at {self.address} does not answer in time")
            self._lookout.pause(waited_s, timeout_s - waited_s)

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
        self._stream_bell.ring()

    def _take(self, response: pb.ConnectResponse) -> None:
        kind = response.WhichOneof("message")
        if kind == "output":
            self.arrivals[response.output.frame_id] = Arrival(response.output, time.perf_counter_ns())
        elif kind == "frame_error":
            self._refusals[response.frame_error.frame_id] = response.frame_error.message
        elif kind == "welcome":
            self._welcomes.put(response.welcome)
        self._stream_bell.ring()

    def _shake_hands(self, hello: pb.Hello) -> pb.Welcome:
        try:
            self.wait(lambda: not self._welcomes.empty(), 0, HANDSHAKE_TIMEOUT_S)
        except InternalError as error:
            raise PeerUnavailable(f"the FFN at {self.address} did not begin with a welcome: {error}") from None
        welcome = self._welcomes.get()
        refuse_mismatch(hello.topology, welcome.topology)
        if welcome.declined:
            raise TransportUnavailable(welcome.declined)
        return welcome
