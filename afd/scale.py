"""Changing the counts of a running mesh: first all that is missing comes up, then what is too much drains."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence

from afd.errors import AfdError, ConfigError, PeerUnavailable
from afd.mesh import POLL_S, STOP_ORDER, STOP_TIMEOUT_S, Mesh, MeshOptions, Seat, Service
from afd.scrape import scrape
from afd.state.connection import patiently
from afd.state.registry import NO_LAYOUT, Registry

_SWITCH_PATIENCE_S = 30.0

Say = Callable[[str], None]


async def scale(mesh: Mesh, wanted: MeshOptions, say: Say) -> None:
    """Makes the mesh what `wanted` counts, one process after the other, while its requests go on; `say` hears of each.

    Raises ConfigError if it cannot be, or if a process does not come up: then everything is as before. Raises
    PeerUnavailable if Redis does not take the new layout in time: then the old replicas run on beside the new ones.
    """
    _refuse_collocated(mesh.options, wanted)
    await asyncio.to_thread(wanted.check)
    say(f"{counts(mesh.options)} -> {counts(wanted)}")
    kept, surplus, missing = _differences(mesh.services, wanted)
    async with mesh.registry() as registry:
        try:
            for seat in missing:
                await _bring_up(mesh, kept, seat, wanted, registry, say)
            await _until_paired(mesh)
        except (AfdError, OSError) as error:
            await _undo(mesh, say)
            raise ConfigError(f"{error}; so all is as before: {counts(mesh.options)}") from None
        mesh.services += mesh.passing
        mesh.passing.clear()
        mesh.options = wanted
        if wanted.ffn:
            await _switch_layout(wanted.ffn, registry, say)
    for service in surplus:
        mesh.services.remove(service)
        mesh.passing.append(service)
        await _drain(mesh, service, say)
    mesh.arrange(mesh.services, wanted)


def counts(options: MeshOptions) -> str:
    """For people: attention 2, ffn 3x1, gateways 1."""
    return f"attention {options.attention}, ffn {options.ffn}x{options.ffn_replicas}, gateways {options.gateways}"


def _refuse_collocated(present: MeshOptions, wanted: MeshOptions) -> None:
    if not present.ffn and (wanted.ffn, wanted.ffn_replicas) != (present.ffn, present.ffn_replicas):
        raise ConfigError(
            "the FFN of this mesh is inside its attention replicas (--ffn 0): start it with --ffn 1 first"
        )


def _differences(services: Sequence[Service], wanted: MeshOptions) -> tuple[list[Service], list[Service], list[Seat]]:
    """Who has a seat, who has none, in the order of leaving, and the seats that are empty."""
    empty = Counter(wanted.seats)
    kept: list[Service] = []
    surplus: list[Service] = []
    for service in services:
        (kept if empty[service.seat] > 0 else surplus).append(service)
        empty[service.seat] -= 1
    surplus.sort(key=lambda service: (STOP_ORDER.index(service.role), -service.index))
    return kept, surplus, list(empty.elements())


async def _bring_up(
    mesh: Mesh, kept: Sequence[Service], seat: Seat, wanted: MeshOptions, registry: Registry, say: Say
) -> None:
    """Raises ConfigError for a process that ends or takes too long."""
    start_s = time.monotonic()
    service = mesh.new_service(seat)
    mesh.passing.append(service)
    mesh.arrange([*kept, *mesh.passing], wanted)
    service.start()
    await mesh.until_ready(mesh.passing, registry)
    assert service.replica is not None
    say(f"{_name(service)} is ready at {service.replica.address}, after {time.monotonic() - start_s:.1f} s")


async def _undo(mesh: Mesh, say: Say) -> None:
    for service in mesh.passing[::-1]:
        await _drain(mesh, service, say)
    mesh.arrange(mesh.services, mesh.options)


async def _until_paired(mesh: Mesh) -> None:
    """Every attention replica has a pair with every new FFN replica, so that no step will wait for one."""
    attention = [service for service in [*mesh.services, *mesh.passing] if service.role == "attention"]
    ffn = {service.replica_id for service in mesh.passing if service.role == "ffn"}
    deadline = time.monotonic() + mesh.options.startup_timeout_s
    while missing := [one for one in attention if not ffn <= await asyncio.to_thread(_paired, one)]:
        for service in mesh.passing:
            service.refuse_end()
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{missing[0].replica_id} has not reached every new FFN replica within "
                f"{mesh.options.startup_timeout_s:g} s"
            )
        await asyncio.sleep(POLL_S)


def _paired(attention: Service) -> set[str]:
    """The FFN replicas that this attention replica has a pair with, as its metrics say."""
    assert attention.replica is not None
    try:
        samples = [name.split("/") for name in scrape(str(attention.replica.metrics_address))]
    except PeerUnavailable:
        return set()
    return {labels[0] for name, *labels in samples if name == "afd_handoff_transport"}


async def _switch_layout(num_shards: int, registry: Registry, say: Say) -> None:
    """Has the FFN split into so many shards from now on. Raises PeerUnavailable without Redis."""

    async def switch() -> None:
        if (await registry.keep_layout(NO_LAYOUT)).num_shards != num_shards:
            layout = await registry.set_layout(num_shards)
            say(f"the layout is {num_shards} FFN shards, in epoch {layout.epoch}")

    try:
        await patiently(switch, _SWITCH_PATIENCE_S)
    except PeerUnavailable as error:
        raise PeerUnavailable(f"{error}; the old FFN replicas run on beside the new ones: scale again") from None


async def _drain(mesh: Mesh, service: Service, say: Say) -> None:
    """Ends one of those that pass; it is killed when that takes too long."""
    start_s = time.monotonic()
    service.terminate()
    while service.alive and time.monotonic() < start_s + STOP_TIMEOUT_S:
        await asyncio.sleep(POLL_S)
    service.wait(0)
    mesh.passing.remove(service)
    say(f"{_name(service)} has ended, after {time.monotonic() - start_s:.1f} s")


def _name(service: Service) -> str:
    shard = service.settings.get("shard")
    return f"{service.replica_id} (shard {shard})" if shard else service.replica_id
