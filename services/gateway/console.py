"""The web console: one page, and what it asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, Response
from google.protobuf import json_format

from afd.trace_view import to_svg
from services.gateway.auth import Gatekeeper
from services.gateway.topology import Topology

_FILES = Path(__file__).parent / "static"
# The page loads nothing from elsewhere, is in no frame, and sends nothing away.
_POLICY = "default-src 'self'; img-src blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
_Width = Annotated[int, Query(ge=300, le=1600)]  # pixels; a narrower timeline has no room for its words
PAGE_PATHS = ("/console", "/console/console.js", "/console/console.css")  # need no API key: they say nothing


def console(topology: Topology, gatekeeper: Gatekeeper, model_name: str) -> APIRouter:
    router = APIRouter(prefix="/console")

    @router.get("")
    async def page() -> Response:
        headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
        return FileResponse(_FILES / "console.html", headers=headers)

    @router.get("/console.js")
    async def script() -> Response:
        return FileResponse(_FILES / "console.js")

    @router.get("/console.css")
    async def style() -> Response:
        return FileResponse(_FILES / "console.css")

    @router.get("/mesh")
    async def mesh(request: Request) -> dict[str, Any]:
        await gatekeeper.check_operator(request.state.caller)
        found = json_format.MessageToDict(
            await topology.mesh(), preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        return {"model": model_name, **found}

    @router.get("/step")
    async def step(request: Request, replica: str, slowest: bool = False, width: _Width = 960) -> Response:
        await gatekeeper.check_operator(request.state.caller)
        found = await topology.step(replica, slowest)
        return Response(to_svg(found, width=width), media_type="image/svg+xml")

    return router
