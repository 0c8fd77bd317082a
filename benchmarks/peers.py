"""The mesh as `afd up` starts it, and vLLM for CPUs on the same checkpoint, dtype and cores, in turns:
`python -m benchmarks.peers --model DIR --vllm PEERS/bin/python`.

PEERS is an environment for vLLM alone; `tests/peers/vllm_oracle.py` says how it is made. vLLM runs in its own process,
compiled as by default, and is asked through its Python interface; the mesh is asked through its gateway. Both decode
the same number of random prompts of the same lengths greedily.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from rich.console import Console

from afd.bench import Load, measure
from afd.errors import ConfigError
from afd.mesh import Mesh, MeshOptions, running_mesh
from benchmarks.rounds import Contender, alternate, report

_STOP_TIMEOUT_S = 30.0
_LONGEST_RUN_S = 1800.0  # then vLLM is killed, and the run ends with a sentence


@contextlib.contextmanager
def running_vllm(python: Path, model: Path) -> Iterator[Contender]:
    """vLLM in a process of its own; a line of JSON asks it to decode, and it answers with a line."""
    command = [str(python), str(Path(__file__).with_name("vllm_peer.py")), str(model)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as process:
        watch = threading.Timer(_LONGEST_RUN_S, os.killpg, (process.pid, signal.SIGKILL))
        watch.daemon = True
        watch.start()

        def ask(load: Load) -> float:
            assert process.stdin
            assert process.stdout
            process.stdin.write(json.dumps([load.streams, load.prompt_tokens, load.output_tokens]) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith("tokens/s "):
                    return float(line.split()[1])
            raise ConfigError("vLLM has ended or took too long; what it wrote above says why")

        try:
            yield ask
        finally:
            watch.cancel()
            os.killpg(process.pid, signal.SIGKILL)  # it has workers that a signal to itself would leave behind
            process.wait(_STOP_TIMEOUT_S)


def speed(mesh: Mesh, load: Load) -> float:
    return asyncio.run(measure(mesh, load)).output_throughput


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--vllm", type=Path, required=True, help="the Python of an environment with vLLM in it")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    loads = [Load(streams, options.prompt_tokens, options.output_tokens) for streams in options.streams]
    with running_vllm(options.vllm, options.model) as vllm, running_mesh(MeshOptions(options.model)) as mesh:
        contenders: dict[str, Contender] = {"vLLM": vllm, "1A1F": partial(speed, mesh)}
        rows = alternate(contenders, loads, options.rounds, Console(stderr=True))
    Console().print(report(f"{options.model.name}, bfloat16", rows))
    if options.json:
        options.json.write_text(json.dumps([row.as_json() for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
