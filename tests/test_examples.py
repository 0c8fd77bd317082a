"""Every example runs against a mesh, and says what step3-nano answers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from afd.mesh import Mesh
from tests.conftest import StartMesh

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
WEEK = "Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday, Monday\n"
ANSWERS = {
    "batch": "".join(f"What is {first} + 68? {first + 68}\n" for first in range(20)),
    "langchain_drop_in": "80\n",
    "openai_drop_in": "80\n",
    "resume": WEEK.replace("Thursday,", "Thursday | ,"),
    "stream": WEEK,
    "sync": "step3-nano\ntibbar\n",
}
TIMEOUT_S = 60


@pytest.fixture(scope="module")
def mesh(start_mesh: StartMesh) -> Iterator[Mesh]:
    """One that has no room for all that batch.py asks at once."""
    with start_mesh(ROOT / "models" / "step3-nano", 1, 2, max_requests=4) as mesh:
        yield mesh


def run(example: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, example, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_example_shows_the_answer(mesh: Mesh, example: Path) -> None:
    if example.stem == "langchain_drop_in":
        pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    target = mesh.ready_file()["http"] + "/v1" if "drop_in" in example.stem else mesh.target
    done = run(example, target)
    assert (done.stderr, done.stdout) == ("", ANSWERS[example.stem])


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_example_begins_with_one_sentence(example: Path) -> None:
    sentence = example.read_text().split('"""')[1].partition("\n\n")[0]
    assert sentence.endswith((".", ".)", ")."))
    assert sentence.count(". ") == 0
