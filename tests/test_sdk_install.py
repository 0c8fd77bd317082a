"""The SDK by itself: `pip install .` brings grpcio and protobuf, and that is enough to ask a mesh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Model, StartMesh

ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys
from afd import SyncClient
with SyncClient(sys.argv[1]) as client:
    print([token.id for token in client.generate([5, 6, 7], max_tokens=5, ignore_eos=True)])
assert not {"torch", "redis", "opentelemetry", "pydantic"} & sys.modules.keys()
"""


@pytest.mark.slow
def test_sdk_installs_and_works_without_torch(
    make_model: Callable[[int], Model], start_mesh: StartMesh, tmp_path: Path
) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", ROOT], check=True)
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], check=True, capture_output=True, text=True
    ).stdout
    names = {line.partition("==")[0] for line in listed.splitlines()}
    assert names <= {"afd", "grpcio", "protobuf", "typing_extensions", "pip", "setuptools"}
    with start_mesh(make_model(4).path, 1, 0) as mesh:
        command = [python, "-c", SCRIPT, mesh.gateway.address]
        environment = {**os.environ, "PYTHONPATH": ""}
        answer = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment
        ).stdout
    assert len(json.loads(answer)) == 5
