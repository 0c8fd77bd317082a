"""Cards and models as tables of at most 100 columns, and as numbers for a JSON file."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.table import Table

from afd.planner.accelerators import Accelerator
from afd.planner.layers import Ffn
from afd.planner.shape import ModelShape


def cards_table(cards: Iterable[Accelerator]) -> Table:
    table = _table(
        "cards: dense TFLOP/s, GB, GB/s in one direction, $ for an hour of one",
        *("card", "BF16", "FP8", "memory\nGB", "memory\nGB/s", "link\nGB/s", "NIC\nGB/s", "per\nserver", "$/h"),
        *("$ per\nEFLOP", "$ per\nPB", "FLOPs\nper byte"),
    )
    for card in cards:
        fp8 = _number(card.fp8_flops / 1e12) if card.fp8_flops else "-"
        rates = (card.memory_bytes, card.memory_bytes_per_s, card.link_bytes_per_s, card.nic_bytes_per_s)
        table.add_row(
            card.name,
            _number(card.bf16_flops / 1e12),
            fp8,
            *(_number(rate / 1e9) for rate in rates),
            f"{card.cards_per_server}",
            f"{card.dollars_per_hour:.2f}",
            f"{card.unit_flop * 1e18:.3f}",
            f"{card.unit_byte * 1e15:.3f}",
            f"{card.roofline:.0f}",
        )
    return table


def card_numbers(card: Accelerator) -> dict[str, object]:
    return card.model_dump() | {
        "dollars_per_flop": card.unit_flop,
        "dollars_per_byte": card.unit_byte,
        "flops_per_byte": card.roofline,
    }


def models_table(shapes: Iterable[ModelShape]) -> Table:
    table = _table(
        "models: billions of parameters, bytes of an 8-bit KV cache for a token of context",
        *("model", "attention", "layers", "in all", "active", "KV\nbytes", "experts\n+ shared", "sparsity"),
        "longest\ncontext",
    )
    for shape in shapes:
        ffn = _main_ffn(shape)
        table.add_row(
            shape.name,
            _attention(shape),
            f"{shape.num_layers}",
            f"{shape.parameters / 1e9:.1f}",
            f"{shape.active_parameters / 1e9:.1f}",
            f"{shape.kv_growth():.0f}",
            _kind(ffn),
            f"{ffn.sparsity:.3f}",
            f"{shape.max_context_tokens}",
        )
    return table


def model_numbers(shape: ModelShape) -> dict[str, object]:
    ffn = _main_ffn(shape)
    return {
        "model": shape.name,
        "layers_by_attention": {attention.kind: count for attention, count in shape.attentions.items()},
        "layers": shape.num_layers,
        "parameters": shape.parameters,
        "active_parameters": shape.active_parameters,
        "kv_bytes_per_token": shape.kv_growth(),
        "experts": ffn.num_experts,
        "experts_per_token": ffn.top_k,
        "sparsity": ffn.sparsity,
        "max_context_tokens": shape.max_context_tokens,
    }


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(first, no_wrap=True)
    for name in others:
        is_text = name in ("attention", "experts\n+ shared")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=name != "attention")
    return table


def _number(value: float) -> str:
    """At least three digits."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _main_ffn(shape: ModelShape) -> Ffn:
    return shape.moe or shape.layers[0][1]


def _attention(shape: ModelShape) -> str:
    kinds = [(attention.kind, count) for attention, count in shape.attentions.items()]
    return kinds[0][0] if len(kinds) == 1 else "\n".join(f"{count} {kind}" for kind, count in kinds)


def _kind(ffn: Ffn) -> str:
    if not ffn.is_moe:
        return "dense"
    shared = f" + {ffn.shared_size / ffn.intermediate_size:.3g}" if ffn.shared_size else ""
    return f"{ffn.top_k} of {ffn.num_experts}{shared}"
