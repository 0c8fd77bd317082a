"""Reading recorded decode steps, and drawing them."""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console, RenderableType

from afd.errors import ConfigError
from afd.trace_view import Handoff, Interval, Step, load_steps, pick, to_chrome, to_svg, verdict
from afd.trace_view.flights import flights
from afd.trace_view.steps import Part
from afd.trace_view.terminal import timeline
from afd.trace_view.view import View, account

DATA = Path(__file__).parent / "data"
RECORDED = DATA / "decode_trace.jsonl"  # a prefill and a decode step; 5 layers, 2 shards
OVERLAPPING = DATA / "overlapping_steps.jsonl"  # 4 sequences in two microbatches, 3 layers, 1 shard
MS = 1_000_000


def did(part: Part, start: int, end: int, layer: int = -1, microbatch: int = -1) -> Interval:
    """An interval; times in milliseconds."""
    return Interval(part, layer, microbatch, start * MS, end * MS)


def handed(shard: int, microbatch: int, sent: int, arrived: int, queue: int, compute: int, layer: int = 0) -> Handoff:
    """A handoff; times in milliseconds."""
    return Handoff(shard, layer, microbatch, sent * MS, arrived * MS, queue * MS, compute * MS)


def step_of(
    intervals: list[Interval],
    handoffs: list[Handoff],
    *,
    duration: int = 100,
    index: int = 0,
    replica: str = "attention-0",
    sequences: int = 2,
    tokens: int = 2,
    ffn_shards: int = 2,
) -> Step:
    attributes = {"afd.num_ffn_shards": ffn_shards, "afd.num_sequences": sequences, "afd.num_tokens": tokens}
    return Step(index, replica, index * MS, duration * MS, attributes, tuple(intervals), tuple(handoffs))


def overlapped_step(**about: Any) -> Step:
    """Two microbatches on two shards: shard 1 computes longest, and attention waits from 40 to 90 ms."""
    return step_of(
        [
            did("attention", 0, 20, layer=0, microbatch=0),
            did("attention", 20, 40, layer=0, microbatch=1),
            did("waiting", 40, 60, layer=0, microbatch=0),
            did("waiting", 60, 90, layer=0, microbatch=1),
            did("lm_head", 90, 95),
            did("sample", 95, 100),
        ],
        [
            handed(0, 0, sent=20, arrived=60, queue=0, compute=20),
            handed(0, 1, sent=40, arrived=80, queue=10, compute=10),
            handed(1, 0, sent=20, arrived=50, queue=0, compute=10),
            handed(1, 1, sent=40, arrived=90, queue=0, compute=30),
        ],
        **about,
    )


def serial_step(ffn_shards: int) -> Step:
    """One layer whose FFN, in-process or on one shard, takes exactly as long as attention is without work."""
    return step_of(
        [did("attention", 0, 40, layer=0, microbatch=0), did("waiting", 40, 100, layer=0, microbatch=0)],
        [handed(0, 0, sent=40, arrived=100, queue=0, compute=60)],
        ffn_shards=ffn_shards,
    )


def deep_step(num_layers: int) -> Step:
    times = [10 * layer for layer in range(num_layers)]
    return step_of(
        [did("attention", time, time + 6, layer=layer, microbatch=0) for layer, time in enumerate(times)]
        + [did("waiting", time + 6, time + 10, layer=layer, microbatch=0) for layer, time in enumerate(times)],
        [handed(0, 0, time + 6, time + 10, queue=0, compute=2, layer=layer) for layer, time in enumerate(times)],
        duration=10 * num_layers,
        ffn_shards=1,
    )


def printed(renderable: RenderableType, width: int) -> list[str]:
    """As it comes out of a pipe: no colour."""
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(renderable)
    return file.getvalue().splitlines()


def lane(lines: list[str], name: str) -> str:
    return next(line for line in lines if line.startswith(name))[len("attention  ") :]


def test_a_recorded_file_gives_its_decode_steps() -> None:
    prefill, decode = load_steps(RECORDED)
    assert (prefill.num_tokens, decode.num_tokens) == (3, 1)
    assert decode.replica == "attention-0"
    assert (decode.num_layers, decode.num_microbatches, decode.num_shards) == (5, 1, 2)
    assert len(decode.handoffs) == 10
    assert not decode.collocated


def test_all_of_a_recorded_step_lies_within_it() -> None:
    for step in load_steps(RECORDED):
        assert min(interval.start_ns for interval in step.intervals) >= 0
        assert max(interval.end_ns for interval in step.intervals) <= step.duration_ns
        assert all(0 <= handoff.sent_ns < handoff.arrived_ns <= step.duration_ns for handoff in step.handoffs)


def test_a_frame_that_is_away_at_a_steps_end_is_a_handoff_of_both_steps() -> None:
    steps = load_steps(OVERLAPPING)
    for step, following in itertools.pairwise(steps):
        away = [handoff for handoff in step.handoffs if handoff.arrived_ns > step.duration_ns]
        came_back = [handoff for handoff in following.handoffs if handoff.sent_ns < 0]
        later_ns = following.start_ns - step.start_ns
        assert [handoff.sent_ns - later_ns for handoff in away] == [handoff.sent_ns for handoff in came_back]
    assert sum(handoff.sent_ns < 0 for step in steps for handoff in step.handoffs) >= len(steps) - 2


def test_a_step_is_drawn_as_long_as_it_was_though_frames_reach_beyond_it() -> None:
    for step in load_steps(OVERLAPPING):
        for layers in (None, range(3)):
            view = View.of(step, layers)
            assert 0 <= view.start_ns < view.end_ns <= step.duration_ns
            assert all(view.start_ns <= bar.start_ns < bar.end_ns <= view.end_ns for bar in view.bars)


def test_a_line_that_a_killed_process_left_unfinished_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    recorded = RECORDED.read_text()
    path.write_text(recorded + recorded.splitlines()[0][:1000])
    assert load_steps(path) == load_steps(RECORDED)


@pytest.mark.parametrize("content", ["a log line\n", "[1, 2]\n", '{"resourceMetrics": []}\n'])
def test_a_file_that_is_no_trace_is_refused_with_the_way_to_record_one(tmp_path: Path, content: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"is not a trace.*AFD_TRACE_SAMPLE=1 AFD_TRACE_FILE="):
        load_steps(path)


def test_a_trace_without_decode_steps_is_refused_with_the_way_to_record_one(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(RECORDED.read_text().splitlines()[1] + "\n")  # an FFN's spans only
    with pytest.raises(ConfigError, match=r"has no decode step.*AFD_TRACE_SAMPLE=1"):
        load_steps(path)


def test_a_missing_file_is_refused_with_the_way_to_record_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No such file.*AFD_TRACE_SAMPLE=1"):
        load_steps(tmp_path / "trace.jsonl")


def flown(*handoffs: Handoff, waits: list[Interval] | None = None) -> list[list[tuple[str, int, int]]]:
    """The phases of each frame, in milliseconds."""
    placed = flights(step_of(waits or [], list(handoffs)))
    return [[(phase, start // MS, end // MS) for phase, start, end in flight.phases] for flight in placed]


def test_ffn_times_are_placed_in_the_middle_of_the_quickest_handoff() -> None:
    (phases,) = flown(handed(0, 1, sent=40, arrived=80, queue=10, compute=10))
    assert phases == [("way", 40, 50), ("queue", 50, 60), ("compute", 60, 70), ("way", 70, 80)]


def test_ffn_times_that_exceed_their_handoff_are_cut_off() -> None:
    (phases,) = flown(handed(0, 0, sent=10, arrived=20, queue=8, compute=8))
    assert phases[2] == ("compute", 12, 20)
    assert all(10 <= start <= end <= 20 for _, start, end in phases)


def test_a_frame_that_lies_in_its_slot_while_the_shard_computes_another_one_is_queued() -> None:
    """The shard looks at its slots between two batches, so it does not know how long the second frame lay there."""
    first, second = flown(
        handed(0, 0, sent=0, arrived=50, queue=0, compute=40),
        handed(0, 1, sent=10, arrived=89, queue=0, compute=39),
    )
    assert first == [("way", 0, 5), ("queue", 5, 5), ("compute", 5, 45), ("way", 45, 50)]
    assert second == [("way", 10, 15), ("queue", 15, 45), ("compute", 45, 84), ("way", 84, 89)]


def test_an_answer_that_lies_in_its_slot_while_attention_computes_is_not_on_its_way() -> None:
    quickest, lying = flown(
        handed(0, 0, sent=0, arrived=20, queue=0, compute=10),
        handed(0, 1, sent=20, arrived=80, queue=0, compute=11),
        waits=[did("attention", 20, 79), did("waiting", 79, 80, layer=0, microbatch=1)],
    )
    assert quickest[-1] == ("way", 15, 20)
    assert lying == [("way", 20, 25), ("queue", 25, 25), ("compute", 25, 36), ("way", 36, 41)]


def test_an_answer_that_attention_waited_for_came_when_it_was_seen() -> None:
    quickest, late = flown(
        handed(0, 0, sent=0, arrived=20, queue=0, compute=10),
        handed(0, 1, sent=20, arrived=80, queue=5, compute=30),
        waits=[did("waiting", 30, 80, layer=0, microbatch=1)],
    )
    assert quickest[2] == ("compute", 5, 15)
    assert late == [("way", 20, 40), ("queue", 40, 45), ("compute", 45, 75), ("way", 75, 80)]


def test_frames_that_were_computed_in_one_batch_were_computed_at_once() -> None:
    phases = flown(
        handed(0, 0, sent=0, arrived=60, queue=10, compute=40),
        handed(0, 1, sent=2, arrived=60, queue=8, compute=40),
    )
    assert [each[2] for each in phases] == [("compute", 15, 55), ("compute", 15, 55)]


def test_a_typical_step_is_a_full_one_that_only_decodes() -> None:
    steps = [
        overlapped_step(index=0, sequences=4, tokens=90, duration=300),
        overlapped_step(index=1, sequences=4, tokens=4, duration=999),
        overlapped_step(index=2, sequences=4, tokens=4, duration=101),
        overlapped_step(index=3, sequences=4, tokens=4, duration=100),
        overlapped_step(index=4, sequences=1, tokens=1, duration=100),
    ]
    assert pick(steps).index == 2
    assert pick(steps, "slowest").index == 1
    assert pick(steps, "last").index == 4
    assert pick(steps, "median").duration_ns == 101 * MS
    assert pick(steps, "3").index == 3


def test_a_step_is_picked_even_if_all_of_them_prefill() -> None:
    assert pick([overlapped_step(sequences=1, tokens=7)]).num_tokens == 7


@pytest.mark.parametrize(("which", "message"), [("1", "no step 1; the trace has steps 0 to 0"), ("best", "typical")])
def test_a_step_that_does_not_exist_is_refused(which: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pick([overlapped_step()], which)


def test_who_computes_and_who_waits_can_be_read_without_colour() -> None:
    lines = printed(timeline(overlapped_step(), 111), 111)  # 100 columns of a millisecond each
    assert lane(lines, "attention") == "A" * 20 + "B" * 20 + "·" * 50 + "h" * 5 + "t" * 5
    assert lane(lines, "FFN 0/2") == "·" * 20 + "-" * 10 + "A" * 20 + "b" * 10 + "B" * 10 + "-" * 10 + "·" * 20


def test_the_account_adds_up_to_the_step() -> None:
    lines = printed(timeline(overlapped_step(), 100), 100)
    words = [" ".join(line.split()) for line in lines]
    for row in ("attention 40.0 ms 40 %", "waiting for the FFN 50.0 ms 50 %", "lm_head 5.00 ms 5 %"):
        assert any(line.startswith(row) for line in words), row
    assert "attention 50 % 50 % 20 % 0 % 30 %" in words  # busy, bubble; of it on the way, queued, other side at work
    assert "FFN 0/2 30 % 70 % 20 % 10 % 40 %" in words
    assert "FFN 1/2 40 % 60 % 30 % 0 % 30 %" in words
    assert "FFN 1/2 2 20.0 ms 0 20.0 ms" in words  # frames, and their means


def test_the_svg_says_for_each_side_how_busy_it_was_and_where_the_rest_of_the_step_went() -> None:
    elements = ElementTree.fromstring(to_svg(overlapped_step())).findall("{*}text")
    texts = [(element.text or "").replace("\N{NO-BREAK SPACE}", " ") for element in elements]
    assert [text for text in texts if text.startswith("busy")] == ["busy 50 %", "busy 30 %", "busy 40 %"]
    parts = "attention 40 %, lm_head 5 %, sample 5 %"
    assert f"attention: busy 50 % ({parts}), bubble 50 % (FFN at work 30 %, on the way 20 %)" in texts
    bubble = "attention at work 40 %, on the way 20 %, queued 10 %"
    assert f"FFN 0/2: busy 30 %, bubble 70 % ({bubble})" in texts


@pytest.mark.parametrize(
    "step", [overlapped_step(), serial_step(1), deep_step(61), *load_steps(RECORDED), *load_steps(OVERLAPPING)]
)
def test_busy_and_bubble_of_every_side_are_the_whole_step(step: Step) -> None:
    sums = account(View.of(step, None))
    assert len(sums.sides) == 1 + step.num_shards
    for side in sums.sides:
        assert side.busy_ns + side.bubble_ns == pytest.approx(step.duration_ns, rel=0.001)
        assert all(duration_ns >= 0 for duration_ns in (*side.busy.values(), *side.bubble.values()))


def test_the_heading_says_how_the_frames_moved() -> None:
    step = overlapped_step()
    moved = replace(step, attributes={**step.attributes, "afd.handoff.transports": ["shm", "inline"]})
    assert "2 FFN shards over inline and shm" in printed(timeline(moved, 120), 120)[1]


def test_the_verdict_says_who_waits_for_whom() -> None:
    assert verdict(overlapped_step()) == (
        "Attention waited 50 % of the step, mostly while the FFN computed; "
        "FFN 0/2 answered last (1 of 2 times), FFN 1/2 computed longest (40 %)."
    )


def test_a_step_without_handoffs_can_be_drawn() -> None:
    step = step_of([did("schedule", 0, 100)], [])
    assert verdict(step) == "Nothing was handed to an FFN in the step."
    assert printed(timeline(step, 80), 80)
    assert to_svg(step)


def test_a_collocated_step_has_no_bubbles() -> None:
    lines = printed(timeline(serial_step(ffn_shards=0), 111), 111)
    assert lane(lines, "FFN") == "·" * 40 + "A" * 60
    assert not any("bubble" in line for line in lines)
    assert lines[-1] == "Collocated: attention took 40 % of the step and the FFN 60 %."


def test_a_shard_that_computes_all_the_time_it_is_waited_for_is_not_taken_for_collocated() -> None:
    lines = printed(timeline(serial_step(ffn_shards=1), 111), 111)
    assert lane(lines, "FFN 0/1") == "·" * 40 + "A" * 60
    assert lines[-1] == (
        "Attention waited 60 % of the step, mostly while the FFN computed; the FFN computed 60 % of it."
    )


@pytest.mark.parametrize("width", [80, 120])
def test_dozens_of_layers_fit_the_terminal(width: int) -> None:
    lines = printed(timeline(deep_step(61), width), width)
    assert all(len(line) <= width for line in lines)
    assert any("--layers" in line for line in lines)
    labels = next(line for line in lines if line.startswith("layer")).split()[1:]
    assert labels[-1] == "60"
    assert len(labels) >= 10


def test_some_layers_can_be_drawn_alone() -> None:
    lines = printed(timeline(deep_step(61), 111, range(10, 20)), 111)
    assert "layers 10 to 19: 100 ms" in lines[0]
    assert lane(lines, "attention").startswith("AAAAAA····AAAAAA····")
    assert lines[-1].startswith("Attention waited 40 % of this part")


def test_layers_that_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match="layers 0 to 60; asked for was 61-70"):
        timeline(deep_step(61), 80, range(61, 71))


def test_the_heading_names_the_replica_as_it_is_called() -> None:
    step = overlapped_step(replica="rack[1]/<a&b>")
    assert "rack[1]/<a&b>" in printed(timeline(step, 80), 80)[0]
    assert "rack[1]/&lt;a&amp;b&gt;" in to_svg(step)


@pytest.mark.parametrize("step", [overlapped_step(), serial_step(0), deep_step(61), load_steps(RECORDED)[1]])
def test_the_svg_is_well_formed_and_needs_nothing_else(step: Step) -> None:
    svg = to_svg(step)
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    assert "prefers-color-scheme: dark" in svg
    assert "href" not in svg


@pytest.mark.parametrize("width", [960, 318])
def test_the_svg_shows_every_computation_inside_the_picture(width: int) -> None:
    root = ElementTree.fromstring(to_svg(overlapped_step(), width=width))
    rects = [rect for rect in root.findall("{*}rect") if rect.find("{*}title") is not None]
    titles = [rect.findtext("{*}title", "") for rect in rects]
    assert titles.count("compute of layer 0, microbatch B: 30.0 ms") == 1
    assert sum(title.startswith("compute") for title in titles) == 4
    assert all(float(rect.get("x", -1)) + float(rect.get("width", 0)) <= width for rect in rects)


def test_a_frame_that_reaches_into_other_layers_is_counted_once() -> None:
    step = step_of(
        [did("attention", 10 * layer, 10 * layer + 10, layer=layer, microbatch=0) for layer in range(4)]
        + [did("waiting", 40, 55, layer=1, microbatch=0)],
        [handed(0, 0, 10 * layer + 10, 10 * layer + 35, queue=0, compute=5, layer=layer) for layer in range(4)],
        ffn_shards=1,
    )
    counts = [account(View.of(step, layers)).shards[0] for layers in (None, range(2), range(2, 4))]
    assert [shard.num_frames for shard in counts] == [4, 2, 2]
    assert counts[0].phases == counts[1].phases + counts[2].phases
    assert [shard.num_awaited for shard in counts] == [1, 1, 0]


def test_chrome_gets_a_process_for_attention_and_for_every_shard() -> None:
    events = to_chrome([overlapped_step()])["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert list(names.values()) == ["attention-0", "FFN 0/2", "FFN 1/2"]
    computing = [event for event in events if event["name"] == "compute" and names[event["pid"]] == "FFN 1/2"]
    assert [(event["ts"], event["dur"]) for event in computing] == [(30_000, 10_000), (50_000, 30_000)]
    assert computing[1]["args"] == {"step": 0, "layer": 0, "microbatch": 1}


@pytest.mark.parametrize("path", [RECORDED, OVERLAPPING])
def test_chrome_events_of_one_thread_never_overlap_halfway(path: Path) -> None:
    events = [event for event in to_chrome(load_steps(path))["traceEvents"] if event["ph"] == "X"]
    for one, other in itertools.combinations(sorted(events, key=lambda event: event["ts"]), 2):
        if (one["pid"], one["tid"]) == (other["pid"], other["tid"]):
            end, other_end = one["ts"] + one["dur"], other["ts"] + other["dur"]
            assert other["ts"] >= end - 0.001 or other_end <= end + 0.001


def test_chrome_keeps_what_two_replicas_saw_apart() -> None:
    steps = [overlapped_step(replica="attention-0"), overlapped_step(replica="attention-1", index=1)]
    events = to_chrome(steps)["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert len(set(names)) == 6
    assert "FFN 1/2 for attention-1" in names
    assert json.loads(json.dumps(events)) == events
