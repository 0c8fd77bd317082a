"""What became of an input."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Protocol

HANG_S = 30.0  # no answer and no close within it


@dataclass(frozen=True)
class Answer:
    """`what` is a status or the name of a code; `is_fault`: the service did what no input should make it do."""

    what: str
    is_fault: bool = False
    detail: str = ""


class Thrower(Protocol):
    """Throws inputs of one kind, one after the other; several work side by side."""

    async def throw(self, chooser: Random) -> list[Answer]:
        """Makes one input, or a stream of some, and waits for what comes back. Raises TimeoutError for a hang."""

    async def close(self) -> None: ...
