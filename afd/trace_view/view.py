"""What is drawn of a step, what it adds up to, and the words and colours that all drawings share."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from afd.errors import ConfigError
from afd.trace_view.flights import Flight, flights
from afd.trace_view.steps import PARTS, PHASES, Part, Phase, Step


class Bar(NamedTuple):
    lane: int  # 0 is attention, 1 + i is FFN shard i
    kind: Part | Phase
    layer_idx: int
    microbatch: int
    start_ns: int
    end_ns: int

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns


def bars_of(step: Step) -> list[Bar]:
    """All that took any time; in one lane they may overlap."""
    bars = [Bar(0, each.part, each.layer_idx, each.microbatch, each.start_ns, each.end_ns) for each in step.intervals]
    bars += [
        Bar(1 + flight.handoff.shard, phase, flight.handoff.layer_idx, flight.handoff.microbatch, start_ns, end_ns)
        for flight in flights(step)
        for phase, start_ns, end_ns in flight.phases
    ]
    return [bar for bar in bars if bar.duration_ns > 0]


@dataclass(frozen=True)
class View:
    """The part of a step from start_ns to end_ns, as bars in lanes."""

    step: Step
    layers: range
    start_ns: int
    end_ns: int

    @classmethod
    def of(cls, step: Step, layers: range | None) -> View:
        """All of the step, or from the first to the last that happened for these layers. Raises ConfigError."""
        if layers is None:
            return cls(step, range(step.num_layers), 0, step.duration_ns)
        bars = [bar for bar in bars_of(step) if bar.layer_idx in layers]
        if not bars:
            asked = "-".join(str(layer) for layer in sorted({*layers[:1], *layers[-1:]})) or "none"
            raise ConfigError(f"the step has layers 0 to {step.num_layers - 1}; asked for was {asked}")
        existing = range(layers[0], min(layers[-1] + 1, step.num_layers))
        start_ns, end_ns = min(bar.start_ns for bar in bars), max(bar.end_ns for bar in bars)
        return cls(step, existing, max(0, start_ns), min(end_ns, step.duration_ns))

    @property
    def duration_ns(self) -> int:
        return max(1, self.end_ns - self.start_ns)

    @property
    def whole(self) -> bool:
        return self.duration_ns == self.step.duration_ns

    @cached_property
    def bars(self) -> list[Bar]:
        """Cut off where the view ends."""
        return [
            bar._replace(start_ns=max(bar.start_ns, self.start_ns), end_ns=min(bar.end_ns, self.end_ns))
            for bar in bars_of(self.step)
            if bar.end_ns > self.start_ns and bar.start_ns < self.end_ns
        ]

    @cached_property
    def flights(self) -> list[Flight]:
        return [
            flight
            for flight in flights(self.step)
            if flight.handoff.arrived_ns > self.start_ns and flight.handoff.sent_ns < self.end_ns
        ]

    @property
    def lanes(self) -> list[str]:
        return ["attention", *map(self.step.shard_name, range(self.step.num_shards))]

    def lane(self, lane: int) -> list[Bar]:
        """One lane's bars, none overlapping."""
        return _flattened([bar for bar in self.bars if bar.lane == lane])


def _flattened(bars: list[Bar]) -> list[Bar]:
    """Of what happens at once only the most telling: a computation hides a queue, and that a frame on its way."""
    cuts = sorted({time for bar in bars for time in (bar.start_ns, bar.end_ns)})
    owners: list[Bar | None] = [None] * len(cuts)
    for bar in sorted(bars, key=lambda bar: PHASES.index(bar.kind) if bar.kind in PHASES else 0):
        for cut in range(bisect_left(cuts, bar.start_ns), bisect_left(cuts, bar.end_ns)):
            owners[cut] = bar
    return [
        bar._replace(start_ns=start_ns, end_ns=end_ns)
        for bar, (start_ns, end_ns) in zip(owners, pairwise(cuts), strict=False)
        if bar
    ]


@dataclass(frozen=True)
class Side:
    """How one side spent the step, in nanoseconds: what it did, and why it did nothing in its bubble."""

    name: str
    busy: dict[str, int]
    bubble: dict[str, int]  # empty where the two are collocated: while the one computes, the other cannot

    @property
    def busy_ns(self) -> int:
        return sum(self.busy.values())

    @property
    def bubble_ns(self) -> int:
        return sum(self.bubble.values())


@dataclass(frozen=True)
class ShardAccount:
    name: str
    busy_ns: int  # computing any frame of this step
    way_ns: int  # computing none, while a frame was on its way
    queue_ns: int  # computing none, while a frame was in its queue
    num_frames: int  # of the view's layers, not those of others that reach into it; so are the two below
    phases: Counter[Phase]  # of all frames together
    num_awaited: int  # frames whose answer was the last one that attention waited for


@dataclass(frozen=True)
class Account:
    duration_ns: int
    parts: Counter[str]  # of attention
    waiting: Counter[Phase]  # of the waiting: what the shard that answered last was doing
    shards: list[ShardAccount]
    collocated: bool

    def share(self, duration_ns: float) -> str:
        return f"{100 * duration_ns / self.duration_ns:.0f} %"

    @property
    def sides(self) -> list[Side]:
        """Attention and every shard, in the order of their lanes."""
        return [self._attention, *map(self._shard, self.shards)]

    @property
    def _attention(self) -> Side:
        busy: dict[str, int] = {part: self.parts[part] for part in PARTS if part != "waiting"}
        busy["other"] = max(0, self.duration_ns - self.parts.total())
        way_ns, queue_ns = self.waiting["way"], self.waiting["queue"]
        ffn_ns = self.parts["waiting"] - way_ns - queue_ns
        bubble = {"on the way": way_ns, "queued": queue_ns, "FFN at work": ffn_ns}
        return Side("attention", busy, {} if self.collocated else bubble)

    def _shard(self, shard: ShardAccount) -> Side:
        attention_ns = self.duration_ns - shard.busy_ns - shard.way_ns - shard.queue_ns
        bubble = {"on the way": shard.way_ns, "queued": shard.queue_ns, "attention at work": attention_ns}
        return Side(shard.name, {"computing": shard.busy_ns}, {} if self.collocated else bubble)


def account(view: View) -> Account:
    parts: Counter[str] = Counter()
    for bar in view.bars:
        if bar.lane == 0:
            parts[bar.kind] += bar.duration_ns
    waiting: Counter[Phase] = Counter()
    awaited: Counter[int] = Counter()
    for wait, last in _waits(view):
        awaited[last.handoff.shard] += last.handoff.layer_idx in view.layers
        for phase, start_ns, end_ns in last.phases:
            waiting[phase] += max(0, min(end_ns, wait.end_ns) - max(start_ns, wait.start_ns))
    shards = [_shard_account(view, shard, awaited[shard]) for shard in range(view.step.num_shards)]
    return Account(view.duration_ns, parts, waiting, shards, view.step.collocated)


def _waits(view: View) -> Iterator[tuple[Bar, Flight]]:
    """Each time attention waited, with the frame that was answered last."""
    by_arrival = sorted(view.flights, key=lambda flight: flight.handoff.arrived_ns)
    last = {(flight.handoff.layer_idx, flight.handoff.microbatch): flight for flight in by_arrival}
    for bar in view.bars:
        if bar.kind == "waiting" and (bar.layer_idx, bar.microbatch) in last:
            yield bar, last[bar.layer_idx, bar.microbatch]


def _shard_account(view: View, shard: int, num_awaited: int) -> ShardAccount:
    own = [each for each in view.flights if each.handoff.shard == shard and each.handoff.layer_idx in view.layers]
    phases: Counter[Phase] = Counter()
    for flight in own:
        for phase, start_ns, end_ns in flight.phases:
            phases[phase] += end_ns - start_ns
    times: Counter[str] = Counter()
    for bar in view.lane(1 + shard):
        times[bar.kind] += bar.duration_ns
    name = view.step.shard_name(shard)
    return ShardAccount(name, times["compute"], times["way"], times["queue"], len(own), phases, num_awaited)


def verdict(step: Step, layers: range | None = None) -> str:
    """One sentence: who waits for whom. Raises ConfigError for layers that the step does not have."""
    view = View.of(step, layers)
    sums = account(view)
    whole = "the step" if view.whole else "this part"
    if not sums.shards:
        return f"Nothing was handed to an FFN in {whole}."
    longest = max(sums.shards, key=lambda shard: shard.busy_ns)
    computed = sums.share(longest.busy_ns)
    if step.collocated:
        return f"Collocated: attention took {sums.share(sums.parts['attention'])} of {whole} and the FFN {computed}."
    waited = f"Attention waited {sums.share(sums.parts['waiting'])} of {whole}{_reason(sums)}"
    if len(sums.shards) == 1:
        return f"{waited}; the FFN computed {computed} of it."
    last = max(sums.shards, key=lambda shard: shard.num_awaited)
    times = f"{last.num_awaited} of {sum(shard.num_awaited for shard in sums.shards)} times"
    joint = " and" if last is longest else f", {longest.name}"
    return f"{waited}; {last.name} answered last ({times}){joint} computed longest ({computed})."


def _reason(sums: Account) -> str:
    if 100 * sums.parts["waiting"] < sums.duration_ns or not sums.waiting.total():
        return ""
    reasons = {"way": "frames were on the way", "queue": "frames were queued at the FFN", "compute": "the FFN computed"}
    return f", mostly while {reasons[max(PHASES, key=lambda phase: sums.waiting[phase])]}"


_WHITE, _BLACK = "#ffffff", "#000000"
_MICROBATCH_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_MICROBATCH_INKS = (_WHITE, _BLACK, _WHITE, _BLACK, _BLACK, _WHITE)
_KIND_COLOURS = {"schedule": ("#8b949e", _BLACK), "lm_head": ("#7f5bb5", _WHITE), "sample": ("#8c564b", _WHITE)}


def colours(kind: str, microbatch: int) -> tuple[str, str]:
    """Of the bar, and of what is written on it."""
    of_microbatch = microbatch % len(_MICROBATCH_COLOURS)
    return _KIND_COLOURS.get(kind, (_MICROBATCH_COLOURS[of_microbatch], _MICROBATCH_INKS[of_microbatch]))


def letter(microbatch: int) -> str:
    return chr(ord("A") + microbatch % 26)


def in_words(duration_ns: float) -> str:
    """Three digits with a unit."""
    if not duration_ns:
        return "0"
    units = (("s", 1e9), ("ms", 1e6), ("µs", 1e3))
    unit, unit_ns = next((each for each in units if duration_ns >= each[1]), ("ns", 1))
    value = duration_ns / unit_ns
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def heading(view: View) -> tuple[str, str]:
    """The title, and the facts for the line beneath."""
    step = view.step
    name = "Decode step" if step.index is None else f"Decode step {step.index}"
    title = f"{name} of {step.replica}: {in_words(step.duration_ns)}"
    if not view.whole:
        title += f", here layers {view.layers[0]} to {view.layers[-1]}: {in_words(view.duration_ns)}"
    counts = [
        (step.num_sequences, "sequence", "s"),
        (step.num_tokens, "token", "s"),
        (step.num_layers, "layer", "s"),
        (step.num_microbatches, "microbatch", "es"),
        (step.num_shards, "FFN shard", "s"),
    ]
    facts = [f"{number} {noun}{'' if number == 1 else ending}" for number, noun, ending in counts]
    if step.collocated:
        facts[-1] = "FFN in-process"
    elif step.transports:
        facts[-1] += f" over {' and '.join(step.transports)}"
    return title, ", ".join(facts)


def ticks(view: View, max_ticks: int) -> tuple[str, list[tuple[int, str]]]:
    """The axis' unit, and (time, label) at round numbers."""
    unit, unit_ns = ("ms", 1e6) if view.end_ns >= 2e6 else ("µs", 1e3)
    spacings = (digit * 10**power for power in range(12) for digit in (1, 2, 5))
    spacing = next(each for each in spacings if view.duration_ns / each <= max_ticks)
    first = -(-view.start_ns // spacing) * spacing
    return unit, [(time, f"{time / unit_ns:g}") for time in range(first, view.end_ns + 1, spacing)]


def layer_labels(view: View, columns: int) -> list[tuple[int, str]]:
    """(when a layer's attention first begins, its number), of every n-th layer where all do not fit."""
    starts: dict[int, int] = {}
    for bar in view.bars:
        if bar.kind == "attention" and bar.layer_idx in view.layers:
            starts[bar.layer_idx] = min(bar.start_ns, starts.get(bar.layer_idx, bar.start_ns))
    room_ns = view.duration_ns * (1 + len(str(view.step.num_layers))) / columns
    for every in (1, 2, 5, 10, 20, 50, 100):
        labels = [(start_ns, str(layer)) for layer, start_ns in sorted(starts.items()) if layer % every == 0]
        if all(right - left >= room_ns for (left, _), (right, _) in pairwise(labels)):
            break
    return labels
