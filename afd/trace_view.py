"""Where a decode step's time went, drawn from the spans that the services append to a file.

Everything is placed on the attention host's clock. Of an FFN shard only intervals are known, which it measured on its
own clock; they are put into the middle of their handoff, so the way there and the way back are taken to last equally
long. Times are nanoseconds since the step's start unless a name says otherwise.
"""

from __future__ import annotations

import json
import statistics
import textwrap
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args
from xml.sax.saxutils import escape

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from afd.errors import ConfigError

Part = Literal["schedule", "attention", "send", "waiting", "lm_head", "sample"]
Phase = Literal["way", "queue", "compute"]
PARTS: tuple[Part, ...] = get_args(Part)
PHASES: tuple[Phase, ...] = get_args(Phase)

_PART_OF_SPAN: dict[str, Part] = {**{part: part for part in PARTS}, "receive": "waiting"}
_HOW_TO_RECORD = "record one with AFD_TRACE_SAMPLE=1 AFD_TRACE_FILE=trace.jsonl set for `afd up`"


@dataclass(frozen=True)
class Interval:
    """What the attention replica did from when to when; layer and microbatch are -1 where it belongs to none."""

    part: Part
    layer_idx: int
    microbatch: int
    start_ns: int
    end_ns: int


@dataclass(frozen=True)
class Handoff:
    """One frame's way to one FFN shard and back; the shard measured queue and compute on its own host."""

    shard: int
    layer_idx: int
    microbatch: int
    sent_ns: int
    arrived_ns: int
    queue_ns: int
    compute_ns: int

    @property
    def way_ns(self) -> int:
        """Both ways together: what neither the queue nor the computation explains."""
        return max(0, self.arrived_ns - self.sent_ns - self.queue_ns - self.compute_ns)

    @property
    def phases(self) -> Iterator[tuple[Phase, int, int]]:
        """(phase, start, end) in order, never outside the handoff."""
        ends = [self.sent_ns + self.way_ns // 2]
        ends.append(min(self.arrived_ns, ends[-1] + self.queue_ns))
        ends.append(min(self.arrived_ns, ends[-1] + self.compute_ns))
        yield "way", self.sent_ns, ends[0]
        yield "queue", ends[0], ends[1]
        yield "compute", ends[1], ends[2]
        yield "way", ends[2], self.arrived_ns


@dataclass(frozen=True)
class Step:
    """One decode step of one attention replica. `start_ns` is since the epoch, on that replica's host."""

    index: int
    replica: str
    start_ns: int
    duration_ns: int
    attributes: Mapping[str, Any]
    intervals: tuple[Interval, ...]
    handoffs: tuple[Handoff, ...]

    @property
    def num_sequences(self) -> int:
        return int(self.attributes.get("afd.num_sequences", 0))

    @property
    def num_tokens(self) -> int:
        return int(self.attributes.get("afd.num_tokens", 0))

    @property
    def num_layers(self) -> int:
        return 1 + max((interval.layer_idx for interval in self.intervals), default=-1)

    @property
    def num_microbatches(self) -> int:
        return 1 + max((interval.microbatch for interval in self.intervals), default=-1)

    @property
    def num_shards(self) -> int:
        return 1 + max((handoff.shard for handoff in self.handoffs), default=-1)

    @property
    def collocated(self) -> bool:
        """Whether the FFN ran in the attention process: then its computation fills every handoff exactly."""
        return self.num_shards == 1 and all(not (handoff.queue_ns or handoff.way_ns) for handoff in self.handoffs)


# --- Reading ---


@dataclass(frozen=True)
class _Span:
    replica: str
    name: str
    key: tuple[str, str]  # trace and span id
    parent: tuple[str, str]
    start_ns: int  # since the epoch
    end_ns: int
    attributes: dict[str, Any]


def load_steps(path: Path) -> list[Step]:
    """All decode steps in the file in the order of their starts, which across hosts is as good as their clocks.

    Lines that a process was killed in while writing are skipped, and steps that no interval is known of. Raises
    ConfigError if the file cannot be read, is no OTLP JSON, or has no decode step.
    """
    roots: list[_Span] = []
    children: dict[tuple[str, str], list[_Span]] = defaultdict(list)
    for span in _read_spans(path):
        if span.name == "decode_step":
            roots.append(span)
        elif span.name == "handoff" or span.name in _PART_OF_SPAN:
            children[span.parent].append(span)
    roots = sorted((root for root in roots if children[root.key]), key=lambda root: root.start_ns)
    if not roots:
        raise ConfigError(f"{path} has no decode step in it; {_HOW_TO_RECORD}, send a request, and stop the mesh")
    return [_step(index, root, children[root.key]) for index, root in enumerate(roots)]


def _read_spans(path: Path) -> Iterator[_Span]:
    num_lines = num_readable = 0
    try:
        with path.open("rb") as lines:
            for line in lines:
                spans = _spans_of_line(line)
                num_lines += 1
                num_readable += spans is not None
                yield from spans or ()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); {_HOW_TO_RECORD}") from None
    if num_lines and not num_readable:
        raise ConfigError(f"{path} is not a trace, one OTLP JSON object a line; {_HOW_TO_RECORD}")


def _spans_of_line(line: bytes) -> list[_Span] | None:
    """None if the line is damaged or something else."""
    try:
        return [
            _span(_attributes(resource_spans.get("resource", {})), span)
            for resource_spans in json.loads(line)["resourceSpans"]
            for scope_spans in resource_spans["scopeSpans"]
            for span in scope_spans["spans"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _span(resource: dict[str, Any], span: dict[str, Any]) -> _Span:
    trace_id = span["traceId"]
    return _Span(
        replica=str(resource.get("service.instance.id", "attention")),
        name=span["name"],
        key=(trace_id, span["spanId"]),
        parent=(trace_id, span.get("parentSpanId", "")),
        start_ns=int(span["startTimeUnixNano"]),
        end_ns=int(span["endTimeUnixNano"]),
        attributes=_attributes(span),
    )


def _attributes(holder: dict[str, Any]) -> dict[str, Any]:
    """OTLP writes 64-bit integers as strings."""
    pairs = ((entry["key"], *entry["value"].items()) for entry in holder.get("attributes", ()))
    return {key: int(value) if kind == "intValue" else value for key, (kind, value) in pairs}


def _step(index: int, root: _Span, children: list[_Span]) -> Step:
    start_ns = min(root.start_ns, *(child.start_ns for child in children))  # the first `schedule` precedes its root
    return Step(
        index=index,
        replica=root.replica,
        start_ns=start_ns,
        duration_ns=max(root.end_ns, *(child.end_ns for child in children)) - start_ns,
        attributes=root.attributes,
        intervals=tuple(_interval(child, start_ns) for child in children if child.name in _PART_OF_SPAN),
        handoffs=tuple(_handoff(child, start_ns) for child in children if child.name == "handoff"),
    )


def _interval(span: _Span, origin_ns: int) -> Interval:
    return Interval(
        part=_PART_OF_SPAN[span.name],
        layer_idx=span.attributes.get("afd.layer_idx", -1),
        microbatch=span.attributes.get("afd.microbatch", -1),
        start_ns=span.start_ns - origin_ns,
        end_ns=span.end_ns - origin_ns,
    )


def _handoff(span: _Span, origin_ns: int) -> Handoff:
    return Handoff(
        shard=span.attributes.get("afd.shard", 0),
        layer_idx=span.attributes.get("afd.layer_idx", -1),
        microbatch=span.attributes.get("afd.microbatch", -1),
        sent_ns=span.start_ns - origin_ns,
        arrived_ns=span.end_ns - origin_ns,
        queue_ns=span.attributes.get("afd.ffn.queue_ns", 0),
        compute_ns=span.attributes.get("afd.ffn.compute_ns", 0),
    )


# --- Choosing ---


def pick(steps: Sequence[Step], which: str = "typical") -> Step:
    """The step that is typical, slowest, last, median, or has this number. Raises ConfigError if there is none.

    "typical" is the median-long one among the steps that decode the most sequences and prefill nothing. That is the
    steady state which tuning is for: the first steps prefill and warm up, the last ones run half empty, and the
    slowest, or any one taken blindly, may have been disturbed by something else on the machine.
    """
    if which in _CHOICES:
        return _CHOICES[which](steps)
    if not which.isdecimal():
        raise ConfigError(f"a step is chosen by its number or by one of {', '.join(_CHOICES)}, not by {which!r}")
    if int(which) >= len(steps):
        raise ConfigError(f"there is no step {which}; the trace has steps 0 to {len(steps) - 1}")
    return steps[int(which)]


def _median(steps: Sequence[Step]) -> Step:
    return sorted(steps, key=lambda step: step.duration_ns)[(len(steps) - 1) // 2]


def _typical(steps: Sequence[Step]) -> Step:
    decoding = [step for step in steps if step.num_tokens <= step.num_sequences] or steps
    fullest = max(step.num_sequences for step in decoding)
    return _median([step for step in decoding if step.num_sequences == fullest])


_CHOICES: dict[str, Callable[[Sequence[Step]], Step]] = {
    "typical": _typical,
    "slowest": lambda steps: max(steps, key=lambda step: step.duration_ns),
    "last": lambda steps: steps[-1],
    "median": _median,
}


# --- What is drawn, and what it adds up to ---


class _Bar(NamedTuple):
    lane: int  # 0 is attention, 1 + i is FFN shard i
    kind: Part | Phase
    layer_idx: int
    microbatch: int
    start_ns: int
    end_ns: int

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns


@dataclass(frozen=True)
class _View:
    """The part of a step from start_ns to end_ns, as bars in lanes."""

    step: Step
    layers: range
    start_ns: int
    end_ns: int

    @classmethod
    def of(cls, step: Step, layers: range | None) -> _View:
        """All of the step, or from the first to the last that happened for these layers. Raises ConfigError."""
        if layers is None:
            return cls(step, range(step.num_layers), 0, step.duration_ns)
        bars = [bar for bar in _bars(step) if bar.layer_idx in layers]
        if not bars:
            asked = f"{layers[0]}-{layers[-1]}" if layers else "none"
            raise ConfigError(f"the step has layers 0 to {step.num_layers - 1}; asked for was {asked}")
        start_ns, end_ns = min(bar.start_ns for bar in bars), max(bar.end_ns for bar in bars)
        return cls(step, range(layers[0], min(layers[-1] + 1, step.num_layers)), start_ns, end_ns)

    @property
    def duration_ns(self) -> int:
        return max(1, self.end_ns - self.start_ns)

    @property
    def whole(self) -> bool:
        return self.duration_ns == self.step.duration_ns

    @cached_property
    def bars(self) -> list[_Bar]:
        """Cut off where the view ends; in one lane they may overlap."""
        cut = (
            bar._replace(start_ns=max(bar.start_ns, self.start_ns), end_ns=min(bar.end_ns, self.end_ns))
            for bar in _bars(self.step)
        )
        return [bar for bar in cut if bar.end_ns > bar.start_ns]

    @cached_property
    def handoffs(self) -> list[Handoff]:
        return [
            handoff
            for handoff in self.step.handoffs
            if handoff.arrived_ns > self.start_ns and handoff.sent_ns < self.end_ns
        ]

    @property
    def lanes(self) -> list[str]:
        if self.step.collocated:
            return ["attention", "FFN"]
        return ["attention", *(_shard_name(self.step, shard) for shard in range(self.step.num_shards))]

    def lane(self, lane: int) -> list[_Bar]:
        """One lane's bars, none overlapping."""
        return _flattened([bar for bar in self.bars if bar.lane == lane])


def _shard_name(step: Step, shard: int) -> str:
    return f"FFN {shard}/{step.num_shards}"


def _bars(step: Step) -> Iterator[_Bar]:
    for each in step.intervals:
        yield _Bar(0, each.part, each.layer_idx, each.microbatch, each.start_ns, each.end_ns)
    for handoff in step.handoffs:
        for phase, start_ns, end_ns in handoff.phases:
            yield _Bar(1 + handoff.shard, phase, handoff.layer_idx, handoff.microbatch, start_ns, end_ns)


def _flattened(bars: list[_Bar]) -> list[_Bar]:
    """Of what happens at once only the most telling: a computation hides a queue, and that a frame on its way."""
    cuts = sorted({time for bar in bars for time in (bar.start_ns, bar.end_ns)})
    owners: list[_Bar | None] = [None] * len(cuts)
    for bar in sorted(bars, key=lambda bar: PHASES.index(bar.kind) if bar.kind in PHASES else 0):
        for cut in range(bisect_left(cuts, bar.start_ns), bisect_left(cuts, bar.end_ns)):
            owners[cut] = bar
    return [
        bar._replace(start_ns=start_ns, end_ns=end_ns)
        for bar, start_ns, end_ns in zip(owners, cuts, cuts[1:], strict=False)
        if bar
    ]


@dataclass(frozen=True)
class _ShardAccount:
    name: str
    busy_ns: int  # computing any frame of this step
    num_frames: int
    mean_ns: dict[Phase, float]  # per frame
    num_awaited: int  # frames whose answer was the last one that attention waited for


@dataclass(frozen=True)
class _Account:
    duration_ns: int
    parts: Counter[str]  # of attention
    waiting: Counter[Phase]  # of the waiting: what the shard that answered last was doing
    shards: list[_ShardAccount]

    @property
    def unmeasured_ns(self) -> int:
        return max(0, self.duration_ns - sum(self.parts.values()))

    def share(self, duration_ns: float) -> str:
        return f"{100 * duration_ns / self.duration_ns:.0f} %"


def _account(view: _View) -> _Account:
    parts: Counter[str] = Counter()
    for bar in view.bars:
        parts[bar.kind] += bar.duration_ns * (bar.lane == 0)
    waiting: Counter[Phase] = Counter()
    awaited: Counter[int] = Counter()
    for wait, last in _waits(view):
        awaited[last.shard] += 1
        for phase, start_ns, end_ns in last.phases:
            waiting[phase] += max(0, min(end_ns, wait.end_ns) - max(start_ns, wait.start_ns))
    shards = [_shard_account(view, shard, awaited[shard]) for shard in range(view.step.num_shards)]
    return _Account(view.duration_ns, parts, waiting, shards)


def _waits(view: _View) -> Iterator[tuple[_Bar, Handoff]]:
    """Each time attention waited, with the handoff that was answered last."""
    by_arrival = sorted(view.handoffs, key=lambda handoff: handoff.arrived_ns)
    last = {(handoff.layer_idx, handoff.microbatch): handoff for handoff in by_arrival}
    for bar in view.bars:
        if bar.kind == "waiting" and (bar.layer_idx, bar.microbatch) in last:
            yield bar, last[bar.layer_idx, bar.microbatch]


def _shard_account(view: _View, shard: int, num_awaited: int) -> _ShardAccount:
    handoffs = [handoff for handoff in view.handoffs if handoff.shard == shard]
    means: dict[Phase, float] = {
        "way": statistics.fmean(handoff.way_ns for handoff in handoffs) if handoffs else 0.0,
        "queue": statistics.fmean(handoff.queue_ns for handoff in handoffs) if handoffs else 0.0,
        "compute": statistics.fmean(handoff.compute_ns for handoff in handoffs) if handoffs else 0.0,
    }
    busy_ns = sum(bar.duration_ns for bar in view.lane(1 + shard) if bar.kind == "compute")
    return _ShardAccount(_shard_name(view.step, shard), busy_ns, len(handoffs), means, num_awaited)


def verdict(step: Step, layers: range | None = None) -> str:
    """One sentence: who waits for whom. Raises ConfigError for layers that the step does not have."""
    view = _View.of(step, layers)
    return _verdict(view, _account(view))


def _verdict(view: _View, account: _Account) -> str:
    whole = "the step" if view.whole else "this part"
    if not account.shards:
        return f"Nothing was handed to an FFN in {whole}."
    longest = max(account.shards, key=lambda shard: shard.busy_ns)
    if view.step.collocated:
        attention = account.share(account.parts["attention"])
        return f"Collocated: attention took {attention} of {whole} and the FFN {account.share(longest.busy_ns)}."
    waited = f"Attention waited {account.share(account.parts['waiting'])} of {whole}{_reason(account)}"
    if len(account.shards) == 1:
        return f"{waited}; the FFN computed {account.share(longest.busy_ns)} of it."
    return f"{waited}; {_slowest_shards(account, longest)}."


_REASONS: dict[Phase, str] = {
    "way": "while frames were on the way",
    "queue": "while frames were queued at the FFN",
    "compute": "while the FFN computed",
}


def _reason(account: _Account) -> str:
    if 100 * account.parts["waiting"] < account.duration_ns or not account.waiting.total():
        return ""
    return f", mostly {_REASONS[max(PHASES, key=lambda phase: account.waiting[phase])]}"


def _slowest_shards(account: _Account, longest: _ShardAccount) -> str:
    last = max(account.shards, key=lambda shard: shard.num_awaited)
    total = sum(shard.num_awaited for shard in account.shards)
    joint = " and" if last is longest else f", {longest.name}"
    answered = f"{last.name} answered last ({last.num_awaited} of {total} times)"
    return f"{answered}{joint} computed longest ({account.share(longest.busy_ns)})"


# --- Words that the terminal and the SVG share ---


def _letter(microbatch: int) -> str:
    return chr(ord("A") + microbatch % 26) if microbatch >= 0 else ""


def _count(number: int, noun: str, plural: str = "") -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


_UNITS = (("s", 1e9), ("ms", 1e6), ("µs", 1e3), ("ns", 0.0))


def _time(duration_ns: float) -> str:
    """Three digits with a unit."""
    if not duration_ns:
        return "0"
    unit, unit_ns = next(each for each in _UNITS if duration_ns >= each[1])
    value = duration_ns / (unit_ns or 1)
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def _heading(view: _View) -> tuple[str, str]:
    step = view.step
    title = f"Decode step {step.index} of {step.replica}: {_time(step.duration_ns)}"
    if not view.whole:
        title += f", here layers {view.layers[0]} to {view.layers[-1]}: {_time(view.duration_ns)}"
    ffn = "FFN in-process" if step.collocated else _count(step.num_shards, "FFN shard")
    facts = [
        _count(step.num_sequences, "sequence"),
        _count(step.num_tokens, "token"),
        _count(step.num_layers, "layer"),
        _count(step.num_microbatches, "microbatch", "microbatches"),
        ffn,
    ]
    return title, ", ".join(facts)


def _ticks(view: _View, max_ticks: int) -> tuple[str, list[tuple[int, str]]]:
    """The axis' unit, and (time, label) at round numbers."""
    unit, unit_ns = ("ms", 1e6) if view.end_ns >= 2e6 else ("µs", 1e3)
    spacings = (digit * 10**power for power in range(12) for digit in (1, 2, 5))
    spacing = next(each for each in spacings if view.duration_ns / each <= max_ticks)
    first = -(-view.start_ns // spacing) * spacing
    return unit, [(time, f"{time / unit_ns:g}") for time in range(first, view.end_ns + 1, spacing)]


def _layer_labels(view: _View, columns: int) -> list[tuple[int, str]]:
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


# --- The terminal ---

_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_INKS = ("#ffffff", "#000000", "#ffffff", "#000000", "#000000", "#ffffff")
_SIGNS: dict[str, str] = {"schedule": "s", "send": ">", "waiting": "·", "lm_head": "h", "sample": "t", "way": "-"}
_STYLES: dict[str, str] = {
    "schedule": "#000000 on #999999",
    "lm_head": "#ffffff on #7f5bb5",
    "sample": "#ffffff on #8c564b",
    "waiting": "dim",
}


def timeline(step: Step, width: int, layers: range | None = None) -> RenderableType:
    """The step as lanes over time, `width` columns wide, with a legend, an account and a verdict beneath.

    Every column shows what took most of its time. Of a shard only this step's frames are known: while it computes
    another replica's, it shows as idle here, or as a queue. Raises ConfigError for layers that the step does not have.
    """
    view = _View.of(step, layers)
    account = _account(view)
    title, facts = _heading(view)
    tables: list[RenderableType] = [_attention_table(view, account, width), Text()]
    if account.shards and not step.collocated:
        tables += [_sides_table(account), Text()]
    return Group(
        _line(Text(title, "bold")),
        _line(Text(facts, "dim")),
        Text(),
        *list[RenderableType](_picture(view, width)),
        Text(),
        _legend(view, width),
        Text(),
        *tables,
        Text(_verdict(view, account), "bold"),
    )


def _line(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "crop"
    return text


def _picture(view: _View, width: int) -> Iterator[Text]:
    margin = 2 + max(map(len, [*view.lanes, "layer"]))
    columns = max(20, width - margin)
    yield _line(Text("layer".ljust(margin) + _ruler(view, _layer_labels(view, columns), columns), "dim"))
    for lane, name in enumerate(view.lanes):
        yield _line(Text(name.ljust(margin)).append_text(_lane_text(view, lane, columns)))
    unit, ticks = _ticks(view, columns // 10)
    yield _line(Text(unit.ljust(margin) + _ruler(view, ticks, columns), "dim"))
    if len(view.layers) * 6 > columns:
        yield Text(f"{len(view.layers)} layers in {columns} columns; `--layers 0-5` shows a few in detail.", "italic")


def _column(view: _View, time_ns: int, columns: int) -> int:
    return min(columns - 1, (time_ns - view.start_ns) * columns // view.duration_ns)


def _ruler(view: _View, labels: Iterable[tuple[int, str]], columns: int) -> str:
    ruler = [" "] * columns
    for time_ns, label in labels:
        column = _column(view, time_ns, columns)
        if column + len(label) <= columns:
            ruler[column : column + len(label)] = label
    return "".join(ruler)


def _lane_text(view: _View, lane: int, columns: int) -> Text:
    text = Text()
    for what in _by_column(view, view.lane(lane), columns):
        text.append(*(_sign(*what) if what else (" " if lane == 0 else "·", "dim")))
    return text


def _by_column(view: _View, bars: list[_Bar], columns: int) -> Iterator[tuple[str, int] | None]:
    """For each column the kind and microbatch that most of its time went to; None where nothing was recorded."""
    shares: list[Counter[tuple[str, int] | None]] = [Counter({None: view.duration_ns}) for _ in range(columns)]
    for bar in bars:  # in units of 1/columns nanoseconds, to stay exact
        start, end = (bar.start_ns - view.start_ns) * columns, (bar.end_ns - view.start_ns) * columns
        for column in range(start // view.duration_ns, -(-end // view.duration_ns)):
            left = column * view.duration_ns
            overlap = min(end, left + view.duration_ns) - max(start, left)
            shares[column][bar.kind, bar.microbatch] += overlap
            shares[column][None] -= overlap
    for share in shares:
        yield max(share, key=lambda what: share[what])


def _sign(kind: str, microbatch: int) -> tuple[str, str]:
    """The letter of a cell, and its style."""
    colour, ink = (colours[microbatch % len(colours)] for colours in (_COLOURS, _INKS))
    if kind in ("attention", "compute"):
        return _letter(microbatch), f"{ink} on {colour}"
    if kind == "queue":
        return _letter(microbatch).lower(), colour
    return _SIGNS[kind], _STYLES.get(kind, colour)


def _legend(view: _View, width: int) -> Text:
    """Only what the picture has."""
    entries = [
        _entry("attention", microbatch, f"microbatch {_letter(microbatch)} computing")
        for microbatch in range(view.step.num_microbatches)
    ]
    kinds = {bar.kind for bar in view.bars}
    if "queue" in kinds:
        entries.append(_entry("queue", 0, "queued at the FFN"))
    words = {"send": "send", "way": "on the way", "schedule": "schedule", "lm_head": "lm_head", "sample": "sample"}
    entries += [_entry(kind, 0, word) for kind, word in words.items() if kind in kinds]
    entries.append(_entry("waiting", 0, "idle"))
    return _joined(entries, width)


def _entry(kind: str, microbatch: int, word: str) -> Text:
    return Text().append(*_sign(kind, microbatch)).append(f" {word}")


def _joined(entries: list[Text], width: int) -> Text:
    lines = [Text()]
    for entry in entries:
        if len(lines[-1]) + len(entry) + 3 > width:
            lines.append(Text())
        lines[-1].append("   " if lines[-1] else "").append_text(entry)
    return Text("\n").join(lines)


_PART_WORDS: dict[Part, str] = {part: part for part in PARTS} | {"waiting": "waiting for the FFN"}
_WAITING_WORDS: dict[Phase, str] = {
    "way": "  on the way",
    "queue": "  in the FFN's queue",
    "compute": "  FFN computing",
}


def _rows(view: _View, account: _Account) -> Iterator[tuple[str, int]]:
    """What attention's time went to, and how much; rows that begin with a blank explain the one above."""
    for part in (part for part in PARTS if account.parts[part]):
        in_process = part == "waiting" and view.step.collocated
        yield "FFN in-process" if in_process else _PART_WORDS[part], account.parts[part]
        if part == "waiting" and not in_process:
            yield from ((_WAITING_WORDS[phase], account.waiting[phase]) for phase in PHASES)
    yield "between these", account.unmeasured_ns


def _attention_table(view: _View, account: _Account, width: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("attention", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    bar_width = max(10, min(40, width - 42))
    for name, duration_ns in _rows(view, account):
        style = "dim" if name.startswith(" ") else ""
        bar = "━" * round(bar_width * duration_ns / account.duration_ns)
        table.add_row(name, _time(duration_ns), account.share(duration_ns), bar, style=style)
    return table


def _sides_table(account: _Account) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("", "busy", "bubble", "frames", "mean: way", "queue", "compute"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    waiting_ns = account.parts["waiting"]
    busy = account.share(account.duration_ns - waiting_ns)
    table.add_row("attention", busy, account.share(waiting_ns))
    for shard in account.shards:
        means = [_time(shard.mean_ns[phase]) for phase in PHASES]
        bubble = account.share(account.duration_ns - shard.busy_ns)
        table.add_row(shard.name, account.share(shard.busy_ns), bubble, str(shard.num_frames), *means)
    return table


# --- SVG ---

_WIDTH, _LEFT, _RIGHT, _TOP = 960, 96, 24, 92  # pixels; the lanes begin at _TOP
_LANE, _GAP = 34, 26
_FILLS: dict[str, str] = {"schedule": "#8b949e", "lm_head": "#7f5bb5", "sample": "#8c564b"}
_THIN: dict[str, int] = {"send": 17, "queue": 17, "waiting": 2}  # pixels; other bars fill their lane
_CSS = """
text { font: 12px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2328 }
.bg { fill: #ffffff; stroke: #d0d7de } .track { fill: #f0f2f5 } .grid { stroke: #d0d7de }
.title { font-size: 16px; font-weight: 600 } .verdict { font-weight: 600 } .soft { fill: #59636e }
.middle { text-anchor: middle } .end { text-anchor: end } .inside { font-size: 11px; text-anchor: middle }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .bg { fill: #0d1117; stroke: #30363d } .track { fill: #1c2128 }
  .grid { stroke: #30363d } .soft { fill: #9198a1 }
}
"""


def to_svg(step: Step, layers: range | None = None) -> str:
    """The same picture as a self-contained SVG, which follows the reader's light or dark scheme.

    Slanted lines are frames on their way. Raises ConfigError for layers that the step does not have.
    """
    view = _View.of(step, layers)
    legend, legend_end = _svg_legend(view, _lane_y(len(view.lanes)) + 24)
    words = textwrap.wrap(_verdict(view, _account(view)), 128)
    height = legend_end + 20 + 18 * len(words)
    title, facts = _heading(view)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{_CSS}</style>",
            f'<rect class="bg" x=".5" y=".5" width="{_WIDTH - 1}" height="{height - 1}" rx="8"/>',
            _label(_RIGHT, 32, title, "title"),
            _label(_RIGHT, 52, facts, "soft"),
            *_svg_axes(view),
            *_svg_ways(view),
            *(_svg_bar(view, bar) for bar in _svg_bars(view)),
            *legend,
            *(_label(_RIGHT, legend_end + 16 + 18 * line, text, "verdict") for line, text in enumerate(words)),
            "</svg>\n",
        ]
    )


def _lane_y(lane: int) -> int:
    return _TOP + lane * (_LANE + _GAP)


def _x(view: _View, time_ns: int) -> float:
    inside = min(max(time_ns, view.start_ns), view.end_ns) - view.start_ns
    return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * inside / view.duration_ns, 2)


def _label(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text class="{style}" x="{x:g}" y="{y:g}">{escape(text)}</text>'


def _svg_axes(view: _View) -> Iterator[str]:
    """Lanes with their names, layers above, time beneath."""
    bottom = _lane_y(len(view.lanes)) - _GAP + 8
    for lane, name in enumerate(view.lanes):
        y = _lane_y(lane)
        yield f'<rect class="track" x="{_LEFT}" y="{y}" width="{_WIDTH - _LEFT - _RIGHT}" height="{_LANE}" rx="3"/>'
        yield _label(_LEFT - 10, y + _LANE / 2 + 4, name, "end")
    unit, ticks = _ticks(view, 10)
    for time_ns, text in ticks:
        x = _x(view, time_ns)
        yield f'<path class="grid" d="M{x} {_TOP - 4}V{bottom}"/>'
        yield _label(x, bottom + 14, text, "soft middle")
    yield _label(_LEFT - 10, bottom + 14, unit, "soft end")
    yield _label(_LEFT - 10, _TOP - 10, "layer", "soft end")
    for start_ns, text in _layer_labels(view, 100):
        yield _label(_x(view, start_ns), _TOP - 10, text, "soft")


def _shows_ways(view: _View) -> bool:
    """Lines of more frames than this only blur the picture."""
    return not view.step.collocated and len(view.handoffs) <= 240


def _svg_ways(view: _View) -> Iterator[str]:
    """A line from the attention lane to where the FFN takes over, and one back."""
    width = 1.6 if len(view.handoffs) <= 40 else 0.8
    for handoff in view.handoffs if _shows_ways(view) else ():
        (_, *out), _, _, (_, *back) = handoff.phases
        top, shard = _lane_y(0) + _LANE, _lane_y(1 + handoff.shard)
        for (start_ns, end_ns), y, end_y in ((out, top, shard), (back, shard, top)):
            if view.start_ns <= start_ns and end_ns <= view.end_ns:
                line = f'd="M{_x(view, start_ns)} {y}L{_x(view, end_ns)} {end_y}" stroke-width="{width}" opacity=".8"'
                yield f'<path {line} stroke="{_colour(handoff.microbatch)}"/>'


def _colour(microbatch: int) -> str:
    return _COLOURS[microbatch % len(_COLOURS)]


def _svg_bars(view: _View) -> list[_Bar]:
    drawn = (bar for bar in view.bars if bar.kind != "way" and not (bar.kind == "waiting" and view.step.collocated))
    return sorted(drawn, key=lambda bar: bar.kind == "compute")  # over the queues


def _svg_bar(view: _View, bar: _Bar) -> str:
    x, y = _x(view, bar.start_ns), _lane_y(bar.lane)
    width, height = max(0.6, round(_x(view, bar.end_ns) - x, 2)), _LANE
    if bar.kind in _THIN:
        y, height = y + (_LANE - _THIN[bar.kind]) // 2, _THIN[bar.kind]
    rect = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" {_svg_fill(bar.kind, bar.microbatch)}>'
    number = ""
    if bar.kind in ("attention", "compute") and width > 9 * len(str(bar.layer_idx)) + 3:
        ink = _INKS[bar.microbatch % len(_INKS)]
        number = f'<text class="inside" style="fill:{ink}" x="{x + width / 2:g}" y="{y + 21}">{bar.layer_idx}</text>'
    return f"{rect}<title>{_describe(bar)}</title></rect>{number}"


def _svg_fill(kind: str, microbatch: int) -> str:
    fill = _FILLS.get(kind) or _colour(microbatch)
    return f'fill="{fill}"' + (' fill-opacity=".45"' if kind in _THIN else "")


def _describe(bar: _Bar) -> str:
    where = f" of layer {bar.layer_idx}, microbatch {_letter(bar.microbatch)}" if bar.layer_idx >= 0 else ""
    return f"{bar.kind}{where}: {_time(bar.duration_ns)}"


def _svg_legend(view: _View, y: int) -> tuple[list[str], int]:
    """The legend, and where it ends."""
    parts: list[str] = []
    x = _LEFT
    for kind, microbatch, word in _svg_legend_entries(view):
        width = 38 + 7 * len(word)
        if x + width > _WIDTH - _RIGHT:
            x, y = _LEFT, y + 22
        parts += [_svg_swatch(x, y, kind, microbatch), _label(x + 24, y + 11, word)]
        x += width
    return parts, y + 22


def _svg_legend_entries(view: _View) -> Iterator[tuple[str, int, str]]:
    for microbatch in range(view.step.num_microbatches):
        yield "compute", microbatch, f"microbatch {_letter(microbatch)} computing"
    kinds = {bar.kind for bar in view.bars}
    yield "send", 0, "send" if view.step.collocated else "send, or queued at the FFN"
    if _shows_ways(view):
        yield "way", 0, "on the way"
    if not view.step.collocated:
        yield "waiting", 0, "waiting for the FFN"
    yield from ((kind, 0, kind) for kind in ("schedule", "lm_head", "sample") if kind in kinds)


def _svg_swatch(x: float, y: int, kind: str, microbatch: int) -> str:
    if kind == "way":
        return f'<path d="M{x} {y}l16 13" stroke="{_colour(microbatch)}" stroke-width="1.6"/>'
    height = min(13, _THIN.get(kind, 26) // 2 + 1)
    return f'<rect x="{x}" y="{y + (13 - height) // 2}" width="16" height="{height}" {_svg_fill(kind, microbatch)}/>'


# --- Chrome and Perfetto ---


def to_chrome(steps: Sequence[Step]) -> dict[str, Any]:
    """Trace events for ui.perfetto.dev or chrome://tracing; microseconds since the first step's start.

    Every attention replica is a process, and so is every FFN shard as that replica saw it: its times are placed on
    the replica's clock. Threads are microbatches; thread 0 is the step as a whole.
    """
    origin_ns = min((step.start_ns for step in steps), default=0)
    replicas = sorted({step.replica for step in steps})
    events: list[dict[str, Any]] = []
    for number, replica in enumerate(replicas):
        own = [step for step in steps if step.replica == replica]
        first_pid = 1 + number * 1000
        events += _chrome_names(own, first_pid, replica if len(replicas) > 1 else "")
        for step in own:
            events.append(_chrome_step(step, first_pid, origin_ns))
            events += (_chrome_bar(step, bar, first_pid, origin_ns) for bar in _bars(step) if bar.duration_ns > 0)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _chrome_names(steps: Sequence[Step], first_pid: int, seen_by: str) -> Iterator[dict[str, Any]]:
    widest = max(steps, key=lambda step: step.num_shards)
    for lane in range(1 + widest.num_shards):
        name = _shard_name(widest, lane - 1) + (f" for {seen_by}" if seen_by else "") if lane else steps[0].replica
        yield _chrome_meta("process_name", first_pid + lane, 0, {"name": name})
        yield _chrome_meta("process_sort_index", first_pid + lane, 0, {"sort_index": first_pid + lane})
        for microbatch in range(-1 if lane == 0 else 0, max(step.num_microbatches for step in steps)):
            thread = f"microbatch {_letter(microbatch)}" if microbatch >= 0 else "step"
            yield _chrome_meta("thread_name", first_pid + lane, 1 + microbatch, {"name": thread})


def _chrome_meta(name: str, pid: int, tid: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "args": args}


def _chrome_step(step: Step, pid: int, origin_ns: int) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": f"decode step {step.index}",
        "cat": "step",
        "pid": pid,
        "tid": 0,
        "ts": (step.start_ns - origin_ns) / 1e3,
        "dur": step.duration_ns / 1e3,
        "args": dict(step.attributes),
    }


def _chrome_bar(step: Step, bar: _Bar, first_pid: int, origin_ns: int) -> dict[str, Any]:
    of_layer = {"layer": bar.layer_idx, "microbatch": bar.microbatch} if bar.layer_idx >= 0 else {}
    return {
        "ph": "X",
        "name": "on the way" if bar.kind == "way" else bar.kind,
        "cat": "ffn" if bar.lane else "attention",
        "pid": first_pid + bar.lane,
        "tid": 1 + bar.microbatch,
        "ts": (step.start_ns - origin_ns + bar.start_ns) / 1e3,
        "dur": bar.duration_ns / 1e3,
        "args": {"step": step.index, **of_layer},
    }
