"""`afd layout`: into how many shards the FFN is split, for a mesh whose processes `afd up` does not run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path

from afd.errors import ConfigError, Mismatch, NotFound, PeerUnavailable
from afd.state.connection import RETRY_PAUSE_S, connect
from afd.state.registry import NO_LAYOUT, Layout, Registry

_LEASE_S = 5.0  # a layout is known for ten of them, and its replicas renew it every second
_PATIENCE_S = 20.0  # a pod that has just come is let through to Redis some seconds later


def show_or_change(url: str, ca: Path | None, mesh: str, num_shards: int | None) -> str:
    """For people: the layout that counts, after a change to `num_shards` if that is given. Raises as `change` does,
    NotFound for a mesh that has neither a layout nor a gateway, and ConfigError if no Redis answers."""
    layout = _ask(url, ca, mesh, lambda registry: change(registry, num_shards) if num_shards else _known(registry))
    return f"mesh {mesh} has {_described(layout)}"


def require(url: str, ca: Path | None, mesh: str, allowed: Collection[int], patience_s: float = _PATIENCE_S) -> str:
    """For whoever is about to leave a mesh with FFN shards of these numbers alone. Raises Mismatch if it goes by
    another one. A Redis that does not answer for `patience_s` hinders nobody: what comes may be what mends it."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            layout = _ask(url, ca, mesh, _present)
            break
        except (ConfigError, PeerUnavailable) as error:
            if time.monotonic() > deadline:
                return f"how many FFN shards mesh {mesh} has is not known, and nothing is refused: {error}"
        time.sleep(RETRY_PAUSE_S)
    if layout.epoch and layout.num_shards not in allowed:
        others = " or ".join(map(str, allowed))
        raise Mismatch(
            f"mesh {mesh} has {_described(layout)}, and nobody would serve with {others} alone: "
            f"keep the {layout.num_shards}, or have the others come up first and go to them by `afd layout`"
        )
    return f"mesh {mesh} has {_described(layout)}"


async def change(registry: Registry, num_shards: int) -> Layout:
    """Begins a new epoch with so many shards, unless they are that many already. Raises PeerUnavailable if a shard of
    the new layout has no replica yet: then all is as before."""
    present = await _present(registry)
    if present.num_shards == num_shards:
        return present
    there = {replica.shard for replica in await registry.replicas("ffn")}
    missing = [f"{shard}/{num_shards}" for shard in range(num_shards) if (shard, num_shards) not in there]
    if missing:
        raise PeerUnavailable(
            f"there is no replica of FFN shard {', '.join(missing)} in mesh {registry.mesh}, so it still has "
            f"{_described(present)}"
        )
    return await registry.set_layout(num_shards)


async def _present(registry: Registry) -> Layout:
    return await registry.keep_layout(NO_LAYOUT)


async def _known(registry: Registry) -> Layout:
    present = await _present(registry)
    if present == NO_LAYOUT and not await registry.replicas("gateway"):
        names = ", ".join(await registry.meshes()) or "none that this user may see"
        raise NotFound(f"there is no mesh {registry.mesh}; on this Redis there are: {names}")
    return present


def _ask(url: str, ca: Path | None, mesh: str, ask: Callable[[Registry], Awaitable[Layout]]) -> Layout:
    async def connected() -> Layout:
        async with connect(url, ca) as redis:
            return await ask(Registry(redis, _LEASE_S, mesh))

    return asyncio.run(connected())


def _described(layout: Layout) -> str:
    return f"{layout.num_shards} FFN shards, in epoch {layout.epoch}" if layout.epoch else "no layout yet"
