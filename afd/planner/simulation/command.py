"""`afd plan simulate`: a deployment over time."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from afd.errors import ConfigError
from afd.output import write_json
from afd.planner import question
from afd.planner.accelerators import Accelerator, load_accelerators
from afd.planner.deployment import Collocated, Disaggregated, Experts
from afd.planner.question import Width
from afd.planner.shape import load_shape
from afd.planner.simulation.outcome import Simulated
from afd.planner.simulation.report import as_json, notes, tables
from afd.planner.simulation.run import simulate
from afd.planner.simulation.scenario import Conditions, Rate, Replay, Scenario, Streams, scaling
from afd.planner.stages import Workload
from afd.planner.traffic import Lengths, Recorded

_WIDTH = 100
_PROMPT, _OUTPUT = "3800", "geometric:500"


def simulate_deployment(
    model: Annotated[str, typer.Option(help="one of `afd plan models`, a config.json, or its folder")],
    deployment: Annotated[str, typer.Option(help="2A2F; or on shared cards EP64, TP8")],
    card: Annotated[str | None, typer.Option(help="for both parts, one of `afd plan cards`")] = None,
    attention_card: Annotated[str | None, typer.Option(help="for attention only")] = None,
    ffn_card: Annotated[str | None, typer.Option(help="for the FFN only")] = None,
    accelerators: Annotated[list[Path] | None, typer.Option(help="TOML file of more cards; repeat it")] = None,
    cards: Annotated[int, typer.Option(help="of each attention and each FFN replica")] = 8,
    microbatches: Annotated[int | None, typer.Option(help="in flight [3; on shared cards 2]")] = None,
    experts: Annotated[Experts, typer.Option(help="how an FFN replica spreads experts")] = Experts.tensor,
    weights: Annotated[Width, typer.Option(help="quantisation of weights")] = Width.fp8,
    kv: Annotated[Width, typer.Option(help="of the KV cache")] = Width.fp8,
    replicas: Annotated[int, typer.Option(help="of the deployment, behind one router")] = 1,
    rate: Annotated[float | None, typer.Option(help="requests per second, at random moments")] = None,
    streams: Annotated[int | None, typer.Option(help="instead: so many sequences, always")] = None,
    prompt: Annotated[
        str | None, typer.Option(help=f"tokens, as `afd plan` takes them [{_PROMPT}, without --output]")
    ] = None,
    output: Annotated[str | None, typer.Option(help=f"tokens [{_OUTPUT}, without --prompt]")] = None,
    lengths: Annotated[
        Path | None,
        typer.Option(
            help='instead: a line {"prompt_tokens": N, "output_tokens": N} per request; with "at_s": S in each, and '
            "neither --rate nor --streams, they come at these moments"
        ),
    ] = None,
    prefill_chunk: Annotated[
        int | None, typer.Option(help="tokens of a prompt in a microbatch; else prompts are prefilled elsewhere")
    ] = None,
    max_sequences: Annotated[int | None, typer.Option(help="that a card decodes at once [as its memory holds]")] = None,
    jitter: Annotated[float, typer.Option(help="of each stage of each layer: standard deviation over mean")] = 0.0,
    stragglers: Annotated[float, typer.Option(help="share of replicas that are slower")] = 0.0,
    straggler_factor: Annotated[float, typer.Option(help="by which they are")] = 1.5,
    failures: Annotated[float | None, typer.Option(help="seconds in which a replica fails once, in the mean")] = None,
    failover: Annotated[float, typer.Option(help="seconds until another one goes on")] = 0.35,
    repair: Annotated[float, typer.Option(help="seconds until a lost attention replica is back")] = 60.0,
    scale: Annotated[str | None, typer.Option(help="30s:12,45s:8: so many replicas from then on")] = None,
    seconds: Annotated[float, typer.Option(help="that are simulated")] = 60.0,
    seed: Annotated[int, typer.Option(help="the same seed has the same numbers")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write every number to this file")] = None,
    pictures: Annotated[Path | None, typer.Option(help="also draw it over time into this folder")] = None,
) -> None:
    """A deployment over time: requests that come and wait, ragged batches, jitter, failures, scaling; beside what the
    estimate says."""
    known = load_accelerators(*accelerators or ())
    attention, ffn = question.chosen(
        [card] if card else [], [attention_card] if attention_card else [], [ffn_card] if ffn_card else [], known
    )
    asked = question.lengths(prompt, output, lengths) or question.lengths(_PROMPT, _OUTPUT, None)
    assert asked is not None
    [precision] = question.precisions([weights], [kv])
    scenario = Scenario(
        _deployment(deployment, attention[-1], ffn[-1], cards, microbatches, experts),
        Workload(load_shape(model), asked.live_context, precision),
        asked,
        _arrivals(rate, streams, asked),
        replicas,
        prefill_chunk,
        max_sequences,
        Conditions(
            jitter,
            stragglers,
            straggler_factor,
            failures,
            failover,
            repair,
            tuple(scaling(scale)) if scale is not None else (),
        ),
        seconds,
        seed,
    )
    _print(_watched(scenario), scenario, json_file, pictures)


def _deployment(
    text: str, attention: Accelerator, ffn: Accelerator, cards: int, microbatches: int | None, experts: Experts
) -> Disaggregated | Collocated:
    """From `2A2F`, `EP64` or `TP8`. Raises ConfigError."""
    apart, together = re.fullmatch(r"(\d{1,4})A(\d{1,4})F", text), re.fullmatch(r"(EP|TP)(\d{1,5})", text)
    if microbatches is not None:
        question.within("--microbatches", microbatches, 1, 16)
    if apart and all(int(number) for number in apart.groups()):
        x, y = map(int, apart.groups())
        cards = question.within("--cards", cards, 1, 1024)
        return Disaggregated(attention, ffn, x, y, cards, microbatches or 3, experts=experts)
    if not together or not int(together[2]):
        raise ConfigError(f"{text!r} is no deployment: give one like 2A2F, or on shared cards EP64 or TP8")
    if attention != ffn:
        raise ConfigError(f"{text} has attention and FFN on the same cards: give one --card")
    number = int(together[2])
    return Collocated(ffn, number, number if together[1] == "TP" else 1, microbatches or 2)


def _arrivals(rate: float | None, streams: int | None, lengths: Lengths) -> Rate | Streams | Replay:
    if rate is not None and streams is not None:
        raise ConfigError("--rate and --streams do not go together: requests come, or there are always so many")
    if rate is not None:
        return Rate(rate)
    if streams is not None:
        return Streams(streams)
    if isinstance(lengths, Recorded):
        return Replay(lengths)
    raise ConfigError('give --rate, or --streams, or a file of --lengths with "at_s" in it')


def _watched(scenario: Scenario) -> Simulated:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.completed:.0f} of {task.total:.0f} s"),
        BarColumn(),
        TextColumn("{task.fields[speed]:.0f} steps/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=scenario.seconds, speed=0.0)

        def show(simulated_s: float, steps: int) -> None:
            took_s = progress.tasks[0].elapsed or 0.0
            progress.update(task, completed=simulated_s, speed=steps / took_s if took_s else 0.0)

        return simulate(scenario, show)


def _print(found: Simulated, scenario: Scenario, json_file: Path | None, pictures: Path | None) -> None:
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    console.print(*tables(found, scenario))
    for note in notes(found, scenario):
        console.print(escape(note), highlight=False)
    if json_file:
        write_json(json_file, as_json(found))
    if pictures:
        from afd.planner.simulation.picture import draw_simulation

        for path in draw_simulation(pictures, found, scenario):
            console.print(f"{path}", highlight=False)
