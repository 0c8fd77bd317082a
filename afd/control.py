"""How `afd scale` talks to `afd up`: over a Unix socket that is named after the mesh's gateway.

The request is a line of JSON, the counts that are wanted. Lines with what was done answer it, and at last one that says
how it ended; while there is nothing to say an empty one comes every second.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from afd.errors import AfdError, ConfigError
from afd.mesh import Mesh
from afd.processes import remove_deserted
from afd.scale import Say, counts, scale

_SIGN_OF_LIFE_S = 1.0
_PATIENCE_S = 30.0  # `afd up` starts a lost Redis before it goes on


@contextlib.asynccontextmanager
async def listening(mesh: Mesh, say: Say) -> AsyncIterator[None]:
    """Scales the mesh as it is asked, while the block runs; `say` hears of it, too."""
    path = _socket_path(mesh.gateway.address)
    remove_deserted(path.parent, f"afd-up-{os.getuid()}-*.sock")
    control = _Control(mesh, say)
    mask = os.umask(0o177)  # for this user alone
    try:
        server = await asyncio.start_unix_server(control.answer, path)
    except OSError as error:
        raise ConfigError(f"the socket for `afd scale` cannot be made: {error}") from None
    finally:
        os.umask(mask)
    try:
        yield
    finally:
        server.close()
        path.unlink(missing_ok=True)


async def ask(gateway: str, wanted: dict[str, int], say: Say) -> str:
    """Has the mesh behind a gateway scaled, the first one of several with commas; `say` hears of what is done. Returns
    the counts at the end.

    Raises ConfigError with a sentence for what cannot be done, or if no `afd up` answers on this machine.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(_socket_path(gateway.partition(",")[0]))
    except OSError:
        raise ConfigError(
            f"no `afd up` of yours serves at {gateway} on this machine: --target is where it says that gRPC is"
        ) from None
    with contextlib.closing(writer):
        writer.write(json.dumps(wanted).encode() + b"\n")
        async for kind, text in _answers(reader):
            if kind == "done":
                return text
            if kind == "error":
                raise ConfigError(text)
            say(text)
    raise ConfigError("`afd up` has ended before all was done")


async def _answers(reader: asyncio.StreamReader) -> AsyncIterator[tuple[str, str]]:
    try:
        while line := await asyncio.wait_for(reader.readline(), _PATIENCE_S):
            if line.strip():
                kind, text = json.loads(line)
                yield kind, text
    except TimeoutError:
        raise ConfigError(f"`afd up` has not given a sign of life for {_PATIENCE_S:g} s") from None
    except ConnectionError:
        return


class _Control:
    """What `afd up` does about a connection."""

    def __init__(self, mesh: Mesh, say: Say) -> None:
        self.mesh = mesh
        self.say = say
        self._scaling = asyncio.Lock()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """What was begun goes on when the one who asked has left."""

        def tell(kind: str, text: str) -> None:
            if not writer.is_closing():
                writer.write(json.dumps([kind, text]).encode() + b"\n")

        def say(text: str) -> None:
            self.say(text)
            tell("step", text)

        with contextlib.closing(writer):
            if not (line := await asyncio.wait_for(reader.readline(), _PATIENCE_S)):
                return  # who only wants to know whether anybody is here
            scaling = asyncio.create_task(self._scale(json.loads(line), say))
            while not (await asyncio.wait([scaling], timeout=_SIGN_OF_LIFE_S))[0]:
                if not writer.is_closing():
                    writer.write(b"\n")
            try:
                tell("done", await scaling)
            except AfdError as error:
                self.say(str(error))
                tell("error", str(error))

    async def _scale(self, wanted: dict[str, int], say: Say) -> str:
        if self._scaling.locked():
            raise ConfigError("this mesh is being scaled; ask again when that has ended")
        async with self._scaling:
            await scale(self.mesh, dataclasses.replace(self.mesh.options, **wanted), say)  # type: ignore[arg-type]
        return counts(self.mesh.options)


def _socket_path(gateway: str) -> Path:
    return Path(tempfile.gettempdir()) / f"afd-up-{os.getuid()}-{gateway.replace('localhost:', '127.0.0.1:')}.sock"
