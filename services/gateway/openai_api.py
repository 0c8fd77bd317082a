"""The OpenAI HTTP API: completions and chat completions, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import dataclass, replace
from typing import Any

import prometheus_client
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client.openmetrics import exposition as openmetrics
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from afd import tasks
from afd.errors import AfdError, Cancelled, InternalError, InvalidRequest, NotFound, PeerUnavailable, Unauthenticated
from afd.model.sampling_params import SamplingParams
from afd.urgency import Urgency
from services.gateway.auth import Caller, Gatekeeper
from services.gateway.console import PAGE_PATHS, console
from services.gateway.generation import Generator
from services.gateway.generation import Request as Admitted
from services.gateway.merge import merged
from services.gateway.openai_format import ChatFormat, CompletionFormat, Format, Part
from services.gateway.openai_types import ChatBody, CompletionBody
from services.gateway.place import Place, request_ids
from services.gateway.tokenizer import Tokenizer
from services.gateway.topology import Topology

log = logging.getLogger(__name__)

_OPEN_PATHS = ("/health", "/metrics", *PAGE_PATHS)  # need no API key
# FastAPI's own, which newer versions have, traces probes and scrapes, too, and logs what validation has refused: that
# can be a prompt.
_NO_TELEMETRY: Any = {"tracing": False, "metrics": False, "logs": False}
_MAX_CHOICES = 256  # of all prompts together
_NO_OBJECT = "the body must be a JSON object in UTF-8, not too deep, sent with Content-Type: application/json"
_MAX_READ_AWAY = 8  # times the largest body
_KEEP_ALIVE_S = 2.0
_STILL_HERE = b": still here\n"  # an empty line behind it would be an event without data to OpenAI's own client
_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def make_app(
    generator: Generator, gatekeeper: Gatekeeper, topology: Topology, model_name: str, max_body_bytes: int
) -> FastAPI:
    """The application; `model_name` is the one model it serves."""
    app = FastAPI(title="AFD Mesh", docs_url=None, redoc_url=None, telemetry=_NO_TELEMETRY)
    created = int(time.time())
    app.add_middleware(_BodyLimit, max_bytes=max_body_bytes)
    app.add_middleware(_KeyCheck, gatekeeper=gatekeeper, max_bytes=max_body_bytes)  # before the body is kept
    app.add_middleware(_Farewell)
    app.include_router(console(topology, gatekeeper, model_name))
    app.add_exception_handler(AfdError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        ready = generator.balancer.num_ready > 0 and not generator.draining and await generator.store.is_reachable()
        return JSONResponse({"status": "ok" if ready else "not ready"}, 200 if ready else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        wants_openmetrics = "application/openmetrics-text" in request.headers.get("accept", "")  # it has exemplars
        exposition = openmetrics if wants_openmetrics else prometheus_client.exposition
        text = exposition.generate_latest(prometheus_client.REGISTRY)
        return Response(text, media_type=exposition.CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(model_name, created, generator)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_model(name, model_name)
        return _model(model_name, created, generator)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        _check_model(body.model, model_name)
        admitted = await _open(generator, gatekeeper, await _ask_completion(body, generator.tokenizer), request)
        return await _answer(generator, gatekeeper, admitted, CompletionFormat(body, generator), request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        _check_model(body.model, model_name)
        admitted = await _open(generator, gatekeeper, await _ask_chat(body, generator.tokenizer), request)
        return await _answer(generator, gatekeeper, admitted, ChatFormat(body, generator), request)

    return app


@dataclass(frozen=True)
class _Asked:
    """A call: its prompts, and what is wanted of each."""

    prompts: list[list[int]]
    params: SamplingParams
    urgency: Urgency
    request_id: str


async def _ask_completion(body: CompletionBody, tokenizer: Tokenizer) -> _Asked:
    urgency, prompts = body.urgency(), body.prompts()
    if not prompts:
        raise InvalidRequest("the prompt is empty", "prompt")
    if len(prompts) > _MAX_CHOICES:
        raise InvalidRequest(f"{len(prompts)} prompts are more than the {_MAX_CHOICES} allowed in a request", "prompt")
    if body.echo and body.logprobs is not None:
        raise InvalidRequest("logprobs of the prompt are not available: echo and logprobs exclude each other", "echo")
    params = body.sampling(body.max_tokens, body.logprobs or 0)
    if body.best_of not in (None, params.n):
        raise InvalidRequest("best_of other than n is not supported", "best_of")
    if len(prompts) > 1 and len(prompts) * params.n > _MAX_CHOICES:
        raise InvalidRequest(
            f"{len(prompts)} prompts with n={params.n} are more than the {_MAX_CHOICES} choices allowed in a request",
            "n",
        )
    ids = [await tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    return _Asked(ids, params, urgency, body.request_id or uuid.uuid4().hex)


async def _ask_chat(body: ChatBody, tokenizer: Tokenizer) -> _Asked:
    urgency = body.urgency()
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", "top_logprobs")
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    messages = [message.for_template(number) for number, message in enumerate(body.messages)]
    prompt_ids = await tokenizer.encode_chat(messages, body.add_generation_prompt)
    params = body.sampling(max_tokens, body.top_logprobs or 0)
    return _Asked([prompt_ids], params, urgency, body.request_id or uuid.uuid4().hex)


async def _open(generator: Generator, gatekeeper: Gatekeeper, asked: _Asked, request: Request) -> list[Admitted]:
    """A request for each prompt: new ones, or those behind the stream that a `Last-Event-ID` header belongs to."""
    header = request.headers.get("last-event-id")
    if header:
        return await _reopen(generator, gatekeeper, asked, Place.parse(header, len(asked.prompts)), request)
    names = request_ids(asked.request_id, len(asked.prompts))
    first, *others = (
        generator.admit(name, prompt_ids, asked.params, asked.urgency)
        for name, prompt_ids in zip(names, asked.prompts, strict=True)
    )
    return [first, *(replace(other, begun=first.begun, is_first=False) for other in others)]


async def _reopen(
    generator: Generator, gatekeeper: Gatekeeper, asked: _Asked, place: Place, request: Request
) -> list[Admitted]:
    """Raises InvalidRequest for another call than that of the stream, or NotFound."""
    asked.params.check(generator.config.vocab_size)
    for name in place.names:
        await gatekeeper.check_owner(request.state.caller, name)
    reopened = [
        await generator.reopen(name, place.of_prompt(number), asked.urgency) for number, name in enumerate(place.names)
    ]
    if not all(one.is_for(ids, asked.params) for one, ids in zip(reopened, asked.prompts, strict=True)):
        raise InvalidRequest("Last-Event-ID is of a request with another prompt or other parameters: send the same")
    return reopened


async def _answer(
    generator: Generator, gatekeeper: Gatekeeper, admitted: list[Admitted], form: Format, request: Request
) -> Response:
    carrier = {"traceparent": request.headers["traceparent"]} if "traceparent" in request.headers else {}
    arriving = _metered(gatekeeper, request.state.caller, admitted, _parts(generator, admitted, carrier))
    if not form.body.stream:
        return JSONResponse(await _unless_disconnected(request, _collect(arriving, form, admitted)))
    first = await _unless_disconnected(request, anext(arriving, None))  # a refusal is still a status, not an event
    events = _events(_chain(first, arriving), form, admitted)
    return _EventStream(events, headers={"Cache-Control": "no-cache"})


async def _metered(
    gatekeeper: Gatekeeper, caller: Caller, admitted: list[Admitted], arriving: AsyncGenerator[list[Part], None]
) -> AsyncGenerator[list[Part], None]:
    async with gatekeeper.admitted(caller, admitted) as account, contextlib.aclosing(arriving):
        async for parts in arriving:
            account.count(len(parts))
            yield parts


def _parts(generator: Generator, admitted: list[Admitted], carrier: dict[str, str]) -> AsyncGenerator[list[Part], None]:
    """The tokens of all prompts as they come; the index of a choice counts prompts first, then their n choices."""

    async def numbered(number: int, one: Admitted) -> AsyncGenerator[list[Part], None]:
        async with generator.opened(one, carrier) as arriving:
            async for tokens in arriving:
                yield [Part(number * one.params.n + token.choice, token) for token in tokens]

    return merged([numbered(number, one) for number, one in enumerate(admitted)])


async def _chain(first: list[Part] | None, rest: AsyncGenerator[list[Part], None]) -> AsyncGenerator[list[Part], None]:
    async with contextlib.aclosing(rest):
        if first is None:
            return
        yield first
        async for parts in rest:
            yield parts


async def _collect(
    arriving: AsyncGenerator[list[Part], None], form: Format, admitted: list[Admitted]
) -> dict[str, Any]:
    async with contextlib.aclosing(arriving):
        return form.whole([part async for parts in arriving for part in parts], admitted)


async def _events(
    arriving: AsyncGenerator[list[Part], None], form: Format, admitted: list[Admitted]
) -> AsyncGenerator[str, None]:
    place = Place.of(admitted)

    def event(part: Part) -> str:
        place.next_index[part.index] = part.token.index + 1
        return _event(form.chunk(part, admitted), place)

    try:
        async with contextlib.aclosing(arriving):
            for chunk in form.opening(admitted) if admitted[0].resumed_at is None else ():
                yield _event(chunk)
            async for parts in arriving:
                yield "".join(map(event, parts))
        if form.body.stream_options and form.body.stream_options.include_usage:
            yield _event(form.usage_chunk(admitted, sum(place.next_index)))
        yield "data: [DONE]\n\n"
    except AfdError as error:
        yield _event(_error_body(error))
    except Exception:
        yield _event(_error_body(_unforeseen()))


class _EventStream(StreamingResponse):
    """Events, and a comment after a few seconds without any, by which a client knows that somebody is there."""

    media_type = "text/event-stream"

    async def stream_response(self, send: Send) -> None:
        sent_s = time.monotonic()

        async def send_part(part: bytes) -> None:
            nonlocal sent_s
            sent_s = time.monotonic()
            await send({"type": "http.response.body", "body": part, "more_body": True})

        async def keep_alive() -> None:
            while True:
                if (left_s := sent_s + _KEEP_ALIVE_S - time.monotonic()) > 0:
                    await asyncio.sleep(left_s)
                else:
                    await send_part(_STILL_HERE)

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        keeping = asyncio.create_task(keep_alive())
        try:
            async for event in self.body_iterator:
                await send_part(str(event).encode())
        finally:
            await tasks.end(keeping)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _event(value: dict[str, Any], place: Place | None = None) -> str:
    name = f"id: {place}\n" if place else ""
    return f"{name}data: {json.dumps(value, separators=(',', ':'))}\n\n"


async def _unless_disconnected(request: Request, work: Awaitable[Any]) -> Any:
    """The result of the work, which is cancelled if the client leaves first."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Cancelled("the client left")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _model(name: str, created: int, generator: Generator) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "afd",
        "max_model_len": generator.balancer.max_context_tokens,
    }


def _check_model(asked: str, served: str) -> None:
    if asked != served:
        raise NotFound(f"the model {asked!r} does not exist; this mesh serves {served!r}")


def _error_body(error: AfdError) -> dict[str, Any]:
    status = error.http_status
    return {
        "error": {
            "message": str(error),
            "type": _ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error"),
            "param": getattr(error, "param", None),
            "code": error.grpc_code.lower(),
        }
    }


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, AfdError)
    return _refusal(error)


def _refusal(error: AfdError) -> Response:
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(_error_body(error), error.http_status, headers=headers)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    path = [str(part) for part in problem["loc"][1:] if problem["type"] != "json_invalid"]
    name = path[0] if path else None
    if problem["type"] == "json_invalid":
        message = f"the body is not valid JSON: {problem['ctx']['error']}"
    elif problem["type"] == "extra_forbidden":
        message = f"no such parameter: {'.'.join(path)}"
    elif problem["type"] == "missing":
        message = f"{'.'.join(path) or 'the JSON body'} is missing"
    else:
        message = f"{'.'.join(path)}: {problem['msg'].removeprefix('Value error, ')}" if path else _NO_OBJECT
    return JSONResponse(_error_body(InvalidRequest(message, name)), 400)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == InvalidRequest.http_status:  # Starlette's word for a body it cannot decode
        return JSONResponse(_error_body(InvalidRequest(_NO_OBJECT)), error.status_code)
    body = {"message": f"{request.method} {request.url.path}: {error.detail}", "type": "invalid_request_error"}
    return JSONResponse({"error": {**body, "param": None, "code": None}}, error.status_code, headers=error.headers)


def _unforeseen() -> InternalError:
    """For an exception that nobody foresaw: it is logged under a number, and the caller is told no more than that."""
    number = uuid.uuid4().hex
    log.exception("internal error %s", number)
    return InternalError(f"internal error; the gateway's log has it as {number}")


class _Farewell:
    """Answers where the application does not: because it fails, or because the server stops and cancels it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def noting(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except asyncio.CancelledError:
            if not has_begun:
                await _refusal(PeerUnavailable("this gateway stops; ask another one"))(scope, receive, send)
        except Exception:
            if has_begun:
                raise  # the server ends the connection
            await _refusal(_unforeseen())(scope, receive, send)


class _KeyCheck:
    """Notes whose request it is, and refuses one without a valid API key where one is needed."""

    def __init__(self, app: ASGIApp, gatekeeper: Gatekeeper, max_bytes: int) -> None:
        self.app = app
        self.gatekeeper = gatekeeper
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS:
            authorization = Headers(scope=scope).get("authorization")
            try:
                scope.setdefault("state", {})["caller"] = await self.gatekeeper.authenticate(authorization)
            except AfdError as error:
                await _read_body(receive, 0, _MAX_READ_AWAY * self.max_bytes)
                app = _refusal(error)
        await app(scope, receive, send)


class _BodyLimit:
    """Reads the body before the application sees it, and refuses one over max_bytes as soon as it is."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = await _read_body(receive, self.max_bytes, _MAX_READ_AWAY * self.max_bytes)
        if body is None:
            error = InvalidRequest(f"the body is larger than the {self.max_bytes} bytes allowed")
            await JSONResponse(_error_body(error), 413, headers={"Connection": "close"})(scope, receive, send)
            return
        replay: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Message:
            return replay.pop() if replay else await receive()

        await self.app(scope, replayed, send)


async def _read_body(receive: Receive, max_bytes: int, most_bytes: int) -> bytes | None:
    """The body; None where it is too large, whose rest is read away, up to most_bytes: a client that still sends does
    not get to hear of the refusal."""
    parts: list[bytes] = []
    num_bytes = 0
    more = True
    while more and num_bytes <= most_bytes:
        message = await receive()
        chunk = message.get("body", b"")
        num_bytes += len(chunk)
        more = message.get("more_body", False)
        if num_bytes <= max_bytes:
            parts.append(chunk)
    return b"".join(parts) if num_bytes <= max_bytes else None
