"""The `afd` command as people run it: it starts, tells where things are, stops cleanly, and refuses in a sentence."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from afd import Client, cli
from afd.certs import make_certificates
from afd.model.random_checkpoint import ModelSizes, make_checkpoint
from tests.conftest import Model

AFD = [sys.executable, "-m", "afd"]


def afd(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*AFD, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def assert_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode not in (0, -signal.SIGABRT)
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


@contextlib.contextmanager
def running_up(
    model: Path, ready: Path, *arguments: object, run_by: Sequence[str] = ()
) -> Iterator[tuple[psutil.Process, dict[str, Any]]]:
    """`afd up` on free ports, and what its ready file says; `run_by` is a command that runs another one."""
    ports = ("--grpc-port", "0", "--http-port", "0")
    command = [*run_by, *AFD, "up", "--model", model, "--dtype", "float32", *ports, "--ready-file", ready, *arguments]
    process = psutil.Popen([str(part) for part in command], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not ready.exists():
            assert process.poll() is None, "afd up ended before it was ready"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process, json.loads(ready.read_text())
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
        process.wait(60)


def still_running(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended; an orphan that has, and waits for init to notice, is not running."""
    _, alive = psutil.wait_procs(processes, timeout=5)
    return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


@pytest.fixture
def model(make_model: Callable[[int], Model]) -> Model:
    return make_model(4)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_up_tells_where_things_are_and_leaves_nothing_behind(
    model: Model, tmp_path: Path, number: signal.Signals
) -> None:
    before = shared_memory()
    with running_up(model.path, tmp_path / "ready.json", "--attention", 2, "--ffn", 2) as (process, ready):
        assert ready["redis"] is None
        assert sorted((entry["role"], entry["index"], entry["shard"]) for entry in ready["processes"]) == [
            ("attention", 0, None),
            ("attention", 1, None),
            ("ffn", 0, "0/2"),
            ("ffn", 1, "1/2"),
            ("gateway", 0, None),
        ]
        assert all(psutil.pid_exists(entry["pid"]) for entry in ready["processes"])
        children = process.children(recursive=True)
        assert len(children) == 7  # with the embedded Redis and the fork server
        with urllib.request.urlopen(ready["http"] + "/health", timeout=10) as answer:
            assert answer.status == 200
        process.send_signal(number)
        assert process.wait(60) == 0
        assert still_running(children) == []
    assert not (tmp_path / "ready.json").exists()
    assert shared_memory() == before


def test_up_that_is_killed_takes_its_children_along(model: Model, tmp_path: Path) -> None:
    with running_up(model.path, tmp_path / "ready.json") as (process, _):
        children = process.children(recursive=True)
        process.kill()
        _, alive = psutil.wait_procs(children, timeout=20)
        assert alive == []


def test_settings_that_are_options_of_up_are_taken_from_the_environment(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFD_FFN_SHARDS", "2")
    with running_up(model.path, tmp_path / "ready.json") as (_, ready):
        assert [entry["shard"] for entry in ready["processes"] if entry["role"] == "ffn"] == ["0/2", "1/2"]


def test_service_that_is_started_again_is_where_it_was(model: Model, tmp_path: Path) -> None:
    with running_up(model.path, tmp_path / "ready.json") as (_, ready):
        before = {entry["role"]: entry for entry in ready["processes"]}
        psutil.Process(before["gateway"]["pid"]).kill()
        deadline = time.monotonic() + 30
        after = before
        while after["gateway"]["pid"] == before["gateway"]["pid"] and time.monotonic() < deadline:
            time.sleep(0.1)
            after = {entry["role"]: entry for entry in json.loads((tmp_path / "ready.json").read_text())["processes"]}
        assert after["gateway"]["pid"] != before["gateway"]["pid"]
        assert after["gateway"]["address"] == before["gateway"]["address"]
        result = afd("generate", "Once", "--target", ready["grpc"], "--max-tokens", 3)
        while result.returncode and time.monotonic() < deadline:
            result = afd("generate", "Once", "--target", ready["grpc"], "--max-tokens", 3)
        assert result.returncode == 0


def test_interrupt_while_starting_leaves_nothing_behind(model: Model, tmp_path: Path) -> None:
    command = [*AFD, "up", "--model", str(model.path), "--ffn", "2", "--grpc-port", "0", "--http-port", "0"]
    with (tmp_path / "stderr").open("w") as stderr:
        process = psutil.Popen(command, stderr=stderr)
    deadline = time.monotonic() + 30
    while len(process.children(recursive=True)) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = process.children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0, (tmp_path / "stderr").read_text()
    assert still_running(children) == []


def test_signal_in_a_callback_of_the_event_loop_is_not_lost() -> None:
    async def be_signalled() -> None:
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGTERM)
        await asyncio.sleep(5)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with cli._until_signalled():
            asyncio.run(be_signalled())
            pytest.fail("the signal was lost")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_running_requests_end_before_up_does(model: Model, tmp_path: Path) -> None:
    async def ask(address: str, process: psutil.Process) -> int:
        num_tokens = 0
        async with Client(address) as client:
            async for _ in client.generate([5, 6, 7], max_tokens=100, ignore_eos=True):
                num_tokens += 1
                if num_tokens == 5:
                    process.send_signal(signal.SIGTERM)
        return num_tokens

    with running_up(model.path, tmp_path / "ready.json") as (process, ready):
        assert asyncio.run(ask(ready["grpc"], process)) == 100


def test_generate_and_chat_print_the_answer(model: Model, tmp_path: Path) -> None:
    with running_up(model.path, tmp_path / "ready.json", "--ffn", 0) as (_, ready):
        first = afd("generate", "Once", "--target", ready["grpc"], "--max-tokens", 5)
        assert (first.returncode, bool(first.stdout.strip())) == (0, True)
        refused = afd("generate", "x" * 5000, "--target", ready["grpc"])
        assert_refused(refused, "afd: the prompt has", "context")


def test_make_checkpoint_writes_what_up_can_serve(tmp_path: Path) -> None:
    sizes = ("--layers", 3, "--hidden", 33, "--experts", 5, "--dense-layers", "1", "--max-file-mib", 0.1)
    result = afd("make-checkpoint", tmp_path / "model", *sizes, "--seed", 3)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    again = tmp_path / "again"
    afd("make-checkpoint", again, *sizes, "--seed", 3)
    for path in (tmp_path / "model").iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_bench_reports_speed_and_where_the_time_went(model: Model, tmp_path: Path) -> None:
    file, certs = tmp_path / "bench.json", tmp_path / "certs"
    make_certificates(certs)
    options = (
        "--tls",
        certs,
        "--streams",
        "1,3",
        "--prompt-tokens",
        9,
        "--output-tokens",
        5,
        "--dtype",
        "float32",
        "--json",
        file,
    )
    result = afd("bench", "--model", model.path, *options)
    assert result.returncode == 0, result.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [row["load"]["streams"] for row in rows] == [1, 3]
    for row in rows:
        assert row["output_throughput"] > 0
        assert 0 < row["ttft_ms"]["p50"] <= row["ttft_ms"]["p99"]
        assert 0.5 < sum(row["step_share"].values()) <= 1
        assert row["bubble_share"]["attention"] == pytest.approx(row["step_share"]["receive"])
        assert 0 < row["bubble_share"]["ffn"] < 1
    assert "bubbles, %" in result.stdout


def test_busy_port_is_a_sentence(model: Model) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        for option in ("--grpc-port", "--http-port"):
            other = "--http-port" if option == "--grpc-port" else "--grpc-port"
            result = afd("up", "--model", model.path, "--ffn", 0, option, port, other, 0)
            assert_refused(result, f"127.0.0.1:{port} cannot be had (Address already in use): give another {option}")


Refused = list[tuple[list[str], dict[str, str], str]]  # arguments, variables, and what is said

REFUSED_AT_ONCE: Refused = [
    (["up", "--model", "/nowhere"], {}, "/nowhere is no model directory: it has no config.json"),
    (["up"], {}, "--model"),
    (["up", "--model", "M", "--ffn", "-1"], {}, "--ffn"),
    (["up", "--model", "M", "--microbatches", "0"], {}, "a number from 1 to 64, or auto"),
    (["up", "--model", "M", "--attention", "0"], {}, "--attention"),
    (["up", "--model", "M", "--dtype", "float8"], {}, "float8"),
    (["up", "--model", "M", "--device", "tpu"], {}, "AFD_DEVICE"),
    (["up", "--model", "M", "--redis", "redis://127.0.0.1:1"], {}, "no Redis answers at redis://127.0.0.1:1"),
    (["up", "--model", "M", "--ffn", "99"], {}, "--ffn 99 is more than the "),
    (["scale", "--attention", "99999999999999"], {}, "--attention"),
    (["up", "--model", "M"], {"AFD_HOST": "192.0.2.1", "AFD_INSECURE": "1"}, "give another AFD_HOST"),
    (["up", "--model", "M", "--redis", "http://x"], {}, "AFD_REDIS=http://x: give a URL like redis://HOST:PORT"),
    (["up", "--model", "M", "--fnn", "1"], {}, "--ffn"),
    (["up", "--model", "M", "--ready-file", "/nowhere/ready"], {}, "/nowhere/ready cannot be written"),
    (["up", "--model", "M", "--tls", "/nowhere"], {}, "no certificate in /nowhere/ffn; `afd certs /nowhere`"),
    (["generate", "x", "--target", ""], {}, "target names no gateway"),
    (
        ["up", "--model", "M"],
        {"AFD_BLOK_SIZE": "4"},
        "no such setting: AFD_BLOK_SIZE, did you mean AFD_BLOCK_SIZE?",
    ),
    (["generate", "x"], {"AFD_CAA": "x"}, "no such setting: AFD_CAA, did you mean AFD_CA?"),
    (["up", "--model", "M"], {"AFD_BLOCK_SIZE": "four"}, "AFD_BLOCK_SIZE=four"),
    (["bench", "--model", "M", "--streams", "many"], {}, "--streams many"),
    (["bench", "--model", "M", "--streams", "0"], {}, "at least 1"),
    (["trace", "/nowhere"], {}, "/nowhere"),
    (["make-checkpoint", "/proc/nowhere"], {}, "cannot be written"),
    (["certs", "."], {}, "give a folder of its own"),
    (["plan", "paper", "--json", "/proc/nowhere/x"], {}, "/proc/nowhere/x cannot be written: No such file"),
    (["plan", "paper", "--pictures", "/dev/null"], {}, "/dev/null cannot be written"),
    (["make-checkpoint", "T", "--experts", "2", "--top-k", "3"], {}, "moe_top_k"),
    (["make-checkpoint", "T", "--head-dim", "7"], {}, "head_dim"),
    (["nonsense"], {}, "nonsense"),
]


REFUSED_BY_A_PROCESS: Refused = [
    (["up", "--model", "M", "--ffn", "0", "--device", "cuda:77"], {}, "no such GPU"),
    (["up", "--model", "M", "--ffn", "0"], {"AFD_KV_CACHE_GIB": "1e-9"}, "AFD_KV_CACHE_GIB"),
    (["up", "--model", "M", "--ffn", "0"], {"AFD_NUM_KV_BLOCKS": "99999999999"}, "lower AFD_NUM_KV_BLOCKS"),
    (["up", "--model", "M"], {"AFD_MAX_FRAME_TOKENS": "3"}, "raise AFD_MAX_FRAME_TOKENS"),
    (["generate", "x", "--target", "127.0.0.1:1"], {}, "no gateway answers at 127.0.0.1:1"),
]


@pytest.fixture(scope="module")
def places(make_model: Callable[[int], Model], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What stands for a model, and for a place for one."""
    return {"M": str(make_model(4).path), "T": str(tmp_path_factory.mktemp("made") / "model")}


@pytest.mark.parametrize(
    ("arguments", "variables", "words"), REFUSED_AT_ONCE, ids=[" ".join(case[0]) for case in REFUSED_AT_ONCE]
)
def test_what_cannot_work_is_refused_in_a_sentence(
    places: dict[str, str],
    arguments: list[str],
    variables: dict[str, str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        cli.main([places.get(argument, argument) for argument in arguments])
    assert caught.value.code
    assert words in f"{caught.value.code} {capsys.readouterr().err}"


def test_what_only_a_process_can_see_is_refused_in_a_sentence(places: dict[str, str]) -> None:
    def check(case: tuple[list[str], dict[str, str], str]) -> None:
        arguments, variables, words = case
        assert_refused(afd(*[places.get(argument, argument) for argument in arguments], **variables), words)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(check, REFUSED_BY_A_PROCESS))


def test_damaged_checkpoint_is_refused_in_a_sentence(model: Model, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model.path, copy)
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert_refused(afd("up", "--model", copy), f"{path} is not a safetensors file, or is damaged")


def test_full_disk_is_a_sentence(model: Model, tmp_path: Path) -> None:
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("a small file system cannot be mounted here")
    try:
        assert_refused(afd("make-checkpoint", tmp_path / "made"), "cannot be written", "No space left")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_two_halves_of_different_models_are_refused_naming_both(model: Model, tmp_path: Path, real_redis: str) -> None:
    other = tmp_path / "other"
    make_checkpoint(other, ModelSizes())
    environment = {"AFD_REDIS": real_redis, "AFD_DTYPE": "float32"}
    ffn = subprocess.Popen(
        [sys.executable, "-m", "services.ffn"], env={**os.environ, **environment, "AFD_MODEL": str(other)}
    )
    try:
        attention = subprocess.run(
            [sys.executable, "-m", "services.attention"],
            env={**os.environ, **environment, "AFD_MODEL": str(model.path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert_refused(attention, "the model fingerprint differs: attention has", "the FFN has")
    finally:
        ffn.terminate()
        ffn.wait(20)
