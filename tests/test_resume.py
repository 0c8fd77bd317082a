"""A client that loses its gateway, or its connection, gets every token all the same, and each of them once."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import grpc
import grpc.aio
import psutil
import pytest
from grpc.aio import Metadata
from starlette.types import Message

from afd import Client, SyncClient, Token
from afd.client import Stream
from afd.errors import AfdError, Cancelled, InvalidRequest, Mismatch, NotFound, Overloaded, PeerUnavailable, StaleEpoch
from afd.mesh import Mesh, Service
from afd.state.connection import connect
from afd.state.embedded import EmbeddedRedis
from afd.state.requests import RequestRecord, RequestStore, SequenceKey
from afd.urgency import NOT_URGENT
from afd.v1 import gateway_pb2 as pb
from afd.v1.sampling_pb2 import SamplingParams
from services.gateway import generation, openai_api
from services.gateway.transcript import Transcript
from tests.conftest import Model, StartMesh

PROMPT = [5, 6, 7]
NUM_TOKENS = 120


@pytest.fixture(scope="module")
def model(make_model: Callable[[int], Model]) -> Model:
    return make_model(4)


@pytest.fixture(scope="module")
def mesh(model: Model, start_mesh: StartMesh) -> Iterator[Mesh]:
    with start_mesh(model.path, 1, 1, lease_s=1) as mesh:
        yield mesh


@contextlib.contextmanager
def second_gateway(mesh: Mesh) -> Iterator[str]:
    """Its gRPC address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {**mesh.services[-1].settings, "grpc_port": port, "http_port": 0}
    gateway = Service("gateway", 1, settings, mesh.fork_server)
    gateway.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        assert gateway.process is not None
        gateway.process.kill()
        gateway.process.wait()


async def tokens_of(
    client: Client, at_token: dict[int, Callable[[], Any]] | None = None, **options: Any
) -> list[Token]:
    tokens = []
    async for token in client.generate(PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True, **options):
        tokens.append(token)
        if at_token and token.index in at_token:
            at_token[token.index]()
    return tokens


def check(model: Model, tokens: list[Token]) -> None:
    assert [token.index for token in tokens] == list(range(NUM_TOKENS))
    model.check_greedy(PROMPT, [token.id for token in tokens], [token.logprob for token in tokens])


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_stream_goes_on_when_its_gateway_is_back(model: Model, start_mesh: StartMesh, number: signal.Signals) -> None:
    with start_mesh(model.path, 1, 1, lease_s=1, drain_timeout_s=0.05) as mesh:

        def lose() -> None:
            process = mesh.services[-1].process
            assert process is not None
            process.send_signal(number)
            process.wait()
            mesh.watch()

        async def run() -> list[Token]:
            async with Client(mesh.gateway.address) as client:
                return await tokens_of(client, {30: lose})

        check(model, asyncio.run(run()))


def test_stream_goes_on_through_another_gateway(model: Model, start_mesh: StartMesh) -> None:
    with start_mesh(model.path, 1, 1, lease_s=1) as mesh, second_gateway(mesh) as other:

        async def run() -> list[Token]:
            async with Client(other) as warm:  # it is up
                assert (await warm.get_model()).max_context_tokens > 0
            async with Client(f"{mesh.gateway.address},{other}") as client:
                client._current = 0
                process = mesh.services[-1].process
                assert process is not None
                return await tokens_of(client, {30: process.kill})

        check(model, asyncio.run(run()))


async def test_request_that_was_left_is_resumed_from_any_index(model: Model, mesh: Mesh) -> None:
    async with Client(mesh.gateway.address) as client:
        stream = client.generate(PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True, request_id="left")
        first = [await anext(stream) for _ in range(10)]
        await stream.aclose()
        rest = [token async for token in client.resume("left", 10)]
        check(model, first + rest)
        again = [token async for token in client.resume("left", 100)]
        assert again == rest[90:]
        assert [token async for token in client.resume("left")] == first + rest
        assert [token async for token in client.resume("left", NUM_TOKENS)] == []


async def test_of_several_who_resume_at_once_one_gets_it_and_nobody_is_told_that_it_runs(
    model: Model, mesh: Mesh
) -> None:
    async def resumed() -> list[Token] | Mismatch:
        try:
            return [token async for token in client.resume("wanted", 10)]
        except Mismatch as error:
            return error

    async with Client(mesh.gateway.address) as client:
        stream = client.generate(PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True, request_id="wanted")
        first = [await anext(stream) for _ in range(10)]
        await stream.aclose()
        whole = [rest for rest in await asyncio.gather(*(resumed() for _ in range(6))) if isinstance(rest, list)]
        assert whole
        for rest in whole:
            check(model, first + rest)


async def test_who_resumes_a_request_gets_it_also_where_the_gateway_before_has_just_moved_it() -> None:
    key, record = SequenceKey("r1"), RequestRecord(prompt_ids=(5,), sampling=b"", owner="")
    nothing = cast(Transcript, SimpleNamespace(tokens=[]))
    with EmbeddedRedis() as embedded:
        async with connect(embedded.url) as redis:
            store = RequestStore(redis, 60)
            await store.create(key, record)
            before = generation._Ownership(store, key, record, is_new=True)
            after = generation._Ownership(store, key, record, is_new=False)
            assert [await before.claim("attention-1", nothing) for _ in range(2)] == [[], []]
            assert await after.claim("attention-2", nothing) == []
            assert (before.record.epoch, after.record.epoch) == (2, 3)
            with pytest.raises(StaleEpoch, match="epoch 2 is over, its owner's is 3"):
                await before.claim("attention-1", nothing)


async def test_a_request_is_cancelled_through_any_gateway(mesh: Mesh) -> None:
    with second_gateway(mesh) as other:
        async with Client(mesh.gateway.address) as client, Client(other) as elsewhere:
            stream = client.generate(PROMPT, max_tokens=900, ignore_eos=True, n=2, request_id="unwanted")
            seen = [await anext(stream) for _ in range(10)]
            assert await elsewhere.cancel("unwanted")
            with pytest.raises(Cancelled, match="request unwanted was cancelled"):
                seen += [token async for token in stream]
            assert len(seen) < 1800
            for through in (client, elsewhere):
                assert not await through.cancel("unwanted"), "it is over"
                with pytest.raises(Cancelled):
                    await anext(through.resume("unwanted"))
            assert not await elsewhere.cancel("never begun")


async def test_a_request_is_not_gone_on_with_by_another_model() -> None:
    key, record = SequenceKey("r1"), RequestRecord((5,), SamplingParams().SerializeToString(), "", "config-weights")
    balancer = SimpleNamespace(fingerprint="config-others")
    with EmbeddedRedis() as embedded:
        async with connect(embedded.url) as redis:
            store = RequestStore(redis, 60)
            await store.create(key, record)
            generator = generation.Generator(cast(Any, None), cast(Any, None), cast(Any, balancer), store, 60, 60, 10)
            with pytest.raises(NotFound, match="request r1 began with another model"):
                await generator.reopen("r1", [0], NOT_URGENT)
            balancer.fingerprint = record.fingerprint
            assert (await generator.reopen("r1", [0], NOT_URGENT)).prompt_ids == [5]
            balancer.fingerprint = ""
            assert (await generator.reopen("r1", [0], NOT_URGENT)).prompt_ids == [5], "nobody is there just now"
            await store.create(key, replace(record, fingerprint=""))
            balancer.fingerprint = "config-weights"
            assert (await generator.reopen("r1", [0], NOT_URGENT)).prompt_ids == [5], "nobody was there when it began"


async def test_sampled_choices_and_their_alternatives_are_the_same_after_a_resumption(mesh: Mesh) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seed": 7, "n": 2, "top_logprobs": 2}
    async with Client(mesh.gateway.address) as client:
        whole = {(token.choice, token.index): token for token in await tokens_of(client, **options)}
        stream = client.generate(PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True, request_id="two", **options)
        first = [await anext(stream) for _ in range(30)]
        await stream.aclose()
        seen = {(token.choice, token.index): token for token in first}
        next_index = [1 + max((i for c, i in seen if c == choice), default=-1) for choice in (0, 1)]
        seen |= {(token.choice, token.index): token async for token in client.resume("two", next_index)}
    assert seen.keys() == whole.keys()
    for place, token in whole.items():
        assert (seen[place].id, seen[place].text) == (token.id, token.text)
        assert [i for i, _ in seen[place].top_logprobs] == [i for i, _ in token.top_logprobs]


async def test_stream_that_is_resumed_elsewhere_ends(mesh: Mesh) -> None:
    async with Client(mesh.gateway.address) as client:
        stream = client.generate(PROMPT, max_tokens=900, ignore_eos=True, request_id="moved")
        await anext(stream)
        resumed = client.resume("moved")
        await anext(resumed)
        with pytest.raises(Mismatch, match=r"was resumed .*in another stream"):
            async for _ in stream:
                pass
        await resumed.aclose()


class Call:
    """Messages of a gateway, and how the call ends."""

    def __init__(self, messages: list[Any], end: grpc.StatusCode | None = None) -> None:
        self.messages = messages
        self.end = end

    async def read(self) -> Any:
        if self.messages:
            return self.messages.pop(0)
        if self.end is None:
            return grpc.aio.EOF
        raise grpc.aio.AioRpcError(self.end, Metadata(), Metadata(("retry-after", "0.1")), "why")

    def cancel(self) -> None:
        pass


async def test_stream_that_was_lost_asks_again_where_there_was_no_room_for_its_resumption(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def tokens(*indices: int) -> Any:
        return pb.GenerateResponse(tokens=[pb.GeneratedToken(index=index) for index in indices])

    client, asked = Client("here:1,there:1"), []
    calls = [
        Call([pb.GenerateResponse(started=pb.Started()), tokens(0, 1)], grpc.StatusCode.UNAVAILABLE),
        Call([], grpc.StatusCode.RESOURCE_EXHAUSTED),
        Call([tokens(2)]),
    ]

    def ask(request: Any, urgency: Any) -> Call:
        asked.append(request)
        return calls[len(asked) - 1]

    monkeypatch.setattr(client, "_ask", ask)
    assert [token.index async for token in client.generate(PROMPT)] == [0, 1, 2]
    assert [list(request.next_index) for request in asked[1:]] == [[2], [2]]
    asked.clear()
    calls[0] = Call([], grpc.StatusCode.RESOURCE_EXHAUSTED)
    with pytest.raises(Overloaded):
        await anext(client.generate(PROMPT))


async def test_request_that_a_gateway_does_not_take_is_asked_of_each_other_one_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client, asked = Client("here:1,there:1,elsewhere:1"), []
    refusals = {0: grpc.StatusCode.UNAVAILABLE, 1: grpc.StatusCode.UNAVAILABLE}

    def ask(request: Any, urgency: Any) -> Call:
        asked.append(client._current)
        if client._current in refusals:
            return Call([], refusals[client._current])
        return Call([pb.GenerateResponse(started=pb.Started(), tokens=[pb.GeneratedToken(index=0)])])

    monkeypatch.setattr(client, "_ask", ask)
    two = client.generate(PROMPT), client.generate(PROMPT)
    assert [[token.index async for token in stream] for stream in two] == [[0], [0]]
    assert asked == [0, 0, 1, 2, 2], "the second stream goes where the first has ended up"
    refusals[2] = grpc.StatusCode.UNAVAILABLE
    with pytest.raises(PeerUnavailable):
        await anext(client.generate(PROMPT))
    assert asked[5:] == [2, 0, 1]
    refusals[client._current] = grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(Overloaded):
        await anext(client.generate(PROMPT))
    assert len(asked) == 9, "another gateway has no more room than this one"


async def test_stream_that_was_closed_has_nothing_more(mesh: Mesh) -> None:
    async with Client(mesh.gateway.address) as client:
        stream = client.generate(PROMPT, max_tokens=900, ignore_eos=True)
        await anext(stream)
        waiting = asyncio.create_task(anext(stream, None))
        await asyncio.sleep(0)
        await stream.aclose()
        while await waiting is not None:
            waiting = asyncio.create_task(anext(stream, None))
        assert await anext(stream, None) is None


async def test_stream_that_nobody_reads_does_not_hold_up_a_resumption(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_SUPERSEDE_TIMEOUT_S", 0.05)
    with pytest.raises(PeerUnavailable, match="request stuck has another stream, whose client does not read it"):
        await asyncio.wait_for(generation._until_ended(generation._Running(), "stuck"), 5)


async def test_what_cannot_be_resumed_is_a_sentence(mesh: Mesh) -> None:
    async def error_of(request_id: str, next_index: Any = 0) -> AfdError:
        with pytest.raises(AfdError) as raised:
            await anext(client.resume(request_id, next_index))
        return raised.value

    async with Client(mesh.gateway.address) as client:
        assert isinstance(await error_of("never-begun"), NotFound)
        stream = client.generate(PROMPT, max_tokens=900, ignore_eos=True, request_id="cancelled")
        await anext(stream)
        assert await client.cancel("cancelled")
        with pytest.raises(Cancelled):
            async for _ in stream:
                pass
        assert isinstance(await error_of("cancelled"), Cancelled)
        assert [token async for token in client.generate(PROMPT, max_tokens=1, request_id="one")]
        assert isinstance(await error_of("one", [0, 0]), InvalidRequest)


async def test_index_behind_the_end_is_refused_and_the_end_is_not(mesh: Mesh) -> None:
    async with Client(mesh.target) as client:
        request_id = (await tokens_of_request(client)).request_id
        assert [token async for token in client.resume(request_id, NUM_TOKENS)] == []
        with pytest.raises(InvalidRequest, match=f"the answer has {NUM_TOKENS} tokens, none with index 999"):
            await anext(client.resume(request_id, 999))


async def tokens_of_request(client: Client) -> Stream:
    """A request that has ended."""
    stream = client.generate(PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True)
    async for _ in stream:
        pass
    return stream


def test_sync_client_resumes_too(mesh: Mesh) -> None:
    with SyncClient(mesh.gateway.address) as client:
        whole = list(client.generate(PROMPT, max_tokens=9, ignore_eos=True, request_id="sync"))
        assert list(client.resume("sync", 4)) == whole[4:]


def post(mesh: Mesh, body: dict[str, Any], last_event_id: str = "") -> Iterator[tuple[str, str]]:
    """The events of a stream: id and data."""
    headers = {"Content-Type": "application/json"} | ({"Last-Event-ID": last_event_id} if last_event_id else {})
    request = urllib.request.Request(
        f"{mesh.http_url}/v1/completions", json.dumps({"stream": True, **body}).encode(), headers
    )
    name = ""
    with urllib.request.urlopen(request, timeout=30) as answer:
        for line in answer:
            field, _, value = line.decode().strip().partition(": ")
            if field == "id":
                name = value
            elif field == "data":
                yield name, value


@pytest.mark.parametrize("prompt", [PROMPT, [PROMPT, [9, 8]]])
def test_last_event_id_resumes_a_stream_of_events(mesh: Mesh, model: Model, prompt: Any) -> None:
    body = {"model": model.path.name, "prompt": prompt, "max_tokens": 40, "n": 2, "temperature": 1, "seed": 3,
            "ignore_eos": True, "return_token_ids": True, "stream_options": {"include_usage": True}}  # fmt: skip

    def parts(events: list[tuple[str, str]]) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for _, data in events:
            for choice in json.loads(data)["choices"] if data != "[DONE]" else ():
                found.setdefault(choice["index"], []).extend(choice["token_ids"])
        return found

    whole = list(post(mesh, body))
    stream = post(mesh, body)
    first = [next(stream) for _ in range(25)]
    stream.close()
    rest = list(post(mesh, body, first[-1][0]))
    seen, after = parts(first), parts(rest)
    assert {index: ids + after[index] for index, ids in seen.items()} == parts(whole)
    assert json.loads(rest[-2][1])["usage"] == json.loads(whole[-2][1])["usage"]


def test_last_event_id_with_another_body_is_refused_and_disturbs_nobody(mesh: Mesh, model: Model) -> None:
    body = {"model": model.path.name, "prompt": PROMPT, "max_tokens": 200, "temperature": 0.3, "ignore_eos": True}
    stream = post(mesh, body)
    first = [next(stream) for _ in range(5)]
    for other in ({"prompt": [9, 8]}, {"max_tokens": 5}, {"n": 2}, {"temperature": 0.4}, {"seed": 1}, {"stop": ["x"]}):
        with pytest.raises(urllib.error.HTTPError) as raised:
            list(post(mesh, body | other, first[-1][0]))
        assert raised.value.code == 400
        assert "another prompt or other parameters" in raised.value.read().decode()
    assert len(first + list(stream)) == 201
    assert len(list(post(mesh, {**body, "max_tokens": None}, first[-1][0]))) == 196, "what is not said may be anything"


def test_whole_answer_whose_request_is_resumed_elsewhere_is_a_conflict(mesh: Mesh, model: Model) -> None:
    """The other client did it: no fault of the gateway's."""
    body = {"model": model.path.name, "prompt": PROMPT, "max_tokens": 900, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool, SyncClient(mesh.gateway.address) as client:
        whole = pool.submit(list, post(mesh, {**body, "request_id": "wanted-twice", "stream": False}))
        for _ in range(100):
            with contextlib.suppress(NotFound):
                resumed = client.resume("wanted-twice")
                next(resumed)
                break
            time.sleep(0.02)
        with pytest.raises(urllib.error.HTTPError) as raised:
            whole.result(30)
    assert raised.value.code == 409


def test_last_event_id_behind_the_end_is_refused(mesh: Mesh, model: Model) -> None:
    body = {"model": model.path.name, "prompt": PROMPT, "max_tokens": 9, "ignore_eos": True}
    name = list(post(mesh, body))[-1][0].partition("/")[0]
    assert [data for _, data in post(mesh, body, f"{name}/9")] == ["[DONE]"]
    with pytest.raises(urllib.error.HTTPError) as raised:
        list(post(mesh, body, f"{name}/10"))
    assert raised.value.code == 400
    assert "the answer has 9 tokens, none with index 10" in raised.value.read().decode()


@pytest.mark.parametrize("header", ["nonsense", "x/1.", "x/1.y", "never-begun/3", "x/" + "9" * 30])
def test_wrong_last_event_id_is_a_clients_error(mesh: Mesh, model: Model, header: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as raised:
        list(post(mesh, {"model": model.path.name, "prompt": PROMPT}, header))
    assert raised.value.code in (400, 404)


def test_frozen_gateway_that_wakes_up_shows_nothing_more(model: Model, start_mesh: StartMesh) -> None:
    with start_mesh(model.path, 1, 1, lease_s=1) as mesh, second_gateway(mesh) as other:
        frozen = mesh.services[-1].process
        assert frozen is not None

        async def run() -> None:
            async with Client(mesh.gateway.address, resume_timeout_s=0) as client, Client(other) as second:
                stream = client.generate(PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True, request_id="frozen")
                first = [await anext(stream) for _ in range(10)]
                frozen.send_signal(signal.SIGSTOP)
                rest = [token async for token in second.resume("frozen", 10)]
                check(model, first + rest)
                frozen.send_signal(signal.SIGCONT)
                shown = list(first)
                with contextlib.suppress(AfdError):
                    async for token in stream:
                        shown.append(token)
                assert shown == (first + rest)[: len(shown)]

        started = time.monotonic()
        asyncio.run(run())
        assert time.monotonic() - started < 60


async def test_client_that_is_closed_leaves_no_connection_whatever_became_of_its_streams(mesh: Mesh) -> None:
    port = int(mesh.gateway.address.rpartition(":")[2])

    def connections() -> int:
        found = psutil.Process().net_connections("tcp")
        return sum(bool(one.raddr) and one.raddr.port == port for one in found)

    gc.collect()
    gc.disable()  # nothing waits for it
    try:
        before = connections()
        async with Client(mesh.gateway.address) as client:
            left = client.generate(PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True)
            await anext(left)
            await left.aclose()
            with pytest.raises(InvalidRequest):
                await anext(client.generate(PROMPT, temperature=-1.0))
            assert connections() > before
        del left
        async with asyncio.timeout(10):
            while connections() != before:
                await asyncio.sleep(0.05)
    finally:
        gc.enable()


async def test_stream_of_events_says_that_somebody_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    async def events() -> AsyncIterator[str]:
        yield "data: 1\n\n"
        await asyncio.sleep(0.3)
        yield "data: 2\n\n"

    bodies: list[bytes] = []

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            bodies.append(message["body"])

    monkeypatch.setattr(openai_api, "_KEEP_ALIVE_S", 0.05)
    await openai_api._EventStream(events()).stream_response(send)
    assert (bodies[0], *bodies[-2:]) == (b"data: 1\n\n", b"data: 2\n\n", b"")
    assert set(bodies[1:-2]) == {b": still here\n"}


async def test_stream_of_events_has_no_comments_while_there_are_events(monkeypatch: pytest.MonkeyPatch) -> None:
    async def events() -> AsyncIterator[str]:
        for _ in range(20):
            await asyncio.sleep(0.01)
            yield "data: 1\n\n"

    bodies: list[bytes] = []

    async def send(message: Message) -> None:
        bodies.append(message.get("body", b""))

    monkeypatch.setattr(openai_api, "_KEEP_ALIVE_S", 0.1)
    await openai_api._EventStream(events()).stream_response(send)
    assert bodies == [b"", *[b"data: 1\n\n"] * 20, b""]


def test_stream_of_events_that_outlasts_the_drain_ends_with_an_event(
    model: Model, start_mesh: StartMesh, capfd: pytest.CaptureFixture[str]
) -> None:
    body = {"model": model.path.name, "prompt": PROMPT, "max_tokens": 900, "temperature": 0, "ignore_eos": True}
    with start_mesh(model.path, 1, 1, drain_timeout_s=0.05) as mesh:
        stream = post(mesh, body)
        next(stream)
        process = mesh.services[-1].process
        assert process is not None
        process.send_signal(signal.SIGTERM)
        *_, (_, last) = stream
        assert json.loads(last)["error"]["code"] == "unavailable"
    assert "Traceback" not in capfd.readouterr().err


async def test_call_without_an_answer_when_the_gateway_stops_is_sent_to_another_one() -> None:
    sent: list[dict[str, Any]] = []

    async def waiting(*_: object) -> None:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    serving = asyncio.create_task(openai_api._Farewell(waiting)({"type": "http"}, waiting, send))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    serving.cancel()
    await serving
    assert sent[0]["status"] == 503
    assert json.loads(sent[1]["body"])["error"]["code"] == "unavailable"
