"""Decoding with the FFN in the same process, beside it on the same cores, and on cores of its own:
`python -m benchmarks.decode --model DIR`.

All meshes run at once, and take turns; those that wait sleep. Ratios are to the first, collocated on all cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from functools import partial
from pathlib import Path

from rich.console import Console

from afd.bench import Load, measure
from afd.mesh import Mesh, MeshOptions, running_mesh
from afd.placement import Cores
from benchmarks.rounds import alternate, report


def meshes(model: Path) -> dict[str, MeshOptions]:
    own = partial(MeshOptions, model, cores=Cores.own)
    return {
        "collocated": MeshOptions(model, ffn=0),
        "1A1F": MeshOptions(model),
        "1A1F inline": MeshOptions(model, settings={"handoff": "inline"}),
        "1A1F own cores, serial": own(microbatches="1"),
        "1A1F own cores, pipelined": own(),
    }


def speed(mesh: Mesh, load: Load) -> float:
    return asyncio.run(measure(mesh, load)).output_throughput


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[64])
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(meshes(Path())), help="these meshes; default: all")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        contenders = {
            name: partial(speed, stack.enter_context(running_mesh(mesh)))
            for name, mesh in meshes(options.model).items()
            if name in (options.only or [name])
        }
        loads = [
            Load(streams, prompt, options.output_tokens)
            for prompt in options.prompt_tokens
            for streams in options.streams
        ]
        rows = alternate(contenders, loads, options.rounds, Console(stderr=True))
    Console().print(report(f"decoding {options.model.name}, bfloat16", rows, options.json))


if __name__ == "__main__":
    main()
