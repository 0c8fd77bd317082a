"""A step as lanes of letters over time, for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from afd.trace_view.steps import PARTS, PHASES, Step
from afd.trace_view.view import (
    Account,
    View,
    account,
    colours,
    heading,
    in_words,
    layer_labels,
    letter,
    ticks,
    verdict,
)

_SIGNS = {"schedule": "s", "send": ">", "waiting": "·", "lm_head": "h", "sample": "t", "way": "-"}


def timeline(step: Step, width: int, layers: range | None = None) -> RenderableType:
    """The step as lanes over time, `width` columns wide, with a legend, an account and a verdict beneath.

    Every column shows what took most of its time. Of a shard only this step's frames are known: while it computes
    another replica's, it shows as idle here, or as a queue. Raises ConfigError for layers that the step does not have.
    """
    view = View.of(step, layers)
    sums = account(view)
    title, facts = heading(view)
    blocks: list[RenderableType] = [
        Group(_line(title, "bold"), _line(facts, "dim")),
        Group(*_picture(view, width)),
        _legend(view, width),
        _attention_table(view, sums, width),
    ]
    if sums.shards and not step.collocated:
        blocks += [_sides_table(sums), _frames_table(sums)]
    return Group(*(each for block in blocks for each in (block, Text())), Text(verdict(step, layers), "bold"))


def _line(text: str, style: str = "") -> Text:
    return Text(text, style, no_wrap=True, overflow="crop")


def _picture(view: View, width: int) -> Iterator[Text]:
    margin = 2 + max(map(len, [*view.lanes, "layer"]))
    columns = max(20, width - margin)
    yield _line("layer".ljust(margin) + _ruler(view, layer_labels(view, columns), columns), "dim")
    for lane, name in enumerate(view.lanes):
        yield _line(name.ljust(margin)).append_text(_lane_text(view, lane, columns))
    unit, times = ticks(view, columns // 10)
    yield _line(unit.ljust(margin) + _ruler(view, times, columns), "dim")
    if len(view.layers) * 6 > columns:
        yield Text(f"{len(view.layers)} layers in {columns} columns; `--layers 0-5` shows a few in detail.", "italic")


def _ruler(view: View, labels: Iterable[tuple[int, str]], columns: int) -> str:
    ruler = [" "] * columns
    for time_ns, label in labels:
        column = min(columns - 1, (time_ns - view.start_ns) * columns // view.duration_ns)
        if column + len(label) <= columns:
            ruler[column : column + len(label)] = label
    return "".join(ruler)


def _lane_text(view: View, lane: int, columns: int) -> Text:
    text = Text()
    for what in _by_column(view, lane, columns):
        text.append(*(_sign(*what) if what else (" " if lane == 0 else "·", "dim")))
    return text


def _by_column(view: View, lane: int, columns: int) -> Iterator[tuple[str, int] | None]:
    """For each column the kind and microbatch that most of its time went to; None where nothing was recorded."""
    width = view.duration_ns  # of a column, in units of 1/columns nanoseconds, to stay exact
    shares: list[Counter[tuple[str, int] | None]] = [Counter({None: width}) for _ in range(columns)]
    for bar in view.lane(lane):
        start, end = (bar.start_ns - view.start_ns) * columns, (bar.end_ns - view.start_ns) * columns
        for column in range(start // width, -(-end // width)):
            overlap = min(end, (column + 1) * width) - max(start, column * width)
            shares[column][bar.kind, bar.microbatch] += overlap
            shares[column][None] -= overlap
    for share in shares:
        yield max(share, key=lambda what: share[what])


def _sign(kind: str, microbatch: int) -> tuple[str, str]:
    """The letter of a cell, and its style."""
    colour, ink = colours(kind, microbatch)
    if kind == "queue":
        return letter(microbatch).lower(), colour
    if kind in ("send", "waiting", "way"):
        return _SIGNS[kind], "dim" if kind == "waiting" else colour
    return _SIGNS.get(kind, letter(microbatch)), f"{ink} on {colour}"


def _legend(view: View, width: int) -> Text:
    """Only what the picture has."""
    kinds = {bar.kind for bar in view.bars}
    words = {"queue": "queued at the FFN", "send": "send", "way": "on the way"}
    words |= {kind: kind for kind in ("schedule", "lm_head", "sample")}
    return _joined(
        [
            *(
                _entry("attention", microbatch, f"microbatch {letter(microbatch)} computing")
                for microbatch in range(view.step.num_microbatches)
            ),
            *(_entry(kind, 0, word) for kind, word in words.items() if kind in kinds),
            _entry("waiting", 0, "idle"),
        ],
        width,
    )


def _entry(kind: str, microbatch: int, word: str) -> Text:
    return Text().append(*_sign(kind, microbatch)).append(f" {word}")


def _joined(entries: list[Text], width: int) -> Text:
    lines = [Text()]
    for entry in entries:
        if len(lines[-1]) + len(entry) + 3 > width:
            lines.append(Text())
        lines[-1].append("   " if lines[-1] else "").append_text(entry)
    return Text("\n").join(lines)


def _rows(view: View, sums: Account) -> Iterator[tuple[str, int]]:
    """What attention's time went to, and how much."""
    waiting = "FFN in-process" if view.step.collocated else "waiting for the FFN"
    for part in (part for part in PARTS if sums.parts[part]):
        yield waiting if part == "waiting" else part, sums.parts[part]
    yield "other", max(0, sums.duration_ns - sums.parts.total())


def _attention_table(view: View, sums: Account, width: int) -> Table:
    table = _table("attention", "time", "share", "")
    bar_width = max(10, min(40, width - 42))
    for name, duration_ns in _rows(view, sums):
        bar = "━" * round(bar_width * duration_ns / sums.duration_ns)
        table.add_row(name, in_words(duration_ns), sums.share(duration_ns), bar)
    return table


def _sides_table(sums: Account) -> Table:
    """A bubble lasts as long as frames are on the way or queued, or the other side is at work."""
    table = _table("", "busy", "bubble", "of it: on the way", "queued", "other side at work")
    for side in sums.sides:
        shares = (sums.share(duration_ns) for duration_ns in (side.busy_ns, side.bubble_ns, *side.bubble.values()))
        table.add_row(side.name, *shares)
    return table


def _frames_table(sums: Account) -> Table:
    table = _table("", "frames", "mean: on the way", "queued", "computing")
    for shard in sums.shards:
        means = [in_words(shard.phases[phase] / max(1, shard.num_frames)) for phase in PHASES]
        table.add_row(shard.name, str(shard.num_frames), *means)
    return table


def _table(first: str, *headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(first, no_wrap=True)
    for each in headings:
        table.add_column(each, justify="right" if each else "left", no_wrap=True)
    return table
