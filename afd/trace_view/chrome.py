"""Steps as trace events for ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from afd.trace_view.steps import Step
from afd.trace_view.view import Bar, View, letter

_PIDS_PER_REPLICA = 1000
_Event = dict[str, Any]


def to_chrome(steps: Sequence[Step]) -> dict[str, Any]:
    """Trace events; microseconds since the first step's start.

    Every attention replica is a process, and so is every FFN shard as that replica saw it: its times are placed on
    the replica's clock. Threads are microbatches; thread 0 is the step as a whole.
    """
    origin_ns = min((step.start_ns for step in steps), default=0)
    replicas = sorted({step.replica for step in steps})
    events: list[_Event] = []
    for number, replica in enumerate(replicas):
        own = [step for step in steps if step.replica == replica]
        pid = 1 + number * _PIDS_PER_REPLICA
        events += _names(own, pid, f" for {replica}" if len(replicas) > 1 else "")
        for step in own:
            events += _slices(step, pid, step.start_ns - origin_ns)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _names(steps: Sequence[Step], first_pid: int, seen_by: str) -> Iterator[_Event]:
    widest = max(steps, key=lambda step: step.num_shards)
    shards = [widest.shard_name(shard) + seen_by for shard in range(widest.num_shards)]
    num_microbatches = max(step.num_microbatches for step in steps)
    for pid, process in enumerate([widest.replica, *shards], first_pid):
        yield _meta("process_name", pid, 0, name=process)
        yield _meta("process_sort_index", pid, 0, sort_index=pid)
        if pid == first_pid:
            yield _meta("thread_name", pid, 0, name="step")
        for microbatch in range(num_microbatches):
            yield _meta("thread_name", pid, 1 + microbatch, name=f"microbatch {letter(microbatch)}")


def _meta(what: str, pid: int, tid: int, **args: object) -> _Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": args}


def _slices(step: Step, pid: int, start_ns: int) -> Iterator[_Event]:
    whole = {"name": f"decode step {step.index}", "cat": "step", "pid": pid, "tid": 0}
    yield _slice(whole, start_ns, step.duration_ns, step.attributes)
    for bar in View.of(step, None).bars:
        of_layer = {"layer": bar.layer_idx, "microbatch": bar.microbatch} if bar.layer_idx >= 0 else {}
        yield _slice(_about(bar, pid), start_ns + bar.start_ns, bar.duration_ns, {"step": step.index, **of_layer})


def _about(bar: Bar, first_pid: int) -> _Event:
    return {
        "name": "on the way" if bar.kind == "way" else bar.kind,
        "cat": "ffn" if bar.lane else "attention",
        "pid": first_pid + bar.lane,
        "tid": 1 + bar.microbatch,
    }


def _slice(about: _Event, start_ns: int, duration_ns: int, args: Mapping[str, Any]) -> _Event:
    return {"ph": "X", **about, "ts": start_ns / 1e3, "dur": duration_ns / 1e3, "args": dict(args)}
