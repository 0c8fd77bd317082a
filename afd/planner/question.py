"""From what is written on the command line to a goal and the choices for it. Raises ConfigError for nonsense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from enum import StrEnum
from itertools import product
from pathlib import Path

from afd.errors import ConfigError
from afd.planner.accelerators import Accelerator, accelerator
from afd.planner.search import Goal
from afd.planner.shape import ModelShape
from afd.planner.stages import TRANSPORTS, Efficiencies, Precision, Prefill, Transport
from afd.planner.traffic import Drawn, Lengths, distribution, read_lengths

CONTEXT = 4096.0  # where nothing is said of it
_BOUNDS = {"imbalance": (1.0, 100.0), "step_s": (0.0, 10.0), "overlap": (0.0, 1.0), "link_overlap": (0.0, 1.0)}


class Width(StrEnum):
    """Of an element."""

    fp8 = "fp8"
    bf16 = "bf16"

    @property
    def num_bytes(self) -> float:
        return 1.0 if self is Width.fp8 else 2.0


def precisions(weights: Sequence[Width], kv: Sequence[Width]) -> list[Precision]:
    return [Precision(weights=one.num_bytes, kv=other.num_bytes) for one, other in product(weights, kv)]


def lengths(prompt: str | None, output: str | None, file: Path | None) -> Lengths | None:
    """None where nothing is said of them."""
    if file is not None:
        if prompt or output:
            raise ConfigError("--lengths has prompts and outputs: leave out --prompt and --output")
        return read_lengths(file)
    if prompt is None and output is None:
        return None
    if prompt is None or output is None:
        raise ConfigError("--prompt and --output go together: how long are both?")
    return Drawn(distribution(prompt), distribution(output))


def chosen(
    both: Sequence[str], attention: Sequence[str], ffn: Sequence[str], cards: dict[str, Accelerator]
) -> tuple[list[Accelerator], list[Accelerator]]:
    """Cards for attention, and for the FFN."""
    found = [[accelerator(name, cards) for name in dict.fromkeys([*both, *names])] for names in (attention, ffn)]
    if not any(found):
        raise ConfigError("name the cards to choose from, like --card H800 --card H20; `afd plan cards` shows them")
    if not all(found):
        raise ConfigError("name cards for both parts: --attention-card and --ffn-card, or --card for either")
    return found[0], found[1]


def positive(option: str, value: float) -> float:
    if not 0 < value < float("inf"):
        raise ConfigError(f"{option} {value:g}: give a number above 0")
    return value


def within(option: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise ConfigError(f"{option} {value} is not within {low}..{high}")
    return value


def microbatches(numbers: Sequence[int]) -> list[int]:
    return [within("--microbatches", number, 1, 16) for number in numbers]


def goal(
    shape: ModelShape,
    asked: Lengths | None,
    context: float | None,
    *,
    tpot_ms: float,
    ttft_ms: float | None,
    rate: float | None,
    efficiencies: Efficiencies,
) -> Goal:
    """Of requests that are `asked`, or of a context."""
    tpot_s = positive("--tpot-ms", tpot_ms) / 1e3
    if asked is None:
        if rate is not None or ttft_ms is not None:
            raise ConfigError("--rate and --ttft-ms need the lengths of requests: --prompt and --output, or --lengths")
        return Goal(shape, CONTEXT if context is None else context, tpot_s, efficiencies=efficiencies)
    if context is not None:
        raise ConfigError("--context follows from the lengths of prompts and outputs: leave one of them out")
    longest = asked.prompt_tokens + asked.output_tokens
    if longest > shape.max_context_tokens:
        raise ConfigError(
            f"requests of {longest:.0f} tokens in the mean are over {shape.name}'s limit, {shape.max_context_tokens}"
        )
    prefill = Prefill(asked.prompt_tokens / asked.output_tokens, asked.prompt_tokens / 2)
    return Goal(
        shape,
        asked.live_context,
        tpot_s,
        ttft_s=positive("--ttft-ms", ttft_ms) / 1e3 if ttft_ms is not None else None,
        tokens_per_s=positive("--rate", rate) * asked.output_tokens if rate is not None else None,
        prefill=prefill if ttft_ms is not None else Prefill(),
        output_tokens=asked.output_tokens,
        efficiencies=efficiencies,
    )


def transports(names: Sequence[str]) -> list[Transport]:
    for name in names:
        if name not in TRANSPORTS:
            raise ConfigError(f"--transport {name}: there are {' and '.join(TRANSPORTS)}")
    return [TRANSPORTS[name] for name in dict.fromkeys(names)]


def assume(assumptions: Sequence[str]) -> Efficiencies:
    """`memory=0.7`: efficiencies other than the stated ones."""
    known = {field.name for field in fields(Efficiencies)}
    values: dict[str, float] = {}
    for text in assumptions:
        name, _, value = text.partition("=")
        if name not in known:
            raise ConfigError(f"--assume {text}: there is no {name!r}; there are {', '.join(sorted(known))}")
        values[name] = _efficiency(text, name, value)
    return replace(Efficiencies(), **values)


def _efficiency(text: str, name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    low, high = _BOUNDS.get(name, (0.01, 1.0))
    if not low <= number <= high:
        raise ConfigError(f"--assume {text}: {name} is a number from {low:g} to {high:g}, like {name}={high:g}")
    return number
