"""A process that has loaded what the services need, and forks into them.

Loading torch takes two seconds of a core. Done once, a service that was lost is back in a tenth of that, and takes
nothing from those that serve meanwhile. The server has one thread, and has begun nothing that would not survive a fork.
It may be killed: what came from it lives on, and the next start brings up another one.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self, cast

from afd.errors import ConfigError
from afd.processes import depend_on

_MODULES = tuple(f"services.{role}.__main__" for role in ("attention", "ffn", "gateway"))
_START_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 5.0
_MAX_ORDER_BYTES = 1 << 20
_UNKNOWN_STATUS = 255


class Order(NamedTuple):
    """What a process is to become. It takes the environment as it is given here, and nothing from the server's."""

    name: str  # for `top`
    main: str  # "module:function"
    environment: dict[str, str]


class ForkedProcess:
    """A process that a fork server has made; a part of subprocess.Popen."""

    def __init__(self, pid: int, lifeline: int, status: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._lifeline = open(lifeline, "wb", buffering=0)  # noqa: SIM115
        self._status = status  # the server says here how it ended; the process itself has the other end, too

    def poll(self) -> int | None:
        return self._look(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        status = self._look(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _look(self, timeout_s: float | None) -> int | None:
        """The status, if it ends meanwhile. Looks without taking: several threads may."""
        if self.returncode is None:
            poll = select.poll()
            poll.register(self._status, select.POLLIN)
            if poll.poll(None if timeout_s is None else 1e3 * timeout_s):
                said = self._status.recv(16, socket.MSG_PEEK)
                self.returncode = int(said) if said else _UNKNOWN_STATUS  # the server was gone before
        return self.returncode


class ForkServer:
    """The server of those who have it: it is started with the first order, or before, and ends with `stop`.

    `environment` is for what is read when modules are loaded, as OpenMP's variables are.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        single = {"OPENBLAS_NUM_THREADS": "1"}  # NumPy would start a thread
        self._environment = {**os.environ, **single, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._orders: socket.socket | None = None

    def __enter__(self) -> Self:
        self.launch()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def launch(self) -> None:
        """Begins to load the modules; the first order waits for it."""
        self.stop()
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", __name__, *_MODULES]
            self._process = subprocess.Popen(
                command, env=self._environment, stdin=theirs.fileno(), start_new_session=True
            )

    def start(self, order: Order) -> ForkedProcess:
        """Raises ConfigError if there is no server to be had."""
        for _ in range(2):  # the server may have been killed
            if self._orders is None:
                self.launch()
            with contextlib.suppress(ConnectionError, TimeoutError):
                return self._start(order)
            self.stop()
        raise ConfigError(f"{order.name} cannot be started: the process that all come from ends, or does not answer")

    def stop(self) -> None:
        """Ends the server, not those who came from it."""
        if self._orders is not None:
            self._orders.close()
        if self._process is not None:
            try:
                self._process.wait(_END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._orders = self._process = None

    def _start(self, order: Order) -> ForkedProcess:
        """Raises ConnectionError or TimeoutError if the server is lost."""
        assert self._orders is not None
        its_lifeline, lifeline = os.pipe()
        status, its_status = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with its_status:
                given = [its_lifeline, its_status.fileno(), 1, 2]  # its output is this process's, as it is now
                socket.send_fds(self._orders, [json.dumps(order).encode()], given)
            status.settimeout(_START_TIMEOUT_S)
            if not (pid := status.recv(16)):
                raise ConnectionResetError("the fork server has ended")
        except BaseException:
            os.close(lifeline)
            status.close()
            raise
        finally:
            os.close(its_lifeline)
        return ForkedProcess(int(pid), lifeline, status)


# In the server.


def serve(orders: socket.socket) -> Callable[[], None]:
    """Forks for each order; returns in the forked processes, with what they are to do. Exits when there is nobody any
    more to give orders."""
    children: dict[int, socket.socket] = {}
    with _woken_by_ends() as woken:
        while True:
            ready, _, _ = select.select([orders, woken], [], [])
            if woken in ready:
                woken.recv(4096)
                _report_ends(children)
            if orders in ready:
                message, given, _, _ = socket.recv_fds(orders, _MAX_ORDER_BYTES, 4)
                if not message:
                    sys.exit()
                lifeline, its_status, *output = given
                status = socket.socket(fileno=its_status)
                pid = os.fork()
                if not pid:
                    break
                children[pid] = status
                status.send(str(pid).encode())
                for descriptor in (lifeline, *output):
                    os.close(descriptor)
    for other in children.values():
        other.close()
    status.detach()  # open as long as the process lives
    return _become(Order(*json.loads(message)), lifeline, output)


@contextlib.contextmanager
def _woken_by_ends() -> Iterator[socket.socket]:
    """What can be read from while a child has ended, within the block."""
    woken, waker = socket.socketpair()
    with woken, waker:
        waker.setblocking(False)
        signal.set_wakeup_fd(waker.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        try:
            yield woken
        finally:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)


def _report_ends(children: dict[int, socket.socket]) -> None:
    """Says how each ended before its pid is free for another process."""
    while children and (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)):
        was_killed = ended.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
        with contextlib.suppress(OSError), children.pop(ended.si_pid) as status:
            status.send(str(-ended.si_status if was_killed else ended.si_status).encode())
        os.waitpid(ended.si_pid, 0)


def _become(order: Order, lifeline: int, output: Sequence[int]) -> Callable[[], None]:
    os.setsid()
    for number, descriptor in enumerate((lifeline, *output)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    depend_on(0)
    os.environ.clear()
    os.environ.update(order.environment)
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(order.name)
    return cast(Callable[[], None], pkgutil.resolve_name(order.main))


def main() -> None:
    for module in sys.argv[1:]:
        pkgutil.resolve_name(module)
    gc.collect()
    gc.freeze()  # so that collections leave the pages alone that all share
    with socket.socket(fileno=os.dup(0)) as orders, open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
        become = serve(orders)
    become()


if __name__ == "__main__":
    main()
