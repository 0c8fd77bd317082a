"""What the two services that compute do with torch before they serve."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from afd.config import ComputeSettings
from afd.errors import ConfigError

log = logging.getLogger(__name__)

T = TypeVar("T")

_SWITCH_INTERVAL_S = 1e-4

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ComputeThread(ThreadPoolExecutor):
    """The one thread of a process that computes: it loads, warms up, and runs step after step or batch after batch.

    If several did, OpenMP would keep a team of threads for each of them, and let none look out for its next work.
    The network's thread has to give way to it soon, and not only after the interpreter's usual 5 ms.
    """

    def __init__(self, threads: int = 1, cpus: Collection[int] = ()) -> None:
        super().__init__(1, "compute", _prepare, (threads, cpus))

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """What the function returns; the event loop goes on meanwhile."""
        return await asyncio.wrap_future(self.submit(function, *args))


def _prepare(threads: int, cpus: Collection[int]) -> None:
    torch.set_num_threads(threads)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    if cpus:
        os.sched_setaffinity(0, cpus)


def renice_thread(niceness: int) -> None:
    """Lowers the priority of the thread that calls it, the network's: arithmetic goes first. The compute thread, which
    runs already, keeps its own."""
    if niceness and sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)


def choose_device(settings: ComputeSettings) -> tuple[torch.dtype, torch.device]:
    """The dtype and device asked for. Raises ConfigError without that device, or without a processor asked for."""
    device = torch.device(settings.device)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"AFD_DEVICE={settings.device}: this machine has no such GPU; use AFD_DEVICE=cpu")
    if missing := set(settings.cpus) - os.sched_getaffinity(0):
        there = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        raise ConfigError(f"AFD_CPUS: this process may not use processor {min(missing)}, only {there}")
    return DTYPES[settings.dtype], device


def loading_progress(what: str) -> Callable[[int, int], None]:
    """Logs every tenth of the way."""

    def progress(done: int, total: int) -> None:
        if done * 10 // total > (done - 1) * 10 // total:
            log.info("loading %s: %d of %d layers", what, done, total)

    return progress
