"""What killed processes leave behind is removed by those that come after them."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from afd.processes import remove_deserted


def listener(path: Path, age_s: float) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(path))
    made.listen()
    os.utime(path, times=(0, time.time() - age_s))
    return made


def test_sockets_that_nobody_listens_at_are_removed_and_no_others(tmp_path: Path) -> None:
    with listener(tmp_path / "up-alive.sock", age_s=60):
        listener(tmp_path / "up-deserted.sock", age_s=60).close()
        listener(tmp_path / "up-about-to-listen.sock", age_s=0).close()
        listener(tmp_path / "other-deserted.sock", age_s=60).close()
        remove_deserted(tmp_path, "up-*.sock")
        left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["other-deserted.sock", "up-about-to-listen.sock", "up-alive.sock"]
