"""What compose.yaml can be told: TLS, NIXL between its containers."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

import openai
import pytest

from afd import SyncClient
from afd.errors import PeerUnavailable
from tests.e2e.stack import PROJECT, Stack, image
from tests.e2e.test_compose import QUESTION, transports
from tests.e2e.test_observability import MESH, PROMETHEUS_IMAGE, Observed, eventually
from tests.redis_servers import free_port

pytestmark = pytest.mark.e2e


def test_with_nixl_required_tensors_cross_through_it(images: dict[str, str]) -> None:
    with Stack(variables={**images, "AFD_HANDOFF": "nixl"}).running() as stack, SyncClient(stack.target) as sdk:
        assert "".join(token.text for token in sdk.chat(QUESTION)) == "80"
        assert transports(stack) == {"nixl"}


def test_with_tls_prometheus_reads_every_replica(images: dict[str, str]) -> None:
    port = free_port()
    variables = {**images, "PROMETHEUS_PORT": str(port)}
    stack = Stack(files=("compose.yaml", "compose.tls.yaml"), variables=variables)
    variables["PROMETHEUS_IMAGE"] = image(stack.engine, PROMETHEUS_IMAGE)
    with stack.running(*MESH, "prometheus"):
        observed = Observed(stack, port)
        eventually(lambda: observed.query("count by (job) (up == 1)") == {"gateway": 2, "attention": 2, "ffn": 2})


def test_with_tls_only_those_who_know_the_ca_are_answered(images: dict[str, str], tmp_path: Path) -> None:
    files = ("compose.yaml", "compose.tls.yaml")
    with Stack(files=files, variables=images).running() as stack:
        ca = tmp_path / "ca.crt"
        subprocess.run(["docker", "cp", f"{PROJECT}-certificates-1:/certs/ca.crt", ca], check=True, capture_output=True)
        with SyncClient(stack.target, ca=ca) as sdk:
            assert "".join(token.text for token in sdk.chat(QUESTION)) == "80"
        with pytest.raises(PeerUnavailable, match="no gateway answers"), SyncClient(stack.target):
            pass
        assert transports(stack) == {"shm"}
        base_url = f"https://localhost:{stack.http_ports[0]}/v1"
        trusting = openai.DefaultHttpxClient(verify=ssl.create_default_context(cafile=ca))
        client = openai.OpenAI(base_url=base_url, api_key="none", http_client=trusting)
        answer = client.chat.completions.create(model="step3-nano", messages=QUESTION)
        assert answer.choices[0].message.content == "80"
