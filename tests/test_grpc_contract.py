"""The gRPC contract: health and reflection on every service, and the gateway's calls with their statuses."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from afd import Client, SyncClient
from afd.bench import counters
from afd.errors import Cancelled, InvalidRequest
from afd.mesh import Mesh
from afd.v1 import (
    attention_pb2,
    attention_pb2_grpc,
    ffn_pb2,
    ffn_pb2_grpc,
    gateway_pb2,
    gateway_pb2_grpc,
    sampling_pb2,
)
from tests.conftest import Model, StartMesh, wait_for_zero


@pytest.fixture(scope="module")
def model(make_model: Callable[[int], Model]) -> Model:
    return make_model(6)


@pytest.fixture(scope="module")
def mesh(model: Model, start_mesh: StartMesh) -> Iterator[Mesh]:
    with start_mesh(model.path, 1, 1) as mesh:
        yield mesh


def addresses(mesh: Mesh) -> dict[str, str]:
    return {service.role: service.replica.address for service in mesh.services if service.replica}


@pytest.mark.parametrize("role", ["gateway", "attention", "ffn"])
def test_every_service_has_health_and_reflection(mesh: Mesh, role: str) -> None:
    name = f"afd.v1.{role.capitalize()}Service"
    with grpc.insecure_channel(addresses(mesh)[role]) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        for service in ("", name):
            assert check(health_pb2.HealthCheckRequest(service=service), timeout=5).status == 1
        assert name in ProtoReflectionDescriptorDatabase(channel).get_services()


def test_loads_are_told(mesh: Mesh) -> None:
    with grpc.insecure_channel(addresses(mesh)["attention"]) as channel:
        load = attention_pb2_grpc.AttentionServiceStub(channel).GetLoad(attention_pb2.GetLoadRequest(), timeout=5)
        assert (load.num_running, load.num_kv_blocks_used, load.num_frames_in_flight) == (0, 0, 0)
        assert load.num_kv_blocks > 0
    with grpc.insecure_channel(addresses(mesh)["ffn"]) as channel:
        ffn = ffn_pb2_grpc.FfnServiceStub(channel).GetFfnLoad(ffn_pb2.GetFfnLoadRequest(), timeout=5)
        assert (ffn.num_streams, ffn.num_frames_queued) == (1, 0)


def generate_request(**sampling: Any) -> gateway_pb2.GenerateRequest:
    return gateway_pb2.GenerateRequest(
        token_ids=gateway_pb2.TokenIds(ids=[5, 6]), sampling=sampling_pb2.SamplingParams(**sampling)
    )


@pytest.mark.parametrize(
    ("request_message", "words"),
    [
        (gateway_pb2.GenerateRequest(), "no prompt"),
        (gateway_pb2.GenerateRequest(text=""), "empty"),
        (gateway_pb2.GenerateRequest(token_ids=gateway_pb2.TokenIds()), "empty"),
        (gateway_pb2.GenerateRequest(token_ids=gateway_pb2.TokenIds(ids=[2**32 - 1])), "outside the vocabulary"),
        (gateway_pb2.GenerateRequest(token_ids=gateway_pb2.TokenIds(ids=[5] * 5000)), "context"),
        (gateway_pb2.GenerateRequest(text="x" * (9 << 20)), "larger than"),
        (gateway_pb2.GenerateRequest(chat=gateway_pb2.Chat()), "no messages"),
        (gateway_pb2.GenerateRequest(text="x", request_id="y" * 500), "request_id"),
        (generate_request(temperature=float("nan")), "temperature"),
        (generate_request(temperature=-1), "temperature"),
        (generate_request(top_p=float("inf")), "top_p"),
        (generate_request(top_k=0), "top_k"),
        (generate_request(max_tokens=0), "max_tokens"),
        (generate_request(max_tokens=4_000_000_000), "max_tokens"),
        (generate_request(min_tokens=4_000_000_000), "min_tokens"),
        (generate_request(n=1000), "n must be"),
        (generate_request(top_logprobs=500), "top_logprobs"),
        (generate_request(logit_bias={10**6: 1.0}), "logit_bias"),
        (generate_request(logit_bias={3: float("nan")}), "logit_bias"),
        (generate_request(stop=[""]), "stop"),
        (generate_request(stop_token_ids=[10**6]), "stop_token_ids"),
        (generate_request(stop_token_ids=[1] * 2000), "at most 1024"),
        (generate_request(logit_bias=dict.fromkeys(range(2000), 1.0)), "at most 1024"),
    ],
)
def test_bad_request_is_invalid_argument_with_a_sentence(mesh: Mesh, request_message: Any, words: str) -> None:
    with grpc.insecure_channel(mesh.gateway.address) as channel:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(request_message, timeout=10))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert words in caught.value.details()


@pytest.mark.parametrize(
    "request_message",
    [
        attention_pb2.DecodeRequest(),
        attention_pb2.DecodeRequest(token_ids=[10**6]),
        attention_pb2.DecodeRequest(token_ids=[5], num_generated=1),
        attention_pb2.DecodeRequest(token_ids=[5] * 5000),
        attention_pb2.DecodeRequest(token_ids=[5], sampling=sampling_pb2.SamplingParams(temperature=-1)),
    ],
)
def test_attention_does_not_trust_the_gateway(mesh: Mesh, request_message: Any) -> None:
    with grpc.insecure_channel(addresses(mesh)["attention"]) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            list(attention_pb2_grpc.AttentionServiceStub(channel).Decode(request_message, timeout=10))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_bytes_that_are_no_message_do_not_harm_the_service(mesh: Mesh) -> None:
    with grpc.insecure_channel(mesh.gateway.address) as channel:
        call = channel.unary_stream("/afd.v1.GatewayService/Generate")
        with pytest.raises(grpc.RpcError) as caught:
            list(call(b"\xff\xff\xff\xff", timeout=5))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        responses = list(stub.Generate(generate_request(max_tokens=3, ignore_eos=True), timeout=10))
        assert sum(len(response.tokens) for response in responses) == 3


def headers_of_a_call(path: bytes) -> bytes:
    """The first bytes of a client that speaks HTTP/2, up to a call's headers."""
    fields = (b":path", path), (b":authority", b"x"), (b"content-type", b"application/grpc"), (b"te", b"trailers")
    literals = b"".join(b"\x00%c%b%c%b" % (len(name), name, len(value), value) for name, value in fields)
    block = b"\x83\x86" + literals  # POST, http
    frame = len(block).to_bytes(3, "big") + b"\x01\x05\x00\x00\x00\x01" + block  # HEADERS, and the end of the stream
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5) + frame


@pytest.mark.parametrize("role", ["gateway", "attention", "ffn"])
def test_a_path_that_is_no_text_ends_no_server(mesh: Mesh, role: str) -> None:
    host, _, port = addresses(mesh)[role].rpartition(":")
    with SyncClient(mesh.gateway.address) as client:
        tokens = client.generate([5, 6], max_tokens=300, ignore_eos=True)
        next(tokens)
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(headers_of_a_call(b"/afd.v1.GatewayService/\xff"))
            answer = b""
            while b"grpc-status" not in answer:
                part = connection.recv(4096)
                assert part, "the call is answered"
                answer += part
        assert len(list(tokens)) == 299, "who is connected notices nothing"
    with grpc.insecure_channel(addresses(mesh)[role]) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        assert check(health_pb2.HealthCheckRequest(), timeout=5).status == 1, "others can connect"


def test_method_that_does_not_exist_is_unimplemented(mesh: Mesh) -> None:
    with grpc.insecure_channel(mesh.gateway.address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/afd.v1.GatewayService/Degenerate")(b"", timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def hello_of(mesh: Mesh) -> ffn_pb2.Hello:
    """What an attention replica that fits would say to the FFN."""
    with grpc.insecure_channel(addresses(mesh)["ffn"]) as channel:
        topology = ffn_pb2_grpc.FfnServiceStub(channel).GetTopology(ffn_pb2.GetTopologyRequest(), timeout=5).topology
    dtype = topology.dtype
    return ffn_pb2.Hello(topology=topology, frame_dtype=dtype, output_dtype=dtype, num_slots=2, max_tokens=8)


def connect_with(mesh: Mesh, *messages: bytes) -> list[ffn_pb2.ConnectResponse]:
    """All that the FFN answers to a stream of these messages, which stays open until it has answered as many."""
    answered = threading.Semaphore(0)

    def requests() -> Iterator[bytes]:
        for message in messages:
            yield message
            answered.acquire(timeout=5)

    answers = []
    with grpc.insecure_channel(addresses(mesh)["ffn"]) as channel:
        for answer in channel.stream_stream("/afd.v1.FfnService/Connect")(requests(), timeout=10):
            answers.append(ffn_pb2.ConnectResponse.FromString(answer))
            answered.release()
    return answers


def test_bytes_that_are_no_message_do_not_end_a_pair(mesh: Mesh) -> None:
    hello = ffn_pb2.ConnectRequest(hello=hello_of(mesh)).SerializeToString()
    frame = ffn_pb2.ConnectRequest(frame=ffn_pb2.Frame(frame_id=7)).SerializeToString()
    welcome, undecodable, refused = connect_with(mesh, hello, b"\xff\xff\xff\xff", frame)
    assert welcome.HasField("welcome")
    assert "no message" in undecodable.frame_error.message
    assert refused.frame_error.frame_id == 7, "the stream goes on"


def test_bytes_that_are_no_message_are_no_hello(mesh: Mesh) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        connect_with(mesh, b"\xff\xff\xff\xff")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_dtype_that_does_not_exist_is_a_mismatch(mesh: Mesh) -> None:
    hello = hello_of(mesh)
    hello.topology.dtype = 99  # type: ignore[assignment]
    with pytest.raises(grpc.RpcError) as caught:
        connect_with(mesh, ffn_pb2.ConnectRequest(hello=hello).SerializeToString())
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "the dtype differs: attention has dtype 99, the FFN has float32" in caught.value.details()


def test_request_is_cancelled_by_its_id(mesh: Mesh) -> None:
    async def run() -> None:
        async with Client(mesh.gateway.address) as client:
            assert not await client.cancel("nobody")
            stream = client.generate([5, 6], request_id="mine", max_tokens=900, ignore_eos=True)
            await anext(stream)
            assert stream.request_id == "mine"
            with pytest.raises(InvalidRequest, match="already running"):
                await anext(client.generate([5], request_id="mine"))
            assert await client.cancel("mine")
            with pytest.raises(Cancelled):
                async for _ in stream:
                    pass

    asyncio.run(run())


def test_tokens_that_are_there_at_once_share_a_message_of_bounded_size(mesh: Mesh) -> None:
    request = generate_request(max_tokens=600, ignore_eos=True)
    request.request_id = "grouped"
    with grpc.insecure_channel(mesh.gateway.address) as channel:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        live = list(stub.Generate(request, timeout=30))
        replayed = list(stub.Resume(gateway_pb2.ResumeRequest(request_id="grouped", next_index=[10]), timeout=30))
    assert [response.HasField("started") for response in live[:2]] == [True, False]
    assert len(live) < 600
    assert [len(response.tokens) for response in replayed] == [0, 256, 256, 78]
    tokens = [token for response in live for token in response.tokens]
    assert [token.index for token in tokens] == list(range(600))
    assert [token for response in replayed for token in response.tokens] == tokens[10:]


def test_model_is_described(mesh: Mesh, model: Model) -> None:
    with SyncClient(mesh.gateway.address) as client:
        described = client.get_model()
    assert (described.name, described.vocab_size) == (model.path.name, model.vocab_size)
    assert described.max_context_tokens == model.oracle.config.max_context_tokens


async def test_one_stop_string_is_one(mesh: Mesh) -> None:
    async with Client(mesh.gateway.address) as client:
        for stop in ("abc", ["abc"]):
            stream = client.generate("x", stop=stop)
            assert stream._request.sampling.stop == ["abc"]  # type: ignore[union-attr]
            await stream.aclose()


def test_sdk_refuses_what_is_no_prompt_or_parameter(mesh: Mesh) -> None:
    with SyncClient(mesh.gateway.address) as client:
        bad: list[tuple[Any, dict[str, Any], str]] = [
            ([-1], {}, "prompt"),
            (["x"], {}, "prompt"),
            (None, {}, "prompt must be a text or token ids, not NoneType"),
            (b"x", {}, "prompt must be a text or token ids, not bytes"),
            ("x", {"n": 0}, "^n must be a whole number from 1 to 128, not 0$"),
            ("x", {"max_tokens": "many"}, "^max_tokens must be a whole number from 1 to 2147483648, not 'many'$"),
            ("x", {"top_k": -2}, "^top_k must be a whole number from 1 on, or -1 for all tokens, not -2$"),
            ("x", {"n": -1}, "^n must be a whole number from 1 to 128, not -1$"),
            (
                "x",
                {"seed": 1 << 64},
                "^seed must be a whole number from 0 to 18446744073709551615, not 18446744073709551616$",
            ),
            ("x", {"min_tokens": -1}, "^min_tokens must be a whole number from 0 to max_tokens, not -1$"),
            ("x", {"stop": [None]}, r"^stop must be a text or a list of texts, not \[None\]$"),
            ("x", {"logit_bias": [5]}, r"^logit_bias must be a mapping of token ids to numbers, not \[5\]$"),
            ("x", {"top_p": 1.1}, "^top_p must be from .* to 1, not 1.1$"),
            ("x", {"temprature": 1}, "no such parameter: temprature"),
            (
                "x",
                {"priority": 1 << 31},
                "^priority must be a whole number from -2147483648 to 2147483647, not 2147483648$",
            ),
            ("x", {"request_id": 5}, "^request_id must be a text, not 5$"),
            ("x", {"timeout_s": "5"}, "^timeout_s must be a number of seconds from 0 to 86400, not '5'$"),
            ("x", {"timeout_s": 1e300}, "timeout_s must be a number of seconds from 0 to 86400"),
            ("x", {"timeout_s": float("nan")}, "timeout_s must be a number of seconds from 0 to 86400"),
            ("x", {"timeout_s": -1}, "timeout_s must be a number of seconds from 0 to 86400"),
        ]
        for prompt, options, words in bad:
            with pytest.raises(InvalidRequest, match=words):
                list(client.generate(prompt, **options))
        for next_index, options, words in (
            (-1, {}, "^next_index must be a whole number from 0 on, or a list of them, not -1$"),
            ("y", {}, "^next_index must be a whole number from 0 on, or a list of them, not 'y'$"),
            (
                0,
                {"priority": 1 << 31},
                "^priority must be a whole number from -2147483648 to 2147483647, not 2147483648$",
            ),
            (0, {"timeout_s": 1e300}, "timeout_s must be a number of seconds from 0 to 86400"),
            (0, {"top_p": 1}, "no such parameter: top_p"),
        ):
            with pytest.raises(InvalidRequest, match=words):
                list(client.resume("x", next_index, **options))  # type: ignore[arg-type]
        for request_id in (None, 5):
            for use in (client.resume, client.cancel):
                with pytest.raises(InvalidRequest, match=f"^request_id must be a text, not {request_id}$"):
                    use(request_id)  # type: ignore[operator]


def test_sdk_takes_top_k_that_is_off_as_the_http_api_does(mesh: Mesh) -> None:
    with SyncClient(mesh.gateway.address) as client:
        ids = [
            [token.id for token in client.generate([5, 6], max_tokens=4, temperature=2.0, seed=1, top_k=top_k)]
            for top_k in (-1, 0, None)
        ]
    assert ids[0] == ids[1] == ids[2]


def test_choices_come_each_with_its_own_end(mesh: Mesh) -> None:
    with SyncClient(mesh.gateway.address) as client:
        options = {"n": 3, "max_tokens": 5, "temperature": 2.0, "seed": 1, "ignore_eos": True}
        tokens = list(client.generate([5, 6], **options))  # type: ignore[arg-type]
    for choice in range(3):
        own = [token for token in tokens if token.choice == choice]
        assert [token.index for token in own] == [0, 1, 2, 3, 4]
        assert own[-1].finish_reason == "length"


def assert_ended_early(mesh: Mesh, generated_before: float) -> None:
    """Asserts that a request for 900 tokens, whose client has left, is no longer decoded."""
    assert wait_for_zero(mesh, ("afd_sequences_running",)) == {"afd_sequences_running": 0}
    assert counters(mesh)["afd_generated_tokens"] - generated_before < 900


def test_stream_that_outlives_its_sync_client_does_not_hang(mesh: Mesh) -> None:
    before = counters(mesh)["afd_generated_tokens"]
    with SyncClient(mesh.gateway.address) as client:
        tokens = client.generate([5, 6], max_tokens=900, ignore_eos=True)
        next(tokens)
    tokens.close()  # type: ignore[attr-defined]
    assert_ended_early(mesh, before)


def test_sync_client_that_leaves_the_loop_cancels(mesh: Mesh) -> None:
    before = counters(mesh)["afd_generated_tokens"]
    with SyncClient(mesh.gateway.address) as client:
        for token in client.generate([5, 6], max_tokens=900, ignore_eos=True):
            if token.index == 3:
                break
        assert_ended_early(mesh, before)
