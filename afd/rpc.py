"""gRPC as every service and client here uses it: options, errors, health, reflection."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from afd import tls
from afd.address import joined
from afd.errors import (
    AfdError,
    Cancelled,
    ConfigError,
    InternalError,
    InvalidRequest,
    Mismatch,
    PeerUnavailable,
    PermissionDenied,
    Unauthenticated,
    error_for_grpc_code,
)

if TYPE_CHECKING:
    from afd.access import Access

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 256 << 20
ACCEPTED = "afd-accepted"  # metadata that comes before the first message: the work was taken on
UNDECODABLE = "the bytes are no message of this method"
_STOP_GRACE_S = 1.0

_COMMON_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


def _pings(every_ms: int, timeout_ms: int) -> tuple[tuple[str, int], ...]:
    """The ping's own timeout, a minute if it is not given, counts beside the keepalive's."""
    return (
        ("grpc.keepalive_time_ms", every_ms),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        ("grpc.http2.ping_timeout_ms", timeout_ms),
    )


CHANNEL_OPTIONS = (*_COMMON_OPTIONS, *_pings(10_000, 5_000))
# Within the mesh a peer that is frozen, or cut off, is to be noticed before its lease is over.
_PEER_OPTIONS = (*_COMMON_OPTIONS, *_pings(1_000, 2_000))
_SERVER_OPTIONS = (
    *CHANNEL_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),
)

# Of trailing metadata.
_RETRY_AFTER = "retry-after"  # seconds; as HTTP's header
_PARAM = "afd-param"  # the field at fault

Context = grpc.aio.ServicerContext[Any, Any]
Stub = TypeVar("Stub")


def to_error(error: grpc.RpcError) -> AfdError:
    """The error of our tree for a failed call."""
    code, details = error.code(), error.details()
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and "Deadline Exceeded" in (details or ""):  # gRPC's own words
        details = "the call took longer than its deadline allows"
    return error_for_grpc_code(code.name, details or code.name, _retry_after_s(error), _trailing(error, _PARAM))


def to_peer_error(error: grpc.RpcError) -> AfdError:
    """The same for a call within the mesh, where to be refused is nobody's fault but the mesh's, and a call that its
    caller did not cancel was cut off by a peer that stops."""
    found = to_error(error)
    if isinstance(found, Cancelled):
        return PeerUnavailable("the peer has cut off the call")
    return Mismatch(str(found)) if isinstance(found, PermissionDenied | Unauthenticated) else found


def _retry_after_s(error: grpc.RpcError) -> float | None:
    with contextlib.suppress(ValueError):  # somebody else's, which is a date
        return float(_trailing(error, _RETRY_AFTER) or "")
    return None


def _trailing(error: grpc.RpcError, name: str) -> str | None:
    metadata = cast(Iterable[tuple[str, str]], error.trailing_metadata() or ())
    return next((value for key, value in metadata if key == name), None)


async def abort(context: Context, error: AfdError) -> None:
    """Ends the call with the error's status and sentence, with when to come again, and with the field at fault."""
    metadata: tuple[tuple[str, str], ...] = ()
    if error.retry_after_s is not None:
        metadata += ((_RETRY_AFTER, f"{error.retry_after_s:.3f}"),)
    if isinstance(error, InvalidRequest) and error.param:
        metadata += ((_PARAM, error.param),)
    await context.abort(grpc.StatusCode[error.grpc_code], str(error), metadata)


async def read(call: grpc.aio.UnaryStreamCall[Any, Any]) -> Any:
    """The next message of a stream; None at its end. The iterator that a call has refers to it as it does to that: a
    stream that was left would keep its memory, and its connection, until the garbage collector comes by."""
    message = await call.read()
    return None if message is grpc.aio.EOF else message


def connect_peer(address: str, role: str) -> grpc.Channel:
    """A channel to a service of the mesh: by this process's certificate, as it is now, and to nobody but that role."""
    certificate = tls.own()
    if certificate is None:
        return grpc.insecure_channel(address, options=_PEER_OPTIONS)
    credentials = tls.peer_credentials(certificate.pem())
    return grpc.secure_channel(address, credentials, options=(*_PEER_OPTIONS, tls.pinned(role)))


class PeerChannel:
    """The same for asyncio, and for long: once the certificate is replaced, new calls go through a new connection;
    those that are open end where they began."""

    def __init__(self, address: str, role: str) -> None:
        self.address = address
        self.role = role
        self._certificate = tls.own()
        self._pem: tls.Pem | None = None
        self._channel = self._connect()
        self._stubs: dict[Callable[[grpc.aio.Channel], Any], Any] = {}

    def stub(self, kind: Callable[[grpc.aio.Channel], Stub]) -> Stub:
        """A stub for calls that begin now."""
        if self._certificate and self._certificate.pem() is not self._pem:
            self._channel = self._connect()  # the old one closes itself behind its last call
            self._stubs.clear()
        if kind not in self._stubs:
            self._stubs[kind] = kind(self._channel)
        stub: Stub = self._stubs[kind]
        return stub

    async def close(self) -> None:
        await self._channel.close()

    def _connect(self) -> grpc.aio.Channel:
        if self._certificate is None:
            return grpc.aio.insecure_channel(self.address, options=_PEER_OPTIONS)
        self._pem = self._certificate.pem()
        options = (*_PEER_OPTIONS, tls.pinned(self.role))
        return grpc.aio.secure_channel(self.address, tls.peer_credentials(self._pem), options=options)


def metadata_of(context: Context) -> dict[str, str]:
    """The call's text metadata, a `traceparent` for instance."""
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


@asynccontextmanager
async def aborting(context: Context) -> AsyncIterator[None]:
    """Errors raised inside end the call with their status; an unforeseen one is logged and says no more than that.

    Behind the block the method returns: gRPC raises once more what it has raised here, and keeps it.
    """
    try:
        yield
    except AfdError as error:
        await _end(context, error)
    except (grpc.aio.AbortError, grpc.RpcError):
        raise
    except Exception:
        log.exception("a call failed")
        await _end(context, InternalError("internal error; the service's log has it"))


async def _end(context: Context, error: AfdError) -> None:
    """Aborts the call without going through the method's frames, which would be kept, and the whole request by them."""
    try:
        await abort(context, error)
    except grpc.aio.AbortError as aborted:
        aborted.__traceback__ = aborted.__context__ = None


class _RefuseUndecodable(grpc.aio.ServerInterceptor):
    """Bytes that are no message are the caller's fault: INVALID_ARGUMENT, and no traceback in the log. A servicer that
    takes a stream gets None in their place, and refuses them itself."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        ours = handler_call_details.method.startswith("/afd.")
        if handler is None or not ours:
            return handler

        def decode(data: bytes) -> Any:
            try:
                return handler.request_deserializer(data)
            except DecodeError:
                return None

        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(handler.stream_stream, decode, handler.response_serializer)

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            await _refuse_undecodable(request, context)
            async for response in handler.unary_stream(request, context):
                yield response

        async def unary(request: Any, context: Context) -> Any:
            await _refuse_undecodable(request, context)
            return await handler.unary_unary(request, context)

        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(stream, decode, handler.response_serializer)
        return grpc.unary_unary_rpc_method_handler(unary, decode, handler.response_serializer)


async def _refuse_undecodable(request: Any, context: Context) -> None:
    if request is None:
        await abort(context, InvalidRequest(UNDECODABLE))


@asynccontextmanager
async def serving(
    add_services: Callable[[grpc.aio.Server], None],
    service_names: tuple[str, ...],
    host: str,
    port: int,
    access: Access | None = None,
) -> AsyncIterator[int]:
    """Runs a gRPC server with health and reflection while the block runs; yields its port.

    Without `access` everybody may call it, in plain text. Raises ConfigError if the port is taken.
    """
    # Imported here: the SDK uses this module too, and is installed without them.
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection

    from afd.aio_server import make_server

    interceptors = (*(access.interceptors if access else ()), _RefuseUndecodable())
    options = {**dict(_SERVER_OPTIONS), **dict(access.options if access else ())}
    server = make_server(interceptors, tuple(options.items()))
    add_services(server)
    address = joined(host, port)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        bound_port = _listen(server, address, access.credentials if access else None)
    except RuntimeError:
        raise ConfigError(
            f"cannot listen on {address}: the port is taken or the address is not this machine's"
        ) from None
    await server.start()
    for name in ("", *service_names):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    try:
        yield bound_port
    finally:
        await checks.enter_graceful_shutdown()
        await server.stop(_STOP_GRACE_S)


def _listen(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    return server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
