"""What is asked: how often, and how long prompts and outputs are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from afd.errors import ConfigError

Tokens = NDArray[np.int64]
_MOST_TOKENS = 1 << 24
_MOST_SIGMA = 3.0  # of a lognormal: more has its mean from requests that never come


class Lengths(Protocol):
    """Of prompts and outputs, in tokens."""

    @property
    def prompt_tokens(self) -> float:
        """In the mean."""

    @property
    def output_tokens(self) -> float: ...

    @property
    def live_context(self) -> float:
        """theta = E[D P + D (D - 1) / 2] / E[D]: the context of a sequence in the mean over all decode steps, for
        prompts of P and outputs of D tokens (arXiv 2601.21351). Long outputs count in each of their steps, so it is
        more than the mean of P + D / 2."""

    def sample(self, rng: np.random.Generator, count: int) -> tuple[Tokens, Tokens]:
        """Prompts and outputs, at least one token each."""


@dataclass(frozen=True)
class Distribution:
    """Of whole numbers from 1 on."""

    mean: float
    mean_square: float
    draw: Callable[[np.random.Generator, int], NDArray[np.float64]]

    def sample(self, rng: np.random.Generator, count: int) -> Tokens:
        return np.clip(np.rint(self.draw(rng, count)), 1, _MOST_TOKENS).astype(np.int64)


@dataclass(frozen=True)
class Drawn:
    """Prompts and outputs that know nothing of one another."""

    prompt: Distribution
    output: Distribution

    @property
    def prompt_tokens(self) -> float:
        return self.prompt.mean

    @property
    def output_tokens(self) -> float:
        return self.output.mean

    @property
    def live_context(self) -> float:
        own = (self.output.mean_square - self.output.mean) / 2
        return self.prompt.mean + own / self.output.mean

    def sample(self, rng: np.random.Generator, count: int) -> tuple[Tokens, Tokens]:
        return self.prompt.sample(rng, count), self.output.sample(rng, count)


@dataclass(frozen=True)
class Recorded:
    """Requests that there were, one after the other; drawn from again as often as is needed. `at_s`: when they came, if
    that is known."""

    prompts: Tokens
    outputs: Tokens
    at_s: NDArray[np.float64] | None = None

    @property
    def prompt_tokens(self) -> float:
        return float(self.prompts.mean())

    @property
    def output_tokens(self) -> float:
        return float(self.outputs.mean())

    @property
    def live_context(self) -> float:
        outputs = self.outputs.astype(float)
        return float((outputs * self.prompts + outputs * (outputs - 1) / 2).sum() / outputs.sum())

    def sample(self, rng: np.random.Generator, count: int) -> tuple[Tokens, Tokens]:
        chosen = rng.integers(len(self.prompts), size=count)
        return self.prompts[chosen], self.outputs[chosen]


def distribution(text: str) -> Distribution:
    """`500`, `uniform:100,900`, `geometric:500` (mean) or `lognormal:500,1.2` (mean, sigma of the logarithm). Raises
    ConfigError."""
    kind, _, rest = text.partition(":") if ":" in text else ("fixed", "", text)
    try:
        found = _KINDS[kind](*(float(number) for number in rest.split(",")))
    except (KeyError, TypeError, ValueError):
        raise ConfigError(
            f"{text!r} is no length: give 500, uniform:100,900, geometric:500 or lognormal:500,1.2 (mean, sigma to 3)"
        ) from None
    if not 1 <= found.mean <= _MOST_TOKENS:
        raise ConfigError(f"a length of {text} is not within 1..{_MOST_TOKENS} tokens in the mean")
    return found


def _fixed(tokens: float) -> Distribution:
    return Distribution(tokens, tokens**2, lambda rng, count: np.full(count, tokens))


def _uniform(low: float, high: float) -> Distribution:
    """Of whole numbers, both ends among them."""
    if not 1 <= low <= high:
        raise ValueError
    mean, variance = (low + high) / 2, ((high - low + 1) ** 2 - 1) / 12
    return Distribution(
        mean,
        mean**2 + variance,
        lambda rng, count: rng.integers(int(low), int(high), count, endpoint=True).astype(float),
    )


def _geometric(mean: float) -> Distribution:
    return Distribution(mean, 2 * mean**2 - mean, lambda rng, count: rng.geometric(1 / mean, count).astype(float))


def _lognormal(mean: float, sigma: float) -> Distribution:
    if not 0 <= sigma <= _MOST_SIGMA or mean <= 0:
        raise ValueError
    location = np.log(mean) - sigma**2 / 2
    return Distribution(
        mean, mean**2 * float(np.exp(sigma**2)), lambda rng, count: rng.lognormal(location, sigma, count)
    )


_KINDS: dict[str, Callable[..., Distribution]] = {
    "fixed": _fixed,
    "uniform": _uniform,
    "geometric": _geometric,
    "lognormal": _lognormal,
}


def read_lengths(path: Path) -> Recorded:
    """A file with a JSON object per line, `{"prompt_tokens": 812, "output_tokens": 93}`; all of them may say when they
    came, `"at_s": 3.25`, in seconds from the start. Raises ConfigError, naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is not text'}") from None
    rows = [(number, _row(path, number, line)) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ConfigError(f"{path} has no requests")
    pairs = [_pair(path, number, row) for number, row in rows]
    if not any("at_s" in row for _, row in rows):
        prompts, outputs = np.array(pairs, np.int64).T
        return Recorded(prompts, outputs)
    at_s = np.array([_moment(path, number, row) for number, row in rows])
    order = np.argsort(at_s, kind="stable")
    prompts, outputs = np.array(pairs, np.int64)[order].T
    return Recorded(prompts, outputs, at_s[order])


def _row(path: Path, number: int, line: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    return row if isinstance(row, dict) else _refuse(path, number)


def _pair(path: Path, number: int, row: dict[str, object]) -> tuple[int, int]:
    prompt, output = row.get("prompt_tokens"), row.get("output_tokens")
    if not all(type(tokens) is int and 1 <= tokens <= _MOST_TOKENS for tokens in (prompt, output)):
        _refuse(path, number)
    return cast(int, prompt), cast(int, output)


def _moment(path: Path, number: int, row: dict[str, object]) -> float:
    at_s = row.get("at_s")
    if type(at_s) not in (int, float) or not 0 <= cast(float, at_s) < 1e9:
        raise ConfigError(f"{path}, line {number}: at_s is to be seconds from the start, in each line or in none")
    return float(cast(float, at_s))


def _refuse(path: Path, number: int) -> NoReturn:
    raise ConfigError(
        f'{path}, line {number}: it is not {{"prompt_tokens": N, "output_tokens": N}} with whole numbers from 1 on'
    )
