"""The simulation: where it is the estimate, what it keeps, what makes it slower, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from afd.errors import ConfigError
from afd.planner.accelerators import load_accelerators
from afd.planner.cli import app
from afd.planner.deployment import Collocated, Disaggregated, Experts
from afd.planner.shape import load_shape
from afd.planner.simulation import Conditions, Rate, Replay, Scaling, Scenario, Simulated, Streams, simulate
from afd.planner.simulation.faults import AttentionLost
from afd.planner.simulation.outcome import Times
from afd.planner.simulation.report import notes
from afd.planner.simulation.router import least_loaded
from afd.planner.simulation.run import Run
from afd.planner.simulation.scenario import scaling
from afd.planner.simulation.sequences import NO_TURN, Decoding
from afd.planner.stages import Workload
from afd.planner.traffic import Drawn, Lengths, Recorded, distribution

H800 = load_accelerators()["H800"]
STEP3 = load_shape("step-3")
LENGTHS = Drawn(distribution("lognormal:3000,0.5"), distribution("geometric:300"))
SHORT = Drawn(distribution("uniform:50,500"), distribution("uniform:5,60"))
PAIR, FULL = Disaggregated(H800, H800, 1, 1), Streams(1000)


def scenario(
    deployment: Disaggregated | Collocated = PAIR,
    arrivals: Rate | Streams | Replay = FULL,
    lengths: Lengths = LENGTHS,
    **others: object,
) -> Scenario:
    settings: dict[str, object] = {"seconds": 5.0, **others}
    return Scenario(deployment, Workload(STEP3, lengths.live_context), lengths, arrivals, **settings)  # type: ignore[arg-type]


def run(*args: object, **settings: object) -> Simulated:
    return simulate(scenario(*args, **settings))  # type: ignore[arg-type]


def agree(found: Simulated, within: float = 0.05) -> None:
    assert found.tpot_s.mean == pytest.approx(found.expected.tpot_s, rel=within)
    assert found.tokens_per_s == pytest.approx(found.expected.tokens_per_s, rel=within)


def whole(found: Simulated) -> None:
    """Each token of each request is decoded once, or is still to come."""
    counts = found.counts
    assert counts.tokens_decoded + counts.tokens_to_come == counts.tokens_arrived


DEPLOYMENTS = [
    *(Disaggregated(H800, H800, x, y, microbatches=m) for x, y in [(1, 1), (2, 2), (3, 1)] for m in (1, 2, 3, 4)),
    *(Disaggregated(H800, H800, 2, 2, microbatches=m, experts=Experts.expert) for m in (1, 3)),
    Disaggregated(H800, H800, 1, 1, tp=4),
    Collocated(H800, 64),
    Collocated(H800, 8, tp=8),
]


@pytest.mark.parametrize("each", [8, 120])
@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda d: f"{d.name}-{d.microbatches}")
def test_with_nothing_in_its_way_it_is_the_estimate(deployment: Disaggregated | Collocated, each: int) -> None:
    """Of sequences that are always so many, hardly and well filling the cards."""
    streams = each * deployment.num_groups * deployment.microbatches
    found = run(deployment, Streams(streams), seconds=1.5)
    agree(found)
    whole(found)


def test_at_a_rate_that_is_kept_up_with_it_is_the_estimate() -> None:
    found = run(arrivals=Rate(300), lengths=SHORT, seconds=4, units=4)
    assert not found.expected.saturated
    assert found.tpot_s.mean == pytest.approx(found.expected.tpot_s, rel=0.05)
    assert found.tokens_per_s == pytest.approx(300 * SHORT.output_tokens, rel=0.1), "as many tokens as are asked for"
    whole(found)


def test_requests_that_come_faster_than_they_are_decoded_wait_ever_longer() -> None:
    found = run(arrivals=Rate(100), max_sequences=30, seconds=10)
    assert found.expected.saturated
    agree(found, within=0.1)
    waiting = [second.waiting for second in found.series]
    assert waiting == sorted(waiting)
    assert waiting[-1] > 500


def recorded(count: int, seconds: float) -> Replay:
    rng = np.random.default_rng(1)
    return Replay(Recorded(*SHORT.sample(rng, count), np.sort(rng.uniform(0, seconds, count))))


@pytest.mark.parametrize(("deployment", "per_s"), [(Disaggregated(H800, H800, 2, 2), 40), (Collocated(H800, 32), 150)])
def test_with_prompts_on_the_same_cards_it_is_the_estimate_too(
    deployment: Disaggregated | Collocated, per_s: float
) -> None:
    lengths = Drawn(distribution("1000"), distribution("geometric:200"))
    found = run(deployment, Rate(per_s), lengths=lengths, prefill_chunk=512, seconds=10)
    assert found.tpot_s.mean == pytest.approx(found.expected.tpot_s, rel=0.05)
    whole(found)


def test_littles_law_holds() -> None:
    """What is there in the mean is what came, times how long each stayed."""
    found = run(arrivals=recorded(500, 3), seconds=20, prefill_chunk=256)
    counts = found.counts
    assert counts.requests_finished == 500
    stayed_s = 500 * found.ttft_s.mean + (counts.tokens_decoded - 500) * found.tpot_s.mean
    assert (found.sequences + found.waiting) * 20 == pytest.approx(stayed_s, rel=0.03)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prefill_chunk": 64},
        {"deployment": Collocated(H800, 16), "prefill_chunk": 1000},
        {"deployment": Disaggregated(H800, H800, 3, 1, microbatches=2), "max_sequences": 4},
    ],
)
def test_each_token_is_decoded_once_whatever_fails_and_is_scaled(settings: dict[str, object]) -> None:
    replay = recorded(200, 4)
    conditions = Conditions(
        jitter=0.2,
        stragglers=0.2,
        mean_time_between_failures_s=3,
        repair_s=1,
        scaling=(Scaling(1, 5), Scaling(2, 1), Scaling(3, 2)),
    )
    found = run(**{"arrivals": replay, "units": 3, "seconds": 10, "conditions": conditions, **settings})
    assert found.counts.attention_failures > 3
    assert found.counts.sequences_resumed > 0
    assert found.counts.requests_finished == found.counts.requests_arrived == 200
    assert found.counts.tokens_decoded == found.counts.tokens_arrived == replay.requests.outputs.sum()
    assert found.waiting < found.most_waiting


@pytest.mark.parametrize("arrivals", [Streams(300), Rate(100)])
@pytest.mark.parametrize("prefill_chunk", [None, 128])
def test_each_token_is_decoded_once_or_is_still_to_come(arrivals: Rate | Streams, prefill_chunk: int | None) -> None:
    conditions = Conditions(mean_time_between_failures_s=4, repair_s=2, scaling=(Scaling(1, 1), Scaling(2, 4)))
    found = run(
        arrivals=arrivals, lengths=SHORT, units=3, prefill_chunk=prefill_chunk, conditions=conditions, seconds=4
    )
    assert found.counts.sequences_resumed > 0
    whole(found)


def test_jitter_never_makes_it_faster() -> None:
    deployment = Disaggregated(H800, H800, 2, 2)
    found = [run(deployment, Streams(4000), seconds=2, conditions=Conditions(jitter=jitter)) for jitter in (0, 0.1, 1)]
    means = [each.tpot_s.mean for each in found]
    assert means == sorted(means)
    assert means[2] > 1.1 * means[0]


def test_a_straggler_slows_its_unit_and_no_other() -> None:
    """One replica in ten, and so about one unit in five."""
    even = run(arrivals=Streams(40_000), units=40, seconds=1)
    found = run(
        arrivals=Streams(40_000), units=40, seconds=1, conditions=Conditions(stragglers=0.1, straggler_factor=3)
    )
    assert found.tpot_s.p50 == pytest.approx(even.tpot_s.p50, rel=0.02)
    assert found.tpot_s.p99 > 1.5 * even.tpot_s.p99


def test_the_same_seed_has_the_same_numbers() -> None:
    settings = {"arrivals": Rate(100), "units": 2, "seconds": 2.0, "conditions": Conditions(jitter=0.3, stragglers=0.5)}
    assert run(**settings) == run(**settings)
    assert run(**settings) != run(**settings, seed=1)


def test_a_lost_ffn_replica_costs_its_unit_a_failover() -> None:
    conditions = Conditions(mean_time_between_failures_s=5, failover_s=0.4, repair_s=0)
    calm, found = (run(arrivals=Streams(10_000), units=10, seconds=3, conditions=c) for c in (Conditions(), conditions))
    stalled = 0.4 * found.counts.ffn_failures / (3 * 10)
    assert stalled > 0.02
    assert found.tpot_s.mean > 0.97 * calm.tpot_s.mean / (1 - stalled)
    assert found.tokens_per_s < 1.03 * calm.tokens_per_s * (1 - stalled)


def test_more_replicas_take_a_share_of_the_streams_and_fewer_finish_what_they_have() -> None:
    conditions = Conditions(scaling=(Scaling(3, 4), Scaling(7, 1)))
    found = run(arrivals=Streams(12_000), lengths=SHORT, units=1, seconds=12, conditions=conditions)
    speed = [second.tokens for second in found.series]
    assert speed[6] > 1.3 * speed[2] > 1.3 * 0.8 * speed[11]
    assert [found.series[second].units for second in (0, 5, 11)] == [1, 4, 1]
    assert min(second.sequences for second in found.series) > 11_500, "no stream is lost"


def test_prompts_on_the_same_cards_cost_their_share() -> None:
    elsewhere, here = run(Collocated(H800, 32), Rate(300)), run(Collocated(H800, 32), Rate(300), prefill_chunk=512)
    assert here.tpot_s.mean > 1.1 * elsewhere.tpot_s.mean
    assert here.ttft_s.p50 > elsewhere.ttft_s.p50


def test_a_prompt_takes_a_step_for_each_chunk() -> None:
    """One request at a time: 1000 tokens in chunks of 100, and the first token comes with the last of them."""
    lengths = Recorded(np.array([1000]), np.array([20]), np.array([0.1]))
    found = run(arrivals=Replay(lengths), lengths=lengths, prefill_chunk=100, seconds=1)
    assert found.steps == 10 + 19
    assert found.counts.tokens_decoded == 20


def test_a_stage_is_busy_or_idle() -> None:
    found = run(Disaggregated(H800, H800, 2, 2), Streams(6000))
    for stage, busy in found.utilisation.items():
        assert found.bubbles[stage] == pytest.approx(1 - busy, abs=0.01), "there is always something to do"
    assert found.utilisation["FFN"] > 0.97, "which binds"
    assert 0 < found.kv_use <= found.most_kv_use <= 1


def test_requests_go_to_who_has_least_to_do() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        load, room = rng.integers(0, 20, 6), rng.integers(0, 10, 6)
        count = int(rng.integers(0, room.sum() + 3))
        rows = least_loaded(load, room, count, rng)
        assert len(rows) == min(count, room.sum())
        for row in rows:
            assert load[row] == load[room > 0].min()
            load[row] += 1
            room[row] -= 1


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"arrivals": lambda: Rate(-1)}, "a rate of -1 requests per second"),
        ({"arrivals": lambda: Rate(float("nan"))}, "a rate of nan"),
        ({"arrivals": Rate(1e6)}, r"1e\+06 requests per second are far more than the [0-9.]+ that can be decoded"),
        ({"arrivals": lambda: Streams(0)}, "0 streams are none"),
        ({"arrivals": lambda: Streams(1_000_000)}, "1000000 streams do not fit: [0-9]+ do"),
        ({"arrivals": lambda: Replay(Recorded(np.ones(1), np.ones(1)))}, 'without "at_s" cannot be replayed'),
        ({"seconds": 0.0}, "0 seconds are not within"),
        ({"seconds": float("inf")}, "inf seconds are not within"),
        ({"units": 0}, "0 replicas of the deployment are not within"),
        ({"prefill_chunk": 0}, "a prefill chunk of 0 tokens gets no prompt done"),
        ({"max_sequences": 2}, "2 sequences leave a microbatch without any"),
        ({"seed": -1}, "a seed of -1"),
        ({"conditions": lambda: Conditions(scaling=(Scaling(30, 2),))}, "scaled at 30 s, but 5 s are simulated"),
        ({"conditions": lambda: Conditions(scaling=(Scaling(1, 0),))}, "0 replicas of the deployment, at 1 s"),
        ({"conditions": lambda: Conditions(scaling=tuple(scaling("30s:many")))}, "'30s:many' is no scaling"),
        ({"conditions": lambda: Conditions(scaling=tuple(scaling("inf:2")))}, "'inf:2' is no scaling"),
        ({"conditions": lambda: Conditions(jitter=-0.1)}, "a jitter of -0.1"),
        ({"conditions": lambda: Conditions(stragglers=1.5)}, "a share of 1.5 stragglers"),
        ({"conditions": lambda: Conditions(straggler_factor=0)}, "a straggler's factor of 0"),
        ({"conditions": lambda: Conditions(mean_time_between_failures_s=0)}, "0 s between failures"),
        ({"conditions": lambda: Conditions(repair_s=-1)}, "a repair of -1 s"),
        ({"lengths": Drawn(distribution("60000"), distribution("6000"))}, r"66000 tokens is not within 1\.\.65536"),
        ({"lengths": Drawn(distribution("100"), distribution("lognormal:500,3"))}, r"is not within 1\.\.65536"),
        ({"deployment": Disaggregated(H800, load_accelerators()["L4"], 1, 1)}, "FFN's weights are"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        run(**{name: value() if callable(value) else value for name, value in settings.items()})


def test_what_is_longer_than_a_model_takes_is_cut() -> None:
    lengths = Recorded(np.array([70_000, 100]), np.array([10, 70_000]), np.array([0.0, 0.0]))
    found = run(arrivals=Replay(lengths), lengths=SHORT, seconds=0.1)
    assert found.counts.tokens_arrived == 1 + (65_536 - 100)


SIMULATE = ("simulate", "--model", "step-3", "--card", "H800", "--deployment", "2A2F", "--seconds", "2")


def test_the_command_says_it_beside_the_estimate_and_draws_it(tmp_path: Path) -> None:
    conditions = ("--failures", "10", "--scale", "1s:3", "--jitter", "0.1", "--stragglers", "0.1")
    written = tmp_path / "numbers.json"
    ran = CliRunner().invoke(
        app,
        [*SIMULATE, "--streams", "4000", *conditions, "--json", str(written), "--pictures", str(tmp_path)],
        catch_exceptions=False,
    )
    assert ran.exit_code == 0
    for shown in ("2A2F: 2 s simulated", "TPOT p50, p99", "Attention replicas lost:", "knows nothing of scaling"):
        assert shown in " ".join(ran.output.split())
    numbers = json.loads(written.read_text())
    assert numbers["tokens_per_s"] * 2 == numbers["counts"]["tokens_decoded"]
    assert len(numbers["series"]) == 2
    assert "<svg" in (tmp_path / "plan-simulation.svg").read_text()


def test_recorded_requests_are_replayed(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text("\n".join(f'{{"prompt_tokens": 50, "output_tokens": 9, "at_s": {n / 50}}}' for n in range(40)))
    ran = CliRunner().invoke(app, [*SIMULATE, "--lengths", str(file)], catch_exceptions=False)
    assert "at the start: 40; finished: 40." in " ".join(ran.output.split())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--deployment", "2A2G", "--streams", "9"), "'2A2G' is no deployment"),
        (("--deployment", "0A2F", "--streams", "9"), "'0A2F' is no deployment"),
        (("--deployment", "EP64", "--ffn-card", "H20", "--streams", "9"), "on the same cards"),
        (("--streams", "9", "--rate", "9"), "do not go together"),
        ((), "give --rate, or --streams"),
        (("--streams", "9", "--cards", "0"), "--cards 0 is not within"),
        (("--streams", "9", "--microbatches", "0"), "--microbatches 0 is not within"),
        (("--streams", "9", "--scale", ""), "'' is no scaling"),
    ],
)
def test_nonsense_on_the_command_line_is_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    ran = CliRunner().invoke(app, [*SIMULATE, *arguments])
    assert isinstance(ran.exception, ConfigError)
    assert sentence in str(ran.exception)


def test_a_minute_without_requests_has_no_times() -> None:
    replay = Replay(Recorded(np.array([100]), np.array([100]), np.array([9.0])))
    found = run(arrivals=replay, lengths=SHORT, seconds=1)
    assert (found.tpot_s, found.ttft_s) == (Times(None, None, None), Times(None, None, None))
    assert found.tokens_per_s == 0


def test_layers_of_several_kinds_are_named_where_they_are_the_reason() -> None:
    """Llama 4's are dense or MoE, and see a chunk or everything; the formula has the sum of each stage."""
    shape, lengths = load_shape("llama-4-maverick"), Drawn(distribution("3800"), distribution("geometric:500"))
    mixed = Scenario(
        Disaggregated(H800, H800, 4, 4), Workload(shape, lengths.live_context), lengths, Streams(300), seconds=1.0
    )
    found = simulate(mixed)
    assert found.tpot_s.mean > 1.1 * found.expected.tpot_s
    assert "layers of several kinds" in next(notes(found, mixed))


def test_the_table_of_slots_knows_what_each_row_holds() -> None:
    """Against lists, through growth, losses and rows that have no turn."""
    rng = np.random.default_rng(0)
    table, kept = Decoding(3, 2), [[] for _ in range(3)]
    turn = np.zeros(3, np.int64)
    for _ in range(200):
        rows = np.sort(rng.integers(3, size=rng.integers(4)))
        context, output = rng.integers(1, 50, len(rows)), rng.integers(1, 9, len(rows))
        table.put(rows, turn[rows], context, output)
        for row, before, more in zip(rows, context, output, strict=True):
            kept[row].append([int(before), int(more)])
        active = rng.random(3) < 0.7
        found = table.finish(np.where(active, turn, NO_TURN))
        for row in np.flatnonzero(active):
            kept[row] = [[before + 1, more - 1] for before, more in kept[row]]
            ended = [before for before, more in kept[row] if not more]
            assert sorted(found[1][found[0] == row]) == sorted(ended)
            kept[row] = [pair for pair in kept[row] if pair[1]]
        turn += active
        if rng.random() < 0.1:
            row = int(rng.integers(3))
            assert sorted(zip(*table.lose(row, int(turn[row])), strict=True)) == sorted(map(tuple, kept[row]))
            kept[row] = []
        assert table.count.tolist() == [len(row) for row in kept]
        assert table.context.tolist() == [sum(before for before, _ in row) for row in kept]
        assert table.tokens_to_come(turn) == sum(more for row in kept for _, more in row)


def test_the_pause_of_a_sequence_that_is_lost_is_in_its_tpot() -> None:
    deployment = Disaggregated(H800, H800, 2, 1)
    one = Recorded(np.array([100]), np.array([50]), np.array([0.0]))
    pauses = []
    for losses in ([], [AttentionLost(0.2, 0, 0), AttentionLost(0.2, 0, 1)]):
        conditions = Conditions(failover_s=0.4, repair_s=0.5)
        ran = Run(scenario(deployment, Replay(one), SHORT, conditions=conditions, seconds=3))
        ran.happenings = list(losses)
        while ran.now_s < 3:
            ran.go_on()
        found = ran.outcome()
        assert found.counts.tokens_decoded == 50
        pauses.append(49 * found.tpot_s.mean)
    assert 0.4 < pauses[1] - pauses[0] < 0.65


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rate", "1000"), "Requests come faster than they can be decoded"),
        (("--rate", "30", "--prefill-chunk", "16", "--seconds", "8"), "Many more requests wait at the end"),
    ],
)
def test_an_overload_is_said(arguments: tuple[str, ...], words: str) -> None:
    asked = (
        "--model",
        "step-3",
        "--card",
        "H800",
        "--deployment",
        "2A2F",
        "--prompt",
        "3000",
        "--output",
        "geometric:500",
    )
    done = CliRunner().invoke(app, ["simulate", *asked, "--seconds", "4", *arguments], catch_exceptions=False)
    assert words in " ".join(done.output.split())


def test_more_replicas_than_can_be_simulated_are_refused() -> None:
    asked = ("--model", "step-3", "--card", "H800", "--deployment", "999A999F", "--replicas", "1000", "--rate", "10")
    with pytest.raises(ConfigError, match="1998000 attention and FFN replicas in all are more than can be simulated"):
        CliRunner().invoke(app, ["simulate", *asked], catch_exceptions=False)
