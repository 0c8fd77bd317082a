"""`afd doctor` tells which transports two places have, how fast they are, and why not."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from afd import Client
from afd.bench import counters
from afd.cli import main
from afd.errors import TransportUnavailable
from afd.handoff.negotiate import LADDER
from afd.handoff.shm import DIRECTORY
from afd.mesh import Mesh, Service
from tests.conftest import Model, StartMesh


@pytest.fixture(scope="module")
def mesh(make_model: Callable[[int], Model], start_mesh: StartMesh) -> Iterator[Mesh]:
    with start_mesh(make_model(4).path, 1, 2) as mesh:
        yield mesh


def service(mesh: Mesh, replica_id: str) -> Service:
    return next(service for service in mesh.services if service.replica_id == replica_id)


def address(mesh: Mesh, replica_id: str) -> str:
    replica = service(mesh, replica_id).replica
    assert replica is not None
    return replica.address


def metrics_address(mesh: Mesh) -> str:
    replica = service(mesh, "attention-0").replica
    assert replica is not None
    return str(replica.metrics_address)


def doctor(*arguments: str) -> Any:
    """Its exit status; a sentence is status 1."""
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *arguments])
    return ended.value.code


def unavailable(*arguments: object) -> Any:
    raise TransportUnavailable("no such card here")


def test_every_transport_is_tried_and_auto_takes_shared_memory(
    mesh: Mesh, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, file = set(DIRECTORY.iterdir()), tmp_path / "doctor.json"
    assert doctor(address(mesh, "ffn-1"), metrics_address(mesh), "--json", str(file)) == 0
    written = json.loads(file.read_text())
    assert (written["replica_id"], written["shard"], written["max_tokens"]) == ("ffn-1", "1/2", 640)
    usable = {rung["transport"]: rung for rung in written["transports"] if rung["usable"]}
    assert [rung["transport"] for rung in written["transports"]] == list(LADDER)
    assert {"shm", "inline"} <= usable.keys()
    assert written["chosen"] == written["in_use"] == "shm"
    assert all(rung["bytes_per_s"] > 0 for rung in usable.values())
    assert f"afd_handoff_transport/ffn-1/1/{written['in_use']}" in counters(mesh, "attention-0")
    printed = capsys.readouterr().out
    assert "what auto takes" in printed
    assert f"uses {written['in_use']} with this replica" in printed
    assert set(DIRECTORY.iterdir()) == before


def test_a_transport_that_cannot_be_had_has_a_reason_and_fails_where_it_is_required(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(LADDER, "shm", unavailable)
    place, file = address(mesh, "ffn-0"), tmp_path / "doctor.json"
    assert doctor(place, "--require", "inline", "--json", str(file)) == 0
    assert {"transport": "shm", "usable": False, "reason": "no such card here"} in json.loads(file.read_text())[
        "transports"
    ]
    assert "cannot be had: no such card here" in capsys.readouterr().out
    assert doctor(place, "--require", "shm") == f"afd: shm cannot be had with the FFN at {place}: no such card here"


def test_a_host_without_shared_memory_is_told_so(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("afd.handoff.shm.platform.machine", lambda: "riscv64")
    assert doctor(address(mesh, "ffn-0"), "--require", "inline") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "On this host: shared memory needs Linux, and x86-64's order of writes; this is linux on riscv64." in said


def test_an_ffn_that_takes_small_frames_only_is_tried_with_these(
    make_model: Callable[[int], Model], start_mesh: StartMesh, tmp_path: Path
) -> None:
    file, sizes = tmp_path / "doctor.json", {"max_sequences": 8, "prefill_chunk_tokens": 8, "max_frame_tokens": 16}
    with start_mesh(make_model(4).path, 1, 1, **sizes) as mesh:
        assert doctor(address(mesh, "ffn-0"), "--json", str(file)) == 0
    assert json.loads(file.read_text())["max_tokens"] == 16


def test_the_mesh_goes_on_while_it_is_looked_at(mesh: Mesh, make_model: Callable[[int], Model]) -> None:
    async def ask() -> list[int]:
        async with Client(mesh.gateway.address) as client:
            stream = client.generate([3, 4, 5], max_tokens=60, ignore_eos=True)
            first = [(await anext(stream)).id]
            assert await asyncio.to_thread(doctor, address(mesh, "ffn-0")) == 0
            return first + [token.id async for token in stream]

    assert len(asyncio.run(ask())) == 60


def test_nobody_at_the_address_is_a_sentence() -> None:
    assert str(doctor("127.0.0.1:1")).startswith("afd: no FFN shard answers at 127.0.0.1:1; give the gRPC")


def test_a_frozen_ffn_is_a_sentence_in_bounded_time(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afd.handoff.diagnosis._TIMEOUT_S", 0.5)
    process = service(mesh, "ffn-0").process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    try:
        assert "no FFN shard answers at" in str(doctor(address(mesh, "ffn-0")))
    finally:
        os.kill(process.pid, signal.SIGCONT)


def test_another_service_at_the_address_is_a_sentence(mesh: Mesh) -> None:
    assert f"{mesh.gateway.address} is no FFN shard" in str(doctor(mesh.gateway.address))


def test_an_attention_replica_without_metrics_is_a_sentence(mesh: Mesh) -> None:
    assert "no metrics at http://127.0.0.1:1/metrics" in str(doctor(address(mesh, "ffn-0"), "127.0.0.1:1"))


def test_a_transport_that_does_not_exist_is_a_wrong_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("127.0.0.1:1", "--require", "pigeon") == 2
    assert f"the transports are {', '.join(LADDER)}" in capsys.readouterr().err
