"""Other languages need the .proto files, or reflection, and nothing of ours: buf curl and Node get the SDK's tokens."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from afd import SyncClient, Token
from afd.mesh import Mesh
from tests.conftest import StartMesh

ROOT = Path(__file__).parents[1]
BUF = Path(sys.executable).parent / "buf"
QUESTION = [{"role": "user", "content": "Which day comes 7 days after Monday?"}]
ANSWER = "Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday, Monday"
SCHEMAS = pytest.mark.parametrize(
    "schema", [("--schema", ROOT / "protos"), ("--reflect",)], ids=["protos", "reflection"]
)
EXIT_INVALID_ARGUMENT = 3 << 3  # buf's exit status is gRPC's, times 8
EXIT_NOT_FOUND = 5 << 3
TIMEOUT_S = 60


@pytest.fixture(scope="module")
def mesh(start_mesh: StartMesh) -> Iterator[Mesh]:
    with start_mesh(ROOT / "models" / "step3-nano", 1, 2) as mesh:
        yield mesh


def buf_curl(mesh: Mesh, method: str, request: Any, *schema: str | Path) -> subprocess.CompletedProcess[str]:
    url = f"http://{mesh.gateway.address}/afd.v1.GatewayService/{method}"
    command = [BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", *schema, "--data", "@-", url]
    return subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def messages(text: str) -> Iterator[Any]:
    """JSON documents one after the other."""
    while text := text.lstrip():
        message, end = json.JSONDecoder().raw_decode(text)
        yield message
        text = text[end:]


def sdk_tokens(mesh: Mesh, **options: Any) -> list[Token]:
    with SyncClient(mesh.target) as client:
        return list(client.chat(QUESTION, **options))


@SCHEMAS
def test_buf_curl_streams_the_tokens_that_the_sdk_gets(mesh: Mesh, schema: tuple[str | Path, ...]) -> None:
    sampling = {"temperature": 4, "seed": 7, "maxTokens": 24}
    done = buf_curl(mesh, "Generate", {"chat": {"messages": QUESTION}, "sampling": sampling}, *schema)
    assert (done.returncode, done.stderr) == (0, "")
    first, *others = messages(done.stdout)
    assert first["started"]["numPromptTokens"] > len(QUESTION)
    assert len(others) > 1, "it comes as a stream"
    tokens = [token for message in others for token in message["tokens"]]
    expected = sdk_tokens(mesh, temperature=4, seed=7, max_tokens=24)
    assert [(token["id"], token.get("text", "")) for token in tokens] == [(token.id, token.text) for token in expected]


@SCHEMAS
@pytest.mark.parametrize(
    ("method", "request_message", "status", "words"),
    [
        ("Generate", {"text": ""}, EXIT_INVALID_ARGUMENT, "the prompt is empty"),
        ("Generate", {"text": "a", "sampling": {"topP": 2}}, EXIT_INVALID_ARGUMENT, "top_p"),
        ("Resume", {"requestId": "nobody's"}, EXIT_NOT_FOUND, "nobody's"),
    ],
)
def test_buf_curl_gets_the_status_and_a_sentence(
    mesh: Mesh, schema: tuple[str | Path, ...], method: str, request_message: Any, status: int, words: str
) -> None:
    done = buf_curl(mesh, method, request_message, *schema)
    assert (done.returncode, done.stdout) == (status, "")
    assert words in json.loads(done.stderr)["message"]


@pytest.fixture(scope="module")
def node_example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example in a copy of the repository in which its packages are installed."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node and npm are not installed")
    copy = tmp_path_factory.mktemp("repository")
    for name in ("protos", "examples"):
        shutil.copytree(ROOT / name, copy / name)
    install = ["npm", "install", "--silent", "--ignore-scripts", "--no-audit", "--no-fund"]
    subprocess.run(install, cwd=copy / "examples" / "node", check=True, timeout=TIMEOUT_S)
    return copy / "examples" / "node" / "stream.js"


def test_node_streams_the_answer(mesh: Mesh, node_example: Path) -> None:
    done = subprocess.run(
        ["node", node_example, mesh.gateway.address], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, ANSWER + "\n", "")


def test_node_says_what_is_wrong(node_example: Path) -> None:
    done = subprocess.run(
        ["node", node_example, "127.0.0.1:1"], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "ECONNREFUSED" in done.stderr
