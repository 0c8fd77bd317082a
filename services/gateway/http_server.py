"""The HTTP server of the gateway: TLS with the newest certificate, and bounds for headers and slow clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from afd.address import joined
from afd.errors import ConfigError
from afd.tls import Certificate


@dataclass(frozen=True)
class HttpLimits:
    max_header_bytes: int
    read_timeout_s: float  # from the connection, or the first byte of a further request, to the request's last


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's, which by itself takes headers of any size, and waits for them for ever."""

    def __init__(self, *args: Any, limits: HttpLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._timer: asyncio.TimerHandle | None = None
        self._num_header_bytes = 0
        self._in_body = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._in_body:
            self._num_header_bytes += len(data)  # the parser shows a header only once it is whole
        super().data_received(data)
        if not self._in_body and self._num_header_bytes > self._limits.max_header_bytes:
            self._refuse(431, _too_large(self._limits))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._start_timer()

    def on_headers_complete(self) -> None:
        self._in_body = True
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > self._limits.max_header_bytes:
            self.app = _Refusal(431, _too_large(self._limits))
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._stop_timer()
        self._in_body, self._num_header_bytes = False, 0
        super().on_message_complete()

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(self._limits.read_timeout_s, self._on_timeout)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timeout(self) -> None:
        self._refuse(408, f"the request did not arrive within {self._limits.read_timeout_s:g} s")

    def _refuse(self, status: int, sentence: str) -> None:
        if self.transport.is_closing():
            return
        if self._nothing_is_answered():
            self.transport.write(_raw_answer(status, sentence))
        self.transport.close()

    def _nothing_is_answered(self) -> bool:
        """Nobody has begun to answer the request that is being read, nor still answers the one before."""
        if self.cycle is None:
            return True
        return not self.cycle.response_started if self._in_body else self.cycle.response_complete


def _too_large(limits: HttpLimits) -> str:
    return f"the headers are larger than the {limits.max_header_bytes} bytes allowed"


class _Refusal:
    """The application for a request that is not worth reading."""

    def __init__(self, status: int, sentence: str) -> None:
        self.status = status
        self.sentence = sentence

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = JSONResponse(_error_body(self.sentence), self.status, headers={"Connection": "close"})
        await answer(scope, receive, send)


def _error_body(sentence: str) -> dict[str, Any]:
    return {"error": {"message": sentence, "type": "invalid_request_error", "param": None, "code": None}}


def _raw_answer(status: int, sentence: str) -> bytes:
    """For a request that the server has not seen whole."""
    body = json.dumps(_error_body(sentence)).encode()
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


class _Server(uvicorn.Server):
    """Signals are this process's, not the HTTP server's."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


@contextlib.asynccontextmanager
async def serving_http(
    app: FastAPI, host: str, port: int, limits: HttpLimits, certificate: Certificate | None
) -> AsyncIterator[int]:
    """Runs the HTTP server while the block runs; yields its port. Raises ConfigError if it is taken."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if listener.family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # :: is any, of both families
    try:
        listener.bind((host, port))
        listener.listen()  # who comes before the server accepts waits, and is not refused
    except OSError as error:
        raise ConfigError(f"cannot listen on {joined(host, port)} for HTTP: {error.strerror}") from None
    config = uvicorn.Config(
        app,
        http=partial(BoundedProtocol, limits=limits),  # type: ignore[arg-type]
        ws="none",
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=2,
    )
    config.load()
    config.ssl = _tls_context(certificate) if certificate else None
    server = _Server(config)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield int(listener.getsockname()[1])
    finally:
        server.should_exit = True
        await running


def _tls_context(certificate: Certificate) -> ssl.SSLContext:
    """One whose every handshake begins with a look at the files."""
    context = certificate.server_context()

    def choose(connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, first: ssl.SSLContext) -> None:
        connection.context = certificate.server_context()

    context.sni_callback = choose  # called also for clients that name no server
    return context
