"""Which transport a pair uses: shared memory if a probe comes through it, or the fastest of the others."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from afd.errors import AfdError, ConfigError, InternalError, PeerUnavailable, TransportUnavailable
from afd.handoff import nixl_link, shm
from afd.handoff.frame import Frame
from afd.handoff.inline import InlineTransport
from afd.handoff.nixl import NixlTransport
from afd.handoff.shm import ShmTransport
from afd.handoff.slots import FrameSlots
from afd.handoff.transport import Transport, receive
from afd.v1 import ffn_pb2 as pb

log = logging.getLogger(__name__)

TransportName = Literal["nixl", "shm", "inline"]
# nixl last: an FFN that naps for its pair would hear another one's bell late
LADDER: dict[TransportName, Callable[[str, pb.Hello, FrameSlots], Transport]] = {
    "shm": ShmTransport,
    "inline": InlineTransport,
    "nixl": NixlTransport,
}

_NUM_WARM_UPS, _NUM_SMALL, _NUM_LARGE = 3, 15, 3
_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Rung:
    """One transport of a pair: what its probe measured, or why it cannot be had."""

    transport: TransportName
    latency_s: float = 0.0  # shortest round trip of one token: the others tell how busy the host is
    bytes_per_s: float = 0.0  # of the largest frame, both ways together
    reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return f"{self.transport}: no, {self.reason}"
        return f"{self.transport}: {self.latency_s * 1e6:.0f} µs, {self.bytes_per_s / 1e9:.2f} GB/s"


def possible_transports() -> tuple[TransportName, ...]:
    """Those that this host has the parts for. Which of them reach a peer, a probe says."""
    has_parts = {"shm": shm.is_possible(), "nixl": nixl_link.is_installed(), "inline": True}
    return tuple(name for name in LADDER if has_parts[name])


def slowness(rung: Rung) -> tuple[bool, float]:
    """What `auto` wants least of (docs/adr/0014). Frames of decode steps are small: their latency counts."""
    return rung.transport != "shm", rung.latency_s


def connect_pair(
    address: str, hello: pb.Hello, frames: FrameSlots, wanted: TransportName | Literal["auto"], spin_s: float
) -> tuple[Transport, Rung]:
    """The best transport, or the one wanted, with its probe. Frames of other pairs may be under way meanwhile, in all
    slots but the last.

    Raises PeerUnavailable, Mismatch, or ConfigError if the one wanted cannot be had.
    """
    usable: list[tuple[Transport, Rung]] = []
    best: tuple[Transport, Rung] | None = None
    try:
        for name in LADDER:
            if wanted in (name, "auto"):
                transport, rung = climb(name, address, hello, frames, spin_s)
                log.debug("handoff to %s over %s", address, rung)
                usable += [(transport, rung)] if transport else []
                if transport and name == "shm":
                    break
        if not usable:
            raise ConfigError(f"AFD_HANDOFF={wanted} cannot be had with the FFN at {address}: {rung.reason}")
        best = min(usable, key=lambda pair: slowness(pair[1]))
    finally:
        for pair in usable:
            if pair is not best:
                pair[0].close()
    log.info("handoff to %s over %s", address, best[1])
    return best


def climb(
    name: TransportName, address: str, hello: pb.Hello, frames: FrameSlots, spin_s: float
) -> tuple[Transport | None, Rung]:
    """Tries one transport. Raises PeerUnavailable or Mismatch for what no other one could mend."""
    own_hello = pb.Hello()
    own_hello.CopyFrom(hello)
    try:
        transport = LADDER[name](address, own_hello, frames)
    except TransportUnavailable as error:
        return None, Rung(name, reason=str(error))
    try:
        with frames.probing:
            return transport, probe(name, transport, frames, spin_s)
    except AfdError as error:
        another_may_do = _another_may_do(transport, error)
        transport.close()
        if not another_may_do:
            raise
        return None, Rung(name, reason=str(error))


def _another_may_do(transport: Transport, error: AfdError) -> bool:
    """The probe came back changed, or not at all while the stream stands and it moved outside of it."""
    if isinstance(error, PeerUnavailable):
        return not transport.control.is_lost and not isinstance(transport, InlineTransport)
    return isinstance(error, InternalError)


def probe(name: TransportName, transport: Transport, frames: FrameSlots, spin_s: float) -> Rung:
    """Sends tensors there and back, and compares them. Raises PeerUnavailable, or InternalError if they differ."""
    small = [_round_trip_s(transport, frames, 1, number, spin_s) for number in range(_NUM_WARM_UPS + _NUM_SMALL)]
    num_tokens = frames.shape.max_tokens
    large = [_round_trip_s(transport, frames, num_tokens, number, spin_s) for number in range(1 + _NUM_LARGE)]
    num_bytes = frames.shape.frame_bytes(num_tokens) + frames.shape.answer_bytes(num_tokens)
    return Rung(
        name,
        latency_s=min(small[_NUM_WARM_UPS:]),
        bytes_per_s=num_bytes / min(large[1:]),
    )


def _round_trip_s(transport: Transport, frames: FrameSlots, num_tokens: int, number: int, spin_s: float) -> float:
    frame = _probe_frame(frames, num_tokens, number)
    start = time.perf_counter()
    frames.write(frame)
    transport.send(frame)
    output = receive(transport, frame, _TIMEOUT_S, spin_s).ffn_output
    seconds = time.perf_counter() - start
    if not torch.equal(output, frame.ffn_input.to(output.dtype)):
        raise InternalError("a probe did not come back as it was sent")
    return seconds


_probe_ids = iter(range(1 << 63, 1 << 64))  # apart from those of frames


def _probe_frame(frames: FrameSlots, num_tokens: int, number: int) -> Frame:
    """One power of two, which every dtype here holds exactly, in every place."""
    shape = frames.shape
    ffn_input = torch.full((num_tokens, shape.hidden_size), 2.0 ** (number % 7), dtype=shape.dtype)
    return Frame(next(_probe_ids), shape.num_slots - 1, 0, ffn_input, None, is_probe=True)
