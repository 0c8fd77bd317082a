"""Who gets which cores."""

from __future__ import annotations

import asyncio
import os
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afd.compute import ComputeThread, renice_thread
from afd.config import parse_cpus
from afd.placement import Cores, Placement, split


def test_sides_that_take_turns_have_all_cores_and_sleep_at_once() -> None:
    placement = Placement.of(Cores.shared, 1, 1, [0, 1])
    assert (placement.attention, placement.ffn) == ([[0, 1]], [[0, 1]])
    assert placement.settings([0, 1]) == {"threads": 2, "cpus": "0,1", "handoff_spin_us": 0}


def test_sides_with_their_own_cores_share_none() -> None:
    placement = Placement.of(Cores.own, 1, 2, list(range(8)))
    assert (placement.attention, placement.ffn) == ([[0, 1]], [[2, 3, 4], [5, 6, 7]])
    assert placement.settings([0, 1])["handoff_spin_us"] == 5000
    assert placement.settings([0, 1])["network_nice"] == 10


@pytest.mark.parametrize("cores", list(Cores))
def test_where_cores_are_few_each_process_has_one_and_does_not_hold_it_while_it_waits(cores: Cores) -> None:
    placement = Placement.of(cores, 2, 3, [0, 1])
    assert all(len(cpus) == 1 for cpus in [*placement.attention, *placement.ffn][cores is Cores.shared and 2 :])
    assert placement.settings([0]).get("handoff_spin_us") == (0 if cores is Cores.shared else None)


@given(st.integers(1, 40), st.integers(1, 40))
def test_split_gives_every_part_a_core_and_every_core_a_part_of_about_equal_size(num: int, num_parts: int) -> None:
    parts = split(range(num), num_parts)
    assert len(parts) == num_parts
    assert {cpu for part in parts for cpu in part} == set(range(num))
    sizes = [len(part) for part in parts]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("text", "cpus"), [("3", (3,)), ("0,2-4", (0, 2, 3, 4)), ("1,0", (1, 0))])
def test_processors_are_read_in_their_order(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize("text", ["", "a", "0,,1", "1-", "0-99999", "0,0", "3-1"])
def test_what_names_no_processors_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="give processors like 0 or 0,2-3"):
        parse_cpus(text)


def test_how_long_to_look_out_is_what_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFD_HANDOFF_SPIN_US", "300")
    assert "handoff_spin_us" not in Placement.of(Cores.shared, 1, 1, [0, 1]).settings([0, 1])


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a niceness of their own on Linux")
async def test_network_gives_way_to_the_arithmetic_that_runs_already() -> None:
    compute = ComputeThread()

    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def serve() -> tuple[int, int]:
        before = compute.submit(niceness).result()
        renice_thread(3)
        return niceness() - before, compute.submit(niceness).result() - before

    assert await asyncio.to_thread(serve) == (3, 0)
