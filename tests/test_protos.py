"""The contract: the stubs are those that protos/ make, and buf finds nothing to say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
PROTOS = sorted(path.relative_to(ROOT) for path in (ROOT / "protos").rglob("*.proto"))


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make protos` writes, elsewhere."""
    out = tmp_path_factory.mktemp("stubs")
    kinds = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python", "mypy_grpc")]
    plugin = f"--plugin=protoc-gen-mypy_grpc={BIN / 'protoc-gen-mypy_grpc'}"
    command = [sys.executable, "-m", "grpc_tools.protoc", "--proto_path=protos", plugin, *kinds, *map(str, PROTOS)]
    subprocess.run(command, cwd=ROOT, check=True)
    return out / "afd" / "v1"


def test_the_stubs_are_those_that_the_protos_make(generated: Path) -> None:
    made = {path.name: path.read_bytes() for path in generated.iterdir()}
    checked_in = {path.name: path.read_bytes() for path in (ROOT / "afd" / "v1").glob("*_pb2*.py*")}
    assert len(made) == 4 * len(PROTOS)
    assert made.keys() == checked_in.keys()
    assert [name for name in made if made[name] != checked_in[name]] == [], "run make protos"


def test_buf_finds_nothing_wrong_with_the_protos() -> None:
    done = subprocess.run([BIN / "buf", "lint", "protos"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_method_of_the_contract_says_what_it_promises() -> None:
    for path in PROTOS:
        before = ""
        for line in (ROOT / path).read_text().splitlines():
            words = line.strip()
            if words.startswith(("service ", "rpc ")):
                assert before.startswith("//"), f"{path}: {words} has no comment"
            before = words
