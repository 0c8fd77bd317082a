"""The figures of the paper's analysis."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from afd.planner.cost import cheapest_pair
from afd.planner.drawing import ATTENTION, FFN, SOFT, Axes, Figure, FuncFormatter, mpl, save
from afd.planner.paper import CONTEXTS, MODELS, cards, cost_of, shape_of

_COLOURS = dict(zip(MODELS, mpl.color_sequences["tab10"], strict=False))
_TOKENS = [2**power for power in range(10, 17)]


def draw_paper(folder: Path) -> list[Path]:
    """Writes each figure twice, and says where. Raises ConfigError if the folder cannot be written."""
    return [
        path for draw in _FIGURES for path in save(folder, draw.__name__.strip("_").replace("_", "-"), _drawn(draw))
    ]


def _drawn(draw: Callable[[Axes], None]) -> Figure:
    figure = Figure(figsize=(8.5, 5))
    draw(figure.subplots())
    return figure


def _cost_against_context(axes: Axes) -> None:
    for model in MODELS:
        contexts = [tokens for tokens in _TOKENS if tokens <= shape_of(model).max_context_tokens]
        costs = [cost_of(model, tokens) for tokens in contexts]
        dollars = [cheapest_pair(cost, cards().values()).dollars(cost) for cost in costs]
        width = 3.0 if model == "Step-3" else 1.5
        axes.plot(contexts, dollars, marker="o", markersize=3, linewidth=width, color=_COLOURS[model], label=model)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens / 1024:.0f}K"))
    axes.set(xlabel="context, tokens", ylabel="$ per million tokens", ylim=(0, None))
    axes.set_title("What a decoded token costs, each part on its cheapest card")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _attention_and_ffn_share(axes: Axes) -> None:
    labels, attention, ffn = [], [], []
    for model in MODELS:
        for context in CONTEXTS:
            cost = cost_of(model, context)
            pair = cheapest_pair(cost, cards().values())
            attention.append(cost.attention_dollars(pair.attention))
            ffn.append(cost.ffn_dollars(pair.ffn))
            labels.append(f"{model}  {context // 1024}K" if context == CONTEXTS[0] else f"{context // 1024}K")
    rows = [index + 0.25 * (index // 2) for index in range(len(labels))]
    axes.barh(rows, attention, color=ATTENTION, label="attention")
    axes.barh(rows, ffn, left=attention, color=FFN, label="FFN")
    for row, first, second in zip(rows, attention, ffn, strict=True):
        axes.text(
            first + second + 0.002, row, f"{first / (first + second):.0%} attention", va="center", size=8, color=SOFT
        )
    axes.set_yticks(rows, labels)
    axes.invert_yaxis()
    axes.set(xlabel="$ per million tokens, each part on its cheapest card", xlim=(0, 0.31))
    axes.set_title("Attention grows with the context, the FFN does not")
    axes.legend(frameon=False, loc="lower right")


def _kv_against_compute(axes: Axes) -> None:
    context, ends = CONTEXTS[0], (1e8, 2e9)
    for name, card in cards().items():
        axes.plot(ends, [size * card.roofline for size in ends], color=SOFT, linewidth=1, linestyle="--")
        above = 1 if name == "910B" else -7
        end = (ends[1], ends[1] * card.roofline)
        axes.annotate(name, end, xytext=(4, above), textcoords="offset points", color=SOFT)
    for model in MODELS:
        cost = cost_of(model, context)
        axes.scatter(cost.kv_bytes, cost.attention_flops, color=_COLOURS[model], s=60, zorder=3)
        aside, side = (-7, "right") if model in ("Pangu Pro MoE", "ERNIE 4.5") else (7, "left")
        point = (cost.kv_bytes, cost.attention_flops)
        axes.annotate(model, point, xytext=(aside, -4), textcoords="offset points", ha=side, size=9)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=(2e9, 2e12))
    axes.set(xlabel="bytes of KV cache read per token", ylabel="FLOPs of attention per token")
    axes.set_title(f"Attention at {context // 1024}K: memory binds it below a card's line, compute above")


def _intensity_against_rooflines(axes: Axes) -> None:
    models = sorted(MODELS, key=lambda model: cost_of(model, CONTEXTS[0]).intensity)
    intensities = [cost_of(model, CONTEXTS[0]).intensity for model in models]
    bars = axes.barh(models, intensities, color=[ATTENTION if model == "Step-3" else "#a5c8f0" for model in models])
    axes.bar_label(bars, fmt="%.0f", padding=4, bbox={"color": "white", "pad": 0.5})
    for name, card in cards().items():
        axes.axvline(card.roofline, color=FFN, linestyle="--", linewidth=1)
        side = "left" if name == "910B" else "right"
        axes.text(card.roofline, -0.1, f" {name} ", va="center", ha=side, color=FFN, size=9)
    axes.set(xscale="log", xlabel="FLOPs per byte of KV cache; dashed: what a card does while it reads a byte")
    axes.set(xlim=(2, 1200), ylim=(-0.6, len(models) - 0.4))
    axes.set_title("Arithmetic intensity of attention against rooflines")


_FIGURES = (_cost_against_context, _attention_and_ffn_share, _kv_against_compute, _intensity_against_rooflines)
