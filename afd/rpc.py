"""gRPC as every service and client here uses it: options, errors, health, reflection."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from afd.errors import AfdError, ConfigError, InternalError, InvalidRequest, error_for_grpc_code

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 256 << 20
ACCEPTED = "afd-accepted"  # metadata that comes before the first message: the work was taken on
_STOP_GRACE_S = 1.0

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),
)
_SERVER_OPTIONS = (
    *CHANNEL_OPTIONS[:4],
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),
)

Context = grpc.aio.ServicerContext[Any, Any]


def to_error(error: grpc.RpcError) -> AfdError:
    """The error of our tree for a failed call."""
    code, details = error.code(), error.details()
    return error_for_grpc_code(code.name, details or code.name)


async def abort(context: Context, error: AfdError) -> None:
    """Ends the call with the error's status and sentence."""
    await context.abort(grpc.StatusCode[error.grpc_code], str(error))


def metadata_of(context: Context) -> dict[str, str]:
    """The call's text metadata, a `traceparent` for instance."""
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


@asynccontextmanager
async def aborting(context: Context) -> AsyncIterator[None]:
    """Errors raised inside end the call with their status; an unforeseen one is logged and says no more than that."""
    try:
        yield
    except AfdError as error:
        await abort(context, error)
    except (grpc.aio.AbortError, grpc.RpcError):
        raise
    except Exception:
        log.exception("a call failed")
        await abort(context, InternalError("internal error; the service's log has it"))


class _RefuseUndecodable(grpc.aio.ServerInterceptor):
    """Bytes that are no message are the caller's fault: INVALID_ARGUMENT, and no traceback in the log."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        ours = handler_call_details.method.startswith("/afd.")
        if handler is None or handler.request_streaming or not ours:
            return handler

        def decode(data: bytes) -> Any:
            try:
                return handler.request_deserializer(data)
            except DecodeError:
                return None

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
        await abort(context, InvalidRequest("the bytes are no message of this method"))


@asynccontextmanager
async def serving(
    add_services: Callable[[grpc.aio.Server], None], service_names: tuple[str, ...], host: str, port: int
) -> AsyncIterator[int]:
    """Runs a gRPC server with health and reflection while the block runs; yields its port.

    Raises ConfigError if the port is taken.
    """
    # Imported here: the SDK uses this module too, and is installed without them.
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection

    server = grpc.aio.server(options=_SERVER_OPTIONS, interceptors=[_RefuseUndecodable()])
    add_services(server)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        bound_port = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError:
        raise ConfigError(
            f"cannot listen on {host}:{port}: the port is taken or the address is not this machine's"
        ) from None
    await server.start()
    for name in ("", *service_names):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    try:
        yield bound_port
    finally:
        await checks.enter_graceful_shutdown()
        await server.stop(_STOP_GRACE_S)
