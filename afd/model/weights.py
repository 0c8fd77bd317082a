"""From a checkpoint to the parts that a service runs: each reads only its own tensors and slices."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from afd.errors import CheckpointError
from afd.model.checkpoint import Checkpoint, expected_shapes
from afd.model.ffn import DenseFFN, FFNShard, MoEFFN
from afd.model.layers import SwiGLU
from afd.model.linear import make_linear
from afd.model.mfa import MFA
from afd.model.moe import Experts, Router
from afd.model.stack import AttentionLayer, AttentionStack

Progress = Callable[[int, int], None]  # layers loaded, layers in all


class WeightReader:
    """Reads tensors of one checkpoint in one dtype onto one device; rows or columns are cut while reading."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = device
        self._open_files: dict[Path, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> WeightReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def read(self, name: str, *cut: slice) -> Tensor:
        """The tensor `name`, cut by one slice per leading dimension."""
        path = self.checkpoint.tensors[name].path
        try:
            if path not in self._open_files:
                self._open_files[path] = self._stack.enter_context(safe_open(path, framework="pt"))
            tensor: Tensor = self._open_files[path].get_slice(name)[cut or (slice(None),)]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {name} cannot be read: {error}") from None
        return tensor.to(device=self.device, dtype=self.dtype).contiguous()

    def read_swiglu(self, prefix: str, columns: slice) -> SwiGLU:
        gate = self.read(prefix + "gate_proj.weight", columns)
        up = self.read(prefix + "up_proj.weight", columns)
        down = self.read(prefix + "down_proj.weight", slice(None), columns)
        return SwiGLU(make_linear(torch.cat((gate, up))), make_linear(down))


def shard_slice(size: int, shard: int, num_shards: int) -> slice:
    """The shard-th of num_shards contiguous parts of `size`; sizes differ by at most one, and may be 0."""
    return slice(size * shard // num_shards, size * (shard + 1) // num_shards)


def load_all(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every tensor by name, for the oracle."""
    with WeightReader(checkpoint, dtype, torch.device("cpu")) as reader:
        return {name: reader.read(name) for name in expected_shapes(checkpoint.config)}


def load_attention(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, progress: Progress
) -> AttentionStack:
    """The attention side: embedding, attention, norms, router and lm_head; no FFN weight is read."""
    config = checkpoint.config
    with WeightReader(checkpoint, dtype, device) as reader:
        layers = []
        for layer_idx in range(config.num_layers):
            layers.append(_attention_layer(reader, layer_idx))
            progress(layer_idx + 1, config.num_layers)
        return AttentionStack(
            config=config,
            embedding=reader.read("model.embed_tokens.weight"),
            layers=layers,
            final_norm=reader.read("model.norm.weight"),
            lm_head=make_linear(reader.read("lm_head.weight")),
        )


def _attention_layer(reader: WeightReader, layer_idx: int) -> AttentionLayer:
    config = reader.checkpoint.config
    prefix = f"model.layers.{layer_idx}."
    attn = prefix + "self_attn."
    qkv = [reader.read(f"{attn}{name}_proj.weight") for name in "qkv"]
    return AttentionLayer(
        eps=config.rms_norm_eps,
        input_norm=reader.read(prefix + "input_layernorm.weight"),
        post_attention_norm=reader.read(prefix + "post_attention_layernorm.weight"),
        attention=MFA(
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
            qkv_proj=make_linear(torch.cat(qkv)),
            inter_norm=reader.read(attn + "inter_norm.weight"),
            wq=make_linear(reader.read(attn + "wq.weight")),
            o_proj=make_linear(reader.read(attn + "o_proj.weight")),
        ),
        router=Router(make_linear(reader.read(prefix + "moe.gate.weight")), config.top_k, config.norm_expert_weight)
        if config.is_moe(layer_idx)
        else None,
    )


def load_ffn_shard(
    checkpoint: Checkpoint,
    shard: int,
    num_shards: int,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
) -> FFNShard:
    """Shard `shard` of `num_shards`: a slice of the routed experts, and of every dense and shared FFN's columns."""
    config = checkpoint.config
    with WeightReader(checkpoint, dtype, device) as reader:
        layers: list[DenseFFN | MoEFFN] = []
        for layer_idx in range(config.num_layers):
            prefix = f"model.layers.{layer_idx}."
            if config.is_moe(layer_idx):
                layers.append(
                    MoEFFN(
                        experts=_experts(reader, prefix + "moe.", shard_slice(config.num_experts, shard, num_shards)),
                        shared=reader.read_swiglu(
                            prefix + "share_expert.", shard_slice(config.share_expert_dim, shard, num_shards)
                        ),
                    )
                )
            else:
                columns = shard_slice(config.intermediate_size, shard, num_shards)
                layers.append(DenseFFN(reader.read_swiglu(prefix + "mlp.", columns)))
            progress(layer_idx + 1, config.num_layers)
    return FFNShard(config, shard, num_shards, layers)


def _experts(reader: WeightReader, prefix: str, owned: slice) -> Experts:
    gate, up, down = (reader.read(f"{prefix}{name}_proj.weight", owned) for name in ("gate", "up", "down"))
    experts = zip(torch.cat((gate, up), dim=1), down, strict=True)
    return Experts(owned.start, [SwiGLU(make_linear(gate_up), make_linear(down)) for gate_up, down in experts])
