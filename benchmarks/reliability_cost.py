"""What surviving losses costs while nothing is lost: the decode throughput of a mesh with journals, records and leases,
to that of one without: `python -m benchmarks.reliability_cost --model DIR`.

No setting turns safety off: the processes of the mesh without are those of benchmarks.unsafe_service. Both meshes run
at once and take turns, and ratios are within a round. One and the same mesh can be faster by a tenth when it is started
again, so both are, several times, and the other one first each time. Exit status 1 if a load keeps less than 97 %.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from afd.bench import Load
from afd.forkserver import ForkServer
from afd.mesh import Mesh, MeshOptions, Service, running_mesh
from afd.state.embedded import EmbeddedRedis
from benchmarks.decode import MeasuredMesh
from benchmarks.rounds import alternate, pooled, report

_LEAST_RATIO = 0.97
_DAY_S = 86400

Running = Callable[[MeshOptions], contextlib.AbstractContextManager[Mesh]]


class UnsafeService(Service):
    @property
    def main(self) -> str:
        return "benchmarks.unsafe_service:main"


@contextlib.contextmanager
def running_unsafe_mesh(options: MeshOptions) -> Iterator[Mesh]:
    options = replace(options, settings=options.settings | {"lease_s": str(_DAY_S)})
    with ForkServer(options.environment) as fork_server, EmbeddedRedis() as redis, contextlib.ExitStack() as stack:
        mesh = Mesh(options, redis.url, fork_server, redis)
        mesh.services = [UnsafeService(**vars(service)) for service in mesh.services]
        stack.callback(mesh.stop)
        mesh.start()
        yield mesh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=512)
    parser.add_argument("--starts", type=int, default=4, help="of both meshes")
    parser.add_argument("--rounds", type=int, default=2, help="of each start")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    loads = [Load(streams, arguments.prompt_tokens, arguments.output_tokens) for streams in arguments.streams]
    # Of both the same transport: the probes of a pair could choose differently.
    options = MeshOptions(arguments.model, settings={"handoff": "shm", "log_level": "warning"})
    meshes: list[tuple[str, Running]] = [("without", running_unsafe_mesh), ("with", running_mesh)]
    runs = []
    for number in range(arguments.starts):
        with contextlib.ExitStack() as stack:
            order = meshes if number % 2 == 0 else meshes[::-1]
            contenders = {name: MeasuredMesh(stack.enter_context(running(options))) for name, running in order}
            runs.append(alternate(contenders, loads, arguments.rounds, Console(stderr=True)))
    rows = pooled(runs)
    console = Console()
    console.print(report(f"decoding {arguments.model.name}, with and without journals and leases", rows))
    kept = {row.load.streams: row.ratio for row in rows if row.contender == "with"}
    for streams, ratio in kept.items():
        console.print(f"{streams} streams: {100 * ratio:.1f} % is kept; at least {100 * _LEAST_RATIO:.0f} % is the aim")
    if arguments.json:
        arguments.json.write_text(json.dumps([row.as_json() for row in rows], indent=2) + "\n")
    sys.exit(0 if min(kept.values()) >= _LEAST_RATIO else 1)


if __name__ == "__main__":
    main()
