"""The oracle: the whole model in one process, without a cache, in the plainest form.

Every path through the mesh must yield its tokens. It is written from the model's definition (arXiv 2507.19427)
and shares nothing with the serving path but the elementary pieces in `layers`.

B sequences, T tokens, D hidden size, H heads, d head size, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from afd.model.config import ModelConfig
from afd.model.layers import Rotation, rms_norm


@dataclass(frozen=True)
class Transformer:
    """`weights` maps Hugging Face tensor names to tensors. Gradients flow, so that it can also be trained."""

    config: ModelConfig
    weights: Mapping[str, Tensor]

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Logits [B, T, V] float32 of token_ids [B, T]; each position sees itself and those before it."""
        config = self.config
        positions = torch.arange(token_ids.shape[-1], device=token_ids.device)
        rotation = Rotation.at(positions, config.head_dim, config.rope_theta)
        x = F.embedding(token_ids, self.weights["model.embed_tokens.weight"])  # [B, T, D]
        for layer in range(config.num_layers):
            prefix = f"model.layers.{layer}."
            x = x + self.attention(self.norm(x, prefix + "input_layernorm"), prefix + "self_attn.", rotation)
            h = self.norm(x, prefix + "post_attention_layernorm")
            x = x + (self.moe(h, prefix) if config.is_moe(layer) else self.swiglu(h, prefix + "mlp."))
        return self.linear(self.norm(x, "model.norm"), "lm_head").float()

    def attention(self, h: Tensor, prefix: str, rotation: Rotation) -> Tensor:
        """Multi-matrix factorisation attention: low-rank queries, one key head and one value head for all."""
        config = self.config
        heads = (*h.shape[:-1], config.num_heads, config.head_dim)
        low_rank = self.norm(self.linear(h, prefix + "q_proj"), prefix + "inter_norm")
        q = rotation.rotate(self.linear(low_rank, prefix + "wq").view(heads))  # [B, T, H, d]
        k = rotation.rotate(self.linear(h, prefix + "k_proj").unsqueeze(-2))  # [B, T, 1, d]
        v = self.linear(h, prefix + "v_proj")  # [B, T, d]
        scores = torch.einsum("bthd,bsd->bhts", q, k.squeeze(-2)).float() * config.head_dim**-0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=h.device).triu(1)
        probs = scores.masked_fill(future, float("-inf")).softmax(dim=-1).to(v.dtype)
        out = torch.einsum("bhts,bsd->bthd", probs, v)
        return self.linear(out.flatten(-2), prefix + "o_proj")

    def moe(self, h: Tensor, prefix: str) -> Tensor:
        """The chosen experts, weighted, plus the shared expert, unweighted."""
        config, flat = self.config, h.flatten(0, -2)  # [B*T, D]
        probs = self.linear(flat, prefix + "moe.gate").softmax(dim=-1, dtype=torch.float32)  # [B*T, E]
        topk_weights, topk_ids = probs.topk(config.top_k, dim=-1)  # [B*T, K] each
        if config.norm_expert_weight:
            topk_weights = topk_weights / topk_weights.sum(dim=-1, keepdim=True)
        gate, up, down = (self.weights[f"{prefix}moe.{name}_proj.weight"] for name in ("gate", "up", "down"))
        routed = torch.zeros_like(flat, dtype=torch.float32)
        for expert in topk_ids.unique().tolist():
            rows, choice = (topk_ids == expert).nonzero(as_tuple=True)
            x = flat[rows]
            y = F.linear(F.silu(F.linear(x, gate[expert])) * F.linear(x, up[expert]), down[expert])
            routed = routed.index_add(0, rows, y.float() * topk_weights[rows, choice, None])
        return routed.to(h.dtype).view_as(h) + self.swiglu(h, prefix + "share_expert.")

    def swiglu(self, h: Tensor, prefix: str) -> Tensor:
        gate, up = self.linear(h, prefix + "gate_proj"), self.linear(h, prefix + "up_proj")
        return self.linear(F.silu(gate) * up, prefix + "down_proj")

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[name + ".weight"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self.weights[name + ".weight"], self.config.rms_norm_eps)

    @torch.inference_mode()
    def generate(
        self, prompt: list[int], max_tokens: int, stop_ids: tuple[int, ...] = ()
    ) -> tuple[list[int], list[float]]:
        """Greedy tokens and their log-probabilities; a token of `stop_ids` is the last one."""
        tokens: list[int] = []
        logprobs: list[float] = []
        while len(tokens) < max_tokens and (not tokens or tokens[-1] not in stop_ids):
            logits = self(torch.tensor([prompt + tokens]))[0, -1]
            tokens.append(int(logits.argmax()))
            logprobs.append(float(logits.log_softmax(dim=-1)[tokens[-1]]))
        return tokens, logprobs
