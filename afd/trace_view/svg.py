"""A step as a picture for web pages and papers."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from xml.sax.saxutils import escape

from afd.trace_view.steps import Step
from afd.trace_view.view import (
    Account,
    Bar,
    Side,
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

_WIDTH, _LEFT, _RIGHT = 960, 96, 24  # pixels
_LETTER, _TITLE_LETTER, _LINE = 7.1, 9.6, 18  # pixels: a letter's mean width, and a line's height
_LANE, _GAP = 34, 26
_THIN = {"send": 17, "queue": 17, "waiting": 2}  # pixels; other bars fill their lane
_MAX_WAYS = 240  # lines of more frames only blur the picture
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


@dataclass(frozen=True)
class _Canvas:
    """Where things of a view are, in pixels."""

    view: View
    width: int
    top: int  # of the lanes

    @property
    def plot(self) -> int:
        return self.width - _LEFT - _RIGHT

    @property
    def text_width(self) -> int:
        return self.width - 2 * _RIGHT

    def x(self, time_ns: int) -> float:
        return round(_LEFT + self.plot * (time_ns - self.view.start_ns) / self.view.duration_ns, 2)

    def lane_y(self, lane: int) -> int:
        return self.top + lane * (_LANE + _GAP)


def to_svg(step: Step, layers: range | None = None, width: int = _WIDTH) -> str:
    """The timeline as a self-contained SVG, `width` pixels wide (300 or more), which follows the reader's light or dark
    scheme.

    Slanted lines are frames on their way. Raises ConfigError for layers that the step does not have.
    """
    view = View.of(step, layers)
    sums = account(view)
    head, top = _head(view, width)
    canvas = _Canvas(view, width, top)
    legend, legend_end = _legend(canvas, canvas.lane_y(len(view.lanes)) + 24)
    texts, height = _texts(canvas, sums, verdict(step, layers), legend_end + 16)
    title, _ = heading(view)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{_CSS}</style>",
            f'<rect class="bg" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8"/>',
            *head,
            *_lanes(canvas, sums),
            *_axes(canvas),
            *_ways(canvas),
            *(_bar(canvas, bar) for bar in _drawn(view)),
            *legend,
            *texts,
            "</svg>\n",
        ]
    )


def _head(view: View, width: int) -> tuple[list[str], int]:
    """The title and the facts, and where the lanes begin beneath."""
    title, facts = heading(view)
    titles = textwrap.wrap(title, int((width - 2 * _RIGHT) / _TITLE_LETTER))
    words = textwrap.wrap(facts, int((width - 2 * _RIGHT) / _LETTER))
    labels = [_label(_RIGHT, 32 + 20 * number, line, "title") for number, line in enumerate(titles)]
    y = 32 + 20 * len(titles)
    labels += [_label(_RIGHT, y + _LINE * number, line, "soft") for number, line in enumerate(words)]
    return labels, y + _LINE * len(words) + 22


def _label(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text class="{style}" x="{x:g}" y="{y:g}">{escape(text)}</text>'


def _lanes(canvas: _Canvas, sums: Account) -> Iterator[str]:
    for lane, side in enumerate(sums.sides):
        y = canvas.lane_y(lane)
        yield f'<rect class="track" x="{_LEFT}" y="{y}" width="{canvas.plot}" height="{_LANE}" rx="3"/>'
        yield _label(_LEFT - 10, y + _LANE / 2 - 3, side.name, "end")
        yield _label(_LEFT - 10, y + _LANE / 2 + 12, f"busy {sums.share(side.busy_ns)}", "soft end")


def _texts(canvas: _Canvas, sums: Account, conclusion: str, y: int) -> tuple[list[str], int]:
    """The account of each side and the conclusion, and where the picture ends."""
    num_letters = int(canvas.text_width / _LETTER)
    lines = [line for side in sums.sides for line in textwrap.wrap(_sentence(sums, side), num_letters)]
    labels = [_label(_RIGHT, y + _LINE * number, line) for number, line in enumerate(lines)]
    y += _LINE * len(lines) + 4
    words = textwrap.wrap(conclusion, num_letters)
    labels += [_label(_RIGHT, y + _LINE * number, line, "verdict") for number, line in enumerate(words)]
    return labels, y + _LINE * len(words)


def _sentence(sums: Account, side: Side) -> str:
    """The side's busy and bubble shares, and what is in them."""
    shares = [_share(sums, word, parts) for word, parts in (("busy", side.busy), ("bubble", side.bubble)) if parts]
    return f"{side.name}: {', '.join(shares)}".replace(" %", "\N{NO-BREAK SPACE}%")


def _share(sums: Account, word: str, parts: dict[str, int]) -> str:
    """With its parts that round to anything, the largest first, if there are several."""
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    shares = [f"{name} {sums.share(ns)}" for name, ns in ordered if sums.share(ns) != "0 %"]
    told = f" ({', '.join(shares)})" if shares and len(parts) > 1 else ""
    return f"{word} {sums.share(sum(parts.values()))}{told}"


def _axes(canvas: _Canvas) -> Iterator[str]:
    """Layers above the lanes, time beneath."""
    view, above = canvas.view, canvas.top - 10
    yield _label(_LEFT - 10, above, "layer", "soft end")
    for start_ns, text in layer_labels(view, int(canvas.plot / 8.4)):
        yield _label(canvas.x(start_ns), above, text, "soft")
    bottom = canvas.lane_y(len(view.lanes)) - _GAP + 8
    unit, times = ticks(view, canvas.plot // 84)
    yield _label(_LEFT - 10, bottom + 14, unit, "soft end")
    for time_ns, text in times:
        x = canvas.x(time_ns)
        yield f'<path class="grid" d="M{x} {canvas.top - 4}V{bottom}"/>'
        yield _label(x, bottom + 14, text, "soft middle")


def _shows_ways(view: View) -> bool:
    return not view.step.collocated and len(view.flights) <= _MAX_WAYS


def _ways(canvas: _Canvas) -> Iterator[str]:
    """A line from the attention lane to where the FFN takes over, and one back."""
    view, x = canvas.view, canvas.x
    width = 1.6 if len(view.flights) <= 40 else 0.8
    for flight in view.flights if _shows_ways(view) else ():
        (_, *out), _, _, (_, *back) = flight.phases
        top, shard = canvas.lane_y(0) + _LANE, canvas.lane_y(1 + flight.handoff.shard)
        colour, _ = colours("way", flight.handoff.microbatch)
        for (start_ns, end_ns), y, end_y in ((out, top, shard), (back, shard, top)):
            if view.start_ns <= start_ns and end_ns <= view.end_ns:
                line = f"M{x(start_ns)} {y}L{x(end_ns)} {end_y}"
                yield f'<path d="{line}" stroke-width="{width}" opacity=".8" stroke="{colour}"/>'


def _drawn(view: View) -> list[Bar]:
    """Computations over the queues. In-process, attention does not wait: it computes the FFN itself."""
    hidden = ("way", "waiting") if view.step.collocated else ("way",)
    return sorted((bar for bar in view.bars if bar.kind not in hidden), key=lambda bar: bar.kind == "compute")


def _bar(canvas: _Canvas, bar: Bar) -> str:
    x, y = canvas.x(bar.start_ns), canvas.lane_y(bar.lane)
    width, height = max(0.6, round(canvas.x(bar.end_ns) - x, 2)), _THIN.get(bar.kind, _LANE)
    shape = f'x="{x}" y="{y + (_LANE - height) // 2}" width="{width}" height="{height}"'
    number = ""
    if bar.kind in ("attention", "compute") and width > 9 * len(str(bar.layer_idx)) + 3:
        _, ink = colours(bar.kind, bar.microbatch)
        number = f'<text class="inside" style="fill:{ink}" x="{x + width / 2:g}" y="{y + 21}">{bar.layer_idx}</text>'
    return f"<rect {shape} {_fill(bar.kind, bar.microbatch)}><title>{_described(bar)}</title></rect>{number}"


def _fill(kind: str, microbatch: int) -> str:
    colour, _ = colours(kind, microbatch)
    return f'fill="{colour}"' + (' fill-opacity=".45"' if kind in _THIN else "")


def _described(bar: Bar) -> str:
    where = f" of layer {bar.layer_idx}, microbatch {letter(bar.microbatch)}" if bar.layer_idx >= 0 else ""
    return f"{bar.kind}{where}: {in_words(bar.duration_ns)}"


def _legend(canvas: _Canvas, y: int) -> tuple[list[str], int]:
    """The legend, and where it ends."""
    parts: list[str] = []
    x = left = _LEFT if canvas.width >= _WIDTH else _RIGHT
    for kind, microbatch, word in _legend_entries(canvas.view):
        width = 38 + 7 * len(word)
        if x + width > canvas.width - _RIGHT and x > left:
            x, y = left, y + 22
        parts += [_swatch(x, y, kind, microbatch), _label(x + 24, y + 11, word)]
        x += width
    return parts, y + 22


def _legend_entries(view: View) -> Iterator[tuple[str, int, str]]:
    for microbatch in range(view.step.num_microbatches):
        yield "compute", microbatch, f"microbatch {letter(microbatch)} computing"
    yield "send", 0, "send" if view.step.collocated else "send, or queued at the FFN"
    if _shows_ways(view):
        yield "way", 0, "on the way"
    if not view.step.collocated:
        yield "waiting", 0, "waiting for the FFN"
    kinds = {bar.kind for bar in view.bars}
    yield from ((kind, 0, kind) for kind in ("schedule", "lm_head", "sample") if kind in kinds)


def _swatch(x: float, y: int, kind: str, microbatch: int) -> str:
    if kind == "way":
        return f'<path d="M{x} {y}l16 13" stroke="{colours(kind, microbatch)[0]}" stroke-width="1.6"/>'
    height = min(13, _THIN.get(kind, 26) // 2 + 1)
    return f'<rect x="{x}" y="{y + (13 - height) // 2}" width="16" height="{height}" {_fill(kind, microbatch)}/>'
