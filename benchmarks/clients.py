"""Clients as benchmarks have them: what they ask, over gRPC or the OpenAI HTTP API, and every token that they see."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import httpx2

from afd.client import Client
from afd.errors import AfdError, InternalError, PeerUnavailable, error_for_grpc_code

STALL_S = 0.1  # what counts as one
_ADMISSION_TIMEOUT_S = 60.0
_RESUME_TIMEOUT_S = 60.0
_PAUSE_S = 0.2
_HANG_S = 120.0  # a gRPC stream without a token for so long
_SILENCE_S = 5.0  # a stream of events is not so for long: comments come in it
_HTTP_TIMEOUTS = httpx2.Timeout(5.0, read=_ADMISSION_TIMEOUT_S, pool=None)
_HTTP_LIMITS = httpx2.Limits(max_connections=None, max_keepalive_connections=16)

Api = Literal["gRPC", "HTTP"]


@dataclass(frozen=True)
class Question:
    """One request, as the seed has it."""

    prompt: list[int]
    options: dict[str, Any]
    leaves_after: int | None  # the client goes away after so many tokens
    api: Api

    @classmethod
    def of(cls, chooser: random.Random, vocab_size: int) -> Self:
        prompt = [chooser.randrange(2, vocab_size) for _ in range(chooser.choice((1, 8, 40, 150)))]
        options: dict[str, Any] = {"max_tokens": chooser.randint(20, 250), "ignore_eos": True}
        if chooser.random() < 0.4:
            options |= {"temperature": 0.8, "top_p": 0.95, "seed": chooser.randrange(1 << 30)}
        if chooser.random() < 0.1:
            options["n"] = 2
        leaves_after = chooser.randint(1, 50) if chooser.random() < 0.1 else None
        return cls(prompt, options, leaves_after, "HTTP" if chooser.random() < 1 / 3 else "gRPC")


@dataclass
class Answer:
    """What a client saw of it."""

    tokens: dict[tuple[int, int], int] = field(default_factory=dict)  # ids, by choice and index
    num_twice: int = 0
    num_resumed: int = 0  # over HTTP; the SDK does so by itself
    error: str = ""  # its kind and sentence; itself it would keep what it has seen, connections for instance
    stalls_s: list[tuple[float, float]] = field(default_factory=list)  # when it ended, and how long it was
    _last_s: dict[int, float] = field(default_factory=dict)

    def take(self, choice: int, index: int, token_id: int) -> None:
        now = time.monotonic()
        pause_s = now - self._last_s.get(choice, now)
        if pause_s > STALL_S:
            self.stalls_s.append((now, pause_s))
        self._last_s[choice] = now
        self.num_twice += (choice, index) in self.tokens
        self.tokens[choice, index] = token_id


class Asker(Protocol):
    async def follow(self, question: Question, answer: Answer) -> None:
        """Fills the answer. Raises PeerUnavailable with an empty one if nobody took the request, or what ended it."""

    def turn_to_next(self) -> None:
        """Of the gateways."""


async def ask(asker: Asker, question: Question) -> Answer:
    """The whole answer, or as much as the question wants. A refusal at the door is no loss: it is asked again."""
    deadline = time.monotonic() + _ADMISSION_TIMEOUT_S
    while True:
        answer = Answer()
        try:
            await asker.follow(question, answer)
            return answer
        except (AfdError, TimeoutError) as error:
            was_refused = isinstance(error, PeerUnavailable) and not answer.tokens
            if not was_refused or time.monotonic() > deadline:
                answer.error = f"{type(error).__name__}: {error}"
                return answer
        asker.turn_to_next()
        await asyncio.sleep(_PAUSE_S)


class GrpcAsker:
    def __init__(self, client: Client) -> None:
        self.client = client

    def turn_to_next(self) -> None:
        self.client._turn_from(self.client._current)

    async def follow(self, question: Question, answer: Answer) -> None:
        stream = self.client.generate(question.prompt, **question.options)
        try:
            while (token := await asyncio.wait_for(anext(stream, None), _HANG_S)) is not None:
                answer.take(token.choice, token.index, token.id)
                if len(answer.tokens) == question.leaves_after:
                    return
        finally:
            await stream.aclose()


@dataclass(frozen=True)
class _Event:
    event_id: str
    choice: int
    index: int
    token_id: int


class HttpAsker:
    """Streams completions from the first of the gateways that answers. One that breaks off is gone on with at the next
    one, by the id of its last event."""

    def __init__(self, urls: Sequence[str], model: str, api_key: str | None = None) -> None:
        self.urls = urls
        self.model = model
        self._current = 0
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx2.AsyncClient(timeout=_HTTP_TIMEOUTS, limits=_HTTP_LIMITS, headers=headers, trust_env=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    def turn_to_next(self) -> None:
        self._current = (self._current + 1) % len(self.urls)

    async def follow(self, question: Question, answer: Answer) -> None:
        last_event_id, alive_s = "", time.monotonic()
        while True:
            try:
                async with contextlib.aclosing(self._events(question, last_event_id)) as events:
                    async for event in events:
                        last_event_id, alive_s = event.event_id, time.monotonic()
                        answer.take(event.choice, event.index, event.token_id)
                        if len(answer.tokens) == question.leaves_after:
                            return
                return
            except PeerUnavailable:
                if not last_event_id or time.monotonic() > alive_s + _RESUME_TIMEOUT_S:
                    raise
            answer.num_resumed += 1
            self.turn_to_next()
            await asyncio.sleep(_PAUSE_S)

    async def _events(self, question: Question, last_event_id: str) -> AsyncGenerator[_Event, None]:
        body = {"model": self.model, "prompt": question.prompt, "stream": True, "return_token_ids": True}
        body |= {"temperature": 0, **question.options}
        headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
        url = f"{self.urls[self._current]}/v1/completions"
        try:
            async with self._http.stream("POST", url, json=body, headers=headers) as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, await response.aread())
                event_id, is_whole = "", False
                async for line in _lines(response):
                    name, _, value = line.partition(": ")
                    if name == "id":
                        event_id = value
                    elif value == "[DONE]":
                        is_whole = True
                    elif name == "data":
                        yield _event(event_id, json.loads(value))
                if is_whole:
                    return
        except httpx2.TransportError as error:
            raise PeerUnavailable(f"the connection broke: {error!r}") from None
        raise PeerUnavailable("the stream has no end")


async def _lines(response: httpx2.Response) -> AsyncGenerator[str, None]:
    lines = response.aiter_lines()
    try:
        while True:
            async with asyncio.timeout(_SILENCE_S):
                line = await anext(lines, None)
            if line is None:
                return
            yield line
    except TimeoutError:
        raise PeerUnavailable(f"nothing came for {_SILENCE_S:g} s") from None


def _event(event_id: str, data: dict[str, Any]) -> _Event:
    """The id says for each choice which index is next. Raises the error that ended the stream."""
    if "error" in data:
        raise _error(data)
    (choice,) = data["choices"]
    (token_id,) = choice["token_ids"]
    next_index = event_id.rpartition("/")[2].split(".")
    return _Event(event_id, choice["index"], int(next_index[choice["index"]]) - 1, token_id)


def _error(body: dict[str, Any]) -> AfdError:
    error = body["error"]
    return error_for_grpc_code(str(error["code"]).upper(), error["message"])


def _refusal(status: int, body: bytes) -> AfdError:
    try:
        return _error(json.loads(body))
    except ValueError:  # not one of the gateway's own
        return InternalError(f"HTTP {status}: {body.decode(errors='replace')}")
