"""Reading a Hugging Face checkpoint: one or many safetensors files, only the tensors and slices asked for."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from afd.errors import CheckpointError
from afd.model.config import ModelConfig
from afd.model.fields import read_json

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
INDEX_NAME = "model.safetensors.index.json"
_DTYPES = ("BF16", "F16", "F32", "F64")
_SAMPLE_BYTES = 64  # of a tensor in the fingerprint, at
_NUM_SAMPLES = 16  # places


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is: file, dtype as safetensors writes it, shape, and its bytes' place in the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Checkpoint:
    """A model directory. Opening it reads headers only; tensors are read when asked for, sliced on disk."""

    def __init__(self, model_dir: str | Path) -> None:
        self.dir = Path(model_dir)
        self.config = ModelConfig.load(self.dir)
        self.tensors = {name: info for path in self._files() for name, info in _read_header(path)}
        self._check_shapes()

    @cached_property
    def fingerprint(self) -> str:
        """Equal for equal models: the configuration's digest, and a hash of every tensor's name, type, shape and
        some of its bytes, so that it is known without reading all weights. How they are split over files is left
        out."""
        digest = hashlib.sha256()
        for name in sorted(expected_shapes(self.config)):
            info = self.tensors[name]
            digest.update(f"{name} {info.dtype} {info.shape}".encode())
            for sample in _samples(info):
                digest.update(sample)
        return f"{self.config.digest}-{digest.hexdigest()[:16]}"

    def _files(self) -> list[Path]:
        index = self.dir / INDEX_NAME
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{index} has no weight_map")
            if not all(isinstance(name, str) for name in weight_map.values()):
                raise CheckpointError(f"{index}: its weight_map must map tensors to names of files")
            return [self.dir / name for name in sorted(set(weight_map.values()))]
        files = sorted(self.dir.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{self.dir} holds no *.safetensors file")
        return files

    def _check_shapes(self) -> None:
        layers = {int(match[1]) for name in self.tensors if (match := _LAYER.match(name))}
        if layers != set(range(len(layers))) or len(layers) != self.config.num_layers:
            raise CheckpointError(
                f"{self.dir} holds {len(layers)} layers, up to {max(layers, default=-1)}, but config.json says "
                f"num_hidden_layers: {self.config.num_layers}"
            )
        for name, shape in expected_shapes(self.config).items():
            info = self.tensors.get(name)
            if info is None:
                raise CheckpointError(f"{self.dir} lacks the tensor {name}")
            if info.dtype not in _DTYPES:
                raise CheckpointError(
                    f"{info.path}: {name} is stored as {info.dtype}; quantised checkpoints cannot be served yet, "
                    f"use one in {', '.join(_DTYPES)}"
                )
            if info.shape != shape:
                raise CheckpointError(
                    f"{info.path}: {name} is {list(info.shape)}, but config.json asks for {list(shape)}"
                )


def _samples(info: TensorInfo) -> Iterator[bytes]:
    """Short pieces at even distances over the tensor's bytes, first and last included."""
    with info.path.open("rb") as file:
        last = max(info.start, info.stop - _SAMPLE_BYTES)
        for number in range(_NUM_SAMPLES):
            offset = info.start + (last - info.start) * number // (_NUM_SAMPLES - 1)
            file.seek(offset)
            yield file.read(min(_SAMPLE_BYTES, info.stop - offset))


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model, as Hugging Face names them."""
    hidden, head_dim, q_dim = config.hidden_size, config.head_dim, config.share_q_dim
    heads_dim = config.num_heads * head_dim
    experts, moe_width = config.num_experts, config.moe_intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config.vocab_size, hidden),
    }
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (q_dim, hidden),
            prefix + "self_attn.k_proj.weight": (head_dim, hidden),
            prefix + "self_attn.v_proj.weight": (head_dim, hidden),
            prefix + "self_attn.inter_norm.weight": (q_dim,),
            prefix + "self_attn.wq.weight": (heads_dim, q_dim),
            prefix + "self_attn.o_proj.weight": (hidden, heads_dim),
        }
        if config.is_moe(layer):
            shapes |= {
                prefix + "moe.gate.weight": (experts, hidden),
                prefix + "moe.gate_proj.weight": (experts, moe_width, hidden),
                prefix + "moe.up_proj.weight": (experts, moe_width, hidden),
                prefix + "moe.down_proj.weight": (experts, hidden, moe_width),
            }
            shapes |= _swiglu_shapes(prefix + "share_expert.", hidden, config.share_expert_dim)
        else:
            shapes |= _swiglu_shapes(prefix + "mlp.", hidden, config.intermediate_size)
    return shapes


def _swiglu_shapes(prefix: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        prefix + "gate_proj.weight": (width, hidden),
        prefix + "up_proj.weight": (width, hidden),
        prefix + "down_proj.weight": (hidden, width),
    }


def _read_header(path: Path) -> Iterator[tuple[str, TensorInfo]]:
    """A safetensors file begins with the length of a JSON header, 8 bytes, and that header."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError("its header is longer than the file")
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            data = 8 + length
            for name, entry in header.items():
                start, stop = (data + offset for offset in entry["data_offsets"])
                if stop > size:
                    raise ValueError(f"it ends before the tensor {name}")
                yield name, TensorInfo(path, entry["dtype"], tuple(entry["shape"]), start, stop)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} lacks the file {path.name} that its index names") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a safetensors file, or is damaged: {error}") from None
