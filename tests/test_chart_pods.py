"""The pods of the chart as processes: each with the environment that Kubernetes would give it, an address of its own,
and the ports of its image; a Redis with the chart's users; certificates, keys, probes, other shards while it serves."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from afd.certs import make_certificates
from afd.forkserver import ForkedProcess, ForkServer, Order
from tests.conftest import Model
from tests.redis_servers import Server, one_server
from tests.test_chart import LEAST, NAMES, Object, Rendered, Workload, environment, image_environment, render

READY_S = 60.0
VALUES: Object = {
    "model": {**LEAST["model"], "dtype": "float32"},
    "tls": {"secrets": NAMES},
    "redis": {"password": "of-the-test"},
    "drainSeconds": 5,
    "gateway": {"replicas": 1},
    "attention": {"replicas": 1, "settings": {"kv_cache_gib": 0.01}},
}


@dataclass
class Node:
    """Runs one pod of each workload. Addresses are of this machine alone, 127.x.x.x."""

    model: Path
    certificates: Path
    redis: Server
    fork_server: ForkServer
    network: str = field(default_factory=lambda: f"127.{random.randint(1, 250)}.{random.randint(1, 250)}")
    pods: dict[str, tuple[Workload, ForkedProcess]] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)

    def apply(self, rendered: Rendered) -> None:
        """Starts what is new, waits until it is ready, and ends what is gone; what has changed ends and comes back."""
        wanted = {workload.name: workload for workload in rendered.services}
        for name in wanted.keys() & self.pods.keys():
            if wanted[name].pod != self.pods[name][0].pod:
                self.end(name)
        for name, workload in wanted.items():
            if name not in self.pods:
                order = Order(name, f"services.{workload.role}.__main__:main", self.environment(rendered, workload))
                self.pods[name] = workload, self.fork_server.start(order)
        for name in wanted:
            self.wait_until_ready(name)
        for name in self.pods.keys() - wanted.keys():
            self.end(name)

    def environment(self, rendered: Rendered, workload: Workload) -> dict[str, str]:
        """What is mounted in a pod is in other places here."""
        address = self.addresses.setdefault(workload.name, f"{self.network}.{len(self.addresses) + 1}")
        (secret,) = rendered.of("Secret")
        places = {
            "10.1.2.3": address,
            "0.0.0.0": address,
            "mesh-afd-redis:6379": f"127.0.0.1:{self.redis.port}",
            "/model": str(self.model),
            "/etc/afd/tls": str(self.certificates / workload.role),
            "/etc/afd/public-tls": str(self.certificates / "public"),
        }
        variables = image_environment(workload.role) | environment(rendered, workload)
        assert variables["AFD_REDIS"] == secret["stringData"]["url"]
        for place, here in places.items():
            variables = {name: value.replace(place, here) for name, value in variables.items()}
        others = {name: value for name, value in os.environ.items() if not name.startswith("AFD_")}
        return others | variables

    def wait_until_ready(self, name: str) -> None:
        """As the kubelet asks, by the pod's own probe."""
        workload, process = self.pods[name]
        asked = workload.container["startupProbe"]["grpc"]
        request = health_pb2.HealthCheckRequest(service=asked["service"])
        deadline = time.monotonic() + READY_S
        with grpc.insecure_channel(f"{self.addresses[name]}:{asked['port']}") as channel:
            while True:
                with contextlib.suppress(grpc.RpcError):
                    answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=1, wait_for_ready=True)
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                assert process.poll() is None, f"{name} ended"
                assert time.monotonic() < deadline, f"{name} is not ready"
                time.sleep(0.05)

    def end(self, name: str) -> None:
        _, process = self.pods.pop(name)
        process.send_signal(15)
        assert process.wait(20) == 0, name

    def run(self, rendered: Rendered, *command: str, **variables: str) -> str:
        """As `kubectl exec` in the gateway does."""
        (gateway,) = rendered.of_role("gateway")
        assert command[0] == "afd"
        done = subprocess.run(
            [sys.executable, "-m", *command],
            env=self.environment(rendered, gateway) | variables,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def check_layout(self, rendered: Rendered, **variables: str) -> subprocess.CompletedProcess[str]:
        """The hook of an upgrade or a rollback to this, by its own shell."""
        (job,) = rendered.of_role("layout")
        (gateway,) = rendered.of_role("gateway")
        command = [word.replace("exec afd", f"exec {sys.executable} -m afd") for word in job.container["command"]]
        environment = self.environment(rendered, gateway)
        given = {each["name"] for each in job.container["env"]}
        kept = {name: value for name, value in environment.items() if not name.startswith("AFD_") or name in given}
        return subprocess.run(command, env=kept | variables, capture_output=True, text=True, timeout=60, check=False)

    def helm_test(self, rendered: Rendered, key: str) -> str:
        (test,) = rendered.of_role("test")
        target = {"mesh-afd-gateway:50051": f"{self.addresses['mesh-afd-gateway']}:50051"}
        command = [target.get(word, word) for word in test.container["command"]]
        return self.run(rendered, *command, AFD_API_KEY=key, AFD_CA=str(self.certificates / "public" / "ca.crt"))


@pytest.fixture
def node(make_model: Callable[[int], Model], fork_server: ForkServer, tmp_path: Path) -> Iterator[Node]:
    with one_server(tmp_path / "redis") as redis:
        node = Node(make_model(4).path, tmp_path / "certificates", redis, fork_server)
        make_certificates(node.certificates, [f"{node.network}.{number}" for number in range(1, 10)])
        try:
            yield node
        finally:
            for _, process in node.pods.values():
                process.kill()
                process.wait(20)


def test_they_serve_and_are_resharded(node: Node) -> None:
    two = render({**VALUES, "ffn": {"shards": 2}})
    (secret,) = two.of("Secret")
    for line in secret["stringData"]["users.acl"].splitlines()[::-1]:  # the default one is off last
        node.redis.ask("ACL", "SETUSER", *line.split()[1:])
    node.apply(two)
    key = node.run(two, "afd", "keys", "create", "alice").strip()
    answer = node.helm_test(two, key)
    assert answer.strip()
    both = render({**VALUES, "ffn": {"shards": 2, "nextShards": 3}})
    node.apply(both)
    three = render({**VALUES, "ffn": {"shards": 3}})
    refused = node.check_layout(three)
    sentence = "mesh llm.mesh has 2 FFN shards, in epoch 1, and nobody would serve with 3 alone: keep the 2"
    assert (refused.returncode, sentence in refused.stderr) == (1, True)
    assert node.run(both, "afd", "layout", "3") == "mesh llm.mesh has 3 FFN shards, in epoch 2\n"
    assert node.check_layout(two).returncode == 1, "a rollback, or another set that ends too early"
    assert node.check_layout(three).returncode == 0
    assert node.check_layout(two, AFD_REDIS="").returncode == 0, "no Secret yet"
    node.apply(three)
    assert sorted(node.pods) == sorted(
        ["mesh-afd-attention", "mesh-afd-gateway", *(f"mesh-afd-ffn-{shard}-of-3" for shard in range(3))]
    )
    assert node.helm_test(three, key) == answer
    for name in sorted(node.pods):
        node.end(name)
