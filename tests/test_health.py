"""Health checks on a port of their own: what probes of Docker and Kubernetes see of a service."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc.aio
import pytest
from fastapi import FastAPI

from afd.address import joined
from afd.errors import ConfigError, PeerUnavailable
from afd.health import ALIVE, READY, answering_probes, probe
from afd.rpc import serving
from afd.scrape import scrape
from services.gateway.http_server import HttpLimits, serving_http
from tests.conftest import Model
from tests.redis_servers import Server, free_port, until

ROOT = Path(__file__).resolve().parents[1]


async def test_a_service_is_ready_while_it_says_so() -> None:
    port, is_ready = free_port(), True
    async with answering_probes("127.0.0.1", port, lambda: is_ready):
        assert await asyncio.to_thread(probe, READY, port) is None
        is_ready = False
        assert await asyncio.to_thread(probe, READY, port) == "not ready"
        assert await asyncio.to_thread(probe, ALIVE, port) is None
        assert await asyncio.to_thread(probe, "ffn", port) == 'there is "" and "ready", no "ffn"'
    assert "onnect" in str(await asyncio.to_thread(probe, ALIVE, port))


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
async def test_services_are_reached_by_ipv6_and_on_any_address_by_both() -> None:
    port = free_port()
    async with answering_probes("::", port, lambda: True):
        assert await asyncio.to_thread(probe, READY, port) is None
    async with (
        serving(lambda server: None, (), "::1", 0) as port,
        grpc.aio.insecure_channel(f"[::1]:{port}") as channel,
    ):
        await asyncio.wait_for(channel.channel_ready(), 5)
    async with serving_http(FastAPI(), "::", 0, HttpLimits(1024, 5.0), None) as port:
        for address in (joined("::1", port), joined("127.0.0.1", port)):
            with pytest.raises(PeerUnavailable, match="404"):
                await asyncio.to_thread(scrape, address)


async def test_a_port_that_is_taken_is_a_sentence() -> None:
    port = free_port()
    async with answering_probes("127.0.0.1", port, lambda: True):
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: the port is taken"):
            async with answering_probes("127.0.0.1", port, lambda: True):
                pass


def asked(service: str, port: int) -> tuple[int, str]:
    """What Docker sees: the exit status of the probe, and its word."""
    environment = {**os.environ, "AFD_HEALTH_PORT": str(port)}
    command = [sys.executable, "-m", "afd.health", service]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=30)
    return done.returncode, done.stderr.strip()


def test_a_service_answers_from_its_start_and_is_ready_when_its_parts_are(
    make_model: Callable[[int], Model], tmp_path: Path
) -> None:
    port = free_port()
    server = Server(tmp_path)
    server.start()
    environment = {**os.environ, "AFD_MODEL": str(make_model(0).path), "AFD_REDIS": server.url, "AFD_DTYPE": "float32"}
    attention = subprocess.Popen(
        [sys.executable, "-m", "services.attention"], cwd=ROOT, env={**environment, "AFD_HEALTH_PORT": str(port)}
    )
    ffn = None
    try:
        until(lambda: probe(ALIVE, port) is None, "the attention replica")
        assert asked(READY, port) == (1, "not ready"), "it has no FFN"
        ffn = subprocess.Popen([sys.executable, "-m", "services.ffn"], cwd=ROOT, env=environment)
        until(lambda: probe(READY, port) is None, "the attention replica with its FFN")
        assert asked(READY, port) == (0, "")
        attention.send_signal(signal.SIGSTOP)
        assert asked(ALIVE, port)[0] == 1, "frozen"
    finally:
        for process in (attention, ffn):
            if process:
                process.send_signal(signal.SIGCONT)
                process.terminate()
                process.wait(20)
        server.kill()
    assert attention.returncode == 0
