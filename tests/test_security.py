"""Who gets in: TLS and roles between services, TLS for clients, bounds for those who send too much or too slowly."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from afd import Client, SyncClient, tls
from afd.access import Access
from afd.certs import Authority, make_certificates
from afd.cli import main
from afd.config import AttentionSettings, FFNSettings, GatewaySettings, ServiceSettings, refuse_plain_text
from afd.errors import ConfigError, PeerUnavailable
from afd.mesh import Mesh
from afd.rpc import MAX_MESSAGE_BYTES, PeerChannel, serving
from afd.state.connection import connect
from afd.v1 import attention_pb2, attention_pb2_grpc, ffn_pb2, ffn_pb2_grpc, gateway_pb2, gateway_pb2_grpc
from tests.conftest import Model, StartMesh, embedded_redis

Code = grpc.StatusCode
PASSWORD = "never-to-be-seen"


@pytest.mark.parametrize("kind", [AttentionSettings, FFNSettings, GatewaySettings])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "gateway-1"])
def test_plain_text_is_for_loopback_unless_it_is_meant(kind: type[ServiceSettings], host: str) -> None:
    def settings(**values: Any) -> ServiceSettings:
        return kind(**{"model": "m", "redis": "redis://r", "host": host, **values})

    name = "public_tls" if kind is GatewaySettings else "tls"
    with pytest.raises(ConfigError, match=f"AFD_{name.upper()}.*AFD_INSECURE=1"):
        refuse_plain_text(settings())
    for allowed in (
        {name: "/certs"},
        {"insecure": True},
        *({"host": own} for own in ("127.0.0.1", "::1", "localhost")),
    ):
        refuse_plain_text(settings(**allowed))


def test_a_service_that_others_could_reach_in_plain_text_does_not_start() -> None:
    environment = {**os.environ, "AFD_MODEL": "m", "AFD_REDIS": f"redis://afd:{PASSWORD}@r", "AFD_HOST": "0.0.0.0"}
    done = subprocess.run(
        [sys.executable, "-m", "services.gateway"],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("afd gateway: AFD_HOST=0.0.0.0 can be reached from other machines, so AFD_PUBLIC_TLS")
    assert done.stderr.count("\n") == 1
    assert PASSWORD not in done.stderr


@dataclass(frozen=True)
class Secured:
    """A mesh with TLS everywhere, and a Redis that wants a user and a password."""

    mesh: Mesh
    certs: Path
    model: Model

    def address(self, role: str) -> str:
        return next(str(s.replica.address) for s in self.mesh.services if s.role == role and s.replica)

    @contextlib.contextmanager
    def channel(self, callee: str, certificate: Path | None) -> Iterator[grpc.Channel]:
        """To a service, with a folder's certificate or in plain text."""
        address = self.address(callee)
        if certificate is None:
            channel = grpc.insecure_channel(address)
        else:
            credentials = tls.peer_credentials(tls.Certificate(certificate, mutual=True).pem())
            channel = grpc.secure_channel(
                address, credentials, options=[tls.pinned(callee), ("grpc.use_local_subchannel_pool", 1)]
            )
        with channel:
            yield channel


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    make_certificates(folder)
    return folder


@contextlib.contextmanager
def redis_with_password() -> Iterator[str]:
    """URL of a Redis whose only user may touch nothing but what is ours, and do nothing dangerous."""

    async def restrict(url: str) -> None:
        async with connect(url) as redis:
            rules = ("on", f">{PASSWORD}", "~afd:*", "resetchannels", "&afd:*", "+@all", "-@dangerous")
            await redis.execute_command("ACL", "SETUSER", "afd", *rules)
            await redis.execute_command("ACL", "SETUSER", "default", "off")

    with embedded_redis() as url:
        asyncio.run(restrict(url))
        yield url.replace("unix://", f"unix://afd:{PASSWORD}@")


@pytest.fixture(scope="module")
def secured(make_model: Callable[[int], Model], start_mesh: StartMesh, certs: Path) -> Iterator[Secured]:
    model = make_model(6)
    with redis_with_password() as redis, start_mesh(model.path, 1, 2, tls=certs, redis=redis) as mesh:
        yield Secured(mesh, certs, model)


def ask(secured: Secured, ca: Path, number: int = 8) -> None:
    """One request, held against the oracle."""
    prompt = secured.model.prompt(20, number)
    with SyncClient(secured.mesh.gateway.address, ca=ca) as client:
        tokens = list(client.generate(prompt, max_tokens=number, ignore_eos=True))
    secured.model.check_greedy(prompt, [token.id for token in tokens], [token.logprob for token in tokens])


def test_a_mesh_with_tls_yields_the_oracles_tokens(secured: Secured) -> None:
    ask(secured, secured.certs / "ca.crt", number=12)


def https(url: str, ca: Path) -> Any:
    return json.load(urllib.request.urlopen(url, timeout=10, context=ssl.create_default_context(cafile=ca)))


def test_http_is_https(secured: Secured) -> None:
    url = secured.mesh.http_url
    assert url.startswith("https://")
    assert https(f"{url}/v1/models", secured.certs / "ca.crt")["data"]
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        urllib.request.urlopen(f"{url}/v1/models", timeout=10)
    with pytest.raises(OSError, match=r"reset|closed|disconnected"):
        urllib.request.urlopen(url.replace("https", "http"), timeout=10)


def decode(channel: grpc.Channel) -> None:
    list(attention_pb2_grpc.AttentionServiceStub(channel).Decode(attention_pb2.DecodeRequest(), timeout=5))


def load(channel: grpc.Channel) -> None:
    attention_pb2_grpc.AttentionServiceStub(channel).GetLoad(attention_pb2.GetLoadRequest(), timeout=5)


def pair(channel: grpc.Channel) -> None:
    list(ffn_pb2_grpc.FfnServiceStub(channel).Connect(iter([ffn_pb2.ConnectRequest()]), timeout=5))


def topology(channel: grpc.Channel) -> None:
    ffn_pb2_grpc.FfnServiceStub(channel).GetTopology(ffn_pb2.GetTopologyRequest(), timeout=5)


CALLS = {"attention": (decode, load), "ffn": (pair, topology)}
ALLOWED = {("gateway", "attention"), ("attention", "ffn")}


@pytest.mark.parametrize("caller", ["gateway", "attention", "ffn"])
@pytest.mark.parametrize("callee", ["attention", "ffn"])
def test_a_service_serves_the_role_before_it_and_no_other(secured: Secured, caller: str, callee: str) -> None:
    with secured.channel(callee, secured.certs / caller) as channel:
        for call in CALLS[callee]:
            status: Any = None
            try:
                call(channel)
            except grpc.RpcError as error:
                status = error
            if (caller, callee) in ALLOWED:
                assert status is None or status.code() is not Code.PERMISSION_DENIED
            else:
                assert status.code() is Code.PERMISSION_DENIED
                assert f"certificate is for {caller}.afd" in status.details()
        check = health_pb2_grpc.HealthStub(channel).Check
        assert check(health_pb2.HealthCheckRequest(), timeout=5).status == 1


def folder_of(kind: str, certs: Path, tmp_path: Path) -> Path | None:
    """The certificate of somebody who says that it is the role before the one called."""
    if kind == "plain text":
        return None
    if kind == "wrong CA":
        make_certificates(tmp_path)
        own = tmp_path / "gateway"
        (own / "ca.crt").write_bytes((certs / "ca.crt").read_bytes())  # it trusts the mesh, not the other way round
        return own
    if kind == "what the gateway shows its clients":
        return certs / "public"
    Authority.of(certs).issue(tmp_path, ["gateway.afd", "attention.afd"], days=-1 / 1440)  # it ended a minute ago
    return tmp_path


@pytest.mark.parametrize("kind", ["plain text", "wrong CA", "what the gateway shows its clients", "expired"])
@pytest.mark.parametrize("callee", ["attention", "ffn"])
def test_nobody_gets_in_without_a_valid_certificate(secured: Secured, tmp_path: Path, callee: str, kind: str) -> None:
    with secured.channel(callee, folder_of(kind, secured.certs, tmp_path)) as channel:
        for call in (*CALLS[callee], lambda c: health_pb2_grpc.HealthStub(c).Check(health_pb2.HealthCheckRequest())):
            with pytest.raises(grpc.RpcError) as caught:
                call(channel)
            assert caught.value.code() is Code.UNAVAILABLE


def test_a_caller_talks_to_nobody_but_the_role_it_wants(secured: Secured) -> None:
    credentials = tls.peer_credentials(tls.Certificate(secured.certs / "gateway", mutual=True).pem())
    with grpc.secure_channel(secured.address("ffn"), credentials, options=[tls.pinned("attention")]) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            load(channel)
        assert caught.value.code() is Code.UNAVAILABLE


@pytest.mark.parametrize("options", [{}, {"tls": True}, {"ca": "other"}])
def test_the_sdk_says_why_it_does_not_get_through(secured: Secured, tmp_path: Path, options: dict[str, Any]) -> None:
    if "ca" in options:
        make_certificates(tmp_path)
        options = {"ca": tmp_path / "ca.crt"}
    words = "CERTIFICATE_VERIFY_FAILED" if options else "if it wants TLS, give tls=True or ca"
    client = SyncClient(secured.mesh.gateway.address, connect_timeout_s=0.5, **options)
    with pytest.raises(PeerUnavailable, match=words), client:
        pass


def test_the_command_line_speaks_tls(
    secured: Secured, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ca = str(secured.certs / "ca.crt")
    main_of("generate", "a", "--target", secured.mesh.gateway.address, "--ca", ca, "--max-tokens", "3")
    monkeypatch.setenv("AFD_CA", ca)
    main_of("generate", "a", "--target", secured.mesh.gateway.address, "--max-tokens", "3")
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    doctor = ["doctor", secured.address("ffn"), "--tokens", "8", "--tls"]
    try:
        main_of(*doctor, str(secured.certs / "attention"))
        with pytest.raises(SystemExit, match=r"only attention\.afd may call this"):
            main_of(*doctor, str(secured.certs / "gateway"))
    finally:
        tls.assume(None)


def main_of(*arguments: str) -> None:
    """Runs `afd`; ends with SystemExit if that fails."""
    try:
        main(arguments)
    except SystemExit as end:
        if end.code:
            raise


def test_nobody_sees_the_password_in_the_process_list(secured: Secured) -> None:
    children = [psutil.Process(service.process.pid) for service in secured.mesh.services if service.process]
    assert len(children) == 4
    assert not any(PASSWORD in " ".join(child.cmdline()) for child in children)
    assert PASSWORD not in json.dumps(secured.mesh.ready_file())


def test_a_wrong_redis_password_is_not_repeated(secured: Secured) -> None:
    async def run() -> None:
        async with connect(secured.mesh.redis_url.replace(PASSWORD, "another-secret")):
            pass

    with pytest.raises(ConfigError) as caught:
        asyncio.run(run())
    assert "another-secret" not in str(caught.value)


def test_certificates_are_replaced_under_a_running_mesh(secured: Secured, tmp_path: Path) -> None:
    """All of them, by another CA: what runs goes on, and what begins has the new ones."""
    old_ca = tmp_path / "old.crt"
    old_ca.write_bytes((secured.certs / "ca.crt").read_bytes())
    address = secured.mesh.gateway.address

    async def run() -> None:
        async with Client(address, ca=old_ca) as before:
            stream = before.generate([5, 6], max_tokens=900, ignore_eos=True)
            await anext(stream)
            for path in ("ca.key", "ca.crt"):
                (secured.certs / path).unlink()
            make_certificates(secured.certs)
            async with Client(address, ca=secured.certs / "ca.crt") as after:
                prompt = secured.model.prompt(9, 1)
                tokens = [token async for token in after.generate(prompt, max_tokens=5, ignore_eos=True)]
                secured.model.check_greedy(prompt, [token.id for token in tokens], [token.logprob for token in tokens])
            for _ in range(20):
                await anext(stream)
            await stream.aclose()

    asyncio.run(run())
    assert https(f"{secured.mesh.http_url}/v1/models", secured.certs / "ca.crt")["data"]
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        https(f"{secured.mesh.http_url}/v1/models", old_ca)
    with secured.channel("attention", secured.certs / "gateway") as channel:
        load(channel)


def test_services_that_come_back_find_one_another_by_the_new_certificates(secured: Secured) -> None:
    for service in (secured.mesh.services[0], secured.mesh.services[2]):  # an FFN shard and the attention replica
        assert service.process is not None
        service.process.kill()
        service.process.wait()
    secured.mesh.watch()
    deadline = time.monotonic() + 30
    while True:
        try:
            ask(secured, secured.certs / "ca.crt", number=9)
            break
        except PeerUnavailable:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_certificates_of_another_ca_are_not_overwritten(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    (tmp_path / "ca.key").unlink()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.crt")}
    with pytest.raises(ConfigError, match=r"has a ca\.crt, but not the ca\.key behind it: give another folder"):
        make_certificates(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.crt")} == before


async def test_two_cas_are_good_at_once_while_one_follows_the_other(tmp_path: Path) -> None:
    for name in ("old", "new"):
        make_certificates(tmp_path / name)
    both = b"".join((tmp_path / name / "ca.crt").read_bytes() for name in ("old", "new"))
    (tmp_path / "old" / "attention" / "ca.crt").write_bytes(both)
    tls.assume(tmp_path / "old" / "attention")
    try:
        async with serving(lambda server: None, (), "127.0.0.1", 0, Access.for_peers("gateway")) as port:
            for name in ("old", "new"):
                (tmp_path / name / "gateway" / "ca.crt").write_bytes(both)
                tls.assume(tmp_path / name / "gateway")
                channel = PeerChannel(f"127.0.0.1:{port}", "attention")
                check = channel.stub(health_pb2_grpc.HealthStub).Check
                assert (await check(health_pb2.HealthCheckRequest(), timeout=5)).status == 1
                await channel.close()
    finally:
        tls.assume(None)


def test_a_half_replaced_certificate_is_left_until_it_is_whole(certs: Path, tmp_path: Path) -> None:
    authority = Authority.of(certs)
    for name in ("old", "new"):
        authority.issue(tmp_path / name, ["ffn.afd"], days=1)
    certificate = tls.Certificate(tmp_path / "old", mutual=True)
    pem, context = certificate.pem(), certificate.server_context()
    for name, expected in (("tls.key", pem), ("tls.crt", None)):
        (tmp_path / "new" / name).replace(tmp_path / "old" / name)
        assert (certificate.pem() is expected) == (expected is not None)
    assert certificate.server_context() is not context


@pytest.mark.parametrize("missing", ["tls.crt", "tls.key", "ca.crt"])
def test_a_folder_without_a_certificate_is_refused_by_name(certs: Path, tmp_path: Path, missing: str) -> None:
    Authority.of(certs).issue(tmp_path, ["ffn.afd"], days=1)
    (tmp_path / missing).unlink()
    with pytest.raises(ConfigError, match=missing):
        tls.Certificate(tmp_path, mutual=True)


def test_keys_are_their_owners_alone_and_renewal_keeps_the_ca(tmp_path: Path) -> None:
    main_of("certs", str(tmp_path), "--host", "gateway.example.com")
    ca, old = (tmp_path / "ca.crt").read_bytes(), (tmp_path / "ffn" / "tls.crt").read_bytes()
    main_of("certs", str(tmp_path))
    assert (tmp_path / "ca.crt").read_bytes() == ca
    assert (tmp_path / "ffn" / "tls.crt").read_bytes() != old
    keys = list(tmp_path.rglob("*.key"))
    assert len(keys) == 5
    assert {path.stat().st_mode & 0o077 for path in keys} == {0}


@dataclass(frozen=True)
class Bounded:
    """A gateway with small limits."""

    mesh: Mesh

    def http(self, request: bytes, *, drip_s: float = 0.0) -> str:
        """What comes back for raw bytes, sent at once, or one by one."""
        host, _, port = str(self.mesh.gateway.http_address).rpartition(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            for part in [request] if not drip_s else [request[i : i + 1] for i in range(len(request))]:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    connection.sendall(part)
                time.sleep(drip_s)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while part := connection.recv(1 << 16):
                    answer += part
        return answer.decode()


@pytest.fixture(scope="module")
def bounded(make_model: Callable[[int], Model], start_mesh: StartMesh) -> Iterator[Bounded]:
    limits = {"max_header_bytes": 8192, "max_body_bytes": 1 << 16, "read_timeout_s": 0.7}
    with start_mesh(make_model(6).path, 1, 0, **limits) as mesh:
        yield Bounded(mesh)


@pytest.mark.parametrize(
    "header", [b"x: " + b"y" * 10_000, b"\r\n".join(b"x%d: y" % i for i in range(2000)), b"x" * 10_000]
)
def test_headers_that_are_too_large_are_refused(bounded: Bounded, header: bytes) -> None:
    answer = bounded.http(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + header + b"\r\n\r\n")
    assert answer.startswith("HTTP/1.1 431 ") or (b":" not in header and answer.startswith("HTTP/1.1 400 "))
    assert "HTTP/1.1 200" not in answer


def test_a_header_without_end_is_not_read_for_ever(bounded: Bounded) -> None:
    answer = bounded.http(b"GET / HTTP/1.1\r\nHost: x\r\nx: " + b"y" * 1_000_000)
    assert answer.startswith("HTTP/1.1 431 ")
    assert "8192 bytes" in answer


@pytest.mark.parametrize(
    "beginning",
    [
        b"",
        b"GET / HT",
        b"GET / HTTP/1.1\r\nHost: x\r\nx-",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{",
    ],
)
def test_a_request_that_does_not_go_on_is_given_up(bounded: Bounded, beginning: bytes) -> None:
    start = time.monotonic()
    assert bounded.http(beginning).startswith("HTTP/1.1 408 ")
    assert time.monotonic() - start < 5


def test_a_request_that_drips_is_given_up(bounded: Bounded) -> None:
    answer = bounded.http(b"GET / HTTP/1.1\r\nHost: x\r\nx: " + b"y" * 40, drip_s=0.02)
    assert "did not arrive within 0.7 s" in answer


def test_a_client_that_waits_between_its_requests_is_not_a_slow_one(bounded: Bounded) -> None:
    connection = http.client.HTTPConnection(str(bounded.mesh.gateway.http_address), timeout=10)
    connection.connect()
    own_port = connection.sock.getsockname()[1]
    for pause_s in (0.9, 0):
        connection.request("GET", "/v1/models")
        answer = connection.getresponse()
        assert (answer.status, bool(answer.read())) == (200, True)
        time.sleep(pause_s)
    assert connection.sock.getsockname()[1] == own_port, "it is the same connection"


@pytest.fixture
def channel(bounded: Bounded) -> Iterator[grpc.Channel]:
    options = [("grpc.max_send_message_length", MAX_MESSAGE_BYTES)]
    with grpc.insecure_channel(bounded.mesh.gateway.address, options=options) as channel:
        yield channel


@pytest.mark.parametrize(
    ("num_bytes", "code"),
    [(100_000, Code.INVALID_ARGUMENT), (1_000_000, Code.RESOURCE_EXHAUSTED), (100_000_000, Code.RESOURCE_EXHAUSTED)],
)
def test_a_grpc_request_that_is_too_large_is_refused(channel: grpc.Channel, num_bytes: int, code: Code) -> None:
    stub = gateway_pb2_grpc.GatewayServiceStub(channel)
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(gateway_pb2.GenerateRequest(text="x" * num_bytes), timeout=10))
    assert caught.value.code() is code
    assert "larger" in caught.value.details()


def test_grpc_metadata_that_is_too_large_is_refused(channel: grpc.Channel) -> None:
    stub = gateway_pb2_grpc.GatewayServiceStub(channel)
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetModel(gateway_pb2.GetModelRequest(), metadata=(("x", "y" * 10_000),), timeout=10)
    assert caught.value.code() is Code.RESOURCE_EXHAUSTED
    stub.GetModel(gateway_pb2.GetModelRequest(), metadata=(("x", "y" * 5_000),), timeout=10)


@pytest.mark.parametrize("method", ["GetModel", "Cancel", "Generate"])
def test_a_grpc_call_whose_request_does_not_come_is_given_up(channel: grpc.Channel, method: str) -> None:
    never = threading.Event()

    def requests() -> Iterator[bytes]:
        never.wait(20)
        yield b""

    try:
        with pytest.raises(grpc.RpcError) as caught:
            list(channel.stream_stream(f"/afd.v1.GatewayService/{method}")(requests(), timeout=10))
        assert caught.value.code() is Code.DEADLINE_EXCEEDED
        assert "did not arrive within 0.7 s" in caught.value.details()
    finally:
        never.set()


def test_secrets_are_not_logged(
    make_model: Callable[[int], Model], start_mesh: StartMesh, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = f"afd-{'0' * 12}-{'5ecc' * 16}"
    with redis_with_password() as redis, start_mesh(
        make_model(6).path, 1, 0, redis=redis, require_api_key=True, log_level="debug"
    ) as mesh:  # fmt: skip
        for key in (wrong, wrong[:-9], "sk-5ecc"):
            with (
                SyncClient(mesh.gateway.address, api_key=key) as client,
                pytest.raises(Exception, match="API key") as e,
            ):
                client.get_model()
            assert "5ecc" not in str(e.value)
    seen = capfd.readouterr()
    assert "gateway" in seen.err
    assert PASSWORD not in seen.err + seen.out
    assert "5ecc" not in seen.err + seen.out
