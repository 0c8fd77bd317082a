"""What an attention replica and an FFN shard must agree on before the first frame."""

from __future__ import annotations

import torch

from afd.errors import Mismatch
from afd.handoff.tensors import dtype_name, dtype_to_proto
from afd.model.config import ModelConfig
from afd.v1 import ffn_pb2 as pb

PROTOCOL_VERSION = 3


def topology(config: ModelConfig, fingerprint: str, dtype: torch.dtype, shard: int, num_shards: int) -> pb.Topology:
    return pb.Topology(
        protocol_version=PROTOCOL_VERSION,
        model_fingerprint=fingerprint,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_experts=config.num_experts,
        top_k=config.top_k,
        dtype=dtype_to_proto(dtype),
        shard=shard,
        num_shards=num_shards,
    )


def refuse_mismatch(attention: pb.Topology, ffn: pb.Topology) -> None:
    """Raises Mismatch with a sentence that names the first thing they differ in, and both values."""
    for field in pb.Topology.DESCRIPTOR.fields:
        ours, theirs = getattr(attention, field.name), getattr(ffn, field.name)
        if ours != theirs:
            name = field.name.replace("_", " ")
            if field.name == "dtype":
                ours, theirs = dtype_name(ours), dtype_name(theirs)
            raise Mismatch(f"the {name} differs: attention has {ours}, the FFN has {theirs}")
