"""What the SDK refuses by itself, and what it takes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import grpc
import grpc.aio
import pytest
from grpc.aio import Metadata

from afd import Client, SyncClient
from afd.errors import ConfigError, InvalidRequest
from afd.mesh import Mesh
from tests.conftest import Model, StartMesh


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
    ],
)
async def test_target_that_is_none_is_refused_at_once(target: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        async with Client(target):
            pass


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
        with pytest.raises(InvalidRequest, match="surrogates not allowed"):
            client.generate("a\ud800")
        with pytest.raises(InvalidRequest, match="surrogates not allowed"):
            client.chat([{"role": "user", "content": "a\ud800"}])
