"""A TCP proxy before a server of this machine: delays, holds, cuts and refuses connections, and loses replies."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

CHUNK_BYTES = 1 << 16


class Proxy:
    """`delay_s` is of each way. Its loop runs in a thread of its own."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.delay_s = 0.0
        self.port = 0
        self._replies_to_lose = 0
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def refuse(self) -> None:
        """Nobody listens any more, and who is connected is cut off."""
        self._call(self._stop_listening)
        self.cut()

    def accept(self) -> None:
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(5)

    def cut(self) -> None:
        """Resets all connections."""
        self._call(self._abort)

    def hold(self) -> None:
        """Connections stay, and nothing comes through."""
        self._call(self._flowing.clear)

    def go_on(self) -> None:
        self._call(self._flowing.set)

    def lose_replies(self, count: int) -> None:
        """What the server answers next is not delivered: the connections are reset instead."""
        self._replies_to_lose = count

    def _call(self, function: Callable[[], object]) -> None:
        done = threading.Event()
        self._loop.call_soon_threadsafe(function)
        self._loop.call_soon_threadsafe(done.set)
        assert done.wait(5)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def _stop_listening(self) -> None:
        if self._server:
            self._server.close()

    def _abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, server_writer}
        self._start(self._forward(reader, server_writer, is_reply=False))
        self._start(self._forward(server_reader, writer, is_reply=True))

    def _start(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_reply: bool) -> None:
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        self._start(self._deliver(under_way, writer))
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                if is_reply and self._replies_to_lose:
                    self._replies_to_lose -= 1
                    self._abort()
                    break
                under_way.put_nowait((time.monotonic() + self.delay_s, data))
        under_way.put_nowait((0.0, b""))

    async def _deliver(self, under_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        while True:
            due_s, data = await under_way.get()
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            await self._flowing.wait()
            if not data:
                writer.close()
                return
            writer.write(data)


@contextlib.contextmanager
def tcp_proxy(target_port: int) -> Iterator[Proxy]:
    proxy = Proxy(target_port)
    thread = threading.Thread(target=proxy._loop.run_forever)
    thread.start()
    try:
        proxy.accept()
        yield proxy
    finally:
        proxy.refuse()
        proxy._loop.call_soon_threadsafe(proxy._loop.stop)
        thread.join()
