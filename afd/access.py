"""Who may call a server, and with how much: TLS, roles, sizes, and the time that a request may take to arrive."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from afd import tls
from afd.errors import DeadlineExceeded, InvalidRequest, PermissionDenied
from afd.rpc import Context, abort

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Access:
    """Who may call a server, and with how much."""

    credentials: grpc.ServerCredentials | None = None  # none: plain text
    interceptors: tuple[grpc.aio.ServerInterceptor, ...] = ()
    options: tuple[tuple[str, int], ...] = ()

    @classmethod
    def for_peers(cls, role: str) -> Access:
        """For the mesh's services of one role, if this process has a certificate."""
        certificate = tls.own()
        if certificate is None:
            return cls()
        return cls(tls.server_credentials(certificate, mutual=True), (_OnlyRole(role),))

    @classmethod
    def for_clients(
        cls, certificate: tls.Certificate | None, max_request_bytes: int, max_header_bytes: int, timeout_s: float
    ) -> Access:
        """For everybody who gets here: requests are bounded in size and in the time that they may take to arrive."""
        credentials = tls.server_credentials(certificate, mutual=False) if certificate else None
        options = (
            # What is a little too large is refused by the service, in words; what is larger is not even received.
            ("grpc.max_receive_message_length", 2 * max_request_bytes),
            ("grpc.max_metadata_size", max_header_bytes),
            ("grpc.absolute_max_metadata_size", max_header_bytes),
            ("grpc.server_handshake_timeout_ms", int(timeout_s * 1000)),
        )
        return cls(credentials, (_InTime(timeout_s),), options)


class _OnlyRole(grpc.aio.ServerInterceptor):
    """Our methods are for callers of one role; health and reflection are for every holder of a certificate."""

    def __init__(self, role: str) -> None:
        self.role = role

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith("/afd."):
            return handler

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            await self._check(context)
            async for response in (handler.unary_stream or handler.stream_stream)(request, context):
                yield response

        async def unary(request: Any, context: Context) -> Any:
            await self._check(context)
            return await (handler.unary_unary or handler.stream_unary)(request, context)

        return _like(handler, handler.request_streaming, stream if handler.response_streaming else unary)

    async def _check(self, context: Context) -> None:
        try:
            tls.require_role(context.auth_context(), self.role)
        except PermissionDenied as error:
            log.warning("a call was refused: %s", error)
            await abort(context, error)


class _InTime(grpc.aio.ServerInterceptor):
    """A request that is not here whole within timeout_s ends with DEADLINE_EXCEEDED.

    On the wire one message is a stream of one, which can be awaited with a bound.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        ours = handler_call_details.method.startswith("/afd.")
        if handler is None or handler.request_streaming or not ours:
            return handler

        async def stream(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
            request = await self._first(requests, context)
            async for response in handler.unary_stream(request, context):
                yield response

        async def unary(requests: AsyncIterator[Any], context: Context) -> Any:
            return await handler.unary_unary(await self._first(requests, context), context)

        return _like(handler, True, stream if handler.response_streaming else unary)

    async def _first(self, requests: AsyncIterator[Any], context: Context) -> Any:
        try:
            return await asyncio.wait_for(anext(aiter(requests)), self.timeout_s)
        except TimeoutError:
            await abort(context, DeadlineExceeded(f"the request did not arrive within {self.timeout_s:g} s"))
        except StopAsyncIteration:
            await abort(context, InvalidRequest("the call has no request"))


def _like(handler: Any, request_streaming: bool, behaviour: Any) -> Any:
    """A handler with the same messages and another behaviour."""
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[request_streaming, handler.response_streaming]
    return make(behaviour, handler.request_deserializer, handler.response_serializer)
