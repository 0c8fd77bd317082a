"""`afd plan`: what decoding costs, which deployment to run, and whether disaggregation pays."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from afd.errors import ConfigError
from afd.output import write_json, write_text
from afd.planner import listing, paper, question
from afd.planner import measured as measured_mesh
from afd.planner.accelerators import accelerator, load_accelerators
from afd.planner.calibration import calibrate
from afd.planner.deployment import Experts
from afd.planner.observations import read_observations
from afd.planner.paper import Cell
from afd.planner.paper_tables import tables
from afd.planner.question import Width
from afd.planner.report import Report, as_html, as_json, report
from afd.planner.search import Choices, Plan, plan
from afd.planner.shape import load_shape, shipped
from afd.planner.simulation.command import simulate_deployment
from afd.planner.titled import titled
from afd.planner.verdict import Choice, verdict

app = typer.Typer(no_args_is_help=True, help="What decoding costs, and which deployment to run.")
# Tables are made for this width; what goes into a file or a pipe has it whatever the terminal.
_WIDTH = 100
console = Console(width=None if sys.stdout.isatty() else _WIDTH)
notes = Console(stderr=True)

NOTHING_STATUS = 3  # of a plan that nothing keeps
# Parameters of a plan for a mesh that was measured, and those that no other plan has.
_OF_A_MESH_ALONE = {"measured", "attention", "ffn", "streams", "cores"}
_OF_A_MESH = _OF_A_MESH_ALONE | {"model", "live_context", "microbatches", "json_file"}
_MOST = 16  # replicas or shards: more are too many events to simulate

_MONEY_TOLERANCE, _TOLERANCE = 0.0015, 0.005


@app.callback(invoke_without_command=True)
def plan_deployment(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="one of `afd plan models`, a config.json of Hugging Face, or its folder")
    ] = None,
    card: Annotated[list[str] | None, typer.Option(help="a card to choose from, for both parts; repeat it")] = None,
    attention_card: Annotated[list[str] | None, typer.Option(help="for attention only; repeat it")] = None,
    ffn_card: Annotated[list[str] | None, typer.Option(help="for the FFN only; repeat it")] = None,
    accelerators: Annotated[list[Path] | None, typer.Option(help="TOML file of more cards; repeat it")] = None,
    live_context: Annotated[
        float | None, typer.Option("--context", help=f"tokens before each new one, in the mean ({question.CONTEXT:g})")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="tokens of prompts: 2000, uniform:A,B, geometric:MEAN, lognormal:MEAN,SIGMA")
    ] = None,
    output: Annotated[str | None, typer.Option(help="tokens of outputs, in the same forms")] = None,
    lengths: Annotated[
        Path | None, typer.Option(help='instead: a line {"prompt_tokens": N, "output_tokens": N} per request')
    ] = None,
    rate: Annotated[float | None, typer.Option(help="requests per second, which are to be kept up with")] = None,
    tpot_ms: Annotated[float, typer.Option(help="within which a token is to be decoded")] = 50.0,
    ttft_ms: Annotated[
        float | None, typer.Option(help="within which a prompt is to be prefilled by the same cards; else elsewhere")
    ] = None,
    weights: Annotated[list[Width] | None, typer.Option(help="quantisation of weights; repeat it [fp8]")] = None,
    kv: Annotated[list[Width] | None, typer.Option(help="of the KV cache; repeat it [fp8]")] = None,
    experts: Annotated[
        list[Experts] | None, typer.Option(help="how an FFN instance spreads experts; repeat it [both]")
    ] = None,
    transport: Annotated[list[str] | None, typer.Option(help="nixl or inline, between servers [nixl]")] = None,
    microbatches: Annotated[list[int] | None, typer.Option(help="in flight; repeat it [2, 3, 4]")] = None,
    max_cards: Annotated[int, typer.Option(help="of one deployment")] = 128,
    assume: Annotated[
        list[str] | None, typer.Option(help="another efficiency than the stated one, like memory=0.7; repeat it")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="also write the report with pictures to this HTML file")] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="also draw its pictures into this folder, as SVG and PNG")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write every number to this file")] = None,
    measured: Annotated[
        list[Path] | None,
        typer.Option(
            help="instead of cards: traces (AFD_TRACE_FILE) or scrapes of /metrics of a mesh that ran, to say what it "
            "would do with other numbers; repeat it"
        ),
    ] = None,
    attention: Annotated[list[int] | None, typer.Option(min=1, max=_MOST, help="its replicas; repeat it")] = None,
    ffn: Annotated[list[int] | None, typer.Option(min=1, max=_MOST, help="its FFN shards; repeat it")] = None,
    streams: Annotated[
        list[int] | None, typer.Option(min=1, max=65536, help="that it decodes at once; repeat it")
    ] = None,
    cores: Annotated[
        int | None,
        typer.Option(min=1, help="that its processes share, each with one thread; default: each has its own"),
    ] = None,
) -> None:
    """Which deployment decodes a model cheapest within a TPOT, disaggregated or collocated, and what binds it.

    Status 3 says that nothing that was looked at keeps the TPOT.
    """
    given = _given(context)
    if context.invoked_subcommand is not None:
        _refuse(given, f"is of `afd plan` itself: what `afd plan {context.invoked_subcommand}` takes stands after it")
        return
    if model is None:
        raise ConfigError(
            "name the model, like --model step-3; `afd plan models` shows those that come with the planner"
        )
    if measured:
        others = {name: option for name, option in given.items() if name not in _OF_A_MESH}
        _refuse(others, "says nothing beside --measured, which predicts the mesh that was measured: leave it out")
        most = load_shape(model).max_context_tokens
        contexts = [question.within("--context", round(live_context), 1, most)] if live_context is not None else []
        question.microbatches(microbatches or ())
        _predict(
            measured, model, (attention or (), ffn or ()), microbatches or (), streams or (), contexts, cores, json_file
        )
        return
    of_a_mesh = {name: option for name, option in given.items() if name in _OF_A_MESH_ALONE}
    _refuse(of_a_mesh, "is of a mesh that was measured: give --measured FILE too")
    cards = load_accelerators(*accelerators or ())
    attention_cards, ffn_cards = question.chosen(card or (), attention_card or (), ffn_card or (), cards)
    goal = question.goal(
        load_shape(model),
        question.lengths(prompt, output, lengths),
        live_context,
        tpot_ms=tpot_ms,
        ttft_ms=ttft_ms,
        rate=rate,
        efficiencies=question.assume(assume or ()),
    )
    choices = Choices(
        attention_cards,
        ffn_cards,
        question.within("--max-cards", max_cards, 1, 4096),
        question.precisions(weights or [Width.fp8], kv or [Width.fp8]),
        question.transports(transport or ["nixl"]),
        question.microbatches(microbatches or (2, 3, 4)),
        experts or list(Experts),
    )
    with Progress(console=notes, transient=True, disable=not notes.is_terminal) as progress:
        task = progress.add_task("deployments")
        found = plan(goal, choices, lambda done, total: progress.update(task, completed=done, total=total))
    _print_report(report(found))
    if json_file:
        write_json(json_file, as_json(found))
    if html or pictures:
        _draw(found, html, pictures)
    if verdict(found).choice is Choice.nothing:
        raise typer.Exit(NOTHING_STATUS)


def _given(context: typer.Context) -> dict[str, str]:
    """Parameters that are on the command line, and how their options are written."""
    sources = {param.name or "": context.get_parameter_source(param.name or "") for param in context.command.params}
    return {
        param.name: param.opts[0]
        for param in context.command.params
        if param.name and (source := sources[param.name]) is not None and source.name == "COMMANDLINE"
    }


def _refuse(given: dict[str, str], why: str) -> None:
    if given:
        raise ConfigError(f"{next(iter(given.values()))} {why}")


def _predict(
    files: Sequence[Path],
    model: str,
    ratios: tuple[Sequence[int], Sequence[int]],
    microbatches: Sequence[int],
    streams: Sequence[int],
    context: Sequence[int],
    cores: int | None,
    json_file: Path | None,
) -> None:
    """Fits the times of a running mesh's stages to what it measured itself, and predicts others."""
    observations = read_observations(files)
    found = calibrate(observations, load_shape(model), cores)
    wanted = measured_mesh.settings(observations, *ratios, microbatches, streams, context)
    if not wanted:
        raise ConfigError("there are fewer --streams than microbatches for them: give more")
    console.print(*measured_mesh.tables(found, wanted))
    for note in measured_mesh.notes(found, wanted):
        console.print(f"[dim]{escape(note)}[/dim]", highlight=False)
    if json_file:
        write_json(json_file, measured_mesh.as_json(found, wanted))


def _print_report(found: Report) -> None:
    console.print(f"[bold]{escape(found.title)}[/bold]", highlight=False)
    console.print(escape(found.verdict), highlight=False)
    for table in found.tables:
        shown = titled(table.title, *table.columns)
        for row in table.rows:
            shown.add_row(*map(escape, row))
        console.print(shown)
    for note in found.notes:
        console.print(f"[dim]{escape(note)}[/dim]", highlight=False)


def _draw(found: Plan, html: Path | None, folder: Path | None) -> None:
    from afd.planner.drawing import as_svg, save
    from afd.planner.plan_pictures import pareto, timeline

    drawn = {"plan-pareto": ("What a longer TPOT buys", pareto(found))}
    if found.disaggregated.best:
        drawn["plan-timeline"] = ("How the parts work at the same time", timeline(found.disaggregated.best))
    written = [path for name, (_, figure) in drawn.items() if folder for path in save(folder, name, figure)]
    if html:
        write_text(html, as_html(report(found), [(title, as_svg(figure)) for title, figure in drawn.values()]))
        written.append(html)
    for path in written:
        console.print(f"{path}", highlight=False)


@app.command(name="paper")
def paper_tables(
    json_file: Annotated[Path | None, typer.Option("--json", help="also write every number to this file")] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="also draw the figures into this folder, as SVG and PNG")
    ] = None,
) -> None:
    """The tables of the Step-3 paper (arXiv 2507.19427), its cost analysis and results, computed. A = marks what the
    paper prints in the same digits, as far as that is known here; brackets have what it prints in others."""
    cells = paper.cells()
    console.print(*tables(cells))
    known = [cell for cell in cells if cell.printed is not None]
    off = [cell for cell in known if not _agrees(cell)]
    console.print(
        f"{len(known) - len(off)} of {len(known)} numbers that the paper prints are reproduced within 0.5 % or $0.0015"
    )
    if json_file:
        write_json(json_file, [_as_json(cell) for cell in cells])
    if pictures:
        from afd.planner.pictures import draw_paper

        for path in draw_paper(pictures):
            console.print(f"{path}", highlight=False)
    if off:
        raise typer.Exit(1)


def _agrees(cell: Cell) -> bool:
    assert cell.printed is not None
    off = abs(cell.value - cell.printed)
    return off <= (_MONEY_TOLERANCE if cell.unit == paper.DOLLARS else _TOLERANCE * cell.printed)


def _as_json(cell: Cell) -> dict[str, object]:
    return {name: value for name, value in asdict(cell).items() if name != "printed"}


@app.command(name="cards")
def list_cards(
    name: Annotated[str | None, typer.Argument(help="only this card, as its table in a file of accelerators")] = None,
    accelerators: Annotated[
        list[Path] | None, typer.Option(help="a file with cards of your own, which go before those that are known")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write every number to this file")] = None,
) -> None:
    """The cards that the planner knows, and yours: what they do, hold and cost."""
    cards = load_accelerators(*accelerators or ())
    chosen = [accelerator(name, cards)] if name else list(cards.values())
    if name:
        typer.echo(chosen[0].toml())
    else:
        console.print(listing.cards_table(chosen))
    if json_file:
        write_json(json_file, [listing.card_numbers(card) for card in chosen])


@app.command(name="models")
def list_models(
    model: Annotated[
        str | None, typer.Option(help="only this one: its name, or a config.json of your own, or the folder with it")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write every number to this file")] = None,
) -> None:
    """The models that come with the planner, or yours: layers, parameters, KV cache."""
    shapes = [load_shape(name) for name in ([model] if model else shipped())]
    console.print(listing.models_table(shapes))
    if json_file:
        write_json(json_file, [listing.model_numbers(shape) for shape in shapes])


app.command(name="simulate")(simulate_deployment)
