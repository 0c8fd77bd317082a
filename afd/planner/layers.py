"""What one layer reads and computes for one decoded token. Numbers of a token's share: elements, parameters, FLOPs.

Each product of matrices counts two FLOPs per parameter and token; norms, rotary embeddings and softmax are left out, as
in the Step-3 paper (arXiv 2507.19427, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Amount = float | NDArray[np.float64]  # a number, or one for each of many cases

_FP32_BYTES = 4
_LIGHTNING_FLOPS = 10  # per element of the state


class Attention(Protocol):
    """The attention of one layer: its core over the KV cache, and the linears around it."""

    @property
    def kind(self) -> str:
        """As the field calls it."""

    @property
    def parameters(self) -> int:
        """Of the linears."""

    @property
    def kv_shards(self) -> int:
        """Into how many equal parts tensor parallelism can split what a token reads; further cards hold copies."""

    def kv_bytes(self, context: Amount, element_bytes: float) -> Amount:
        """Read (and written, where it is a state) for one token that follows `context` others."""

    def flops(self, context: Amount) -> Amount:
        """Of the core, for one token that follows `context` others."""


@dataclass(frozen=True)
class GroupedQuery:
    """GQA, with MHA and MQA as its ends. `window` is the most tokens that are seen: sliding or chunked attention."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None

    @property
    def kind(self) -> str:
        name = {1: "MQA", self.num_heads: "MHA"}.get(self.num_kv_heads, "GQA")
        return name if self.window is None else f"{name} over {self.window}"

    @property
    def parameters(self) -> int:
        """q and o, then k and v."""
        return 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)

    @property
    def kv_shards(self) -> int:
        return self.num_kv_heads

    def seen(self, context: Amount) -> Amount:
        if self.window is None:
            return context
        shorter: Amount = np.minimum(context, self.window)
        return shorter

    def kv_bytes(self, context: Amount, element_bytes: float) -> Amount:
        return 2 * self.num_kv_heads * self.head_dim * self.seen(context) * element_bytes

    def flops(self, context: Amount) -> Amount:
        """q k^T and the weighted sum of v: two products of 2 FLOPs."""
        return 4 * self.num_heads * self.head_dim * self.seen(context)


@dataclass(frozen=True)
class MultiMatrix:
    """MFA of Step-3: low-rank queries of many heads over one key head and one value head."""

    hidden_size: int
    num_heads: int
    head_dim: int
    share_q_dim: int
    kv_shards: int = 1
    kind: str = "MFA"

    @property
    def parameters(self) -> int:
        heads = self.num_heads * self.head_dim
        down_and_kv = self.hidden_size * (self.share_q_dim + 2 * self.head_dim)
        return down_and_kv + self.share_q_dim * heads + heads * self.hidden_size

    def kv_bytes(self, context: Amount, element_bytes: float) -> Amount:
        return 2 * self.head_dim * context * element_bytes

    def flops(self, context: Amount) -> Amount:
        return 4 * self.num_heads * self.head_dim * context


@dataclass(frozen=True)
class MultiLatent:
    """MLA of DeepSeek, decoding with the up-projections absorbed: every head attends to the one latent."""

    hidden_size: int
    num_heads: int
    q_lora_rank: int  # 0: queries are not low-rank
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    kv_shards: int = 1
    kind: str = "MLA"

    @property
    def latent(self) -> int:
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def parameters(self) -> int:
        queries = self.num_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        rank = self.q_lora_rank
        q = rank * (self.hidden_size + queries) if rank else self.hidden_size * queries
        kv_up = self.num_heads * (self.qk_nope_head_dim + self.v_head_dim) * self.kv_lora_rank
        return q + self.hidden_size * self.latent + kv_up + self.num_heads * self.v_head_dim * self.hidden_size

    def kv_bytes(self, context: Amount, element_bytes: float) -> Amount:
        return self.latent * context * element_bytes

    def flops(self, context: Amount) -> Amount:
        """The paper's count, which takes the latent's whole width for keys and for values."""
        return 4 * self.num_heads * self.latent * context


@dataclass(frozen=True)
class Lightning:
    """Linear attention of MiniMax: an FP32 state of [heads, head_dim, head_dim] is read and written, whatever the
    context; q, k, v, an output gate and o around it."""

    hidden_size: int
    num_heads: int
    head_dim: int
    kind: str = "lightning"

    @property
    def parameters(self) -> int:
        return 5 * self.hidden_size * self.num_heads * self.head_dim

    @property
    def kv_shards(self) -> int:
        return self.num_heads

    @property
    def state(self) -> int:
        return self.num_heads * self.head_dim**2

    def kv_bytes(self, context: Amount, element_bytes: float) -> Amount:
        return 2 * _FP32_BYTES * self.state

    def flops(self, context: Amount) -> Amount:
        """Ten per element of the state: the paper prints the sum only, which this gives to 0.1 %."""
        return _LIGHTNING_FLOPS * self.state


@dataclass(frozen=True)
class Ffn:
    """SwiGLU experts of `intermediate_size`, of which a token has `top_k`, and a shared part that all tokens have.

    A dense FFN is one expert, and all have it.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int = 1
    top_k: int = 1
    shared_size: int = 0

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 1

    def _of(self, width: float) -> float:
        return 3 * self.hidden_size * width  # gate, up, down

    @property
    def parameters(self) -> float:
        return self._of(self.num_experts * self.intermediate_size + self.shared_size)

    @property
    def common_parameters(self) -> float:
        """That every token has: the shared part, or all of a dense FFN."""
        return self._of(self.shared_size + (0 if self.is_moe else self.intermediate_size))

    @property
    def routed_parameters(self) -> float:
        """Of experts, among which each token has its own."""
        return self.parameters - self.common_parameters

    @property
    def routed_flops(self) -> float:
        return 2 * self.routed_parameters * self.top_k / self.num_experts

    @property
    def flops(self) -> float:
        return 2 * self.common_parameters + self.routed_flops

    @property
    def sparsity(self) -> float:
        """The part of the weights that a token has: (top_k + shared) / (experts + shared)."""
        return self.flops / 2 / self.parameters

    def routed_read(self, num_tokens: Amount) -> Amount:
        """Parameters, expected, of tokens that are routed at random: experts that nobody has are not read."""
        missed = (1 - self.top_k / self.num_experts) ** num_tokens
        return self.routed_parameters * (1 - missed)

    def parameters_read(self, num_tokens: Amount) -> Amount:
        return self.common_parameters + self.routed_read(num_tokens)
