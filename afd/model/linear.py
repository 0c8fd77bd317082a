"""Matrix products with a fixed weight: the hot part of decoding.

T tokens; a weight is [out, in].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# A few rows cost oneDNN no more than four do, and its kernels for one to three rows are slower (docs/performance.md).
MIN_ROWS = 4

# Below this many elements the plain call, which has less to set up, is the faster one.
_MIN_REORDERED = 1 << 16


class Linear(Protocol):
    """x @ weight.T."""

    def __call__(self, x: Tensor) -> Tensor:
        """[T, out] of x [T, in]."""


@dataclass(frozen=True)
class PlainLinear:
    weight: Tensor  # [out, in]

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@dataclass(frozen=True)
class ReorderedLinear:
    """The weight lies as oneDNN's kernels read it, so that no call has to reorder it."""

    weight: Tensor  # opaque

    def __call__(self, x: Tensor) -> Tensor:
        num_rows = x.shape[0]
        if num_rows >= MIN_ROWS:
            return self._product(x)
        return self._product(F.pad(x, (0, 0, 0, MIN_ROWS - num_rows)))[:num_rows]

    def _product(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")  # type: ignore[no-any-return]


def make_linear(weight: Tensor) -> Linear:
    """The fastest form that this weight has on its device."""
    if not _can_reorder(weight):
        return PlainLinear(weight)
    return ReorderedLinear(torch.ops.mkldnn._reorder_linear_weight(weight, MIN_ROWS))


def _can_reorder(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.numel() < _MIN_REORDERED or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
