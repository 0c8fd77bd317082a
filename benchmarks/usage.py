"""What the processes of a mesh, and its Redis, take up."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast

import psutil
from redis.asyncio import Redis

from afd.mesh import Mesh

# Of a process's memory what it has made itself: pages of its files come and go with the page cache.
_OWN_MEMORY = ("Pss_Anon:", "Pss_Shmem:", "SwapPss:")


@dataclass(frozen=True)
class Usage:
    """Of one process."""

    pid: int
    memory_mb: float
    num_files: int  # open ones, without the connections to Redis, which are pooled
    num_threads: int

    @classmethod
    def of(cls, pid: int) -> Self:
        process = psutil.Process(pid)
        lines = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
        memory_kib = sum(int(line[1]) for line in lines if line[0] in _OWN_MEMORY)
        num_files = process.num_fds() - len(process.net_connections("unix"))
        return cls(pid, memory_kib * 1024 / 1e6, num_files, process.num_threads())


def usages(mesh: Mesh) -> dict[str, Usage]:
    """Of each process that is alive, by its replica_id, and of "redis"."""
    assert mesh.embedded is not None
    pids = {s.replica_id: s.process.pid for s in mesh.services if s.process and s.alive}
    return {name: Usage.of(pid) for name, pid in (pids | {"redis": mesh.embedded.process.pid}).items()}


@dataclass(frozen=True)
class Sample:
    """Of all processes, by replica_id, "redis" and "main", and of Redis's data."""

    at_s: float
    processes: Mapping[str, Usage]
    num_keys: int
    data_mb: float

    @classmethod
    async def of(cls, mesh: Mesh, redis: Redis) -> Self:
        gc.collect()  # of this process, which makes the load, it is not looked for what waits for that
        memory = cast(dict[str, int], await redis.info("memory"))
        return cls(
            time.monotonic(),
            usages(mesh) | {"main": Usage.of(os.getpid())},
            await redis.dbsize(),
            memory["used_memory"] / 1e6,
        )


async def keys_of(redis: Redis) -> frozenset[str]:
    return frozenset([key.decode() async for key in redis.scan_iter(count=1000)])


def shm_files() -> frozenset[str]:
    return frozenset(path.name for path in Path("/dev/shm").iterdir())
