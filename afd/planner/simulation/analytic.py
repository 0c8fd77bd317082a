"""What the estimate says of a scenario: sequences, and the time per token that keeps so many of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from afd.errors import ConfigError
from afd.planner.simulation.costs import Costs
from afd.planner.simulation.scenario import Rate, Replay, Scenario, Streams
from afd.planner.simulation.sequences import Ints
from afd.planner.simulation.source import Sampled
from afd.planner.stages import Prefill

_ROUNDS = 1000
_OVERLOAD = 10  # more than that would only fill the memory with requests that wait
_SAMPLE = 1 << 16


@dataclass(frozen=True)
class Expected:
    """`saturated`: more comes than is decoded, and requests wait ever longer."""

    sequences: float
    tpot_s: float
    saturated: bool

    @property
    def tokens_per_s(self) -> float:
        return self.sequences / self.tpot_s


def under_way(lengths: Sampled, count: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Context and tokens to come of sequences that decode at some moment, long after the start: a long output is more
    likely to be met by as much, and is met at any of its tokens."""
    prompts, outputs = lengths.sample(rng, _SAMPLE)
    met = rng.choice(len(outputs), size=count, p=outputs / outputs.sum())
    prompts, outputs = prompts[met], outputs[met]
    decoded = rng.integers(outputs)
    return prompts + decoded, outputs - decoded


def longest_tokens(scenario: Scenario, costs: Costs) -> int:
    """Of a prompt with its output, as the model and the memory of a group of cards have it. Raises ConfigError if the
    mean is longer."""
    shape, lengths = scenario.workload.shape, scenario.lengths
    tokens = np.arange(1, shape.max_context_tokens + 1)
    longest = int(np.searchsorted(costs.kv_bytes(tokens), scenario.deployment.free_bytes(scenario.workload), "right"))
    mean = lengths.prompt_tokens + lengths.output_tokens
    shape.check_context(max(mean, scenario.workload.context))
    if mean > longest:
        raise ConfigError(f"a request of {mean:g} tokens does not fit beside the weights: {longest} tokens do")
    return longest


def most_sequences(scenario: Scenario, costs: Costs) -> int:
    """That the memory of all replicas holds in their whole length, or that are allowed."""
    free = scenario.deployment.free_bytes(scenario.workload)
    context, output = under_way(scenario.lengths, _SAMPLE, np.random.default_rng(0))
    fit = max(1, int(free / costs.kv_bytes(context + output).mean()))
    return min(fit, scenario.max_sequences or fit) * scenario.deployment.num_groups * scenario.units


def expected(scenario: Scenario, most: int) -> Expected:
    """With at most so many sequences. Raises ConfigError if the streams are more."""
    arrivals = scenario.arrivals
    if isinstance(arrivals, Streams):
        if arrivals.count > most:
            raise ConfigError(f"{arrivals.count} streams do not fit: {most} do, in all replicas together")
        return Expected(arrivals.count, _tpot_s(scenario, arrivals.count), False)
    per_s = arrivals.per_s if isinstance(arrivals, Rate) else _mean_rate(arrivals, scenario.seconds)
    sequences = 0.0
    for _ in range(_ROUNDS):
        before, sequences = sequences, per_s * scenario.lengths.output_tokens * _tpot_s(scenario, sequences)
        if sequences >= most:
            return _saturated(scenario, most, per_s)
        if sequences - before < 1e-6 * sequences:
            break
    return Expected(sequences, _tpot_s(scenario, sequences), False)


def _saturated(scenario: Scenario, most: int, per_s: float) -> Expected:
    found = Expected(most, _tpot_s(scenario, most), True)
    kept_up = found.tokens_per_s / scenario.lengths.output_tokens
    if per_s > _OVERLOAD * kept_up:
        raise ConfigError(f"{per_s:g} requests per second are far more than the {kept_up:.3g} that can be decoded")
    return found


def _mean_rate(replay: Replay, seconds: float) -> float:
    return float(np.count_nonzero(replay.at_s < seconds)) / seconds


def _tpot_s(scenario: Scenario, sequences: float) -> float:
    deployment, lengths = scenario.deployment, scenario.lengths
    batch = sequences / (scenario.units * deployment.num_groups * deployment.microbatches)
    prompt = lengths.prompt_tokens
    prefill = Prefill(prompt / lengths.output_tokens, prompt / 2) if scenario.prefill_chunk else Prefill()
    workload = replace(scenario.workload, prefill=prefill)
    return float(deployment.stages(workload, batch).tpot_s(deployment.microbatches))
