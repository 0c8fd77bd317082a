"""Which cores of one machine the processes that compute get."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from afd.config import parse_cpus

_SPIN_TURNS_US = 0  # the other side needs the core at once, and wakes this one on it
_SPIN_ALONE_US = 5000  # nobody else needs the core meanwhile


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
    spin_us: int | None = None  # unless AFD_HANDOFF_SPIN_US says; None: as the settings say

    @classmethod
    def of(cls, cores: Cores, num_attention: int, num_ffn: int, cpus: Sequence[int]) -> Placement:
        if cores is Cores.shared:
            return cls(split(cpus, num_attention), split(cpus, num_ffn), _SPIN_TURNS_US)
        are_enough = num_attention + num_ffn <= len(cpus)
        parts = split(cpus, num_attention + num_ffn)
        return cls(parts[:num_attention], parts[num_attention:], _SPIN_ALONE_US if are_enough else None)

    def settings(self, cpus: Sequence[int]) -> dict[str, Any]:
        """Of the process that has these cores."""
        is_open = self.spin_us is not None and "AFD_HANDOFF_SPIN_US" not in os.environ
        spin = {"handoff_spin_us": self.spin_us} if is_open else {}
        return {"threads": len(cpus), "cpus": ",".join(map(str, cpus)), **spin}


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
