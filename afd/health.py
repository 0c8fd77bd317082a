"""gRPC health checks in plain text on a port of their own, for probes, which have no certificate; and a probe.

The service "" is SERVING while this process's event loop answers, "ready" while it takes work: weights loaded, pairs
up, one forward passed, not told to stop. `python -m afd.health [SERVICE]` asks the process at AFD_HEALTH_PORT here.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc

from afd.address import joined
from afd.aio_server import make_server
from afd.errors import ConfigError
from afd.rpc import Context

ALIVE, READY = "", "ready"
_PROBE_TIMEOUT_S = 5.0
_SERVING, _NOT_SERVING = pb.HealthCheckResponse.SERVING, pb.HealthCheckResponse.NOT_SERVING


class _Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # it has no stubs
    def __init__(self, is_ready: Callable[[], bool]) -> None:
        self.is_ready = is_ready

    async def Check(self, request: pb.HealthCheckRequest, context: Context) -> pb.HealthCheckResponse:
        if request.service not in (ALIVE, READY):
            await context.abort(grpc.StatusCode.NOT_FOUND, f'there is "{ALIVE}" and "{READY}", no "{request.service}"')
        is_well = request.service == ALIVE or self.is_ready()
        return pb.HealthCheckResponse(status=_SERVING if is_well else _NOT_SERVING)


@contextlib.asynccontextmanager
async def answering_probes(host: str, port: int | None, is_ready: Callable[[], bool]) -> AsyncIterator[None]:
    """While the block runs; without a port nobody is answered. Raises ConfigError if the port is taken."""
    if port is None:
        yield
        return
    server = make_server((), (("grpc.so_reuseport", 0),))
    health_pb2_grpc.add_HealthServicer_to_server(_Health(is_ready), server)
    try:
        server.add_insecure_port(joined(host, port))
    except RuntimeError:
        raise ConfigError(f"cannot answer probes on {joined(host, port)}: the port is taken") from None
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)


def probe(service: str, port: int) -> str | None:
    """Why the process at a port here is not well; None if it is."""
    with grpc.insecure_channel(f"127.0.0.1:{port}", (("grpc.enable_http_proxy", 0),)) as channel:
        try:
            request = pb.HealthCheckRequest(service=service)
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=_PROBE_TIMEOUT_S)
        except grpc.RpcError as error:
            return str(error.details())
    return None if answer.status == _SERVING else "not ready"


if __name__ == "__main__":
    sys.exit(probe(sys.argv[1] if len(sys.argv) > 1 else ALIVE, int(os.environ.get("AFD_HEALTH_PORT", "0"))))
