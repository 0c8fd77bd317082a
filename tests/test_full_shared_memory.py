"""A machine whose /dev/shm is full: a mesh in a mount namespace with a small one of its own. Root only."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from afd import Client
from tests.conftest import Model, needs_nixl
from tests.test_cli import AFD, assert_refused, running_up

PROMPT = [5, 6, 7]
FULL_OF_BYTES = "cat /dev/zero > /dev/shm/much 2> /dev/null"
FULL_OF_FILES = "n=0; while true 2> /dev/null > /dev/shm/$n; do n=$((n + 1)); done 2> /dev/null"


def where(filling: str) -> list[str]:
    """Runs another command, where /dev/shm is small and filled."""
    mount = "mount -t tmpfs -o size=1m,nr_inodes=64 tmpfs /dev/shm"
    return ["unshare", "--mount", "sh", "-c", f'{mount} || exit; {filling}; exec "$@"', "sh"]


@pytest.fixture(autouse=True, scope="module")
def right_to_mount() -> None:
    try:
        subprocess.run([*where("true"), "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs unshare(1), and the right to make mounts")


@pytest.mark.parametrize(
    ("filling", "handoff"),
    [
        pytest.param(FULL_OF_BYTES, "shm", id="bytes-shm"),
        pytest.param(FULL_OF_BYTES, "nixl", id="bytes-nixl", marks=[needs_nixl, pytest.mark.slow]),
        pytest.param(FULL_OF_FILES, "auto", id="files-auto"),
    ],
)
async def test_mesh_serves_where_dev_shm_is_full(
    make_model: Callable[[int], Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filling: str, handoff: str
) -> None:
    model = make_model(4)
    monkeypatch.setenv("AFD_HANDOFF", handoff)
    with running_up(model.path, tmp_path / "ready.json", run_by=where(filling)) as (_, ready):
        async with Client(ready["grpc"].removeprefix("grpc://")) as client:
            tokens = [token async for token in client.generate(PROMPT, max_tokens=24, ignore_eos=True)]
    model.check_greedy(PROMPT, [token.id for token in tokens], [token.logprob for token in tokens])


def test_shared_memory_that_is_required_and_cannot_be_handed_over_is_a_sentence(
    make_model: Callable[[int], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFD_HANDOFF", "shm")
    up = [*where(FULL_OF_FILES), *AFD, "up", "--model", str(make_model(4).path), "--grpc-port", "0", "--http-port", "0"]
    result = subprocess.run(up, capture_output=True, text=True, timeout=60, check=False)
    assert_refused(result, "no socket can be made in /dev/shm (No space left on device)")
