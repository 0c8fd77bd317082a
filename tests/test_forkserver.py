"""The fork server: what comes from it is as if it had been started by itself, and may outlive it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import afd.forkserver
import afd.mesh
from afd.errors import ConfigError
from afd.forkserver import ForkedProcess, ForkServer, Order
from afd.mesh import Mesh, MeshOptions


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer({"OF_THE_SERVER": "1"}) as server:
        yield server


def order(function: str, **environment: str) -> Order:
    return Order("forked-0", f"{__name__}:{function}", environment)


def refuse() -> None:
    sys.exit("a sentence")


def fail() -> None:
    raise ValueError("a mistake")


def say_environment() -> None:
    print(json.dumps(dict(os.environ)), flush=True)


def sleep() -> None:
    time.sleep(60)


def sleep_if_asked_to_end() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    time.sleep(60)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_process_ends_as_one_that_was_started_by_itself(
    server: ForkServer, capfd: pytest.CaptureFixture[str]
) -> None:
    assert server.start(order("refuse")).wait(30) == 1
    assert capfd.readouterr().err == "a sentence\n"
    assert server.start(order("fail")).wait(30) == 1
    assert "ValueError: a mistake" in capfd.readouterr().err
    assert server.start(Order("forked-0", "os:abort", {})).wait(30) == -signal.SIGABRT
    assert server.start(Order("forked-0", "gc:collect", {})).wait(30) == 0


def test_a_process_has_the_environment_of_its_order_alone(
    server: ForkServer, capfd: pytest.CaptureFixture[str]
) -> None:
    assert server.start(order("say_environment", OF_THE_ORDER="2")).wait(30) == 0
    assert json.loads(capfd.readouterr().out) == {"OF_THE_ORDER": "2"}


def test_processes_share_no_files_and_have_a_name_and_a_session_of_their_own(server: ForkServer) -> None:
    processes = [server.start(order("sleep")) for _ in range(3)]
    until(lambda: {Path(f"/proc/{process.pid}/comm").read_text() for process in processes} == {"forked-0\n"})
    until(lambda: {psutil.Process(process.pid).num_fds() for process in processes} == {4})  # 0, 1, 2, and the status
    assert {os.getsid(process.pid) for process in processes} == {process.pid for process in processes}
    assert [process.poll() for process in processes] == [None] * 3
    with pytest.raises(subprocess.TimeoutExpired):
        processes[0].wait(0.1)
    processes[1].kill()
    assert processes[1].wait(10) == -signal.SIGKILL
    assert [process.poll() for process in processes] == [None, -signal.SIGKILL, None]
    processes[0].terminate()
    assert processes[0].wait(10) == -signal.SIGTERM
    processes[2].kill()
    processes[2].kill()
    assert processes[2].wait(10) == -signal.SIGKILL


def test_the_server_has_one_thread_and_no_child_that_ended(server: ForkServer) -> None:
    assert server.start(Order("forked-0", "gc:collect", {})).wait(30) == 0
    assert server.pid is not None
    assert psutil.Process(server.pid).num_threads() == 1
    until(lambda: not psutil.Process(server.pid).children())


def test_a_process_that_nobody_holds_is_told_to_end(server: ForkServer) -> None:
    process: ForkedProcess | None = server.start(order("sleep"))
    assert process is not None
    seen = psutil.Process(process.pid)
    process = None
    until(lambda: has_ended(seen))


def test_processes_live_on_without_the_server_and_the_next_one_has_another() -> None:
    with ForkServer() as server:
        left = server.start(order("sleep_if_asked_to_end"))
        first = server.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        another = server.start(order("sleep"))
        assert server.pid != first
        assert left.poll() is None
        left.terminate()
        assert left.wait(10) == 255  # nobody can say how
        another.kill()
        assert another.wait(10) == -signal.SIGKILL


def test_all_end_with_the_one_who_started_them() -> None:
    script = f"""
import os, signal
from afd.forkserver import ForkServer, Order
server = ForkServer()
process = server.start(Order("forked-0", "{__name__}:sleep", dict(os.environ)))
print(process.pid, server.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", script]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=50).stdout
    pids = [int(pid) for pid in said.split()]
    assert len(pids) == 2
    until(lambda: not any(psutil.pid_exists(pid) and not has_ended(psutil.Process(pid)) for pid in pids))


def test_a_mesh_goes_on_while_nothing_can_be_started(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(ForkServer):
        def start(self, order: Order) -> ForkedProcess:
            raise error

    monkeypatch.setattr(afd.mesh, "_RESTART_PAUSE_S", 0.0)
    mesh = Mesh(MeshOptions(Path("model")), "redis://", Broken())
    for error in (ConfigError("no server"), OSError("no memory")):
        mesh.watch()
        assert f"{error}; it is tried again" in caplog.text
    monkeypatch.setattr(afd.mesh, "_RESTART_PAUSE_S", 60.0)
    caplog.clear()
    mesh.watch()
    assert caplog.text == "", "it was tried just now"


def test_a_server_that_cannot_load_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(afd.forkserver, "_MODULES", ("no_such_module",))
    with ForkServer() as server, pytest.raises(ConfigError, match="forked-0 cannot be started"):
        server.start(order("sleep"))
