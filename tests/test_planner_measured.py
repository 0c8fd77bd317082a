"""Stages calibrated by what a mesh measured, and what is predicted from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from afd.errors import ConfigError
from afd.planner.calibration import Calibration, Line, calibrate, fit_line
from afd.planner.cli import app
from afd.planner.layers import Ffn, GroupedQuery
from afd.planner.observations import Observation, Setting, of_steps, read_observations
from afd.planner.shape import ModelShape, load_shape
from afd.planner.shared_cores import Machine, Pace, Simulation, Work
from afd.trace_view import Handoff, Interval, Step, load_steps
from afd.trace_view.steps import Part

MS = 1_000_000
DATA = Path(__file__).parent / "data"
MODEL = Path(__file__).resolve().parents[1] / "models" / "step3-nano"
NANO_LAYERS = load_shape(str(MODEL)).num_layers
MOE = Ffn(hidden_size=1000, intermediate_size=1000, num_experts=16, top_k=2)
SHAPE = ModelShape("small", 1000, 1000, 4096, ((GroupedQuery(1000, 8, 2, 64), MOE),) * 4)


ALONE = Machine()


def paced(work: Work, attention: int, ffn: int, microbatches: int, machine: Machine = ALONE) -> Pace:
    return Simulation(work, attention, ffn, microbatches, machine).run()


TWO_LAYERS = Work(attention=2.0, beside=1.0, ffn=(3.0, 3.0), crossing=0.5)


def test_a_lone_microbatch_takes_the_sum_of_all_its_stages() -> None:
    found = paced(TWO_LAYERS, 1, 1, 1)
    assert found.step_s == pytest.approx(2 * (2 + 3 + 0.5) + 1)
    assert (found.attention, found.ffn) == pytest.approx((5 / 12, 6 / 12), abs=0.01)


def test_the_slower_side_is_busy_all_the_time_if_there_are_microbatches_enough() -> None:
    slow_ffn = paced(Work(1.0, 0.0, (3.0, 3.0), 0.1), 1, 1, 2)
    assert slow_ffn.step_s == pytest.approx(2 * 2 * 3)
    assert slow_ffn.ffn == pytest.approx(1, abs=0.05)
    slow_attention = paced(Work(3.0, 0.5, (1.0, 1.0), 0.1), 1, 1, 2)
    assert slow_attention.step_s == pytest.approx(2 * (2 * 3 + 0.5))


def test_replicas_take_turns_at_the_ffn_as_microbatches_do() -> None:
    assert paced(Work(1.0, 0.0, (3.0, 3.0), 0.1), 2, 1, 1).step_s == pytest.approx(2 * 2 * 3)
    assert paced(Work(4.0, 0.0, (3.0, 3.0), 1.0), 2, 1, 1).step_s == pytest.approx(2 * (4 + 3 + 1))


def test_two_shards_that_share_one_core_take_twice_as_long() -> None:
    alone = paced(TWO_LAYERS, 1, 2, 1)
    assert alone.step_s == pytest.approx(12)
    assert paced(TWO_LAYERS, 1, 2, 1, Machine(cores=1)).step_s == pytest.approx(12 + 2 * 3)
    assert paced(TWO_LAYERS, 1, 2, 1, Machine(cores=2, slowdown=1.5)).step_s == pytest.approx(12 + 2 * 1.5)
    crowded = paced(TWO_LAYERS, 1, 4, 1, Machine(cores=2, slowdown=1.5, crowding=2))
    assert crowded.step_s == pytest.approx(6 + 2 * 3 * 2 * 1.5 * 2)


def test_a_line_is_found_again_and_no_term_is_below_zero() -> None:
    loads = [(n, n * context) for n in (1, 2, 8, 16) for context in (100, 900)]
    line = fit_line(("sequence", "token"), loads, [3 + 0.5 * n + 0.001 * tokens for n, tokens in loads])
    assert line.coefficients == pytest.approx((3, 0.5, 0.001))
    assert line.error < 1e-9
    assert line(4, 1000) == pytest.approx(3 + 2 + 1)
    falling = fit_line(("sequence",), [(1,), (2,), (4,)], [4.0, 3.0, 2.0])
    assert min(falling.coefficients) == 0


def test_terms_that_the_loads_do_not_tell_apart_become_one() -> None:
    line = fit_line(("sequence", "token"), [(n, 100 * n) for n in (1, 2, 4)], [2.0 * n for n in (1, 2, 4)])
    assert sum(coefficient > 0 for coefficient in line.coefficients) == 1
    assert line(8, 800) == pytest.approx(16)


TRUTH = Calibration(
    shape=SHAPE,
    machine=Machine(),
    attention=Line(("once", "sequence", "context token"), (1e-3, 2e-4, 1e-6), 0),
    beside=Line(("once", "sequence"), (2e-3, 1e-4), 0),
    ffn=Line(("once", "10^9 weights", "token"), (1e-3, 0.05, 3e-4), 0),
    crossing=Line(("once", "sequence", "further shard"), (5e-4, 1e-5, 2e-4), 0),
    observations=(),
)


def observed(setting: Setting, truth: Calibration = TRUTH) -> Observation:
    """What a mesh of these stages would measure."""
    work = truth.work(setting)
    return Observation(
        setting,
        SHAPE.num_layers,
        num_steps=100,
        step_s=truth.predict(setting).pace.step_s,
        attention_s=work.attention * SHAPE.num_layers,
        beside_s=work.beside,
        ffn_s=sum(work.ffn),
    )


LONE = [Setting(1, ffn, 1, streams, context) for ffn in (1, 2) for streams in (1, 4, 8, 16) for context in (100, 800)]


def test_stages_are_found_again_from_what_was_measured() -> None:
    found = calibrate([observed(setting) for setting in LONE], SHAPE)
    for name in ("attention", "beside", "ffn", "crossing"):
        assert getattr(found, name).coefficients == pytest.approx(getattr(TRUTH, name).coefficients, rel=1e-4), name
    other = Setting(3, 2, 2, 48, 2000)
    assert found.predict(other).tokens_per_s == pytest.approx(TRUTH.predict(other).tokens_per_s, rel=1e-4)
    assert not found.is_within(other)
    assert found.is_within(Setting(2, 1, 2, 32, 500))


def test_more_processes_than_cores_are_no_faster() -> None:
    shared = replace(TRUTH, machine=Machine(cores=1))
    alone, both = (shared.predict(Setting(number, 1, 1, 16, 100)) for number in (1, 2))
    assert both.tokens_per_s < alone.tokens_per_s
    assert both.binding == "cores"


def test_what_binds_is_what_is_busy() -> None:
    assert TRUTH.predict(Setting(1, 1, 1, 16, 100)).binding == "turns"
    assert TRUTH.predict(Setting(4, 1, 1, 64, 100)).binding == "FFN"
    assert TRUTH.predict(Setting(1, 8, 2, 32, 100_000)).binding == "attention"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([Setting(1, 1, 1, 8, 100), Setting(1, 1, 2, 16, 100)], "of 8 sequences do not tell"),
        ([Setting(1, 1, 2, 8, 100), Setting(1, 1, 2, 16, 100)], "AFD_MICROBATCHES=1"),
    ],
)
def test_loads_that_do_not_tell_enough_are_refused(settings: Sequence[Setting], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        calibrate([observed(setting) for setting in settings], SHAPE)


def test_another_model_than_was_measured_is_refused() -> None:
    other = replace(SHAPE, name="other", layers=SHAPE.layers * 2)
    with pytest.raises(ConfigError, match="other has 8 layers, and what was measured 4"):
        calibrate([observed(setting) for setting in LONE], other)


def did(part: Part, start: int, end: int, layer: int = -1) -> Interval:
    return Interval(part, layer, 0 if layer >= 0 else -1, start * MS, end * MS)


def step(**attributes: Any) -> Step:
    """Of one layer and shard: 10 ms of attention, 2 of sending, 38 of waiting while the FFN computes 30; 5 beside."""
    return Step(
        index=0,
        replica="attention-0",
        start_ns=0,
        duration_ns=55 * MS,
        attributes={
            "afd.num_ffn_shards": 1,
            "afd.num_sequences": 4,
            "afd.num_tokens": 4,
            "afd.num_context_tokens": 400,
            **attributes,
        },
        intervals=(
            did("attention", 0, 10, 0),
            did("send", 10, 12, 0),
            did("waiting", 12, 50, 0),
            did("sample", 50, 54),
        ),
        handoffs=(Handoff(0, 0, 0, 10 * MS, 50 * MS, 1 * MS, 30 * MS),),
    )


def test_a_traces_steps_are_one_observation_for_each_load() -> None:
    steps = [step()] * 4 + [step(**{"afd.num_context_tokens": 4000})] * 4 + [step(**{"afd.num_tokens": 9})] * 4
    first, second = of_steps(Path("t.jsonl"), steps)
    assert first.setting == Setting(1, 1, 1, 4, 100)
    assert first.num_layers == 1
    assert second.setting == Setting(1, 1, 1, 4, 1000)
    times = (first.step_s, first.attention_s, first.beside_s, first.ffn_s, first.crossing_s)
    assert times == pytest.approx((0.055, 0.010, 0.005, 0.030, 0.010))


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([step(**{"afd.num_ffn_shards": 0})] * 4, "FFN in the attention process"),
        ([step()] * 3, "3 steps that only decode"),
        ([step(**{"afd.num_tokens": 9})] * 9, "0 steps that only decode"),
    ],
)
def test_a_trace_that_tells_nothing_is_refused(steps: list[Step], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        of_steps(Path("t.jsonl"), steps)


def test_a_trace_of_before_contexts_were_told_is_refused() -> None:
    with pytest.raises(ConfigError, match="older mesh"):
        of_steps(DATA / "overlapping_steps.jsonl", load_steps(DATA / "overlapping_steps.jsonl"))


def scrape(steps: int, streams: int, context: int = 100, prefilled: int = 0, name: str = "afd_steps") -> str:
    """An attention replica's metrics after so many steps of `step`'s times."""
    values = {
        name: steps,
        'afd_handoffs{shard="0"}': steps * NANO_LAYERS,
        "afd_microbatches": steps,
        "afd_step_tokens": steps * streams + prefilled,
        "afd_generated_tokens": steps * streams,
        "afd_context_tokens": steps * streams * context,
        "afd_step_seconds": 0.055 * steps,
        'afd_step_part_seconds{part="attention"}': 0.010 * steps,
        'afd_step_part_seconds{part="send"}': 0.002 * steps,
        'afd_step_part_seconds{part="receive"}': 0.038 * steps,
        'afd_handoff_ffn_compute_seconds{shard="0"}': 0.030 * steps,
        'afd_handoff_ffn_bubble_seconds{shard="0"}': 0.025 * steps,
    }
    lines = []
    for each, value in values.items():
        family, brace, labels = each.partition("{")
        kind = f"# TYPE {family}_total counter"
        lines += [] if kind in lines else [kind]
        lines.append(f"{family}_total{brace}{labels} {value}")
    return "\n".join(lines) + "\n"


def test_scrapes_of_one_file_are_read_one_after_the_other(tmp_path: Path) -> None:
    file = tmp_path / "metrics.txt"
    gateway = '# TYPE afd_replicas gauge\nafd_replicas{role="attention"} 2.0\n'
    file.write_text(scrape(10, 4) + scrape(110, 4) + scrape(120, 4, prefilled=500) + scrape(20, 4) + gateway)
    (found,) = read_observations([file])
    assert found.setting == Setting(2, 1, 1, 8, 100)
    assert found.num_layers == NANO_LAYERS
    times = (found.num_steps, found.step_s, found.attention_s, found.beside_s, found.ffn_s, found.crossing_s)
    assert times == pytest.approx((100, 0.055, 0.010, 0.005, 0.030, 0.010))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hello, world", "neither a trace"),
        ("\x00\x01", "neither a trace"),
        ("", "no metrics of an attention replica"),
        ("{}", "not a trace"),
        (scrape(10, 4, name="afd_ffn_batches"), "no metrics of an attention replica"),
        (scrape(10, 4).replace("afd_context", "afd_other"), "older mesh"),
        (scrape(10, 4), "1 scrapes, and nothing decodes"),
        (scrape(10, 4) + scrape(90, 4, prefilled=99), "2 scrapes, and nothing decodes"),
        ((scrape(10, 4) + scrape(90, 4)).replace("ffn_bubble", "other"), "FFN inside"),
    ],
)
def test_a_file_that_tells_nothing_is_refused_in_a_sentence(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "file"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words) as refused:
        read_observations([file])
    assert str(file) in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_observations([tmp_path / "none"])


def measured(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["--measured", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_prints_what_was_fitted_and_what_is_predicted(tmp_path: Path) -> None:
    file, numbers = tmp_path / "metrics.txt", tmp_path / "out.json"
    file.write_text(scrape(0, 4) + scrape(100, 4) + scrape(200, 10))
    shown = measured(file, "--model", MODEL, "--ffn", 1, "--ffn", 2, "--streams", 32, "--json", numbers)
    for word in ("1A1F", "1A2F", "73", "one shard was measured", "cores of its own", "* beyond"):
        assert word in shown
    written = json.loads(numbers.read_text())
    assert [(each["num_ffn"], each["streams"]) for each in written["predicted"]] == [(1, 32), (2, 32)]
    assert written["measured"][0]["step_s"] == pytest.approx(0.055)


def test_options_of_cards_and_of_a_mesh_do_not_mix(tmp_path: Path) -> None:
    for arguments, sentence in (
        (["--measured", str(tmp_path), "--model", "step-3", "--card", "H800"], "--card says nothing beside --measured"),
        (["--model", "step-3", "--card", "H800", "--streams", "8"], "--streams is of a mesh that was measured"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            CliRunner().invoke(app, arguments, catch_exceptions=False)
