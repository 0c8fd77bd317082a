"""The pieces that every layer is made of.

T tokens, D hidden size, H heads, d head size, I width of an FFN (or of a slice of it).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, computed in float32: x / sqrt(mean(x^2) + eps) * weight."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.float()).to(x.dtype)


@dataclass(frozen=True)
class Rotation:
    """Rotary embedding of given positions: cos and sin, [T, d/2] float32, the same for every layer."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, head_dim: int, theta: float) -> Rotation:
        """`positions` is [T]; angle of pair i is position * theta^(-2i/d)."""
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
        angles = positions.float()[:, None] * (1.0 / theta**exponents)  # [T, d/2]
        return cls(angles.cos(), angles.sin())

    def rotate(self, x: Tensor) -> Tensor:
        """Half-split ("NeoX") rotation of x [..., T, heads, d]: pairs are (i, i + d/2)."""
        cos, sin = self.cos[:, None], self.sin[:, None]  # [T, 1, d/2]
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


@dataclass(frozen=True)
class SwiGLU:
    """down(silu(gate x) * up x), or the share of it that a slice of the columns contributes."""

    gate_up: Tensor  # [2I, D]: gate above up
    down: Tensor  # [D, I]

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up).chunk(2, dim=-1)  # [T, I] each
        return F.linear(F.silu(gate) * up, self.down)  # [T, D]
