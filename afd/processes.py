"""Children that do not outlive their parent.

Each has the reading end of a pipe as its standard input, and gets SIGTERM from the kernel when the parent's end of it
is closed, however that comes about (Linux). This file is also run as a script, in the child, which becomes a command.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_PROBE_TIMEOUT_S = 1.0
_DESERTED_AFTER_S = 1.0  # a socket that has a name and no listener yet is younger


def start_child(
    command: Sequence[str], environment: Mapping[str, str], *, quiet: bool = False
) -> subprocess.Popen[bytes]:
    """Starts a command that gets SIGTERM when this process ends, or lets go of what is returned.

    It has a session of its own: a Ctrl-C is for the parent alone.
    """
    output = subprocess.DEVNULL if quiet else None
    return subprocess.Popen(
        [sys.executable, "-S", __file__, *command],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )


def depend_on(lifeline: int) -> None:
    """This process gets SIGTERM when nobody has the other end of the pipe any more. Exits if that is so already."""
    if sys.platform == "linux":
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGTERM)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
        if select.select([lifeline], [], [], 0)[0]:
            sys.exit(1)


def remove_deserted(folder: Path, names: str) -> None:
    """Removes the Unix sockets that killed processes have left: those with names of this pattern that nobody listens
    at."""
    for path in folder.glob(names):
        with contextlib.suppress(OSError):  # another one was faster, or it is somebody else's
            is_old = time.time() - path.stat().st_mtime > _DESERTED_AFTER_S
            if is_old and not has_listener(path):
                path.unlink()


def has_listener(path: Path) -> bool:
    """Whether a process listens at a Unix socket, whose file may be there without. Raises OSError if that cannot be
    told."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        return True


if __name__ == "__main__":
    depend_on(0)
    os.execvp(sys.argv[1], sys.argv[1:])
