"""The SDK as people get it: the wheel, in a venv that has nothing else. It asks a mesh, and its types are seen."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Model, StartMesh

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "redis", "opentelemetry", "pydantic", "fastapi", "typer")

ASKING = """
import asyncio
import json
import sys
from importlib.util import find_spec

from afd import Client, SyncClient, Token

OPTIONS = {"max_tokens": 5, "ignore_eos": True}


async def ask(target: str) -> list[Token]:
    async with Client(target) as client:
        return [token async for token in client.generate([5, 6, 7], **OPTIONS)]


with SyncClient(sys.argv[1]) as client:
    answers = [list(client.generate([5, 6, 7], **OPTIONS)), asyncio.run(ask(sys.argv[1]))]
there = [name for name in sys.argv[2:] if find_spec(name)]
print(json.dumps({"answers": [[(token.id, token.logprob) for token in answer] for answer in answers], "heavy": there}))
"""

RIGHT = """
from typing import assert_type

from afd import AfdError, Client, Stream, SyncClient, Token


async def ask(client: Client) -> str:
    stream = client.generate("The sky is", max_tokens=16, temperature=0.7, stop=["\\n"], timeout_s=10)
    assert_type(stream, Stream)
    text = ""
    try:
        async for token in stream:
            assert_type(token, Token)
            text += token.text
    except AfdError as error:
        assert_type(error.retry_after_s, float | None)
    assert_type(await client.cancel(stream.request_id), bool)
    return text


def ask_sync(client: SyncClient) -> list[int]:
    messages = [{"role": "user", "content": "What is 12 + 68?"}]
    return [token.id for token in client.chat(messages, seed=1)]
"""

WRONG = """
from afd import Client, SyncClient


async def ask(client: Client) -> None:
    async for token in client.generate("The sky is", max_token=16):
        print(token.txt)


def ask_sync(client: SyncClient) -> None:
    client.generate("The sky is", max_tokens="16")
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new venv with the wheel, built from the sources alone: earlier builds leave files there."""
    sources, wheels, venv = (tmp_path_factory.mktemp(name) for name in ("sources", "wheels", "venv"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    for name in ("afd", "services"):
        shutil.copytree(ROOT / name, sources / name)
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", wheels, sources], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    interpreter = venv / "bin" / "python"
    subprocess.run([*pip, "--python", interpreter, "install", "--quiet", *wheels.glob("*.whl")], check=True)
    return interpreter


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """In a folder without our sources: what is imported, or looked at, is the wheel."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


def type_errors(python: Path, program: str, folder: Path) -> list[str]:
    (folder / "program.py").write_text(program)
    command = (sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--python-executable", python)
    return run(*command, "program.py", cwd=folder).stdout.splitlines()


def test_wheel_brings_grpcio_and_protobuf_and_nothing_else(python: Path) -> None:
    listed = run(sys.executable, "-m", "pip", "--python", python, "list", "--format=json", cwd=python.parent)
    names = {package["name"] for package in json.loads(listed.stdout)}
    assert names - {"typing_extensions"} == {"afd", "grpcio", "protobuf"}, "grpcio needs typing_extensions"


def test_wheel_alone_asks_a_mesh_with_and_without_asyncio(
    python: Path, make_model: Callable[[int], Model], start_mesh: StartMesh, tmp_path: Path
) -> None:
    model = make_model(4)
    with start_mesh(model.path, 1, 0) as mesh:
        done = run(python, "-c", ASKING, mesh.target, *HEAVY, cwd=tmp_path)
    assert done.stderr == ""
    answer: dict[str, Any] = json.loads(done.stdout)
    assert answer["heavy"] == []
    assert [len(tokens) for tokens in answer["answers"]] == [5, 5]
    for tokens in answer["answers"]:
        model.check_greedy([5, 6, 7], [token_id for token_id, _ in tokens], [logprob for _, logprob in tokens])


def test_the_command_of_the_wheel_says_what_it_needs(python: Path, tmp_path: Path) -> None:
    done = run(python.parent / "afd", "generate", "The sky is", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("afd: the command line needs typer, which is not installed: pip install 'afd[cli]'")


def test_program_that_uses_the_wheel_is_typed_strictly(python: Path, tmp_path: Path) -> None:
    assert type_errors(python, RIGHT, tmp_path) == []


def test_type_checker_finds_what_is_wrong_with_a_program_that_uses_the_wheel(python: Path, tmp_path: Path) -> None:
    found = type_errors(python, WRONG, tmp_path)
    places = [line.split(":")[1] for line in found if ": error:" in line]
    assert places == ["6", "7", "11"], found
