"""The Step-3 paper's tables, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from afd.planner import paper
from afd.planner.paper import AFD, CARDS, CONTEXTS, MODELS, Cell
from afd.planner.titled import titled

_PER_TOKEN = ("kv_bytes", "attention_flops", "linear_flops", "ffn_flops")


def tables(cells: Sequence[Cell]) -> Iterator[Table]:
    """All. A = marks what the paper prints in the same digits; brackets have what it prints in others."""
    for context in CONTEXTS:
        yield _per_token(cells, context)
        yield from _money(cells, context)
    yield from (_cards(cells), _published(), _layers())


def _per_token(cells: Sequence[Cell], context: int) -> Table:
    title = f"per token at a context of {context}: KV bytes, FLOPs"
    table = titled(title, "model", "KV cache", "attention", "linears", "FFN", "FLOPs per KV byte")
    for model in MODELS:
        amounts = [_number(_find(cells, quantity, model, context), "{:.2e}") for quantity in _PER_TOKEN]
        table.add_row(model, *amounts, _number(_find(cells, "intensity", model, context), "{:.3g}"))
    return table


def _money(cells: Sequence[Cell], context: int) -> Iterator[Table]:
    for part, quantity in (("attention", "attention_cost"), ("FFN", "ffn_cost"), ("both", "total_cost")):
        table = titled(f"{part}: $ per million tokens at a context of {context}", "model", *CARDS)
        if part == "both":
            table.add_column("each on its cheapest", justify="right")
        cards = (*CARDS, AFD) if part == "both" else CARDS
        for model in MODELS:
            row = [_find(cells, quantity, model, context, card) for card in cards]
            table.add_row(model, *(_number(cell, "{:.3f}") for cell in row))
        yield table


def _cards(cells: Sequence[Cell]) -> Table:
    table = titled("cards", "card", "$ per EFLOP", "$ per PB", "FLOPs per byte", "least MoE sparsity for Step-3")
    for card in CARDS:
        flop, byte = (_find(cells, quantity, None, None, card).value for quantity in ("unit_flop", "unit_byte"))
        roofline = _number(_find(cells, "roofline", None, None, card), "{:.0f}")
        sparsity = _find(cells, "min_sparsity", "Step-3", None, card).value
        table.add_row(card, f"{flop * 1e18:.3f}", f"{byte * 1e15:.3f}", roofline, f"{sparsity:.4f}")
    return table


def _published() -> Table:
    columns = ("deployment", "context", "KV bytes", "TPOT", "tokens/s/GPU", "bound by")
    table = titled("on H800: Step-3 disaggregated, DeepSeek-V3 with large expert parallelism", *columns)
    for row in (*paper.PUBLISHED, *paper.PUBLISHED_EXPERT_PARALLEL):
        found = row.predicted()
        speed = f"{found.tokens_per_s_per_card:.0f} [dim]({row.tokens_per_s_per_card:.0f})[/dim]"
        kv = f"{found.workload.precision.kv:g}"
        tpot = f"{found.tpot_s * 1e3:.1f} ms"
        table.add_row(found.deployment.name, f"{row.context}", kv, tpot, speed, found.binding)
    return table


def _layers() -> Table:
    table = titled("one attention layer, 64 sequences per card, KV cache in BF16", "model", "context", "card", "µs")
    for row in paper.MEASURED_LAYERS:
        table.add_row(
            row.model, f"{row.context}", row.card, f"{row.predicted_us:.0f} [dim]({row.measured_us:.0f})[/dim]"
        )
    return table


def _find(
    cells: Sequence[Cell], quantity: str, model: str | None, context: int | None, card: str | None = None
) -> Cell:
    wanted = (quantity, model, context, card)
    return next(cell for cell in cells if (cell.quantity, cell.model, cell.context, cell.card) == wanted)


def _number(cell: Cell, form: str) -> str:
    """With a mark where the paper prints the same digits, and with what it prints where they differ."""
    shown = form.format(cell.value)
    if cell.printed is None:
        return f"{shown}  "
    same = form.format(cell.printed) == shown
    return f"{shown} [green]=[/green]" if same else f"{shown} [dim]({form.format(cell.printed)})[/dim]"
