"""What `afd advise` says to metrics that are made up, one for each verdict, and to a mesh that runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from afd.advice import Advice, Goal, Look, advise, seen_as
from afd.client import Replica
from afd.errors import ConfigError, PeerUnavailable

CALM = Look(
    attention=2,
    ffn=2,
    missing_shards=(),
    running=40,
    waiting=0,
    places=64,
    kv_use=0.41,
    steps_per_s=40,
    step_s=1.6,
    bubble_s=0.6,
    handoff_s=1.2,
    queue_s=0.1,
    compute_s=0.9,
    ffn_busy=0.5,
    ttft_ms=200,
)


def advised(goal: Goal | None = None, **seen: Any) -> Advice:
    return advise(replace(CALM, **seen), goal or Goal())


def test_where_nobody_waits_there_is_nothing_to_do() -> None:
    assert advised() == Advice(
        2,
        2,
        "nothing: 41% of the KV blocks are used, no sequence waits, a token takes 40.0 ms; "
        "the busiest FFN shard computes 50% of the time",
    )


def test_a_goal_that_is_kept_changes_nothing() -> None:
    assert advised(Goal(tpot_ms=50, ttft_ms=300), ffn_busy=0.99).reason.startswith("nothing")


def test_without_load_there_is_nothing_to_judge_by() -> None:
    found = advised(Goal(tpot_ms=1), steps_per_s=0, step_s=0, bubble_s=0, handoff_s=0, running=0, ttft_ms=None)
    assert (found.attention, found.ffn) == (2, 2)
    assert "ask again under load" in found.reason


def test_a_shard_without_a_replica_comes_first() -> None:
    found = advised(missing_shards=(1,), steps_per_s=0, step_s=0, waiting=9)
    assert (found.attention, found.ffn) == (2, 2)
    assert "FFN shard 1/2 has no replica" in found.reason


def test_a_full_kv_cache_wants_attention_replicas_for_those_that_wait() -> None:
    found = advised(kv_use=0.96, waiting=12)
    assert (found.attention, found.ffn) == (4, 2)  # 2 * 0.96 / 0.8 * 52 / 40
    assert "96% of the KV blocks are used and 12 sequences wait" in found.reason


def test_places_that_are_all_taken_want_attention_replicas() -> None:
    found = advised(running=64, waiting=16)
    assert (found.attention, found.ffn) == (3, 2)
    assert "all 64 places for sequences are taken and 16 wait" in found.reason


def test_however_many_wait_replicas_are_doubled_at_most() -> None:
    assert advised(kv_use=1.0, waiting=1000).attention == 4


def test_tokens_that_are_too_slow_want_more_of_the_side_that_takes_the_most() -> None:
    ffn = advised(Goal(tpot_ms=30), bubble_s=1.1, ffn_busy=0.95)
    assert (ffn.attention, ffn.ffn) == (2, 3)
    assert "a token takes 40.0 ms instead of 30, and attention waits 69% of it for the FFN" in ffn.reason
    attention = advised(Goal(tpot_ms=10))
    assert (attention.attention, attention.ffn) == (4, 2)
    assert "of which attention computes 62%" in attention.reason


def test_ways_that_are_long_are_not_mended_by_replicas() -> None:
    found = advised(Goal(tpot_ms=30), bubble_s=1.2, compute_s=0.2)
    assert (found.attention, found.ffn) == (2, 2)
    assert "75% of a handoff is on the way" in found.reason
    assert "--ffn 0" in found.reason


def test_a_first_token_that_is_too_late_wants_more_of_the_busier_side() -> None:
    found = advised(Goal(ttft_ms=150))
    assert (found.attention, found.ffn) == (3, 2)
    assert "the first token takes 200 ms instead of 150" in found.reason
    assert advised(Goal(ttft_ms=150), ffn_busy=0.95).ffn == 3


def test_without_a_goal_a_side_that_is_always_busy_while_the_other_waits_is_told() -> None:
    ffn = advised(ffn_busy=0.95, bubble_s=0.608)
    assert (ffn.attention, ffn.ffn) == (2, 3)
    assert "attention waits 38% of it for the FFN, whose busiest shard computes 95% of the time" in ffn.reason
    attention = advised(step_s=1.9, bubble_s=0.1)
    assert (attention.attention, attention.ffn) == (3, 2)


def test_replicas_that_have_little_to_do_are_given_back_one_at_a_time() -> None:
    idle = {"running": 4, "kv_use": 0.05, "step_s": 0.4, "bubble_s": 0.1, "steps_per_s": 20}
    assert (advised(**idle).attention, advised(**idle).ffn) == (1, 2)
    assert advised(Goal(tpot_ms=25), **idle).attention == 2, "20 ms of 25 leave no room"
    assert advised(attention=1, **idle).attention == 1


def replica(role: str, number: int, **about: Any) -> Replica:
    defaults: dict[str, Any] = {
        "address": "",
        "shard": None,
        "is_ready": True,
        "links": {},
        "sequences_at": {},
        "capacity": {},
        "load": {},
        "rates": {},
    }
    return Replica(role=role, replica_id=f"{role}-{number}", **{**defaults, **about})


def test_leases_are_added_up_and_readings_averaged() -> None:
    def at(steps: float) -> list[Replica]:
        rates = {"steps": steps, "step_seconds": 0.5}
        about = {"capacity": {"kv_blocks": 10, "sequences": 8}, "load": {"sequences": 3, "waiting": 1, "kv_blocks": 4}}
        return [
            replica("gateway", 0, rates={"first_tokens": 2.0, "ttft_seconds": 0.5}),
            *(replica("attention", number, rates=rates, **about) for number in range(2)),
            replica("ffn", 0, shard=(0, 2), rates={"ffn_compute_seconds": 0.25}),
            replica("ffn", 1, shard=(0, 2), rates={"ffn_compute_seconds": 0.75}),
        ]

    found = seen_as([at(10), at(20)])
    assert (found.attention, found.ffn, found.missing_shards) == (2, 2, (1,))
    assert (found.running, found.waiting, found.places, found.kv_use) == (4, 2, 16, 0.4)
    assert (found.steps_per_s, found.step_s, found.ffn_busy, found.ttft_ms) == (30, 1.0, 0.5, 250)


def test_what_is_no_mesh_with_shards_is_refused() -> None:
    with pytest.raises(PeerUnavailable, match="no attention replica"):
        seen_as([[replica("gateway", 0)]])
    with pytest.raises(ConfigError, match="FFN inside"):
        seen_as([[replica("attention", 0)]])
