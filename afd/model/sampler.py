"""From logits to tokens. Draws are a function of (seed, position), never of the batch or of what was drawn before,
so that a sequence that is resumed or recomputed draws the same tokens.

R rows (one per sequence), V vocabulary.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afd.model.sampling_params import SamplingParams


@dataclass(frozen=True)
class SamplerRow:
    """What the sampler must know of the sequence in one row of the logits."""

    params: SamplingParams
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    forbidden_ids: Sequence[int] = ()  # ids that may not be drawn yet (min_tokens)

    @property
    def is_plain(self) -> bool:
        """Whether the logits are used as they are."""
        p = self.params
        penalties = p.repetition_penalty, p.presence_penalty, p.frequency_penalty
        return not (any(penalties) or p.logit_bias or self.forbidden_ids)

    @property
    def is_filtered(self) -> bool:
        p = self.params
        return p.top_k is not None or p.top_p is not None or p.min_p is not None


@dataclass(frozen=True)
class SampledToken:
    """A token with its natural log-probability, before penalties and temperature, and the likeliest alternatives."""

    id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()


def sample(logits: Tensor, rows: Sequence[SamplerRow]) -> list[SampledToken]:
    """One token for each row of logits [R, V] float32."""
    adjusted = logits
    if not all(row.is_plain for row in rows):
        adjusted = logits.clone()
        for row_logits, row in zip(adjusted, rows, strict=True):
            if not row.is_plain:
                _adjust(row_logits, row)
    ids = adjusted.argmax(dim=-1)  # [R]
    for filtered in (False, True):
        drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0 and row.is_filtered == filtered]
        if drawn:
            choose = _draw_filtered if filtered else _draw
            chosen = [rows[i] for i in drawn]
            index = torch.tensor(drawn, device=logits.device)
            ids[index] = choose(adjusted[index], chosen)
    return _with_logprobs(logits, ids, rows)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, position), digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _adjust(logits: Tensor, row: SamplerRow) -> None:
    """Applies logit bias, penalties and forbidden ids to one row [V], in place."""
    p = row.params
    if p.logit_bias:
        logits[list(p.logit_bias)] += torch.tensor(list(p.logit_bias.values()), device=logits.device)
    if p.repetition_penalty:
        seen = torch.tensor(sorted({*row.prompt_ids, *row.output_ids}), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    if row.output_ids and (p.presence_penalty or p.frequency_penalty):
        counts = Counter(row.output_ids)
        penalties = [(p.presence_penalty or 0) + (p.frequency_penalty or 0) * count for count in counts.values()]
        logits[list(counts)] -= torch.tensor(penalties, device=logits.device)
    if row.forbidden_ids:
        logits[list(row.forbidden_ids)] = float("-inf")


def _probs(logits: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
    """[R, V] float64: a cumulative sum over a large vocabulary needs the digits."""
    temperatures = torch.tensor([row.params.temperature for row in rows], dtype=torch.float64, device=logits.device)
    return (logits.double() / temperatures[:, None]).softmax(dim=-1)


def _draw(logits: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
    """Inverse of the cumulative distribution at the row's uniform number; ids [R]."""
    return _invert(_probs(logits, rows), rows)


def _draw_filtered(logits: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
    """The same over the tokens that min-p, top-k and then top-p leave; they keep their places, so that two of nearly
    the same probability, whose order is a matter of rounding, do not change the draw."""
    probs, order = _probs(logits, rows).sort(dim=-1, descending=True, stable=True)
    vocab_size = probs.shape[-1]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    rank = torch.arange(vocab_size, device=logits.device)
    probs = probs.where(rank < column([row.params.top_k or vocab_size for row in rows]), 0.0)
    probs = probs.where(probs >= column([row.params.min_p or 0.0 for row in rows]) * probs[:, :1], 0.0)
    probs = probs / probs.sum(dim=-1, keepdim=True)
    before = probs.cumsum(dim=-1) - probs  # the mass of the likelier tokens
    top_p = column([row.params.top_p or 1.0 for row in rows])
    probs = probs.where((before < top_p) | (rank == 0), 0.0)
    return _invert(torch.zeros_like(probs).scatter(1, order, probs), rows)


def _invert(probs: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
    draws = [uniform(row.params.seed or 0, len(row.prompt_ids) + len(row.output_ids)) for row in rows]
    cumulative = probs.cumsum(dim=-1)
    targets = torch.tensor(draws, dtype=torch.float64, device=probs.device)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    last = (probs > 0).long().cumsum(dim=-1).argmax(dim=-1)  # the last token with any probability
    return torch.minimum(index, last)


def _with_logprobs(logits: Tensor, ids: Tensor, rows: Sequence[SamplerRow]) -> list[SampledToken]:
    normaliser = logits.logsumexp(dim=-1)  # [R]
    logprobs = (logits.gather(1, ids[:, None])[:, 0] - normaliser).tolist()
    top = _top_logprobs(logits, normaliser, rows)
    return [SampledToken(*fields) for fields in zip(ids.tolist(), logprobs, top, strict=True)]


def _top_logprobs(
    logits: Tensor, normaliser: Tensor, rows: Sequence[SamplerRow]
) -> list[tuple[tuple[int, float], ...]]:
    most = min(max(row.params.top_logprobs for row in rows), logits.shape[-1])
    if most == 0:
        return [()] * len(rows)
    values, ids = (logits - normaliser[:, None]).topk(most, dim=-1)
    pairs = [tuple(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return [pair[: row.params.top_logprobs] for pair, row in zip(pairs, rows, strict=True)]
