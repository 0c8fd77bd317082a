"""How fast a deployment decodes, and what binds it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from afd.errors import ConfigError
from afd.planner.deployment import Deployment
from afd.planner.stages import Stages, Workload


@dataclass(frozen=True)
class Estimate:
    """What a deployment does with `batch` sequences per group and microbatch; `binding` keeps it from more."""

    deployment: Deployment
    workload: Workload
    batch: int
    stages: Stages
    binding: str

    @property
    def tpot_s(self) -> float:
        return float(self.stages.tpot_s(self.deployment.microbatches))

    def ttft_s(self, output_tokens: float) -> float:
        """Of a prompt that does not wait, where steps prefill as many prompts as they end: a group's share of a step is
        its batch's, so a prompt takes `output_tokens` / batch steps, after one that it comes in the midst of."""
        return (math.ceil(output_tokens / self.batch) + 1) * self.tpot_s

    @property
    def sequences(self) -> int:
        """That decode at once, in the whole deployment."""
        return self.batch * self.deployment.microbatches * self.deployment.num_groups

    @property
    def tokens_per_s(self) -> float:
        return self.sequences / self.tpot_s

    @property
    def tokens_per_s_per_card(self) -> float:
        return self.tokens_per_s / self.deployment.num_cards

    @property
    def dollars_per_million_tokens(self) -> float:
        return self.deployment.dollars_per_hour / 3600 / self.tokens_per_s * 1e6


def estimate(deployment: Deployment, workload: Workload, tpot_s: float) -> Estimate:
    """With as many sequences as keep the TPOT and the memory. Raises ConfigError if not one per group does."""
    microbatches, most = deployment.microbatches, room(deployment, workload)

    def takes_s(batch: int) -> float:
        return float(deployment.stages(workload, batch).tpot_s(microbatches))

    alone = takes_s(1)
    if alone > tpot_s:
        raise ConfigError(
            f"{deployment.name}: a token takes {alone * 1e3:.1f} ms with one sequence per card, not {tpot_s * 1e3:g} ms"
        )
    batch = _largest(most, lambda batch: takes_s(batch) <= tpot_s)
    found = deployment.stages(workload, batch)
    return Estimate(deployment, workload, batch, found, "memory" if batch == most else found.slowest)


def room(deployment: Deployment, workload: Workload) -> int:
    """The most sequences per group and microbatch that fit the memory. Raises ConfigError if none does."""
    workload.shape.check_context(workload.context)
    most = int(deployment.free_bytes(workload) / deployment.kv_bytes(workload) / deployment.microbatches)
    if most < 1:
        raise ConfigError(
            f"{deployment.name}: {deployment.microbatches} sequences of {workload.context:g} tokens do not fit beside "
            "the weights"
        )
    return most


def _largest(most: int, keeps: Callable[[int], bool]) -> int:
    """By halving: who keeps it with more keeps it with fewer. One does."""
    batch, too_many = 1, most + 1
    while too_many - batch > 1:
        middle = (batch + too_many) // 2
        batch, too_many = (middle, too_many) if keeps(middle) else (batch, middle)
    return batch
