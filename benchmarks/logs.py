"""What the processes of a mesh write, kept to be looked through."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_ALARMS = (
    "Traceback",
    "never retrieved",
    "never awaited",
    "was destroyed",
    "Segmentation fault",
    "Fatal Python error",
)
_MOST_LINES = 60


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[IO[str]]:
    """Standard output and error, of this process and of children started meanwhile, go to a file.

    Yields where standard error went before.
    """
    kept = [os.dup(number) for number in (1, 2)]
    try:
        with path.open("ab") as file:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
        with os.fdopen(os.dup(kept[1]), "w") as terminal:
            yield terminal
    finally:
        for number, file_number in enumerate(kept, start=1):
            os.dup2(file_number, number)
            os.close(file_number)


def alarms(log: Path) -> list[str]:
    """What tells of something unforeseen, each with what stands before and behind it."""
    lines = log.read_text(errors="replace").splitlines()
    places = [number for number, line in enumerate(lines) if any(alarm in line for alarm in _ALARMS)]
    return ["\n".join(lines[max(0, place - 2) : place + _MOST_LINES]) for place in places]
