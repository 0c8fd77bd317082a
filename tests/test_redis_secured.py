"""A Redis whose user may only do what the mesh needs, and one with TLS."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from afd import Client
from afd.errors import ConfigError
from afd.state.connection import connect
from afd.state.registry import Registry, Replica
from afd.state.requests import JournaledToken, JournalEntry, RequestRecord, RequestStore, SequenceKey
from tests.conftest import Model, StartMesh
from tests.redis_servers import Server, cluster_servers, one_server, running
from tests.test_cli import afd

DOCS = Path(__file__).resolve().parents[1] / "docs" / "redis.md"
REPLICA = Replica("ffn", "ffn-1", "127.0.0.1:1", "fingerprint", pid=1, shard=(0, 1))
RECORD = RequestRecord(prompt_ids=(5,), sampling=b"", owner="attention-1")


async def use_everything(url: str, ca: Path | None = None) -> None:
    """Registry and request store, with all that they do."""
    key = SequenceKey("r1")
    async with connect(url, ca) as redis, asyncio.timeout(20):
        registry, store = Registry(redis, lease_s=0.5), RequestStore(redis, 60)
        assert await store.is_reachable()
        async with contextlib.aclosing(registry.watch("ffn")) as changes:
            assert await anext(changes) == []
            async with registry.registered(lambda: REPLICA):
                assert await anext(changes) == [REPLICA]
                assert await registry.replicas("ffn") == [REPLICA]
            assert await anext(changes) == []
        await registry._renew(REPLICA)
        while await registry.replicas("ffn"):
            await asyncio.sleep(0.05)
        await store.create(key, RECORD)
        assert await store.append([JournalEntry(key, 1, 0, JournaledToken(7, -0.5))]) == [None]
        await store.finish(key, 1, "finished")
        assert not await store.cancel(key), "it is over"
        assert await store.record(key) == replace(RECORD, status="finished")
        assert await store.journal(key) == [JournaledToken(7, -0.5)]


def acl_rules() -> list[str]:
    """The user of docs/redis.md, as ACL SETUSER takes it."""
    (line,) = re.findall(r"^user (afd .*)$", DOCS.read_text(), re.MULTILINE)
    return str(line).split()


def url_of_user(server: Server, scheme: str = "redis") -> str:
    return f"{scheme}://afd:PASSWORD@127.0.0.1:{server.port}"


async def test_the_documented_user_may_do_all_that_the_mesh_does(tmp_path: Path) -> None:
    with one_server(tmp_path) as server:
        server.ask("ACL", "SETUSER", *acl_rules())
        server.ask("ACL", "SETUSER", "default", "off")
        await use_everything(url_of_user(server))


async def test_the_documented_user_may_do_all_that_the_mesh_does_in_a_cluster(tmp_path: Path) -> None:
    with cluster_servers(tmp_path) as servers:
        for server in servers:
            server.ask("ACL", "SETUSER", *acl_rules())
            server.ask("ACL", "SETUSER", "default", "off")
        await use_everything(url_of_user(servers[1], "redis+cluster"))


@pytest.mark.parametrize("command", [("FLUSHALL",), ("GET", "other:key"), ("KEYS", "*"), ("CONFIG", "GET", "*")])
async def test_the_documented_user_may_do_nothing_else(tmp_path: Path, command: tuple[str, ...]) -> None:
    with one_server(tmp_path) as server:
        server.ask("ACL", "SETUSER", *acl_rules())
        async with connect(url_of_user(server)) as redis:
            with pytest.raises(Exception, match=r"no permissions|No permissions"):
                await redis.execute_command(*command)


def composed_redis(password: str = "PASSWORD") -> list[str]:
    """The arguments that compose.yaml gives its Redis, but for the folder."""
    command = yaml.safe_load((DOCS.parents[1] / "compose.yaml").read_text())["services"]["redis"]["command"]
    given = {"${REDIS_PASSWORD:-afd}": password, "${REDIS_MAXMEMORY:-1gb}": "1gb"}
    _, _, folder, *arguments = (re.sub(r"\$\{.*\}", lambda match: given[match[0]], word) for word in command)
    assert folder == "/data"
    return arguments


def test_the_compose_file_has_the_documented_users() -> None:
    arguments = " ".join(composed_redis())
    for line in re.findall(r"^user (.*)$", DOCS.read_text(), re.MULTILINE):
        assert f"--user {line.replace('resetkeys ', '')}" in arguments


async def test_a_composed_password_may_have_any_characters_that_need_no_escape_in_a_url(tmp_path: Path) -> None:
    password = 'it\'s "a" long @:/#&<> one\\'
    url = yaml.safe_load((DOCS.parents[1] / "compose.yaml").read_text())["x-environment"]["AFD_REDIS"]
    user = {"username": "afd", "password": password}
    server = Server(tmp_path / "redis", tuple(composed_redis(password)), credentials=user)
    with running(server):
        url = url.replace("${REDIS_PASSWORD:-afd}", password).replace("redis:6379", f"127.0.0.1:{server.port}")
        async with connect(url) as redis:
            assert await redis.ping()


async def test_the_composed_redis_has_after_a_kill_what_it_had(tmp_path: Path) -> None:
    key = SequenceKey("r1")
    user = {"username": "afd", "password": "PASSWORD"}
    server = Server(tmp_path / "redis", tuple(composed_redis()), credentials=user)
    with running(server):
        async with connect(url_of_user(server)) as redis:
            store = RequestStore(redis, 60)
            await store.create(key, RECORD)
            assert await store.append([JournalEntry(key, 1, 0, JournaledToken(7, -0.5))]) == [None]
        server.kill()
        server.start()
        async with connect(url_of_user(server)) as redis:
            assert await RequestStore(redis, 60).journal(key) == [JournaledToken(7, -0.5)]


async def test_a_wrong_password_is_one_sentence(tmp_path: Path) -> None:
    with one_server(tmp_path) as server:
        server.ask("ACL", "SETUSER", *acl_rules())
        with pytest.raises(ConfigError, match=r"no Redis answers at .*(invalid username-password|WRONGPASS)") as caught:
            async with connect(url_of_user(server).replace("PASSWORD", "secret")):
                pass
        assert "secret" not in str(caught.value)
        server.ask("CONFIG", "SET", "requirepass", "secret")
        with pytest.raises(ConfigError, match=r"the Redis at redis://127.0.0.1:\d+ wants a password: redis://"):
            async with connect(f"redis://127.0.0.1:{server.port}"):
                pass


# --- TLS ---


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.crt, and a certificate of it for 127.0.0.1: server.crt, server.key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make certificates with")
    path = tmp_path_factory.mktemp("certificates")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *key, "-keyout", path / "ca.key", "-out", path / "ca.crt", "-subj", "/CN=ca", "-days", "1")
    openssl("req", *key, "-keyout", path / "server.key", "-out", path / "server.csr", "-subj", "/CN=redis")
    (path / "names").write_text("subjectAltName=IP:127.0.0.1")
    openssl(
        "x509", "-req", "-in", path / "server.csr", "-CA", path / "ca.crt", "-CAkey", path / "ca.key",
        "-CAcreateserial", "-out", path / "server.crt", "-days", "1", "-extfile", path / "names",
    )  # fmt: skip
    return path


class TlsServer(Server):
    """Its port wants TLS; another one is for the tests."""

    @property
    def url(self) -> str:
        return f"rediss://127.0.0.1:{self.tls_port}"

    @property
    def tls_port(self) -> int:
        return int(self.arguments[self.arguments.index("--tls-port") + 1])


@pytest.fixture
def tls_server(certificates: Path, tmp_path: Path) -> Iterator[TlsServer]:
    options = {
        "--tls-port": str(Server(tmp_path).port),
        "--tls-cert-file": str(certificates / "server.crt"),
        "--tls-key-file": str(certificates / "server.key"),
        "--tls-ca-cert-file": str(certificates / "ca.crt"),
        "--tls-auth-clients": "no",
    }
    server = TlsServer(tmp_path / "tls", tuple(part for option in options.items() for part in option))
    if server.refuses_to_start():
        pytest.skip("this redis-server has no TLS")
    try:
        server.start()
        yield server
    finally:
        server.kill()


async def test_a_server_with_tls_is_known_by_its_authority(tls_server: TlsServer, certificates: Path) -> None:
    await use_everything(tls_server.url, certificates / "ca.crt")


async def test_a_server_with_a_certificate_that_is_not_known_is_refused(tls_server: TlsServer) -> None:
    with pytest.raises(ConfigError, match="certificate verify failed"):
        async with connect(tls_server.url):
            pass


async def test_certificates_that_are_not_there_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"there are no certificates in {tmp_path}/ca.crt"):
        async with connect("rediss://127.0.0.1:1", tmp_path / "ca.crt"):
            pass


def test_a_mesh_runs_on_a_redis_with_tls(
    make_model: Callable[[int], Model], start_mesh: StartMesh, tls_server: TlsServer, certificates: Path
) -> None:
    async def generate(address: str) -> list[int]:
        async with Client(address) as client:
            return [token.id async for token in client.generate([5, 6, 7], max_tokens=5, ignore_eos=True)]

    settings = {"redis": tls_server.url, "redis_ca": certificates / "ca.crt"}
    with start_mesh(make_model(4).path, 1, 0, **settings) as mesh:
        assert len(asyncio.run(generate(mesh.gateway.address))) == 5


@pytest.mark.parametrize(
    ("command", "status", "told"),
    [
        (("keys", "create", "alice"), 0, ""),
        (("keys", "list"), 0, ""),
        (("layout",), 1, "there is no mesh default"),
    ],
)
def test_commands_reach_a_redis_with_tls(
    tls_server: TlsServer, certificates: Path, command: tuple[str, ...], status: int, told: str
) -> None:
    assert "certificate verify failed" in afd(*command, AFD_REDIS=tls_server.url).stderr
    done = afd(*command, AFD_REDIS=tls_server.url, AFD_REDIS_CA=str(certificates / "ca.crt"))
    assert done.returncode == status, done.stderr
    assert told in done.stderr
