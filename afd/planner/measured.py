"""`afd plan --measured`: what a running mesh would do with other numbers, for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product
from statistics import median

from rich.table import Table

from afd.planner.calibration import Calibration, Line, Prediction
from afd.planner.observations import Observation, Setting
from afd.planner.titled import titled

_RATIOS = ((1, 1), (2, 1), (1, 2), (2, 2))


def settings(
    observations: Sequence[Observation],
    attention: Sequence[int],
    ffn: Sequence[int],
    microbatches: Sequence[int],
    streams: Sequence[int],
    context: Sequence[int],
) -> list[Setting]:
    """All that is asked for. Where nothing is said: some ratios, and of the rest what the largest load had."""
    measured = max((each.setting for each in observations), key=lambda one: (one.streams, one.context))
    ratios = list(product(attention or (1,), ffn or (1,))) if attention or ffn else _RATIOS
    return [
        Setting(*ratio, *rest)
        for rest in product(
            microbatches or (measured.microbatches,),
            streams or (round(measured.streams), 2 * round(measured.streams)),
            context or (round(measured.context),),
        )
        for ratio in ratios
        if rest[1] >= ratio[0] * rest[0]  # else some have nothing to do
    ]


def tables(calibration: Calibration, wanted: Sequence[Setting]) -> Iterator[Table]:
    yield _stages(calibration)
    yield _measured(calibration)
    yield _predicted(calibration, wanted)


def notes(calibration: Calibration, wanted: Sequence[Setting]) -> Iterator[str]:
    machine = calibration.machine
    if machine.cores:
        yield (
            f"all processes share {machine.cores} cores: everything takes {machine.slowdown:.2f} times as long while "
            f"several compute, and {machine.crowding:.2f} times that while more do than there are cores"
        )
        if not any(each.setting.most_computing > machine.cores for each in calibration.observations):
            yield "no more processes than cores were measured at once: what that costs beside the turns is left out"
    else:
        yield "each process is taken to have cores of its own; --cores N says how many all share"
    if not any(each.setting.num_ffn > 1 for each in calibration.observations):
        yield "one shard was measured: what a further one adds to the ways is left out"
    if not all(map(calibration.is_within, wanted)):
        yield "* beyond the sizes of microbatches, or the contexts, that were measured"


def as_json(calibration: Calibration, wanted: Sequence[Setting]) -> dict[str, object]:
    stages = {name: asdict(line) for name, line in _lines(calibration).items()}
    return {
        "stages": stages,
        "machine": asdict(calibration.machine),
        "measured": [asdict(each) for each in calibration.observations],
        "errors": calibration.errors,
        "predicted": [_as_json(calibration.predict(setting)) for setting in wanted],
    }


def _as_json(found: Prediction) -> dict[str, object]:
    return {
        **asdict(found.setting),
        "tokens_per_s": found.tokens_per_s,
        "tpot_s": found.pace.step_s,
        "binding": found.binding,
        "attention_busy": found.pace.attention,
        "ffn_busy": found.pace.ffn,
    }


def _lines(calibration: Calibration) -> dict[str, Line]:
    return {
        "attention": calibration.attention,
        "beside": calibration.beside,
        "FFN": calibration.ffn,
        "ways": calibration.crossing,
    }


def _stages(calibration: Calibration) -> Table:
    table = titled("what a microbatch takes, all layers, alone", "", "µs", "off, median")
    table.columns[1].justify = "left"
    for name, line in _lines(calibration).items():
        terms = zip(line.names, line.coefficients, strict=True)
        fitted = " + ".join(_term(name, seconds) for name, seconds in terms if seconds)
        table.add_row(name, fitted, f"{line.error:.1%}")
    return table


def _term(name: str, seconds: float) -> str:
    return f"{seconds * 1e6:.4g}" if name == "once" else f"{seconds * 1e6:.4g} per {name}"


def _measured(calibration: Calibration) -> Table:
    errors = calibration.errors
    title = f"measured, and what the fit says: {median(map(abs, errors)):.1%} off in the median"
    table = _table(title, "tokens/s", "ms a token", "fit", "off")
    for observed, error in zip(calibration.observations, errors, strict=True):
        speed = observed.setting.streams / observed.step_s
        fitted_ms = 1e3 * observed.step_s * (1 + error)
        table.add_row(
            *_row(observed.setting), f"{speed:.0f}", f"{1e3 * observed.step_s:.1f}", f"{fitted_ms:.1f}", f"{error:+.1%}"
        )
    return table


def _predicted(calibration: Calibration, wanted: Sequence[Setting]) -> Table:
    table = _table("predicted", "tokens/s", "ms a token", "attention busy", "FFN busy", "bound by")
    for setting in wanted:
        found = calibration.predict(setting)
        beyond = "" if calibration.is_within(setting) else "*"
        table.add_row(
            *_row(setting),
            f"{found.tokens_per_s:.0f}{beyond}",
            f"{1e3 * found.pace.step_s:.1f}",
            f"{found.pace.attention:.0%}",
            f"{found.pace.ffn:.0%}",
            found.binding,
        )
    return table


def _table(title: str, *columns: str) -> Table:
    return titled(title, "", "micro-\nbatches", "streams", "context", *columns)


def _row(setting: Setting) -> tuple[str, ...]:
    return setting.name, f"{setting.microbatches}", f"{setting.streams:.4g}", f"{setting.context:.0f}"
