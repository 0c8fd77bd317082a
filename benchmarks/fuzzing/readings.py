"""What the services hold, and what they say in their logs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from afd.mesh import Mesh

_BAD_WORDS = ("Traceback", "was never retrieved", "Segmentation fault", "Fatal Python error")
_MOST_LINES = 60


@dataclass(frozen=True)
class Reading:
    """Of one process."""

    pid: int
    rss_mib: float
    files: int
    threads: int


def readings(mesh: Mesh) -> dict[str, Reading]:
    """Of each process that is alive, Redis's included, by its name in the mesh."""
    processes = {
        service.replica_id: service.process.pid for service in mesh.services if service.process and service.alive
    }
    if mesh.embedded:
        processes["redis"] = mesh.embedded.process.pid
    return {name: _reading(pid) for name, pid in processes.items()}


def _reading(pid: int) -> Reading:
    process = psutil.Process(pid)
    with process.oneshot():
        return Reading(pid, process.memory_info().rss / (1 << 20), process.num_fds(), process.num_threads())


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """What children that are started meanwhile write to stdout and stderr goes to a file."""
    kept = [os.dup(number) for number in (1, 2)]
    try:
        with path.open("ab") as file:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
        yield
    finally:
        for number, file_number in enumerate(kept, start=1):
            os.dup2(file_number, number)
            os.close(file_number)


def tracebacks(log: Path) -> list[str]:
    """What tells of something unforeseen, each with what stands before and behind it."""
    lines = log.read_text(errors="replace").splitlines()
    places = [number for number, line in enumerate(lines) if any(word in line for word in _BAD_WORDS)]
    return ["\n".join(lines[max(0, place - 2) : place + _MOST_LINES]) for place in places]
