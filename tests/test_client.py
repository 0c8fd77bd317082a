"""What the SDK refuses by itself, and what it takes."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc.aio import Metadata

from afd import Client, SyncClient
from afd.errors import ConfigError, InvalidRequest
from afd.mesh import Mesh
from tests.conftest import Model, StartMesh

FINDING_NOBODY = """
import asyncio
from afd import Client, SyncClient
from afd.errors import PeerUnavailable

TARGET, QUICK = "localhost:1,localhost:2", {"connect_timeout_s": 0.02}


async def find() -> None:
    async with Client(TARGET, **QUICK):
        pass


def find_sync() -> None:
    with SyncClient(TARGET, **QUICK):
        pass


for _ in range(10):
    for finding in (find_sync, lambda: asyncio.run(find())):
        try:
            finding()
        except PeerUnavailable as error:
            assert str(error).startswith("no gateway answers at localhost:1,localhost:2 within 0.02 s: "), error
"""
FORKING = """
import os
import sys
from afd import SyncClient
from afd.errors import ConfigError

with SyncClient(sys.argv[1]) as client:
    client.get_model()
    if not os.fork():
        for use in (client.get_model, SyncClient(sys.argv[1]).__enter__):
            try:
                use()
            except ConfigError as error:
                print(error, flush=True)
        os._exit(0)
    os.wait()
    client.get_model()
    print("the parent goes on")
"""


@pytest.fixture(scope="module")
def mesh(make_model: Callable[[int], Model], start_mesh: StartMesh) -> Iterator[Mesh]:
    with start_mesh(make_model(4).path, 1, 0) as mesh:
        yield mesh


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("", "names no gateway"),
        (" , ", "names no gateway"),
        ("here:1, http://localhost:8000", "not a URL like http://local"),
        ("localhost", "host:port, .* not 'localhost'$"),
        ("a:1,localhost:99999", "a port from 1 to 65535 .* not 'localhost:99999'$"),
        ("localhost:0", "not 'localhost:0'$"),
        ("localhost:abc", "not 'localhost:abc'$"),
        ("localhost:", "not 'localhost:'$"),
        ("::1:50051", "IPv6 in brackets, not '::1:50051'$"),
        ("grpc://a:50051", "not 'grpc://a:50051'$"),
        (None, 'a text like "localhost:50051", not None'),
        (50051, 'a text like "localhost:50051", not 50051'),
    ],
)
@pytest.mark.parametrize("kind", [Client, SyncClient])
def test_target_that_is_none_is_refused_at_once(kind: Any, target: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        kind(target)


@pytest.mark.parametrize(
    "target",
    [
        "a_b.example.com:65535",
        "10.0.0.1:1",
        "[::1]:50051,[fe80::1%eth0]:2",
        "unix:/run/afd.sock",
        "dns:///a:1",
        "ipv6:[::1]:1",
    ],
)
def test_every_form_of_an_address_is_taken(target: str) -> None:
    assert SyncClient(target)._client._addresses == target.split(",")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"api_key": 5}, "^api_key must be a text$"),
        ({"api_key": "afd key"}, "no API key has"),
        ({"connect_timeout_s": "5"}, "connect_timeout_s must be a number of seconds, not '5'"),
        ({"connect_timeout_s": float("nan")}, "connect_timeout_s must be"),
        ({"tls": False, "ca": "ca.crt"}, "^tls=False has no use for ca: leave one of them out$"),
        ({"resume_timeout_s": -1}, "resume_timeout_s must be"),
    ],
)
def test_options_that_cannot_be_are_refused_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SyncClient("localhost:1", **options)


def test_ca_that_is_no_certificate_is_refused_at_once(tmp_path: Path) -> None:
    for name, content in (("text", "# Read me"), ("empty", ""), ("half", "-----BEGIN CERTIFICATE-----\nAAAA\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match=f"{name} has no certificate"), SyncClient("a:1", ca=tmp_path / name):
            pass
    for path, words in ((tmp_path / "nothing", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=words), SyncClient("a:1", ca=path):
            pass


def test_clients_that_find_nobody_leave_nothing_behind() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FINDING_NOBODY], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_forked_process_is_told_that_it_cannot_use_clients(mesh: Mesh) -> None:
    command = [sys.executable, "-c", FORKING, mesh.target]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.count("forked from one that has used a client") == 2, "a new one, and the one that was open"
    assert done.stdout.endswith("the parent goes on\n")


def test_threads_have_clients_of_their_own_or_one_together(mesh: Mesh) -> None:
    def ask(number: int) -> int:
        with SyncClient(mesh.target) if number % 2 else contextlib.nullcontext(shared) as client:
            return len(list(client.generate([1, 2], max_tokens=3, ignore_eos=True)))

    with SyncClient(mesh.target) as shared, ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(16))) == {3}


@pytest.mark.parametrize("form", ["{},", ",{}", " {} , ", "dns:///{}"])
async def test_target_with_empty_places_or_a_scheme_of_grpc_is_taken(mesh: Mesh, form: str) -> None:
    async with Client(form.format(mesh.target)) as client:
        assert len([token async for token in client.generate([1, 2], max_tokens=3, ignore_eos=True)]) == 3


async def test_client_that_is_not_open_says_how_to_open_it(mesh: Mesh, capfd: pytest.CaptureFixture[str]) -> None:
    client = Client(mesh.target)
    for _ in ("before", "after"):
        with pytest.raises(ConfigError, match="inside `async with Client"):
            client.generate([1, 2])
        with pytest.raises(ConfigError, match="inside `async with Client"):
            await client.get_model()
        async with client:
            await client.get_model()
    gc.collect()
    assert "Exception ignored" not in capfd.readouterr().err


async def test_stream_that_is_lost_behind_the_end_of_its_client_says_so(mesh: Mesh) -> None:
    class LostCall:
        async def read(self) -> None:
            raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, Metadata(), Metadata(), "the gateway is gone")

        def cancel(self) -> None:
            pass

    async with Client(mesh.target) as client:
        stream = client.generate([1, 2], max_tokens=3, ignore_eos=True)
        await anext(stream)
        stream._unread.clear()
    stream._call = LostCall()  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="inside `async with Client"):
        await anext(stream)


def test_sync_client_that_is_not_open_says_how_to_open_it(mesh: Mesh) -> None:
    client = SyncClient(mesh.target)
    for _ in ("before", "after"):
        with pytest.raises(ConfigError, match="`with SyncClient"):
            client.get_model()
        with client:
            assert len(list(client.generate([1, 2], max_tokens=3, ignore_eos=True))) == 3


async def test_half_a_surrogate_pair_is_refused(mesh: Mesh) -> None:
    async with Client(mesh.target) as client:
        with pytest.raises(InvalidRequest, match=r"^prompt has half of a surrogate pair"):
            client.generate("a\ud800")
        with pytest.raises(InvalidRequest, match=r"^messages\.0 has half of a surrogate pair"):
            client.chat([{"role": "user", "content": "a\ud800"}])


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (None, "messages must be a list, not NoneType"),
        ("hello", 'messages.0: must be like {"role": "user", "content": "..."}'),
        ([USER, None], 'messages.1: must be like {"role": "user", "content": "..."}'),
        ([{"role": "user"}], "messages.0.content is missing"),
        ([{"content": "x"}], "messages.0.role is missing"),
        ([{"role": 5, "content": "x"}], "messages.0.role: must be a text"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "messages.0.content: must be a text"),
        ([{**USER, "name": "Ann"}], "messages.0 has no field 'name', only role and content"),
    ],
)
async def test_what_is_no_message_is_refused_in_a_sentence(mesh: Mesh, messages: Any, words: str) -> None:
    async with Client(mesh.target) as client:
        with pytest.raises(InvalidRequest) as caught:
            client.chat(messages)
    assert (str(caught.value), caught.value.param) == (words, "messages")


async def test_what_the_gateway_refuses_names_the_field_at_fault(mesh: Mesh) -> None:
    async with Client(mesh.target) as client:
        for stream, param, words in (
            (client.generate([1, 2], temperature=-1), "temperature", "temperature must be from 0 to 100"),
            (client.generate([1, 2], logit_bias={3: 1000}), "logit_bias", "logit_bias of token 3 must be"),
            (client.generate([]), "prompt", "the prompt is empty"),
            (client.generate([1], request_id="two words"), "request_id", "request_id must be"),
        ):
            with pytest.raises(InvalidRequest, match=words) as caught:
                await anext(stream)
            assert caught.value.param == param
        with pytest.raises(InvalidRequest, match=r"^request_id must be a text, not 5$"):
            await client.cancel(5)  # type: ignore[arg-type]
