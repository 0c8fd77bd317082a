"""Ending asyncio's tasks."""

from __future__ import annotations

import asyncio

_CANCEL_AGAIN_S = 0.5


async def end(task: asyncio.Task[None]) -> None:
    """Cancels a task and waits for it; again, if the cancellation got lost on its way, as it can in what it awaits."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=_CANCEL_AGAIN_S)
