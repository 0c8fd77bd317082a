"""Which cores of one machine the processes that compute get."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from afd.config import parse_cpus

# Settings of processes that take turns on a core: the other side needs it at once, and wakes this one on it.
_TURNS = {"handoff_spin_us": 0}
# And of those that have one alone: nobody needs it while they wait, and while they compute the network can.
_ALONE = {"handoff_spin_us": 5000, "network_nice": 10}


class Cores(StrEnum):
    """How attention and FFN divide the cores: `shared`, both have all of them and take turns, which suits any work;
    `own`, each has its part and they work at the same time, which suits work that is balanced between them."""

    shared = "shared"
    own = "own"


@dataclass(frozen=True)
class Placement:
    """The cores of each attention replica and of each FFN shard, in order: the thread that waits for the other side
    keeps to the first one."""

    attention: list[Sequence[int]]
    ffn: list[Sequence[int]]
    defaults: Mapping[str, int] = field(default_factory=dict)  # settings, where the environment does not say

    @classmethod
    def of(cls, cores: Cores, num_attention: int, num_ffn: int, cpus: Sequence[int]) -> Placement:
        if cores is Cores.shared:
            return cls(split(cpus, num_attention), split(cpus, num_ffn), _TURNS)
        are_enough = num_attention + num_ffn <= len(cpus)
        parts = split(cpus, num_attention + num_ffn)
        return cls(parts[:num_attention], parts[num_attention:], _ALONE if are_enough else {})

    def settings(self, cpus: Sequence[int]) -> dict[str, Any]:
        """Of the process that has these cores."""
        defaults = {name: value for name, value in self.defaults.items() if f"AFD_{name.upper()}" not in os.environ}
        return {"threads": len(cpus), "cpus": ",".join(map(str, cpus)), **defaults}


def split(cpus: Sequence[int], num_parts: int) -> list[Sequence[int]]:
    """Contiguous parts of nearly equal size; where there are fewer cores than parts, each has one, and shares it."""
    num = len(cpus)
    if num_parts > num:
        return [[cpus[part % num]] for part in range(num_parts)]
    return [cpus[part * num // num_parts : (part + 1) * num // num_parts] for part in range(num_parts)]


def usable_cpus() -> list[int]:
    """What AFD_CPUS leaves of this machine, or all of it. Raises ValueError for what names no processors."""
    wanted = os.environ.get("AFD_CPUS")
    return list(parse_cpus(wanted) if wanted else sorted(os.sched_getaffinity(0)))
