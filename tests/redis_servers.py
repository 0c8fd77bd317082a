"""Redis servers of the tests' own: one server, a master with its replica and Sentinels, a Cluster."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from afd.state.embedded import redis_server_binary

START_TIMEOUT_S = 20.0


def binary() -> str:
    """The redis-server on PATH, else the one that the embedded default carries."""
    return shutil.which("redis-server") or redis_server_binary()


def free_port() -> int:
    """One whose bus port, which a node of a Cluster needs 10000 above it, is free, too."""
    while True:
        with socket.socket() as probe, socket.socket() as bus:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
            with contextlib.suppress(OSError, OverflowError):
                bus.bind(("127.0.0.1", port + 10_000))
                return port


def until(condition: object, what: str, timeout_s: float = START_TIMEOUT_S) -> None:
    """Waits until `condition()` is true; a server that does not answer yet is not there yet."""
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(redis.RedisError, OSError):
            if condition():
                return
        assert time.monotonic() < deadline, f"{what} is not there within {timeout_s:g} s"
        time.sleep(0.02)


@dataclass
class Server:
    """A redis-server of our own. It can be killed, frozen, and started again on the same port."""

    directory: Path
    arguments: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    credentials: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._run()
        until(lambda: self.ask("PING"), f"redis-server on port {self.port}")

    def refuses_to_start(self) -> bool:
        """Whether it does not know its arguments."""
        process = self._run()
        time.sleep(0.2)
        refused = process.poll() is not None
        self.kill()
        return refused

    def _run(self) -> subprocess.Popen[bytes]:
        self.directory.mkdir(parents=True, exist_ok=True)
        command = [binary(), *self.config_file(), "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--dir", str(self.directory), "--save", "", *self.arguments]
        if "--sentinel" not in command:
            command += ["--repl-diskless-sync-delay", "0"]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        return self.process

    def config_file(self) -> list[str]:
        return []

    def ask(self, *command: str | int) -> object:
        with self.client() as client:
            return client.execute_command(*command)

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, socket_timeout=5, retry=Retry(NoBackoff(), 0), **self.credentials)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def restart_empty(self) -> None:
        self.kill()
        shutil.rmtree(self.directory)
        self.start()


@dataclass
class SentinelServer(Server):
    """A Sentinel that watches the master `main`."""

    master_port: int = 0

    def config_file(self) -> list[str]:
        path = self.directory / "sentinel.conf"
        if not path.exists():
            path.write_text(
                f"sentinel monitor main 127.0.0.1 {self.master_port} 2\n"
                "sentinel down-after-milliseconds main 500\n"
                "sentinel failover-timeout main 4000\n"
            )
        return [str(path), "--sentinel"]


@dataclass
class Watched:
    """A master, its replica, and three Sentinels that make the replica the master when the first one is lost."""

    master: Server
    replica: Server
    sentinels: list[SentinelServer]

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{hosts}/main"

    def replace_master(self) -> None:
        """As before a maintenance: what the old master takes until it learns of it is lost."""
        until(lambda: self.sentinels[0].ask("SENTINEL", "FAILOVER", "main"), "a fail-over")


@contextlib.contextmanager
def running(*servers: Server) -> Iterator[None]:
    try:
        for server in servers:
            server.start()
        yield
    finally:
        for server in servers:
            server.kill()


@contextlib.contextmanager
def one_server(directory: Path, *arguments: str) -> Iterator[Server]:
    server = Server(directory, arguments)
    with running(server):
        yield server


@contextlib.contextmanager
def watched_servers(directory: Path) -> Iterator[Watched]:
    master = Server(directory / "master")
    replica = Server(directory / "replica", ("--replicaof", "127.0.0.1", str(master.port)))
    sentinels = [SentinelServer(directory / f"sentinel-{i}", master_port=master.port) for i in range(3)]
    with running(master, replica, *sentinels):
        until(lambda: info(replica, "replication")["master_link_status"] == "up", "the replica")
        for sentinel in sentinels:
            with contextlib.suppress(redis.RedisError):  # Redis 7 can be made to look round more often
                sentinel.ask("SENTINEL", "DEBUG", "info-period", 200, "publish-period", 200, "ask-period", 200)
        for sentinel in sentinels:
            until(lambda sentinel=sentinel: knows_everybody(sentinel), "a Sentinel that knows the others")
        yield Watched(master, replica, sentinels)


def info(server: Server, section: str) -> dict[str, object]:
    with server.client() as client:
        return client.info(section)


def knows_everybody(sentinel: Server) -> bool:
    with sentinel.client() as client:
        state = client.sentinel_master("main")
    return bool(state["num-other-sentinels"] == 2 and state["num-slaves"] == 1)


@contextlib.contextmanager
def cluster_servers(directory: Path, num_masters: int = 3, num_replicas: int = 0) -> Iterator[list[Server]]:
    """Masters that share all slots evenly; the first `num_replicas` of them have a replica each, listed behind."""
    arguments = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--cluster-require-full-coverage", "no")
    servers = [Server(directory / str(i), arguments) for i in range(num_masters + num_replicas)]
    for server in servers:
        while server.port > 55_000:  # its bus has the port 10,000 further on
            server.port = free_port()
    with running(*servers):
        first, masters = servers[0], servers[:num_masters]
        for number, server in enumerate(masters):
            server.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            start, stop = (16384 * n // num_masters for n in (number, number + 1))
            server.ask("CLUSTER", "ADDSLOTS", *range(start, stop))
        for server in servers[1:]:
            server.ask("CLUSTER", "MEET", "127.0.0.1", first.port)
        until(lambda: all(knows(server, len(servers)) for server in servers), "the cluster")
        for master, replica in zip(masters, servers[num_masters:], strict=False):
            replica.ask("CLUSTER", "REPLICATE", str(master.ask("CLUSTER", "MYID"), "ascii"))
            until(lambda replica=replica: info(replica, "replication")["master_link_status"] == "up", "a replica")
        yield servers


def knows(server: Server, num_nodes: int) -> bool:
    with server.client() as client:
        state = client.execute_command("CLUSTER INFO")
    return (
        state["cluster_state"] == "ok"
        and int(state["cluster_known_nodes"]) == num_nodes
        and int(state["cluster_slots_assigned"]) == 16384
    )


def cluster_url(servers: list[Server]) -> str:
    return "redis+cluster://" + ",".join(f"127.0.0.1:{server.port}" for server in servers)
