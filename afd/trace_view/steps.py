"""Reading decode steps from a file of spans, and choosing one of them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from afd.errors import ConfigError

Part = Literal["schedule", "attention", "send", "waiting", "lm_head", "sample"]
Phase = Literal["way", "queue", "compute"]
PARTS: tuple[Part, ...] = get_args(Part)
PHASES: tuple[Phase, ...] = get_args(Phase)

PART_OF_SPAN: dict[str, Part] = {**{part: part for part in PARTS}, "receive": "waiting"}
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
        """What neither the queue nor the computation explains."""
        return max(0, self.arrived_ns - self.sent_ns - self.queue_ns - self.compute_ns)


@dataclass(frozen=True)
class Step:
    """One decode step of one attention replica. `start_ns` is since the epoch, on that replica's host; `index` is its
    number in the file that it was read from.

    Microbatches that are away when it begins or ends have handoffs that reach beyond it, and attention waits for them
    in the step in which they come back. What is away at its end is known if the next step was recorded, too.
    """

    index: int | None
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
    def collocated(self) -> bool:
        """Whether the FFN ran in the attention process."""
        return self.attributes.get("afd.num_ffn_shards") == 0

    @property
    def transports(self) -> list[str]:
        """Those that frames moved over, each once."""
        return sorted(set(self.attributes.get("afd.handoff.transports", ())))

    @property
    def num_layers(self) -> int:
        return 1 + max((interval.layer_idx for interval in self.intervals), default=-1)

    @property
    def num_microbatches(self) -> int:
        return 1 + max((interval.microbatch for interval in self.intervals), default=-1)

    @property
    def num_shards(self) -> int:
        """How many were handed a frame; 1 where the FFN is collocated."""
        return 1 + max((handoff.shard for handoff in self.handoffs), default=-1)

    def shard_name(self, shard: int) -> str:
        return "FFN" if self.collocated else f"FFN {shard}/{self.num_shards}"


class _Span(NamedTuple):
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
    roots: dict[str, list[_Span]] = defaultdict(list)  # by replica
    children: dict[tuple[str, str], list[_Span]] = defaultdict(list)
    for span in _read_spans(path):
        if span.name == "decode_step":
            roots[span.replica].append(span)
        elif span.name == "handoff" or span.name in PART_OF_SPAN:
            children[span.parent].append(span)
    found: list[tuple[_Span, list[_Span]]] = []
    for own in roots.values():
        own.sort(key=lambda root: root.start_ns)
        for root, following in zip_longest(own, own[1:]):
            if children[root.key]:
                away = _away(root, children[following.key]) if following else []
                found.append((root, [*children[root.key], *away]))
    if not found:
        raise ConfigError(f"{path} has no decode step in it; {_HOW_TO_RECORD}, send a request, and stop the mesh")
    found.sort(key=lambda step: step[0].start_ns)
    return [_step(index, root, spans) for index, (root, spans) in enumerate(found)]


def _away(root: _Span, following: list[_Span]) -> list[_Span]:
    """Of the spans of the step after this one: frames that were sent in this one, and where they were waited for."""
    handoffs = [span for span in following if span.name == "handoff" and span.start_ns < root.end_ns]
    frames = {_frame(handoff) for handoff in handoffs}
    waits: dict[tuple[int, int], _Span] = {}
    for span in sorted(following, key=lambda span: span.start_ns):
        if span.name == "receive" and _frame(span) in frames:
            waits.setdefault(_frame(span), span)
    return [*handoffs, *waits.values()]


def _frame(span: _Span) -> tuple[int, int]:
    """The layer and the microbatch, -1 where it belongs to none."""
    return span.attributes.get("afd.layer_idx", -1), span.attributes.get("afd.microbatch", -1)


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
    return _Span(
        replica=str(resource.get("service.instance.id", "attention")),
        name=span["name"],
        key=(span["traceId"], span["spanId"]),
        parent=(span["traceId"], span.get("parentSpanId", "")),
        start_ns=int(span["startTimeUnixNano"]),
        end_ns=int(span["endTimeUnixNano"]),
        attributes=_attributes(span),
    )


def _attributes(holder: dict[str, Any]) -> dict[str, Any]:
    return {entry["key"]: _value(entry["value"]) for entry in holder.get("attributes", ())}


def _value(tagged: dict[str, Any]) -> Any:
    """OTLP writes 64-bit integers as strings."""
    ((kind, value),) = tagged.items()
    if kind == "arrayValue":
        return [_value(each) for each in value.get("values", ())]
    return int(value) if kind == "intValue" else value


def _step(index: int, root: _Span, children: list[_Span]) -> Step:
    start_ns = root.start_ns
    return Step(
        index=index,
        replica=root.replica,
        start_ns=start_ns,
        duration_ns=root.end_ns - start_ns,
        attributes=root.attributes,
        intervals=tuple(_interval(child, start_ns) for child in children if child.name in PART_OF_SPAN),
        handoffs=tuple(_handoff(child, start_ns) for child in children if child.name == "handoff"),
    )


def _interval(span: _Span, origin_ns: int) -> Interval:
    layer_idx, microbatch = _frame(span)
    return Interval(
        part=PART_OF_SPAN[span.name],
        layer_idx=layer_idx,
        microbatch=microbatch,
        start_ns=span.start_ns - origin_ns,
        end_ns=span.end_ns - origin_ns,
    )


def _handoff(span: _Span, origin_ns: int) -> Handoff:
    layer_idx, microbatch = _frame(span)
    return Handoff(
        shard=span.attributes.get("afd.shard", 0),
        layer_idx=layer_idx,
        microbatch=microbatch,
        sent_ns=span.start_ns - origin_ns,
        arrived_ns=span.end_ns - origin_ns,
        queue_ns=span.attributes.get("afd.ffn.queue_ns", 0),
        compute_ns=span.attributes.get("afd.ffn.compute_ns", 0),
    )


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
