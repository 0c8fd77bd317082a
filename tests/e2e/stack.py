"""The mesh of compose.yaml as a project of the tests' own: brought up by compose, disturbed through the Docker SDK."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import docker
from docker.errors import APIError, ImageNotFound
from docker.models.containers import Container

from tests.redis_servers import free_port

ROOT = Path(__file__).resolve().parents[2]
PROJECT = "afd-e2e"
PROJECT_OPTIONS = ("--project-name", PROJECT, "--project-directory", str(ROOT))
_UP_TIMEOUT_S = 120
_BUILD_TIMEOUT_S = 1800
_UPGRADE_TIMEOUT_S = 400


@dataclass
class Stack:
    """Some of the compose files, with the variables that they are given."""

    files: tuple[str, ...] = ("compose.yaml",)
    profiles: tuple[str, ...] = ("two-gateways",)
    variables: dict[str, str] = field(default_factory=dict)
    grpc_ports: tuple[int, int] = field(default_factory=lambda: (free_port(), free_port()))
    http_ports: tuple[int, int] = field(default_factory=lambda: (free_port(), free_port()))
    engine: docker.DockerClient = field(default_factory=docker.from_env)

    @property
    def target(self) -> str:
        """Both gateways, as the SDK takes them."""
        return ",".join(f"localhost:{port}" for port in self.grpc_ports)

    @property
    def environment(self) -> dict[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("AFD_")},
            "GRPC_PORT": str(self.grpc_ports[0]),
            "GRPC_PORT_2": str(self.grpc_ports[1]),
            "HTTP_PORT": str(self.http_ports[0]),
            "HTTP_PORT_2": str(self.http_ports[1]),
            "IMAGE_TAG": "e2e",
            "AFD_DTYPE": "float32",  # whose tokens are the oracle's
            **self.variables,
        }

    def compose(self, *arguments: str, timeout_s: float = _UP_TIMEOUT_S) -> None:
        options = [*PROJECT_OPTIONS, *(word for name in self.files for word in ("--file", str(ROOT / name)))]
        options += [word for name in self.profiles for word in ("--profile", name)]
        self._run("docker", "compose", *options, *arguments, timeout_s=timeout_s)

    def build(self) -> None:
        self.compose("build", timeout_s=_BUILD_TIMEOUT_S)

    def upgrade(self) -> None:
        """As `make upgrade`."""
        self._run(str(ROOT / "compose" / "upgrade"), *PROJECT_OPTIONS, timeout_s=_UPGRADE_TIMEOUT_S)

    def up(self, *services: str) -> None:
        """Starts what is not there, or is another one by now, and waits until all of it is ready."""
        self.compose("up", "--detach", "--wait", *services)

    @contextmanager
    def running(self, *services: str) -> Iterator[Stack]:
        """All of them by default."""
        try:
            self.up(*services)
            yield self
        finally:
            self.down()

    def down(self) -> None:
        self.compose("--profile", "*", "down", "--volumes", "--remove-orphans", "--timeout", "5")

    def containers(self, service: str | None = None) -> list[Container]:
        """Of a service, or all of them; in the order of their names."""
        labels = [f"com.docker.compose.project={PROJECT}"]
        labels += [f"com.docker.compose.service={service}"] if service else []
        found = self.engine.containers.list(all=True, filters={"label": labels})
        return sorted(found, key=lambda container: str(container.name))

    def metrics(self, container: Container) -> str:
        """What a service in a container shows Prometheus. Its network is not ours, so it is asked from inside."""
        url = "http://127.0.0.1:9090/metrics"
        script = f"import urllib.request; print(urllib.request.urlopen({url!r}, timeout=5).read().decode())"
        status, output = container.exec_run(["python", "-c", script])
        assert status == 0, output
        return str(output.decode())

    def _run(self, *command: str, timeout_s: float) -> None:
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}\n{self._last_words()}"

    def _last_words(self) -> str:
        return "\n".join(f"{each.name}: {each.logs(tail=8).decode()}" for each in self.containers())


def image(engine: docker.DockerClient, wanted: str) -> str:
    """The real image where it can be had, else one with what the distribution has of that name."""
    name = wanted.rpartition("/")[2].partition(":")[0]
    try:
        engine.images.get(wanted)
    except ImageNotFound:
        try:
            engine.images.pull(wanted)
        except APIError:
            folder, tag = Path(__file__).parent, f"{PROJECT}-{name}"
            engine.images.build(path=str(folder), dockerfile=f"{name}.Dockerfile", tag=tag, rm=True)
            return tag
    return wanted
