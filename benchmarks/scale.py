"""What a token costs as the mesh grows: by streams, context, layers and FFN shards, `python -m benchmarks.scale`.

Meshes of random checkpoints, started as `afd up` starts them. Figures are of decode steps alone: they begin when every
stream has some tokens, so that all prompts are computed, and end when each has as many more as were asked for. One size
grows at a time; the others stay as in BASE. The last part is that of `benchmarks.gateway`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from rich.console import Console
from rich.table import Table

from afd.bench import counters
from afd.client import Client, Stream
from afd.mesh import Mesh, MeshOptions, running_mesh
from afd.model.random_checkpoint import ModelSizes, make_checkpoint
from benchmarks import gateway

_VOCAB_SIZE = 1024
_LAYER_PARTS, _OTHER_PARTS = ("attention", "send", "receive"), ("schedule", "lm_head", "sample")
_WARM_UP_TOKENS = 24
_ROUNDS = 3
_MOST_TOKENS = 1024  # of a stream: none ends before the figures are taken

Axis = Literal["streams", "context", "layers", "shards"]


@dataclass(frozen=True)
class Point:
    """A mesh and its load; shards 0: collocated."""

    streams: int = 8
    context: int = 64  # prompt tokens of each stream
    layers: int = 6
    shards: int = 1


BASE = Point()
AXES: dict[Axis, tuple[int, ...]] = {
    "streams": (1, 8, 32, 64),
    "context": (64, 512, 1024, 2048),
    "layers": (3, 6, 12, 24),
    "shards": (0, 1, 2, 4),
}


@dataclass(frozen=True)
class Result:
    axis: Axis
    point: Point
    tokens_per_s: float
    step_ms: float
    part_ms: dict[str, float]  # of the step

    @property
    def layer_ms(self) -> float:
        return sum(self.part_ms[part] for part in _LAYER_PARTS) / self.point.layers

    @property
    def rest_ms(self) -> float:
        """Of the step, whatever does not grow with the layers: scheduling, logits, sampling."""
        return self.step_ms - self.layer_ms * self.point.layers


def sizes(num_layers: int) -> ModelSizes:
    """About 7 million parameters a layer; the first and the last one are dense."""
    return ModelSizes(
        num_hidden_layers=num_layers,
        hidden_size=512,
        num_attention_heads=8,
        head_dim=64,
        share_q_dim=256,
        intermediate_size=1408,
        moe_num_experts=8,
        moe_top_k=3,
        moe_intermediate_size=384,
        share_expert_dim=384,
        moe_layers_enum=",".join(map(str, range(1, num_layers - 1))),
        vocab_size=_VOCAB_SIZE,
    )


def points(axes: Sequence[Axis]) -> list[tuple[Axis, Point]]:
    return [(axis, replace(BASE, **{axis: value})) for axis in axes for value in AXES[axis]]


# Measuring.


def measure(axes: Sequence[Axis], num_tokens: int) -> Iterator[Result]:
    """Points of the same mesh are measured on it by turns; of a point's rounds the median one counts."""
    by_mesh: dict[tuple[int, int], list[tuple[Axis, Point]]] = {}
    for axis, point in points(axes):
        by_mesh.setdefault((point.layers, point.shards), []).append((axis, point))
    for (layers, shards), asked in by_mesh.items():
        with tempfile.TemporaryDirectory() as folder:
            make_checkpoint(folder, sizes(layers), dtype=torch.bfloat16)
            with running_mesh(MeshOptions(Path(folder), ffn=shards)) as mesh:
                turns = [
                    [asyncio.run(_measure_point(mesh, *each, num_tokens)) for each in asked] for _ in range(_ROUNDS)
                ]
                yield from (_median(rounds) for rounds in zip(*turns, strict=True))


async def _measure_point(mesh: Mesh, axis: Axis, point: Point, num_tokens: int) -> Result:
    async with Client(mesh.gateway.address) as client:
        streams = [_stream(client, point, number) for number in range(point.streams)]
        try:
            await asyncio.gather(*(_take(stream, _WARM_UP_TOKENS) for stream in streams))
            before, start = await asyncio.to_thread(counters, mesh), time.perf_counter()
            await asyncio.gather(*(_take(stream, num_tokens) for stream in streams))
            after, seconds = await asyncio.to_thread(counters, mesh), time.perf_counter() - start
        finally:
            for stream in streams:
                await stream.aclose()
    spent = {name: value - before[name] for name, value in after.items()}
    ms_per_step = {name: 1e3 * value / spent["afd_steps"] for name, value in spent.items()}
    part_ms = {part: ms_per_step[f"afd_step_part_seconds/{part}"] for part in (*_LAYER_PARTS, *_OTHER_PARTS)}
    tokens_per_s = spent["afd_generated_tokens"] / seconds
    return Result(axis, point, tokens_per_s, ms_per_step["afd_step_seconds"], part_ms)


def _median(rounds: Sequence[Result]) -> Result:
    return sorted(rounds, key=lambda result: result.step_ms)[len(rounds) // 2]


def _stream(client: Client, point: Point, seed: int) -> Stream:
    chooser = random.Random(seed)
    prompt = [chooser.randrange(_VOCAB_SIZE) for _ in range(point.context)]
    return client.generate(prompt, max_tokens=_MOST_TOKENS, ignore_eos=True)


async def _take(stream: Stream, num_tokens: int) -> None:
    for _ in range(num_tokens):
        await anext(stream)


def table(results: Sequence[Result]) -> Table:
    rest = f"{BASE.streams} streams, context {BASE.context}, {BASE.layers} layers, {BASE.shards} shard"
    made = Table(title=f"decode steps; what does not grow: {rest}")
    for column in ("of", "number", "tokens/s", "step, ms", "a layer of it", "besides"):
        made.add_column(column, justify="right")
    for row in results:
        value = asdict(row.point)[row.axis]
        times = (f"{time:.2f}" for time in (row.step_ms, row.layer_ms, row.rest_ms))
        made.add_row(row.axis, str(value), f"{row.tokens_per_s:.0f}", *times)
    return made


def main() -> None:
    os.environ.setdefault("AFD_LOG_LEVEL", "warning")
    parser = argparse.ArgumentParser(description="What a token costs as the mesh grows, and what the gateway costs.")
    parts = (*get_args(Axis), "gateway")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="default: all")
    parser.add_argument("--tokens", type=int, default=64, help="of each stream, for a figure of the mesh")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    console = Console()
    axes = [axis for axis in get_args(Axis) if axis in options.parts]
    mesh = sorted(measure(axes, options.tokens), key=lambda row: points(axes).index((row.axis, row.point)))
    alone = gateway.measure(gateway.LOADS, gateway.two_cores()) if "gateway" in options.parts else []
    for made in ([table(mesh)] if mesh else []) + ([gateway.table(alone)] if alone else []):
        console.print(made)
    if options.json:
        figures = {"mesh": [asdict(row) for row in mesh], "gateway": [asdict(row) for row in alone]}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
