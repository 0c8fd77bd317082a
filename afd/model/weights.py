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
from afd.model.ffn import FFNLayer, FFNShard
from afd.model.native import KernelsName, choose_ops
from afd.model.ops import AttentionWeights, FFNWeights
from afd.model.stack import AttentionStack

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

    def read_columns(self, prefix: str, columns: slice) -> FFNWeights:
        """A slice of a dense or shared FFN."""
        gate = self.read(prefix + "gate_proj.weight", columns)
        up = self.read(prefix + "up_proj.weight", columns)
        return FFNWeights(gate, up, self.read(prefix + "down_proj.weight", slice(None), columns))

    def read_experts(self, prefix: str, owned: slice) -> FFNWeights:
        """Some of a layer's experts, stacked."""
        return FFNWeights(*(self.read(f"{prefix}{name}_proj.weight", owned) for name in ("gate", "up", "down")))


def shard_slice(size: int, shard: int, num_shards: int) -> slice:
    """The shard-th of num_shards contiguous parts of `size`; sizes differ by at most one, and may be 0."""
    return slice(size * shard // num_shards, size * (shard + 1) // num_shards)


def load_all(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every tensor by name, for the oracle."""
    with WeightReader(checkpoint, dtype, torch.device("cpu")) as reader:
        return {name: reader.read(name) for name in expected_shapes(checkpoint.config)}


def load_attention(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
    kernels: KernelsName = "auto",
    cpus: tuple[int, ...] = (),
) -> AttentionStack:
    """The attention side: embedding, attention, norms, router and lm_head; no FFN weight is read."""
    config = checkpoint.config
    ops = choose_ops(kernels, config, dtype, device, cpus)
    with WeightReader(checkpoint, dtype, device) as reader:
        layers = []
        for layer_idx in range(config.num_layers):
            layers.append(ops.attention_layer(_attention_weights(reader, layer_idx)))
            progress(layer_idx + 1, config.num_layers)
        return AttentionStack(
            ops=ops,
            config=config,
            embedding=reader.read("model.embed_tokens.weight"),
            layers=layers,
            final_norm=reader.read("model.norm.weight"),
            lm_head=ops.linear(reader.read("lm_head.weight")),
        )


def _attention_weights(reader: WeightReader, layer_idx: int) -> AttentionWeights:
    config = reader.checkpoint.config
    prefix = f"model.layers.{layer_idx}."
    attn = prefix + "self_attn."
    return AttentionWeights(
        input_norm=reader.read(prefix + "input_layernorm.weight"),
        qkv_proj=torch.cat([reader.read(f"{attn}{name}_proj.weight") for name in "qkv"]),
        inter_norm=reader.read(attn + "inter_norm.weight"),
        wq=reader.read(attn + "wq.weight"),
        o_proj=reader.read(attn + "o_proj.weight"),
        post_attention_norm=reader.read(prefix + "post_attention_layernorm.weight"),
        gate=reader.read(prefix + "moe.gate.weight") if config.is_moe(layer_idx) else None,
        head_dim=config.head_dim,
        eps=config.rms_norm_eps,
        top_k=config.top_k,
        renormalise=config.norm_expert_weight,
    )


def load_ffn_shard(
    checkpoint: Checkpoint,
    shard: int,
    num_shards: int,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
    kernels: KernelsName = "auto",
    cpus: tuple[int, ...] = (),
) -> FFNShard:
    """Shard `shard` of `num_shards`: a slice of the routed experts, and of every dense and shared FFN's columns."""
    config = checkpoint.config
    ops = choose_ops(kernels, config, dtype, device, cpus)
    with WeightReader(checkpoint, dtype, device) as reader:
        layers: list[FFNLayer] = []
        for layer_idx in range(config.num_layers):
            prefix = f"model.layers.{layer_idx}."
            if config.is_moe(layer_idx):
                experts = shard_slice(config.num_experts, shard, num_shards)
                columns = shard_slice(config.share_expert_dim, shard, num_shards)
                shared = reader.read_columns(prefix + "share_expert.", columns)
                layers.append(
                    ops.moe_ffn(
                        shared, reader.read_experts(prefix + "moe.", experts), experts.start, config.num_experts
                    )
                )
            else:
                columns = shard_slice(config.intermediate_size, shard, num_shards)
                layers.append(ops.dense_ffn(reader.read_columns(prefix + "mlp.", columns)))
            progress(layer_idx + 1, config.num_layers)
    return FFNShard(config, shard, num_shards, layers)
