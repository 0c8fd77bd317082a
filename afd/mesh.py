"""The whole mesh on one machine: starts the services as processes, watches over them, and stops them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import json
import logging
import math
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from afd.address import joined
from afd.config import PUBLIC, SETTINGS_OF, load_settings, parse_host, refuse_plain_text
from afd.errors import ConfigError
from afd.forkserver import ForkedProcess, ForkServer, Order
from afd.model.checkpoint import Checkpoint
from afd.placement import Cores, Placement, usable_cpus
from afd.state.connection import connect, without_password
from afd.state.embedded import EmbeddedRedis
from afd.state.registry import Registry, Replica, Role

log = logging.getLogger(__name__)

POLL_S = 0.05
STOP_TIMEOUT_S = 40.0
_RESTART_PAUSE_S = 1.0
STOP_ORDER: tuple[Role, ...] = ("gateway", "attention", "ffn")  # nobody loses the service behind it


class Seat(NamedTuple):
    """What a process is there for: its role, and for an FFN replica its shard (i, M)."""

    role: Role
    shard: tuple[int, int] | None = None


@dataclass(frozen=True)
class MeshOptions:
    """What is to run. `ffn` 0 is collocated: the FFN runs inside the attention process."""

    model: Path
    attention: int = 1
    gateways: int = 1
    ffn: int = 1
    ffn_replicas: int = 1  # of each shard
    microbatches: str | None = None
    dtype: str = "bfloat16"
    device: str = "cpu"
    redis: str | None = None
    tls: Path | None = None  # what `afd certs` has made; None is plain text
    grpc_port: int = 0
    http_port: int = 0
    cores: Cores = Cores.shared
    threads: int | None = None
    startup_timeout_s: float = 120.0
    settings: dict[str, str] = field(default_factory=dict)  # further AFD_* settings, without the prefix

    def check(self) -> None:
        """Raises ConfigError for certificates that are not there, or more shards than there is work for;
        CheckpointError for the model."""
        for role in dict.fromkeys(seat.role for seat in self.seats):
            for folder in self.tls_settings(role).values():
                if not (folder / "tls.crt").is_file():
                    raise ConfigError(f"--tls: there is no certificate in {folder}; `afd certs {self.tls}` makes them")
        num_experts = Checkpoint(self.model).config.num_experts
        if self.ffn > num_experts:
            raise ConfigError(f"--ffn {self.ffn} is more than the {num_experts} experts that the model can share out")

    @property
    def seats(self) -> list[Seat]:
        """A seat for every process, in the order of their start."""
        shards = [(shard, self.ffn) for shard in range(self.ffn)] * self.ffn_replicas
        return [
            *(Seat("ffn", shard) for shard in shards),
            *[Seat("attention")] * self.attention,
            *[Seat("gateway")] * self.gateways,
        ]

    @property
    def num_microbatches(self) -> str:
        """One where the sides take turns on the same cores: nothing would overlap, and weights be read twice. On a GPU
        it depends on the work whether a smaller microbatch takes less time at all."""
        return self.microbatches or ("1" if self.takes_turns else "2" if self.device == "cpu" else "auto")

    @property
    def takes_turns(self) -> bool:
        return self.device == "cpu" and self.cores is Cores.shared and self.threads is None

    @property
    def environment(self) -> dict[str, str]:
        """What is read when torch is loaded: its threads must not hold the cores of the others' turns."""
        return {"OMP_WAIT_POLICY": "passive"} if self.takes_turns and self.ffn else {}

    def tls_settings(self, role: Role) -> dict[str, Any]:
        if self.tls is None:
            return {}
        own = {"tls": self.tls.absolute() / role}
        return own | {"public_tls": self.tls.absolute() / PUBLIC} if role == "gateway" else own

    def placement(self) -> Placement | None:
        """None: every process has `threads` of them, anywhere. Beside GPUs the cores have nothing to share.
        Raises ConfigError for an AFD_CPUS that cannot be."""
        if self.threads is not None:
            return None
        cores = self.cores if self.device == "cpu" else Cores.own
        try:
            return Placement.of(cores, self.attention, self.ffn * self.ffn_replicas, usable_cpus())
        except ValueError as error:
            raise ConfigError(f"AFD_CPUS={os.environ.get('AFD_CPUS')}: {error}") from None


@dataclass(eq=False)
class Service:
    """One process of the mesh, and how the registry knows it."""

    role: Role
    index: int
    settings: dict[str, Any]
    fork_server: ForkServer
    shard: tuple[int, int] | None = None
    placement: dict[str, Any] = field(default_factory=dict)  # settings of cores, where `settings` does not say
    process: ForkedProcess | None = None
    replica: Replica | None = None
    restarted_s: float = -math.inf  # monotonic: when it was last started again

    @property
    def seat(self) -> Seat:
        return Seat(self.role, self.shard)

    @property
    def replica_id(self) -> str:
        return f"{self.role}-{self.index}"

    @property
    def main(self) -> str:
        """What runs in the process, as "module:function"."""
        return f"services.{self.role}.__main__:main"

    def check(self) -> None:
        """Raises ConfigError for settings that cannot be."""
        kind = SETTINGS_OF[self.role]
        own = {name: str(value) for name, value in self.settings.items() if name in kind.model_fields}
        refuse_plain_text(load_settings(kind, **own))

    def start(self) -> None:
        settings = {**self.placement, **self.settings, "replica_id": self.replica_id}
        variables = {f"AFD_{name.upper()}": str(value) for name, value in settings.items()}
        self.process = self.fork_server.start(Order(self.replica_id, self.main, {**os.environ, **variables}))

    def keep_ports(self) -> None:
        """From its next start on it is where it is now."""
        assert self.replica is not None
        addresses = {
            "grpc_port": self.replica.address,
            "http_port": self.replica.http_address,
            "metrics_port": self.replica.metrics_address if self.role != "gateway" else None,
        }
        self.settings |= {
            name: address.rpartition(":")[2]
            for name, address in addresses.items()
            if address and not int(self.settings.get(name) or 0)
        }

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def refuse_end(self) -> None:
        """Raises ConfigError if it has ended."""
        if not self.alive:
            status = self.process.returncode if self.process else None
            raise ConfigError(f"{self.replica_id} ended with status {status} before it was ready")

    def terminate(self) -> None:
        """Tells it to drain and end."""
        if self.alive and self.process:
            self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float) -> None:
        """Waits for the end of a service that was told to stop; kills it when the time is over."""
        if self.process is None:
            return
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            log.warning("%s does not stop, so it is killed", self.replica_id)
            self.process.kill()
            self.process.wait()

    def describe(self) -> dict[str, Any]:
        """This process in the ready file."""
        assert self.replica is not None
        assert self.process is not None
        shard = self.replica.shard
        return {
            "role": self.role,
            "index": self.index,
            "shard": f"{shard[0]}/{shard[1]}" if shard else None,
            "pid": self.process.pid,
            "address": self.replica.address,
            "metrics": self.replica.metrics_address,
        }


class Mesh:
    """The running services. `gateway`, `http_url` and `services` tell where they are."""

    def __init__(
        self, options: MeshOptions, redis_url: str, fork_server: ForkServer, embedded: EmbeddedRedis | None = None
    ) -> None:
        self.options = options
        self.redis_url = redis_url
        self.fork_server = fork_server
        self.embedded = embedded
        self.name = os.environ.get("AFD_MESH") or f"up-{uuid.uuid4().hex[:8]}"  # others may share the Redis
        self.services: list[Service] = []
        self.passing: list[Service] = []  # they come up, or drain: nobody starts them again
        for seat in options.seats:
            self.services.append(self.new_service(seat))
        self.arrange(self.services, options)

    def new_service(self, seat: Seat) -> Service:
        """Not started yet, and none of `services`."""
        taken = {service.index for service in [*self.services, *self.passing] if service.role == seat.role}
        index = next(index for index in itertools.count() if index not in taken)
        service = Service(seat.role, index, self._settings(seat), self.fork_server, seat.shard)
        if service.replica_id == "gateway-0":
            service.settings |= {"grpc_port": self.options.grpc_port, "http_port": self.options.http_port}
        return service

    def _settings(self, seat: Seat) -> dict[str, Any]:
        options = self.options
        common = {
            "mesh": self.name,
            "model": options.model,
            "redis": self.redis_url,
            "startup_timeout_s": options.startup_timeout_s,
            "grpc_port": 0,
            "metrics_port": 0,
            **options.settings,
        }
        compute = {"dtype": options.dtype, "device": options.device}
        own: dict[Role, dict[str, Any]] = {
            "ffn": {**compute, "shard": seat.shard and f"{seat.shard[0]}/{seat.shard[1]}"},
            "attention": {**compute, "microbatches": options.num_microbatches},
            "gateway": {"http_port": 0},
        }
        return common | own[seat.role] | options.tls_settings(seat.role)

    @staticmethod
    def arrange(services: Sequence[Service], options: MeshOptions) -> None:
        """Gives them what depends on the counts, from their next start on. Raises ConfigError as `placement`."""
        placement = options.placement()
        parts = {"ffn": iter(placement.ffn), "attention": iter(placement.attention)} if placement else {}
        for service in (service for service in services if service.role != "gateway"):
            if service.role == "attention":
                service.settings["ffn_shards"] = options.ffn
            if placement is None:
                service.placement = {"threads": options.threads}
            else:
                service.placement = placement.settings(next(parts[service.role]))

    @property
    def _redis_ca(self) -> Path | None:
        ca = self.options.settings.get("redis_ca") or os.environ.get("AFD_REDIS_CA")
        return Path(ca) if ca else None

    @property
    def _gateways(self) -> list[Replica]:
        return [one.replica for one in self.services if one.role == "gateway" and one.replica]

    @property
    def http_url(self) -> str:
        return self.http_urls[0]

    @property
    def http_urls(self) -> list[str]:
        """All gateways'."""
        is_tls = self.options.tls is not None or "AFD_PUBLIC_TLS" in os.environ
        return [f"{'https' if is_tls else 'http'}://{gateway.http_address}" for gateway in self._gateways]

    @property
    def target(self) -> str:
        """All gateways, as clients take them."""
        return ",".join(gateway.address for gateway in self._gateways)

    @property
    def gateway(self) -> Replica:
        return self._gateways[0]

    @contextlib.asynccontextmanager
    async def registry(self) -> AsyncIterator[Registry]:
        """For looking, not for taking part."""
        async with connect(self.redis_url, self._redis_ca) as redis:
            yield Registry(redis, lease_s=1.0, mesh=self.name)

    def start(self) -> None:
        """Returns when every service is ready. Raises ConfigError for a wrong setting, or if one ends, or takes too
        long."""

        async def bring_up() -> None:
            async with self.registry() as registry:  # without Redis nothing else is tried
                for service in self.services:
                    service.start()
                await self.until_ready(self.services, registry)

        for service in self.services:
            service.check()
        asyncio.run(bring_up())

    def watch(self) -> None:
        """Starts again what has ended by itself, on the same ports; what goes on ending, once a second."""
        ended = [service for service in self.services if not service.alive]
        now_s = time.monotonic()
        if self.embedded and not self.embedded.alive:
            log.warning("the embedded Redis has ended; it is started again")
            self.embedded.start()
        for service in (service for service in ended if now_s - service.restarted_s >= _RESTART_PAUSE_S):
            service.restarted_s = now_s
            log.warning("%s has ended; it is started again", service.replica_id)
            try:
                service.start()
            except (ConfigError, OSError) as error:  # memory, processes or files may be short just now
                log.warning("%s; it is tried again", error)

    def stop(self) -> None:
        """Drains and ends every process: gateway first, FFN last."""
        for role in STOP_ORDER:
            ending = [service for service in [*self.services, *self.passing] if service.role == role]
            for service in ending:
                service.terminate()
            for service in ending:
                service.wait(STOP_TIMEOUT_S)

    def ready_file(self) -> dict[str, Any]:
        return {
            "grpc": self.target,
            "http": self.http_url,
            "redis": without_password(self.options.redis) if self.options.redis else None,
            "processes": [service.describe() for service in self.services],
        }

    async def until_ready(self, services: Sequence[Service], registry: Registry) -> None:
        """Raises ConfigError if one of these services ends, or takes too long."""
        deadline = time.monotonic() + self.options.startup_timeout_s
        while not all(service.replica for service in services):
            for service in services:
                service.refuse_end()
            if time.monotonic() > deadline:
                late = [service.replica_id for service in services if service.replica is None]
                raise ConfigError(
                    f"not ready within {self.options.startup_timeout_s:g} s: {', '.join(late)}; "
                    "--startup-timeout allows more"
                )
            await _look_up(services, registry)
            await asyncio.sleep(POLL_S)
        for service in services:
            service.keep_ports()


async def _look_up(services: Sequence[Service], registry: Registry) -> None:
    pids = {service.process.pid for service in services if service.process}
    found = {
        replica.replica_id: replica
        for role in STOP_ORDER
        for replica in await registry.replicas(role)
        if replica.pid in pids
    }
    for service in services:
        service.replica = found.get(service.replica_id)


@contextlib.contextmanager
def running_mesh(options: MeshOptions, fork_server: ForkServer | None = None) -> Iterator[Mesh]:
    """Starts a mesh, with an embedded Redis unless one is given, and from a fork server of its own unless there is one;
    nothing of it is left afterwards.

    Raises ConfigError or CheckpointError with a sentence for what cannot start.
    """
    options.check()  # what is wrong with the model is said once, here, not by every service
    _refuse_taken_ports(options)
    with contextlib.ExitStack() as stack:
        server = fork_server or stack.enter_context(ForkServer(options.environment))
        embedded = None if options.redis else stack.enter_context(EmbeddedRedis())
        mesh = Mesh(options, options.redis or (embedded.url if embedded else ""), server, embedded)
        stack.callback(mesh.stop)
        mesh.start()
        yield mesh


def _refuse_taken_ports(options: MeshOptions) -> None:
    """At once, not when all but the gateway is ready."""
    host = str(parse_host(options.settings.get("host") or os.environ.get("AFD_HOST") or "127.0.0.1"))
    for name, port in (("--grpc-port", options.grpc_port), ("--http-port", options.http_port)):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                way_out = name if error.errno in (errno.EADDRINUSE, errno.EACCES) else "AFD_HOST"
                raise ConfigError(
                    f"{joined(host, port)} cannot be had ({error.strerror}): give another {way_out}"
                ) from None


@contextlib.contextmanager
def ready_file_of(mesh: Mesh, path: Path) -> Iterator[None]:
    """Tells where the mesh is while the block runs. Raises ConfigError if the file cannot be written."""
    write_ready_file(mesh, path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def refuse_ready_file(path: Path) -> None:
    """Raises ConfigError if it cannot be written, before anything has been started for it."""
    if not os.access(path.parent, os.W_OK) or path.is_dir():
        raise ConfigError(f"the ready file {path} cannot be written: {path.parent} is no folder to write to")


def write_ready_file(mesh: Mesh, path: Path) -> None:
    """It appears whole, and only if there is anything new."""
    partial, text = path.with_name(path.name + ".partial"), json.dumps(mesh.ready_file(), indent=2) + "\n"
    try:
        if not (path.is_file() and path.read_text() == text):
            partial.write_text(text)
            partial.replace(path)
    except OSError as error:
        raise ConfigError(f"the ready file {path} cannot be written: {error.strerror}") from None
