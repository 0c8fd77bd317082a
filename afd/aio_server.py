"""grpcio's asyncio server, with what it leaves to whoever calls it mended."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

import grpc.aio
from grpc._cython import cygrpc
from grpc.aio._server import Server

Interceptors = tuple[grpc.aio.ServerInterceptor, ...]
Options = tuple[tuple[str, int], ...]


def make_server(interceptors: Interceptors, options: Options) -> grpc.aio.Server:
    """A server for registered methods only."""
    logging.getLogger(cygrpc.__name__).addFilter(_is_of_ours)
    if hasattr(cygrpc.AioServer, "_request_registered_call"):
        return cast(grpc.aio.Server, _Server(interceptors, options))
    return grpc.aio.server(options=options, interceptors=interceptors)  # a release that reads paths one by one


class _Calls(cygrpc.AioServer):  # type: ignore[misc]  # it has no stubs
    """By itself it ends, with all calls, at the first one whose path is not UTF-8. Every method here is registered: a
    call that does not come by a method's name is for none, and is answered before anybody reads what it is for."""

    async def _request_call(self) -> Any:
        loop, nobody = asyncio.get_running_loop(), cygrpc._MethodResolver([], {})
        refusals: set[asyncio.Task[None]] = set()
        while True:
            call = await super()._request_call()
            refusal = cygrpc._handle_rpc("", nobody, (), call, loop, False)  # UNIMPLEMENTED
            task = loop.create_task(cygrpc._schedule_rpc_coro(refusal, call, loop, ""))
            refusals.add(task)
            task.add_done_callback(refusals.discard)


class _Server(Server):
    def __init__(self, interceptors: Interceptors, options: Options) -> None:
        self._loop = cygrpc.get_working_loop()
        self._server = _Calls(self._loop, None, (), interceptors, options, None)


def _is_of_ours(record: logging.LogRecord) -> bool:
    """grpcio logs with a traceback what callers do: metadata that is not UTF-8, which may be a key, and to be gone just
    when the status is sent."""
    return not str(record.msg).startswith(("Invalid encoding on", "ExecuteBatchError raised in core"))
