"""ffn_input in eight bits: e4m3 with one scale per token (arXiv 2507.19427, section 5)."""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max
_SMALLEST_SCALE = 1e-12  # a row of zeros has no scale of its own


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x [T, D] divided by its scales, as e4m3; the scales [T] float32)."""
    wide = x.float()
    scales = (wide.abs().amax(dim=-1) / _LARGEST).clamp_(min=_SMALLEST_SCALE)
    return (wide / scales[:, None]).to(FP8), scales


def dequantize(quantized: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, D] in dtype."""
    return (quantized.float() * scales[:, None]).to(dtype)
