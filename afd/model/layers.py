"""The pieces that every layer is made of.

T tokens, D hidden size, H heads, d head size, I width of an FFN (or of a slice of it).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from afd.model.linear import Linear


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32."""
    return F.rms_norm(x, weight.shape, weight, eps)


@dataclass(frozen=True)
class Rotation:
    """Rotary embedding of given positions, the same for every layer: half-split ("NeoX"), pairs are (i, i + d/2)."""

    cos: Tensor  # [T, 1, d] float32
    sin: Tensor  # [T, 1, d] float32, negative in the first half

    @classmethod
    def at(cls, positions: Tensor, head_dim: int, theta: float) -> Rotation:
        """`positions` is [T]; angle of pair i is position * theta^(-2i/d)."""
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
        angles = positions.float()[:, None] * (1.0 / theta**exponents)  # [T, d/2]
        cos, sin = angles.cos(), angles.sin()
        return cls(torch.cat((cos, cos), dim=-1)[:, None], torch.cat((-sin, sin), dim=-1)[:, None])

    def rotate(self, x: Tensor) -> Tensor:
        """x [..., T, heads, d] rotated by its tokens' positions."""
        wide = x.float()
        first, second = wide.chunk(2, dim=-1)
        return torch.addcmul(wide * self.cos, torch.cat((second, first), dim=-1), self.sin).to(x.dtype)


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, [T, I], of [T, 2I]: the gate's columns, then the others."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@dataclass(frozen=True)
class SwiGLU:
    """down(silu(gate x) * up x), or the share of it that a slice of the columns contributes."""

    gate_up: Linear  # D to 2I
    down: Linear  # I to D

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(gated(self.gate_up(x)))  # [T, D]
