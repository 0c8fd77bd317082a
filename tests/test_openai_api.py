"""The OpenAI HTTP API, asked by the `openai` package and by curl, gives what the SDK gives."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httpx2
import openai
import pytest

from afd import Client, SyncClient, Token
from afd.bench import counters
from afd.mesh import Mesh
from services.gateway.openai_api import _events, make_app
from services.gateway.openai_format import Part
from tests.conftest import Model, StartMesh, wait_for_zero

CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@dataclass(frozen=True)
class Api:
    """A mesh, and the ways to ask it."""

    model: Model
    name: str
    grpc: str
    http: str
    client: openai.OpenAI
    mesh: Mesh

    def sdk(self, prompt: str | list[int], **options: Any) -> list[Token]:
        with SyncClient(self.grpc) as client:
            return list(client.generate(prompt, **options))

    def complete(self, prompt: Any, **options: Any) -> Any:
        return self.client.completions.create(model=self.name, prompt=prompt, **{"temperature": 0, **options})

    def chat(self, text: str, **options: Any) -> Any:
        messages: Any = [{"role": "user", "content": text}]
        return self.client.chat.completions.create(
            model=self.name, messages=messages, **{"temperature": 0, "max_tokens": 12, **options}
        )

    def curl(self, path: str, body: Any = None, *options: str) -> tuple[int, str]:
        """Status and body of what curl gets."""
        data = ["--data-binary", "@-", "-H", "Content-Type: application/json"] if body is not None else []
        command = ["curl", "-sS", "-m", "30", "-w", "\n%{http_code}", *options, *data, self.http + path]
        text = body if isinstance(body, str) else json.dumps(body)
        output = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
        answer, _, status = output.rpartition("\n")
        return int(status), answer


@pytest.fixture(scope="module")
def api(make_model: Callable[[int], Model], start_mesh: StartMesh) -> Iterator[Api]:
    model = make_model(8)
    (model.path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    with start_mesh(model.path, 1, 1) as mesh:
        http = mesh.ready_file()["http"]
        client = openai.OpenAI(base_url=http + "/v1", api_key="none", max_retries=0, timeout=30)
        yield Api(model, model.path.name, mesh.gateway.address, http, client, mesh)


def text_of(tokens: list[Token]) -> str:
    return "".join(token.text for token in tokens)


def test_openai_and_curl_and_sdk_get_the_same_tokens(api: Api) -> None:
    expected = api.sdk("Once upon", max_tokens=12)
    ids = [token.id for token in expected]
    api.model.check_greedy(
        api.complete("Once upon", max_tokens=1, extra_body={"return_token_ids": True}).choices[0].prompt_token_ids,
        ids,
        [token.logprob for token in expected],
    )
    whole = api.complete("Once upon", max_tokens=12, extra_body={"return_token_ids": True}).choices[0]
    assert (whole.token_ids, whole.text) == (ids, text_of(expected))
    streamed = list(api.complete("Once upon", max_tokens=12, stream=True, extra_body={"return_token_ids": True}))
    assert [i for chunk in streamed for i in chunk.choices[0].token_ids] == ids
    assert "".join(chunk.choices[0].text for chunk in streamed) == text_of(expected)
    body = {"model": api.name, "prompt": "Once upon", "temperature": 0, "max_tokens": 12, "return_token_ids": True}
    status, answer = api.curl("/v1/completions", body)
    assert status == 200
    assert json.loads(answer)["choices"][0]["token_ids"] == ids
    status, events = api.curl("/v1/completions", {**body, "stream": True}, "-N")
    lines = [line.removeprefix("data: ") for line in events.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    assert [i for line in lines[:-1] for i in json.loads(line)["choices"][0]["token_ids"]] == ids


def test_chat_is_the_completion_of_the_rendered_template(api: Api) -> None:
    expected = api.sdk("[user] Hello\n[assistant] ", max_tokens=12)
    assert api.chat("Hello").choices[0].message.content == text_of(expected)
    chunks = list(api.chat("Hello", stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text_of(expected)
    assert chunks[-1].choices[0].finish_reason == expected[-1].finish_reason
    parts = api.client.chat.completions.create(
        model=api.name,
        messages=[{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}],
        temperature=0,
        max_completion_tokens=12,
    )
    assert parts.choices[0].message.content == text_of(expected)

    async def over_grpc() -> list[Token]:
        async with Client(api.grpc) as client:
            return [token async for token in client.chat([{"role": "user", "content": "Hello"}], max_tokens=12)]

    assert text_of(asyncio.run(over_grpc())) == text_of(expected)


def test_every_form_of_a_prompt_is_taken(api: Api) -> None:
    first, second = ([token.id for token in api.sdk(text, max_tokens=5)] for text in ("ab", "xyz"))
    ids = [api.complete(text, max_tokens=1, extra_body={"return_token_ids": True}) for text in ("ab", "xyz")]
    prompts = [answer.choices[0].prompt_token_ids for answer in ids]
    for prompt, expected in [
        ("ab", [first]),
        (["ab", "xyz"], [first, second]),
        (prompts[0], [first]),
        (prompts, [first, second]),
    ]:
        answer = api.complete(prompt, max_tokens=5, extra_body={"return_token_ids": True})
        assert [choice.index for choice in answer.choices] == list(range(len(expected)))
        assert [choice.token_ids for choice in answer.choices] == expected


def test_usage_counts_prompt_and_output(api: Api) -> None:
    answer = api.complete("abcd", max_tokens=7, extra_body={"ignore_eos": True})
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 7, 11)
    chunks = list(
        api.complete(
            "abcd",
            max_tokens=7,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    )
    assert chunks[-1].usage.total_tokens == 11
    assert chunks[-1].choices == []


def test_logprobs_come_with_alternatives(api: Api) -> None:
    tokens = api.sdk("Once", max_tokens=4, top_logprobs=3)
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0] == (token.id, pytest.approx(token.logprob, abs=1e-5))
        assert [v for _, v in token.top_logprobs] == sorted((v for _, v in token.top_logprobs), reverse=True)
    logprobs = api.complete("Once", max_tokens=4, logprobs=3).choices[0].logprobs
    assert logprobs.token_logprobs == pytest.approx([token.logprob for token in tokens], abs=1e-5)
    chunks = list(api.complete("Once", max_tokens=4, logprobs=3, stream=True))
    assert [offset for chunk in chunks for offset in chunk.choices[0].logprobs.text_offset] == logprobs.text_offset
    content = api.chat("Hi", logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert all(len(entry.top_logprobs) == 2 for entry in content)


def test_sampling_with_a_seed_is_repeatable_and_choices_differ(api: Api) -> None:
    options = {"max_tokens": 12, "temperature": 1.5, "n": 3, "extra_body": {"ignore_eos": True}}
    first, again = (api.complete("Once", seed=7, **options) for _ in range(2))
    other = api.complete("Once", seed=8, **options)
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert texts != [choice.text for choice in other.choices]
    assert len(set(texts)) == 3
    alone = api.complete("Once", seed=7, **{**options, "n": 1})
    assert alone.choices[0].text == texts[0]


def test_openais_client_reads_a_stream_that_is_silent_for_a_while(api: Api) -> None:
    stream = api.client.completions.create(
        model=api.name, prompt=[5], max_tokens=200, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    process = next(service for service in api.mesh.services if service.role == "attention").process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    later = threading.Timer(2.6, process.send_signal, [signal.SIGCONT])
    later.start()
    assert len(list(stream)) == 199
    later.join()


def test_stop_string_ends_the_text_before_it(api: Api) -> None:
    text = text_of(api.sdk("Once upon", max_tokens=40, ignore_eos=True))
    stop = text[5:8]
    expected = text[: text.index(stop)]
    answer = api.complete("Once upon", max_tokens=40, stop=stop, extra_body={"ignore_eos": True}).choices[0]
    assert (answer.text, answer.finish_reason) == (expected, "stop")
    chunks = list(api.complete("Once upon", max_tokens=40, stop=[stop], stream=True, extra_body={"ignore_eos": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected


def test_stop_token_ends_the_answer_with_it(api: Api) -> None:
    ids = [token.id for token in api.sdk("Once upon", max_tokens=20, ignore_eos=True)]
    stop = ids[4]
    tokens = api.sdk("Once upon", max_tokens=20, ignore_eos=True, stop_token_ids=[stop])
    assert [token.id for token in tokens] == ids[: ids.index(stop) + 1]
    assert tokens[-1].finish_reason == "stop"


def test_echo_gives_the_prompt_back(api: Api) -> None:
    plain = api.complete("Once", max_tokens=3).choices[0].text
    assert api.complete("Once", max_tokens=3, echo=True).choices[0].text == "Once" + plain


def test_http_client_that_leaves_frees_everything(api: Api) -> None:
    stream = api.complete("Once", max_tokens=900, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    impatient = api.client.with_options(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        impatient.completions.create(
            model=api.name, prompt="Once", max_tokens=900, n=4, extra_body={"ignore_eos": True}
        )
    before = counters(api.mesh)["afd_generated_tokens"]
    names = ("afd_sequences_running", "afd_sequences_waiting", "afd_kv_blocks_used", "afd_ffn_queue_frames")
    assert wait_for_zero(api.mesh, names) == dict.fromkeys(names, 0)
    assert counters(api.mesh)["afd_generated_tokens"] < before + 900


def test_models_health_and_metrics(api: Api) -> None:
    assert [model.id for model in api.client.models.list()] == [api.name]
    assert api.client.models.retrieve(api.name).id == api.name
    assert api.curl("/health")[0] == 200
    status, text = api.curl("/metrics")
    assert status == 200
    assert "gen_ai_server_time_to_first_token_seconds_bucket" in text


def completion(**changes: Any) -> dict[str, Any]:
    return {"model": "random-8", "prompt": "x", **changes}


def messages(*contents: Any, **changes: Any) -> dict[str, Any]:
    return {"model": "random-8", "messages": list(contents), **changes}


BAD_COMPLETIONS: list[tuple[Any, str]] = [
    ("{not json", "not valid JSON"),
    ("[1, 2", "not valid JSON"),
    ('"text"', "body"),
    (completion(prompt=""), "empty"),
    (completion(prompt=[]), "empty"),
    (completion(prompt=[[]]), "empty"),
    (completion(prompt=[1, 10**6]), "outside the vocabulary"),
    (completion(prompt=[-1]), "outside the vocabulary"),
    (completion(prompt=[1.5]), "prompt"),
    (completion(prompt={"a": 1}), "prompt"),
    (completion(prompt=[["x"]]), "prompt"),
    (completion(prompt="x" * 5000), "context"),
    ({"model": "random-8"}, "prompt is missing"),
    ({"prompt": "x"}, "model is missing"),
    (completion(max_tokens=0), "max_tokens"),
    (completion(max_tokens=-5), "max_tokens"),
    (completion(max_tokens=10**9), "max_tokens"),
    (completion(max_tokens=10**30), "max_tokens"),
    (completion(max_tokens="many"), "max_tokens"),
    (completion(max_tokens=True), "max_tokens"),
    (completion(temperature=-1), "temperature"),
    (completion(temperature="hot"), "temperature"),
    ('{"model":"random-8","prompt":"x","temperature":NaN}', "temperature"),
    ('{"model":"random-8","prompt":"x","temperature":1e999}', "temperature"),
    (completion(top_p=0), "top_p"),
    (completion(top_p=1.1), "top_p"),
    (completion(top_k=-2), "top_k"),
    (completion(min_p=2), "min_p"),
    (completion(n=0), "n must be"),
    (completion(priority="high"), "priority"),
    (completion(priority=1.5), "priority"),
    (completion(priority=1 << 31), "priority"),
    (completion(timeout_s=0), "timeout_s"),
    (completion(timeout_s=-1), "timeout_s"),
    (completion(timeout_s=10**400), "timeout_s"),
    (completion(timeout_s=True), "timeout_s"),
    ('{"model":"random-8","prompt":"x","timeout_s":1e999}', "timeout_s"),
    (completion(n=10**6), "n must be"),
    (completion(best_of=5), "best_of"),
    (completion(logprobs=1000), "top_logprobs"),
    (completion(seed=-1), "seed"),
    (completion(seed=2**70), "seed"),
    (completion(stop=[""]), "stop"),
    (completion(stop=["x"] * 99), "stop"),
    (completion(stop=5), "stop"),
    (completion(stop=["\ud800"]), "surrogate"),
    (completion(stop=[1] * 500_000), "at most 16"),
    (completion(stop_token_ids=[1] * 500_000), "at most 1024"),
    (completion(logit_bias={str(i): "" for i in range(100_000)}), "at most 1024"),
    (completion(**{f"field{i}": i for i in range(100_000)}), "no such parameter: field0"),
    (completion(prompt=["x"] * 4, n=128), "more than the 256 choices"),
    (completion(stop_token_ids=[10**9]), "stop_token_ids"),
    (completion(logit_bias={"10000000": 1}), "logit_bias"),
    (completion(logit_bias={"a": 1}), "logit_bias"),
    (completion(logit_bias={"3": 1000}), "logit_bias"),
    (completion(presence_penalty=3), "presence_penalty"),
    (completion(repetition_penalty=0), "repetition_penalty"),
    (completion(min_tokens=-1), "min_tokens"),
    (completion(temprature=1), "no such parameter: temprature"),
    (completion(suffix="x"), "suffix"),
    (completion(request_id="x" * 1000), "request_id"),
    (completion(request_id="\ud800"), "request_id"),
    (completion(request_id="two\nlines"), "request_id"),
    (completion(echo=True, logprobs=1), "echo"),
    ("[" * 100_000, "body"),
    ('{"model": "random-8", "prompt": "x", "seed": ' + "9" * 6000 + "}", "body"),
    (completion(prompt=["x"] * 1000), "1000 prompts"),
]
BAD_CHATS: list[tuple[Any, str]] = [
    (messages(), "the chat has no messages"),
    (messages("hello"), 'messages.0: must be like {"role": "user", "content": "..."}'),
    (messages({"content": "x"}), "messages.0.role is missing"),
    (messages({"role": "user"}), "messages.0.content is missing"),
    (messages({"role": "user", "content": 5}), "messages.0.content: must be a text, or a list of parts"),
    (messages({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}), "messages.0.content: must be"),
    (messages({"role": "user", "content": [{"type": "text"}]}), "messages.0.content: must be a text, or a list"),
    (messages({"role": "owner", "content": "x"}), "messages.0.role must be one of system, developer, user"),
    (messages({"role": "", "content": "x"}), "messages.0.role must be one of"),
    (messages({"role": "user", "content": "x"}, tools=[]), "no such parameter: tools"),
    (messages({"role": "user", "content": "x"}, top_logprobs=3), "top_logprobs"),
    (messages({"role": "user", "content": "x"}, response_format={"type": "json_object"}), "response_format"),
    (messages({"role": "user", "content": "x" * 5000}), "context"),
    (messages(*[1] * 500_000), "at most 4096"),
    (messages({"role": "user", "content": [{}] * 500_000}), "at most 1024"),
    (messages(*[{"role": "user", "content": [{}] * 1000}] * 1000), "content"),
]


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [("/v1/completions", *case) for case in BAD_COMPLETIONS] + [("/v1/chat/completions", *case) for case in BAD_CHATS],
)
def test_bad_request_is_refused_in_a_sentence(api: Api, path: str, body: Any, expected: str) -> None:
    status, answer = api.curl(path, body)
    error = json.loads(answer)["error"]
    assert status == 400, error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert expected in error["message"]
    assert "\n" not in error["message"]


def test_a_bad_body_does_not_hold_up_the_gateway(api: Api) -> None:
    """Eight megabytes of what is wrong: an error for each item would take a minute, and gigabytes."""
    began = time.monotonic()
    assert api.curl("/v1/chat/completions", messages(*[1] * 2_000_000))[0] == 400
    assert time.monotonic() - began < 10


def test_resuming_a_call_without_prompts_is_refused(api: Api) -> None:
    status, answer = api.curl("/v1/completions", completion(prompt=[]), "-H", "Last-Event-ID: x/0")
    assert (status, json.loads(answer)["error"]["param"]) == (400, "prompt")


def test_streaming_request_is_refused_with_a_status_too(api: Api) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        list(api.complete("x", temperature=-1, stream=True))


def test_one_request_may_ask_for_all_the_choices_that_are_allowed(api: Api) -> None:
    answer = api.complete("1 2", n=128, max_tokens=2, temperature=1, extra_body={"ignore_eos": True})
    assert [choice.index for choice in answer.choices] == list(range(128))


def test_one_request_id_runs_once_at_a_time(api: Api) -> None:
    body = completion(request_id="twice", prompt=["a", "b"], max_tokens=200, ignore_eos=True)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: api.curl("/v1/completions", body), range(8)))
    texts = {answer for status, answer in answers if status == 200}
    assert {json.loads(text)["usage"]["completion_tokens"] for text in texts} == {400}, "the first one is not disturbed"
    refused = {json.loads(answer)["error"]["message"] for status, answer in answers if status != 200}
    assert refused == {"a request 'twice-0' is already running"}, "all of a call's prompts are taken, or none"


def test_unknown_model_path_and_method_have_their_status(api: Api) -> None:
    with pytest.raises(openai.NotFoundError, match="serves 'random-8'"):
        api.client.completions.create(model="gpt-9", prompt="x")
    assert api.curl("/v1/nothing")[0] == 404
    assert api.curl("/v1/completions")[0] == 405


def test_huge_body_is_refused(api: Api) -> None:
    status, answer = api.curl("/v1/completions", completion(prompt="x" * (9 << 20)))
    assert status == 413
    assert "larger" in json.loads(answer)["error"]["message"]
    chunked = api.curl("/v1/completions", completion(prompt="x" * (9 << 20)), "-H", "Transfer-Encoding: chunked")
    assert chunked[0] == 413


def test_bad_requests_do_not_disturb_their_neighbours(api: Api) -> None:
    async def run() -> list[Token]:
        async with Client(api.grpc) as client:
            tokens = []
            async for token in client.generate([5, 6, 7], max_tokens=60, ignore_eos=True):
                tokens.append(token)
                if token.index % 10 == 0:
                    await asyncio.to_thread(api.curl, "/v1/completions", completion(prompt=[10**9]))
            return tokens

    tokens = asyncio.run(run())
    api.model.check_greedy([5, 6, 7], [token.id for token in tokens], [token.logprob for token in tokens])


async def test_unforeseen_error_is_an_error_object_whose_number_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    nothing: Any = None  # so that /health, which asks it, fails
    app = make_app(nothing, nothing, nothing, "a model", 1000)
    transport = httpx2.ASGITransport(app=app)  # which raises what the application does
    async with httpx2.AsyncClient(transport=transport, base_url="http://gateway") as client:
        response = await client.get("/health")
    assert response.status_code == 500
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("server_error", "internal", None)
    assert "NoneType" not in error["message"]
    (record,) = caplog.records
    assert record.getMessage().removeprefix("internal error ") == error["message"].rpartition(" ")[2]
    assert record.exc_info, "with its traceback"


async def test_unforeseen_error_in_a_stream_is_its_last_event() -> None:
    async def failing() -> AsyncGenerator[list[Part], None]:
        raise RuntimeError("a secret of ours")
        yield []

    form: Any = SimpleNamespace(opening=lambda admitted: ())
    admitted: Any = [SimpleNamespace(resumed_at=None, request_id="x", params=SimpleNamespace(n=1))]
    (event,) = [event async for event in _events(failing(), form, admitted)]
    error = json.loads(event.removeprefix("data: "))["error"]
    assert error["message"].startswith("internal error; the gateway's log has it as ")
