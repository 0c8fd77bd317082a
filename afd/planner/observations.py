"""What a running mesh took, as its trace or its metrics tell: the times that `calibration` fits."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from afd.errors import ConfigError
from afd.scrape import samples
from afd.trace_view import Step, load_steps
from afd.trace_view.steps import Part

_LEAST_STEPS = 4  # of one load: fewer are no mean
_MOST_PREFILL = 0.02  # of a window's tokens
_HOW_TO_SCRAPE = (
    "append an attention replica's /metrics to it under one load after the other, at the beginning and the end of each"
)


@dataclass(frozen=True)
class Setting:
    """A mesh under a load: of `streams` in all that decode at once, each after `context` tokens in the mean. Every
    attention replica cuts its own into so many microbatches."""

    num_attention: int
    num_ffn: int  # shards
    microbatches: int
    streams: float
    context: float

    @property
    def name(self) -> str:
        return f"{self.num_attention}A{self.num_ffn}F"

    @property
    def sequences(self) -> float:
        """Of one microbatch."""
        return self.streams / (self.num_attention * self.microbatches)

    @property
    def is_lone(self) -> bool:
        """Whether there is one microbatch, which waits for no other."""
        return self.num_attention * self.microbatches == 1

    @property
    def most_computing(self) -> int:
        """Processes at once: all shards, and attention replicas whose microbatches are not all at the FFN."""
        return self.num_ffn + min(self.num_attention, self.num_attention * self.microbatches - 1)


@dataclass(frozen=True)
class Observation:
    """The mean of steps under one load: seconds of a step, and of one microbatch through all layers."""

    setting: Setting
    num_layers: int
    num_steps: int
    step_s: float
    attention_s: float
    beside_s: float  # logits, sampling, scheduling, and what has no name
    ffn_s: float  # computing, on each shard

    @property
    def crossing_s(self) -> float:
        """What is left of the step of a lone microbatch: its ways."""
        return self.step_s - self.attention_s - self.beside_s - self.ffn_s


def read_observations(paths: Sequence[Path]) -> list[Observation]:
    """Of traces (AFD_TRACE_FILE) and of files with scrapes of an attention replica, in any order.

    Raises ConfigError for a file that is neither, or in which nothing decodes.
    """
    return [observation for path in paths for observation in _read(path)]


def _read(path: Path) -> list[Observation]:
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} cannot be read: it is no file")
    try:
        with path.open("rb") as file:
            is_trace = file.read(1) == b"{"
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    return of_steps(path, load_steps(path)) if is_trace else of_scrapes(path, _scrapes(path))


def of_steps(path: Path, steps: Sequence[Step]) -> list[Observation]:
    """One for each load; of all replicas in the trace together."""
    if any(step.collocated for step in steps):
        raise ConfigError(f"{path} has steps with the FFN in the attention process: trace a mesh with FFN shards")
    decoding = [step for step in steps if step.num_tokens == step.num_sequences and step.handoffs]
    if any("afd.num_context_tokens" not in step.attributes for step in decoding):
        raise ConfigError(f"{path} does not say how long contexts were: it is of an older mesh, trace this one")
    num_attention = len({step.replica for step in decoding})
    loads: dict[object, list[Step]] = defaultdict(list)
    for step in decoding:
        loads[step.num_shards, step.num_microbatches, step.num_sequences, _size_of(_context(step))].append(step)
    found = [_of_load(own, num_attention) for own in loads.values() if len(own) >= _LEAST_STEPS]
    if not found:
        raise ConfigError(
            f"{path} has {len(decoding)} steps that only decode, and no load with {_LEAST_STEPS} of them: trace more"
        )
    return found


def _context(step: Step) -> float:
    """Of a sequence, in the mean."""
    return float(step.attributes["afd.num_context_tokens"]) / step.num_sequences


def _size_of(context: float) -> int:
    """Contexts that are alike: within a factor of two."""
    return int(math.log2(context))


def _of_load(steps: Sequence[Step], num_attention: int) -> Observation:
    first = steps[0]
    step_s = fmean(step.duration_ns for step in steps) / 1e9
    attention_s = fmean(_part_s(step, "attention") for step in steps)
    away_s = fmean(_part_s(step, "send", "waiting") for step in steps)
    return Observation(
        Setting(
            num_attention,
            first.num_shards,
            first.num_microbatches,
            first.num_sequences * num_attention,
            fmean(map(_context, steps)),
        ),
        first.num_layers,
        len(steps),
        step_s,
        attention_s / first.num_microbatches,
        (step_s - attention_s - away_s) / first.num_microbatches,
        fmean(map(_computing_s, steps)) / first.num_shards / first.num_microbatches,
    )


def _part_s(step: Step, *parts: Part) -> float:
    """Without the intervals of the next step, in which frames of this one came back."""
    own = [each for each in step.intervals if each.part in parts and each.end_ns <= step.duration_ns]
    return sum(each.end_ns - each.start_ns for each in own) / 1e9


def _computing_s(step: Step) -> float:
    """Of all shards, for the frames that came back in this step."""
    return sum(each.compute_ns for each in step.handoffs if each.arrived_ns <= step.duration_ns) / 1e9


def _scrapes(path: Path) -> list[dict[str, float]]:
    """One after the other: a new one begins where a name comes again."""
    try:
        return [samples(part) for part in _parts(path.read_text(encoding="utf-8"))]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"{path} is neither a trace (AFD_TRACE_FILE) nor Prometheus metrics") from None


def _parts(text: str) -> Iterator[str]:
    begun: list[str] = []
    seen: set[str] = set()
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            if line in seen:
                yield "\n".join(begun) + "\n"
                begun, seen = [], set()
            seen.add(line)
        begun.append(line)
    yield "\n".join(begun) + "\n"


def of_scrapes(path: Path, scrapes: Sequence[Mapping[str, float]]) -> list[Observation]:
    """Of one attention replica, between a scrape and the next; where it started again or prefilled there is none. A
    gateway's scrape among them tells how many attention replicas there are."""
    own = [each for each in scrapes if "afd_steps" in each]
    if not own:
        raise ConfigError(f"{path} has no metrics of an attention replica: {_HOW_TO_SCRAPE}")
    if any("afd_context_tokens" not in each for each in own):
        raise ConfigError(f"{path} does not say how long contexts were: it is of an older mesh, scrape this one")
    num_attention = max(1, *(int(each.get("afd_replicas/attention", 0)) for each in scrapes))
    windows = [_between(before, after) for before, after in pairwise(own)]
    found = [of_window(window, num_attention) for window in windows if _decodes(window)]
    if not found:
        raise ConfigError(f"{path} has {len(own)} scrapes, and nothing decodes between two of them: {_HOW_TO_SCRAPE}")
    if any(not observation.setting.num_ffn for observation in found):
        raise ConfigError(f"{path} is of a replica that has the FFN inside: scrape a mesh with FFN shards")
    return found


def _between(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def _decodes(window: Mapping[str, float]) -> bool:
    tokens, sampled = window["afd_step_tokens"], window["afd_generated_tokens"]
    return window["afd_steps"] >= _LEAST_STEPS and 0 < tokens <= sampled * (1 + _MOST_PREFILL)


def of_window(window: Mapping[str, float], num_attention: int) -> Observation:
    """What the counters of an attention replica, or of all together, have grown by; named as `afd.scrape` does."""
    steps, batches = window["afd_steps"], window["afd_microbatches"]
    shards = [name.partition("/")[2] for name in window if name.startswith("afd_handoff_ffn_bubble_seconds/")]
    part_s = {part: window[f"afd_step_part_seconds/{part}"] for part in ("attention", "send", "receive")}
    ffn_s = sum(window[f"afd_handoff_ffn_compute_seconds/{shard}"] for shard in shards)
    return Observation(
        Setting(
            num_attention=num_attention,
            num_ffn=len(shards),
            microbatches=round(batches / steps),
            streams=num_attention * window["afd_generated_tokens"] / steps,
            context=window["afd_context_tokens"] / window["afd_step_tokens"],
        ),
        num_layers=round(sum(window[f"afd_handoffs/{shard}"] for shard in shards) / max(1, len(shards)) / batches),
        num_steps=int(steps),
        step_s=window["afd_step_seconds"] / steps,
        attention_s=part_s["attention"] / batches,
        beside_s=(window["afd_step_seconds"] - sum(part_s.values())) / batches,
        ffn_s=ffn_s / max(1, len(shards)) / batches,
    )
