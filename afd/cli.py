"""The command line: `afd up`, `scale`, `layout`, `generate`, `chat`, `top`, `advise`, `bench`, `trace`, `doctor`,
`certs`, `keys`, `plan`, `make-checkpoint`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from afd import control, keys
from afd.advice import Goal, Look, look
from afd.advice import advise as advise_on
from afd.client import Client, Stream
from afd.config import parse_microbatches, refuse_unknown_variables
from afd.errors import AfdError, ConfigError
from afd.mesh import Mesh, MeshOptions, ready_file_of, refuse_ready_file, running_mesh, write_ready_file
from afd.output import write_json, write_text
from afd.placement import Cores
from afd.planner import cli as planner_cli

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(keys.app, name="keys")
app.add_typer(planner_cli.app, name="plan")
console = Console()
notes = Console(stderr=True)

_WATCH_S = 0.2
_TOP_EVERY_S = 1.0
_MOST = 256  # of a kind: a slip of the finger is not to fill the machine


@app.callback()
def check_variables() -> None:
    refuse_unknown_variables(os.environ)


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


Model = Annotated[Path, typer.Option("--model", envvar="AFD_MODEL", help="directory of the Hugging Face checkpoint")]
Attention = Annotated[int, typer.Option(min=1, max=_MOST, help="attention replicas")]
Ffn = Annotated[
    int,
    typer.Option(min=0, max=_MOST, envvar="AFD_FFN_SHARDS", help="FFN shards; 0 runs the FFN in the attention process"),
]

FfnReplicas = Annotated[
    int, typer.Option(min=1, max=_MOST, help="replicas of each FFN shard: any of them can take over")
]


def _number_or_auto(text: str | None) -> str | None:
    try:
        return text and str(parse_microbatches(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


Microbatches = Annotated[
    str | None,
    typer.Option(
        callback=_number_or_auto,
        envvar="AFD_MICROBATCHES",
        help="parts of the batch that cross the layers independently, or auto: found by trying; "
        "default: 1 where the sides take turns on the cores, else 2",
    ),
]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", envvar="AFD_DTYPE", help="of weights and arithmetic")]
Device = Annotated[str, typer.Option(envvar="AFD_DEVICE", help="cpu, cuda or cuda:N")]
Threads = Annotated[
    int | None, typer.Option(min=1, envvar="AFD_THREADS", help="threads of each process, anywhere; --cores is ignored")
]
CoresOption = Annotated[
    Cores,
    typer.Option(
        "--cores",
        help="shared: attention and FFN take turns on all cores; own: each has its part, and both work at once",
    ),
]
StartupTimeout = Annotated[
    float, typer.Option(min=1, envvar="AFD_STARTUP_TIMEOUT_S", help="longest wait until all is ready, seconds")
]
Target = Annotated[str, typer.Option("--target", help="the gateway's gRPC address")]
Tls = Annotated[
    bool | None, typer.Option("--tls", help="encrypt, to a gateway with a certificate that this machine trusts")
]
TlsFolder = Annotated[Path | None, typer.Option("--tls", help="TLS everywhere, with what `afd certs` has made here")]
Ca = Annotated[Path | None, typer.Option(envvar="AFD_CA", help="encrypt, to a gateway that this CA has signed")]
ApiKey = Annotated[
    str | None,
    typer.Option(envvar="AFD_API_KEY", help="of `afd keys create`; others on this machine see options, not variables"),
]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="longest answer, tokens")]
Temperature = Annotated[float, typer.Option(min=0, help="0 is greedy")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="also write the result to this file")]


@app.command()
def up(
    model: Model,
    attention: Attention = 1,
    ffn: Ffn = 1,
    ffn_replicas: FfnReplicas = 1,
    gateways: Annotated[int, typer.Option(min=1, max=_MOST, help="gateways; all but the first one on free ports")] = 1,
    microbatches: Microbatches = None,
    dtype: DtypeOption = Dtype.bfloat16,
    device: Device = "cpu",
    redis: Annotated[
        str | None, typer.Option(envvar="AFD_REDIS", help="URL of a Redis; default: an embedded one")
    ] = None,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, envvar="AFD_GRPC_PORT", help="0: a free one")] = 50051,
    http_port: Annotated[int, typer.Option(min=0, max=65535, envvar="AFD_HTTP_PORT", help="0: a free one")] = 8000,
    tls: TlsFolder = None,
    cores: CoresOption = Cores.shared,
    threads: Threads = None,
    startup_timeout: StartupTimeout = 120.0,
    ready_file: Annotated[Path | None, typer.Option(help="written when all is ready: addresses and pids, JSON")] = None,
) -> None:
    """Runs the whole mesh on this machine until it is interrupted. AFD_* variables set everything else."""
    options = MeshOptions(
        model=model,
        attention=attention,
        ffn=ffn,
        ffn_replicas=ffn_replicas,
        gateways=gateways,
        microbatches=microbatches,
        dtype=dtype.value,
        device=device,
        redis=redis,
        tls=tls,
        grpc_port=grpc_port,
        http_port=http_port,
        cores=cores,
        threads=threads,
        startup_timeout_s=startup_timeout,
    )
    if ready_file:
        refuse_ready_file(ready_file)
    with _until_signalled(), running_mesh(options) as mesh:
        notes.print(f"ready: gRPC on {mesh.target}, OpenAI API on {mesh.http_url}/v1", soft_wrap=True)
        with ready_file_of(mesh, ready_file) if ready_file else contextlib.nullcontext():
            asyncio.run(_attend(mesh, ready_file))


def _note(text: str) -> None:
    notes.print(text, markup=False, highlight=False, soft_wrap=True)


async def _attend(mesh: Mesh, ready_file: Path | None) -> None:
    """Watches over the mesh, and scales it when it is asked to."""
    written = mesh.ready_file()
    async with control.listening(mesh, _note):
        while True:
            await asyncio.sleep(_WATCH_S)
            mesh.watch()
            if ready_file and (present := mesh.ready_file()) != written:
                write_ready_file(mesh, ready_file)
                written = present


class _Signalled(KeyboardInterrupt):
    """SIGINT or SIGTERM: unwinds what has been started, at whatever point; asyncio would swallow others."""


@contextlib.contextmanager
def _until_signalled() -> Iterator[None]:
    """Ends the block at SIGINT or SIGTERM; later signals do not disturb the clean-up."""

    def handle(number: int, frame: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        notes.print("stopping")
        raise _Signalled

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    with contextlib.suppress(_Signalled):
        yield


@app.command()
def scale(
    attention: Annotated[int | None, typer.Option(min=1, max=_MOST, help="attention replicas")] = None,
    ffn: Annotated[int | None, typer.Option(min=1, max=_MOST, help="FFN shards")] = None,
    ffn_replicas: Annotated[int | None, typer.Option(min=1, max=_MOST, help="replicas of each FFN shard")] = None,
    gateways: Annotated[int | None, typer.Option(min=1, max=_MOST, help="gateways; the first one stays")] = None,
    target: Target = "127.0.0.1:50051",
) -> None:
    """Changes how many replicas and shards a mesh of `afd up` on this machine has, while its requests go on.

    What is new comes up first, one process after the other; then what is no longer wanted drains and ends. If anything
    does not come up all stays as it was. Once it has begun it goes on, also when this command is interrupted.
    """
    given = {"attention": attention, "ffn": ffn, "ffn_replicas": ffn_replicas, "gateways": gateways}
    wanted = {name: count for name, count in given.items() if count is not None}
    if not wanted:
        raise typer.BadParameter("say what shall change: --attention, --ffn, --ffn-replicas or --gateways")
    try:
        console.print(asyncio.run(control.ask(target, wanted, _note)), highlight=False)
    except KeyboardInterrupt:
        _note("the change goes on; `afd up` shows it")
        raise typer.Exit(130) from None


@app.command()
def layout(
    redis: keys.RedisUrl,
    ffn: Annotated[int | None, typer.Argument(min=1, max=_MOST, help="FFN shards from now on")] = None,
    require: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="exit status 1 if it is split into another number; repeatable; 0 where Redis does not answer"
        ),
    ] = None,
    mesh: Annotated[str, typer.Option(envvar="AFD_MESH", help="which of the meshes on this Redis")] = "default",
    redis_ca: keys.RedisCa = None,
) -> None:
    """Tells into how many shards the FFN of a mesh is split; or has it split into others, which must run already.

    For a mesh whose processes Kubernetes or something else runs; `afd scale` does it for one of `afd up`. Its requests
    go on, and the shards of before are not needed any more.
    """
    from afd import layout

    if ffn and require:
        raise typer.BadParameter("FFN changes the layout and --require looks at it: give one of them")
    if require:
        told = layout.require(redis, redis_ca, mesh, require)
    else:
        told = layout.show_or_change(redis, redis_ca, mesh, ffn)
    console.print(told, highlight=False, soft_wrap=True)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="the text to continue")],
    target: Target = "127.0.0.1:50051",
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.0,
    tls: Tls = None,
    ca: Ca = None,
    api_key: ApiKey = None,
) -> None:
    """Streams the continuation of a text."""

    async def run() -> None:
        async with Client(target, tls=tls, ca=ca, api_key=api_key) as client:
            await _print(client.generate(prompt, max_tokens=max_tokens, temperature=temperature))

    asyncio.run(run())


@app.command()
def chat(
    target: Target = "127.0.0.1:50051",
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.0,
    tls: Tls = None,
    ca: Ca = None,
    api_key: ApiKey = None,
) -> None:
    """A conversation; an empty line or the end of the input ends it."""

    async def run() -> None:
        messages: list[dict[str, str]] = []
        async with Client(target, tls=tls, ca=ca, api_key=api_key) as client:
            while line := await asyncio.to_thread(_read_line):
                messages.append({"role": "user", "content": line})
                answer = await _print(client.chat(messages, max_tokens=max_tokens, temperature=temperature))
                messages.append({"role": "assistant", "content": answer})

    asyncio.run(run())


def _read_line() -> str:
    if sys.stdin.isatty():
        notes.print("> ", end="")
    return sys.stdin.readline().strip()


async def _print(stream: Stream) -> str:
    texts: list[str] = []
    async for token in stream:
        texts.append(token.text)
        print(token.text, end="", flush=True)
    print()
    return "".join(texts)


@app.command()
def top(
    target: Target = "127.0.0.1:50051",
    once: Annotated[bool, typer.Option("--once", help="show it once, and end")] = False,
    tls: Tls = None,
    ca: Ca = None,
    api_key: ApiKey = None,
) -> None:
    """Shows all replicas of a mesh and how busy they are, again every second. Where API keys are required it needs an
    operator's."""
    from rich.live import Live

    from afd.top import picture

    async def run() -> None:
        async with Client(target, tls=tls, ca=ca, api_key=api_key) as client:
            if once:
                lines = console if console.is_terminal else Console(width=keys.PIPE_WIDTH)
                lines.print(picture(await client.get_mesh(), lines.width))
                return
            with Live(console=console, screen=True, auto_refresh=False) as live:
                while True:
                    live.update(picture(await client.get_mesh(), console.width), refresh=True)
                    await asyncio.sleep(_TOP_EVERY_S)

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run())


@app.command()
def advise(
    target: Annotated[str, typer.Argument(help="the gateway's gRPC address")] = "127.0.0.1:50051",
    tpot_ms: Annotated[float | None, typer.Option(min=0.001, help="that a token may take")] = None,
    ttft_ms: Annotated[float | None, typer.Option(min=0.001, help="that a request's first token may take")] = None,
    seconds: Annotated[float, typer.Option(min=1, max=600, help="to look at the mesh")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="print the numbers wanted, for a script")] = False,
    tls: Tls = None,
    ca: Ca = None,
    api_key: ApiKey = None,
) -> None:
    """Says what of a running mesh to scale next, and why. Changes nothing. Where API keys are required it needs an
    operator's.

    Exit status 0, whatever the advice is; 1 where there is no mesh to judge.
    """

    async def run() -> Look:
        async with Client(target, tls=tls, ca=ca, api_key=api_key) as client:
            return await look(client, seconds)

    advice = advise_on(asyncio.run(run()), Goal(tpot_ms, ttft_ms))
    if as_json:
        print(json.dumps(advice.as_json()))
    else:
        console.print(advice.reason, markup=False, highlight=False, soft_wrap=True)


@app.command()
def bench(
    model: Model,
    streams: Annotated[str, typer.Option(help="numbers of concurrent streams, with commas")] = "1,8,32",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="length of each prompt")] = 64,
    output_tokens: Annotated[int, typer.Option(min=2, help="length of each answer")] = 64,
    attention: Attention = 1,
    ffn: Ffn = 1,
    ffn_replicas: FfnReplicas = 1,
    microbatches: Microbatches = None,
    dtype: DtypeOption = Dtype.bfloat16,
    device: Device = "cpu",
    tls: TlsFolder = None,
    cores: CoresOption = Cores.shared,
    threads: Threads = None,
    startup_timeout: StartupTimeout = 120.0,
    json_file: JsonFile = None,
) -> None:
    """Measures a mesh of its own: tokens/s, TTFT, TPOT, and where the time of a decode step goes."""
    from afd.bench import Load, report, run_bench

    try:
        numbers = [int(number) for number in streams.split(",")]
    except ValueError:
        raise ConfigError(f"--streams {streams}: give numbers with commas, like 1,8,32") from None
    if min(numbers) < 1:
        raise ConfigError(f"--streams {streams}: every number must be at least 1")
    options = MeshOptions(
        model=model,
        attention=attention,
        ffn=ffn,
        ffn_replicas=ffn_replicas,
        microbatches=microbatches,
        dtype=dtype.value,
        device=device,
        tls=tls,
        cores=cores,
        threads=threads,
        startup_timeout_s=startup_timeout,
    )
    loads = [Load(number, prompt_tokens, output_tokens) for number in numbers]
    results = run_bench(options, loads, notes)
    for table in report(results):
        console.print(table)
    if json_file:
        write_json(json_file, results.as_json())


@app.command()
def trace(
    file: Annotated[Path, typer.Argument(help="spans, as AFD_TRACE_FILE collects them")],
    step: Annotated[str, typer.Option(help="which: typical, slowest, median, last or a number")] = "typical",
    layers: Annotated[str | None, typer.Option(help="only these layers, like 0-3")] = None,
    svg: Annotated[Path | None, typer.Option(help="also write the picture to this file")] = None,
    chrome: Annotated[Path | None, typer.Option(help="also write all steps as Chrome/Perfetto JSON")] = None,
) -> None:
    """Draws one decode step as a timeline: who waited for whom."""
    from afd import trace_view
    from afd.trace_view.terminal import timeline

    steps = trace_view.load_steps(file)
    chosen = trace_view.pick(steps, step)
    console.print(timeline(chosen, console.width, _layer_range(layers)))
    if svg:
        write_text(svg, trace_view.to_svg(chosen, _layer_range(layers)))
    if chrome:
        write_json(chrome, trace_view.to_chrome(steps))


def _layer_range(text: str | None) -> range | None:
    if text is None:
        return None
    first, _, last = text.partition("-")
    try:
        return range(int(first), int(last or first) + 1)
    except ValueError:
        raise ConfigError(f"--layers {text}: give a layer, or a range like 0-3") from None


@app.command()
def doctor(
    ffn: Annotated[str, typer.Argument(help="gRPC address of a running FFN shard")],
    attention: Annotated[
        str | None, typer.Argument(help="metrics address of a running attention replica: tells also what that one uses")
    ] = None,
    require: Annotated[str | None, typer.Option(help="exit status 1 unless this transport can be had")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="of the largest frame that is tried")] = 640,
    spin_us: Annotated[int, typer.Option(min=0, envvar="AFD_HANDOFF_SPIN_US", help="as an attention replica's")] = 50,
    tls: Annotated[
        Path | None, typer.Option(envvar="AFD_TLS", help="folder with an attention replica's certificate")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Tries every transport from this host to an FFN shard, as an attention replica here would: why not, or how fast.

    The shard itself tells what the two must agree on, so no model is needed. It may be serving meanwhile; then the
    numbers have its load in them.
    """
    from afd.doctor import InUse, as_json, check, report
    from afd.handoff.diagnosis import diagnose
    from afd.handoff.negotiate import LADDER
    from afd.tls import assume

    if require is not None and require not in LADDER:
        raise typer.BadParameter(f"--require {require}: the transports are {', '.join(LADDER)}")
    assume(tls)
    diagnosis = diagnose(ffn, tokens, spin_us / 1e6)
    in_use = InUse.of(attention, diagnosis.ffn) if attention else None
    for part in report(diagnosis, in_use):
        console.print(part)
    if json_file:
        write_json(json_file, as_json(diagnosis, in_use))
    if require:
        check(diagnosis, require)


@app.command()
def certs(
    directory: Annotated[Path, typer.Argument(help="where the CA and a folder for each role are, or will be")],
    host: Annotated[
        list[str] | None, typer.Option(help="further name or address by which clients reach the gateway; repeatable")
    ] = None,
    days: Annotated[int, typer.Option(min=1, help="how long the certificates are valid")] = 365,
) -> None:
    """Makes a CA and a certificate for every role, for `afd up --tls`; once more, it renews those of the roles.

    For a laptop or a test: in a cluster let cert-manager do it.
    """
    from afd.certs import make_certificates

    if directory.resolve() == Path.cwd():
        raise ConfigError("give a folder of its own, like certs: here ca.key would lie among other files")
    make_certificates(directory, host or (), days)
    console.print(f"{directory}: give clients {directory / 'ca.crt'}, and keep {directory / 'ca.key'} to yourself")


@app.command()
def make_checkpoint(
    directory: Annotated[Path, typer.Argument(help="where to write it")],
    layers: Annotated[int, typer.Option(min=1)] = 4,
    hidden: Annotated[int, typer.Option(min=1)] = 64,
    heads: Annotated[int, typer.Option(min=1)] = 4,
    head_dim: Annotated[int, typer.Option(min=2)] = 16,
    share_q_dim: Annotated[int, typer.Option(min=1)] = 32,
    intermediate: Annotated[int, typer.Option(min=1, help="width of a dense FFN")] = 128,
    experts: Annotated[int, typer.Option(min=1)] = 6,
    top_k: Annotated[int, typer.Option(min=1)] = 3,
    moe_intermediate: Annotated[int, typer.Option(min=1, help="width of a routed expert")] = 48,
    share_expert: Annotated[int, typer.Option(min=1, help="width of the shared expert")] = 48,
    dense_layers: Annotated[str, typer.Option(help="layers with a dense FFN, like 0,3")] = "0",
    vocab: Annotated[int, typer.Option(min=2)] = 512,
    context: Annotated[int, typer.Option(min=2, help="longest prompt and output together")] = 4096,
    dtype: DtypeOption = Dtype.float32,
    seed: int = 0,
    max_file_mib: Annotated[float, typer.Option(min=0.01, help="begin a new file beyond this size")] = 4096,
) -> None:
    """Writes a random Step-3-shaped checkpoint of given sizes, for tests and benchmarks."""
    import torch

    from afd.model.random_checkpoint import ModelSizes, make_checkpoint

    try:
        dense = {int(layer) for layer in dense_layers.split(",") if layer}
    except ValueError:
        raise ConfigError(f"--dense-layers {dense_layers}: give layers with commas, like 0,3") from None
    sizes = ModelSizes(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        head_dim=head_dim,
        share_q_dim=share_q_dim,
        intermediate_size=intermediate,
        moe_num_experts=experts,
        moe_top_k=top_k,
        moe_intermediate_size=moe_intermediate,
        share_expert_dim=share_expert,
        moe_layers_enum=",".join(str(layer) for layer in range(layers) if layer not in dense),
        vocab_size=vocab,
        max_seq_len=context,
    )
    with Progress(console=notes, transient=True) as progress:
        task = progress.add_task("writing", total=None)
        make_checkpoint(
            directory,
            sizes,
            seed=seed,
            dtype=getattr(torch, dtype.value),
            max_file_bytes=int(max_file_mib * 2**20),
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    num_bytes = sum(path.stat().st_size for path in directory.iterdir())
    console.print(f"{directory}: {num_bytes / 2**20:.1f} MiB", highlight=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; a known error is one sentence on stderr and exit status 1, a wrong option status 2."""
    try:
        app(arguments)
    except AfdError as error:
        sys.exit(f"afd: {error}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
