"""How long the stages of a mesh take, fitted to what it took; and so what it would take with other numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from afd.errors import ConfigError
from afd.planner.observations import Observation, Setting
from afd.planner.shape import ModelShape
from afd.planner.shared_cores import Machine, Pace, Simulation, Work

_FACTORS = tuple(1 + step / 20 for step in range(25))  # that are tried
_ROUNDING_S = 1e-9
_BUSY = 0.85  # of the time: more is what binds

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    """Seconds of a microbatch through all layers: a constant, and so much for each of what `names` says."""

    names: tuple[str, ...]
    coefficients: tuple[float, ...]
    error: float  # median of what it is off where it was fitted, relative

    def __call__(self, *amounts: float) -> float:
        return float(np.dot(self.coefficients, (1.0, *amounts)))


def fit_line(names: tuple[str, ...], amounts: Sequence[Sequence[float]], seconds: Sequence[float]) -> Line:
    """Least squares of relative errors, no coefficient below 0: the best of all sets of terms.

    Where the amounts do not tell two terms apart there is only one of them.
    """
    columns = np.column_stack([np.ones(len(seconds)), np.array(amounts, dtype=float).reshape(len(seconds), -1)])
    relative = columns / np.array(seconds)[:, None]
    subsets = (
        list(own) for size in range(1, columns.shape[1] + 1) for own in combinations(range(columns.shape[1]), size)
    )
    found = [fit for own in subsets if (fit := _least_squares(relative, own)) is not None]
    coefficients = min(found, key=lambda fit: round(float(_squares(relative @ fit - 1)), 12))
    off = np.abs(relative @ coefficients - 1)
    return Line(("once", *names), tuple(map(float, coefficients)), float(np.median(off)))


def _least_squares(relative: Vector, terms: Sequence[int]) -> Vector | None:
    """With these terms alone; None if one is negative, or they cannot be told apart."""
    own, _, rank, _ = np.linalg.lstsq(relative[:, terms], np.ones(len(relative)), rcond=1e-9)
    if rank < len(terms) or (own < 0).any():
        return None
    coefficients = np.zeros(relative.shape[1])
    coefficients[terms] = own
    return coefficients


def _squares(values: Vector) -> float:
    return float(values @ values)


@dataclass(frozen=True)
class Prediction:
    setting: Setting
    pace: Pace

    @property
    def tokens_per_s(self) -> float:
        return self.setting.streams / self.pace.step_s

    @property
    def binding(self) -> str:
        """What is busy nearly always; nothing is where sides wait for one another in turn."""
        shares = {"FFN": self.pace.ffn, "attention": self.pace.attention, "cores": self.pace.cores}
        name = max(shares, key=lambda one: shares[one])
        return name if shares[name] >= _BUSY else "turns"


@dataclass(frozen=True)
class Calibration:
    """The stages of a mesh as they were fitted. `num_read` of `ffn` are billions of the FFN's weights."""

    shape: ModelShape
    machine: Machine
    attention: Line
    beside: Line
    ffn: Line
    crossing: Line
    observations: Sequence[Observation]

    def work(self, setting: Setting) -> Work:
        sequences, layers = setting.sequences, self.shape.num_layers
        reads = _reads(self.shape, sequences)
        once, per_read, per_token = self.ffn.coefficients
        compute_s = (per_read * sum(reads) + per_token * sequences) / setting.num_ffn
        return Work(
            attention=self.attention(sequences, sequences * setting.context) / layers,
            beside=self.beside(sequences),
            ffn=[once / layers + compute_s * read / sum(reads) for read in reads],
            crossing=self.crossing(sequences, setting.num_ffn - 1) / layers,
        )

    def predict(self, setting: Setting) -> Prediction:
        simulation = Simulation(
            self.work(setting), setting.num_attention, setting.num_ffn, setting.microbatches, self.machine
        )
        return Prediction(setting, simulation.run())

    @property
    def errors(self) -> list[float]:
        """Of the steps that it was fitted to, relative."""
        return [self.predict(each.setting).pace.step_s / each.step_s - 1 for each in self.observations]

    def is_within(self, setting: Setting) -> bool:
        """Whether sequences of a microbatch and contexts are within what was measured."""
        measured = [each.setting for each in self.observations]
        return all(
            min(map(of, measured)) * 0.99 <= of(setting) <= max(map(of, measured)) * 1.01
            for of in (_sequences_of, _context_of)
        )


def _sequences_of(setting: Setting) -> float:
    return setting.sequences


def _context_of(setting: Setting) -> float:
    return setting.context


def _reads(shape: ModelShape, num_tokens: float) -> list[float]:
    """Billions of weights of each layer's FFN that so many tokens need."""
    return [float(ffn.parameters_read(num_tokens)) / 1e9 for _, ffn in shape.layers]


def calibrate(observations: Sequence[Observation], shape: ModelShape, cores: int | None = None) -> Calibration:
    """cores: what all processes of the measured mesh share, if they do. Raises ConfigError where the loads are too few
    to tell what depends on what."""
    if other := {each.num_layers for each in observations} - {shape.num_layers}:
        raise ConfigError(
            f"{shape.name} has {shape.num_layers} layers, and what was measured {other.pop()}: name its own --model"
        )
    crowded = [each for each in observations if cores and each.setting.most_computing > cores]
    others = [each for each in observations if each not in crowded]
    _check(others)
    together = cores and any(each.setting.most_computing > 1 for each in others)
    slowdowns = [Machine(cores, factor) for factor in (_FACTORS if together else (1.0,))]
    found = min((_fit(others, shape, machine) for machine in slowdowns), key=_squared_errors)
    crowdings = [replace(found.machine, crowding=factor) for factor in (_FACTORS if crowded else (1.0,))]
    fits = (replace(found, machine=machine, observations=crowded or others) for machine in crowdings)
    return replace(min(fits, key=_squared_errors), observations=observations)


def _squared_errors(calibration: Calibration) -> float:
    return sum(error**2 for error in calibration.errors)


def _check(observations: Sequence[Observation]) -> None:
    sizes = {round(each.setting.sequences, 1) for each in observations}
    if len(sizes) < 2:
        raise ConfigError(
            f"microbatches of {', '.join(map('{:g}'.format, sizes)) or 'no'} sequences do not tell what one more adds: "
            "measure other numbers of streams, too, with no more processes than cores"
        )
    if not any(each.setting.is_lone for each in observations):
        raise ConfigError(
            "every step has several microbatches, in whose shadow the ways are: measure one with "
            "AFD_MICROBATCHES=1, or a single stream, too"
        )


def _fit(observations: Sequence[Observation], shape: ModelShape, machine: Machine) -> Calibration:
    """With the times that each side would have taken alone."""
    loads = [each.setting for each in observations]
    own = [_alone(each, machine.slowdown) for each in observations]
    lone = [each for each in own if each.setting.is_lone]

    def line(names: tuple[str, ...], amounts: Callable[[Setting], Sequence[float]], seconds: Sequence[float]) -> Line:
        return fit_line(names, [amounts(load) for load in loads], seconds)

    return Calibration(
        shape=shape,
        machine=machine,
        attention=line(
            ("sequence", "context token"),
            lambda load: (load.sequences, load.sequences * load.context),
            [each.attention_s for each in own],
        ),
        beside=line(("sequence",), lambda load: (load.sequences,), [each.beside_s for each in own]),
        ffn=line(
            ("10^9 weights", "token"),
            lambda load: (sum(_reads(shape, load.sequences)) / load.num_ffn, load.sequences / load.num_ffn),
            [each.ffn_s for each in own],
        ),
        crossing=fit_line(
            ("sequence", "further shard"),
            [(each.setting.sequences, each.setting.num_ffn - 1) for each in lone],
            [max(_ROUNDING_S, observed.crossing_s) for observed in observations if observed.setting.is_lone],
        ),
        observations=observations,
    )


def _alone(observed: Observation, slowdown: float) -> Observation:
    """Without what the other side's computing took meanwhile."""
    setting = observed.setting
    rounds = setting.num_attention * setting.microbatches
    if setting.is_lone:
        beside_attention, beside_ffn = 0.0, float(setting.num_ffn > 1)
    else:
        beside_attention = min(1.0, rounds * observed.ffn_s / observed.step_s)
        attention_s = observed.attention_s + observed.beside_s
        beside_ffn = 1.0 if setting.num_ffn > 1 else min(1.0, rounds * attention_s / observed.step_s)
    longer_attention, longer_ffn = (1 + (slowdown - 1) * share for share in (beside_attention, beside_ffn))
    return replace(
        observed,
        attention_s=observed.attention_s / longer_attention,
        beside_s=observed.beside_s / longer_attention,
        ffn_s=observed.ffn_s / longer_ffn,
    )
