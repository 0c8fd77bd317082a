"""Several streams as one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


async def merged(
    streams: Sequence[AsyncGenerator[T, None]],
    guard: Coroutine[Any, Any, NoReturn] | None = None,
    hang_up: Callable[[], Awaitable[None]] | None = None,
) -> AsyncGenerator[T, None]:
    """The items of all streams as they come, until all have ended.

    What a stream raises, or the guard, which runs beside them, is raised here; then, and when this is closed, all are:
    hang_up ends them from without, and those that it does not end are cancelled.
    """
    items: asyncio.Queue[T | BaseException | None] = asyncio.Queue()

    async def follow(stream: AsyncGenerator[T, None]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for item in stream:
                    items.put_nowait(item)
            items.put_nowait(None)
        except Exception as error:
            items.put_nowait(error)

    async def watch(guard: Coroutine[Any, Any, NoReturn]) -> None:
        try:
            await guard
        except Exception as error:
            items.put_nowait(error)

    tasks = [asyncio.create_task(follow(stream)) for stream in streams]
    if guard is not None:
        tasks.append(asyncio.create_task(watch(guard)))
    num_open = len(streams)
    try:
        while num_open:
            item = await items.get()
            if isinstance(item, BaseException):
                try:
                    raise item
                finally:
                    del item  # its traceback has this frame, which would keep all of the streams with it
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        if hang_up is not None:
            await hang_up()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
