"""What every way across offers to the attention side of a pair."""

from __future__ import annotations

import time
from typing import Protocol

from afd.errors import PeerUnavailable
from afd.handoff.bell import Bell, Lookout
from afd.handoff.control import ControlStream
from afd.handoff.frame import Frame, FrameOutput
from afd.handoff.slots import Region


class Transport(Protocol):
    """One attention-FFN pair: how its frames move. A frame is sent after it was written to its slot."""

    name: str
    control: ControlStream

    @property
    def regions(self) -> tuple[Region, ...]:
        """What answers lie in."""

    @property
    def bells(self) -> tuple[Bell | None, ...]:
        """What rings when there may be an answer; None if nobody rings, and it has to be looked for."""

    def send(self, frame: Frame) -> None:
        """Starts moving a frame. Raises PeerUnavailable."""

    def answer(self, frame: Frame) -> FrameOutput | None:
        """A frame's answer, if it is there. Raises PeerUnavailable if the pair is lost, StaleEpoch if the frame is for
        a layout that is over, InternalError if it is refused for another reason."""

    def drop(self, frame: Frame) -> None:
        """The answer is no longer awaited."""

    def close(self) -> None:
        """Ends the pair."""


def receive(transport: Transport, frame: Frame, timeout_s: float, spin_s: float) -> FrameOutput:
    """Waits for the answer of one pair: looks out for it for spin_s, giving way to others, and then sleeps in between.
    Raises what `answer` raises, and PeerUnavailable if the time is over."""
    lookout = Lookout(spin_s, transport.bells)
    started = time.monotonic()
    while (output := transport.answer(frame)) is None:
        waited_s = time.monotonic() - started
        if waited_s > timeout_s:
            raise PeerUnavailable(f"the FFN at {transport.control.address} does not answer in time")
        lookout.pause(waited_s, timeout_s - waited_s)
    return output
