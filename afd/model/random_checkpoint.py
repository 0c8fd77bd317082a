"""A random checkpoint of given sizes in the real file layout, for tests and benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from afd.errors import ConfigError
from afd.model.checkpoint import INDEX_NAME, expected_shapes
from afd.model.config import MODEL_TYPE, ModelConfig

_NUM_BYTES = 256


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a Step-3-shaped model, named as in its `config.json`."""

    num_hidden_layers: int = 4
    hidden_size: int = 64
    num_attention_heads: int = 4
    head_dim: int = 16
    share_q_dim: int = 32
    intermediate_size: int = 128
    moe_num_experts: int = 6
    moe_top_k: int = 3
    moe_intermediate_size: int = 48
    share_expert_dim: int = 48
    moe_layers_enum: str = "1,2"
    vocab_size: int = 512
    max_seq_len: int = 4096
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    norm_expert_weight: bool = False
    bos_token_id: int = 0
    eos_token_id: int = 1


def make_checkpoint(
    model_dir: str | Path,
    sizes: ModelSizes,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_file_bytes: int = 4 << 30,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ModelConfig:
    """Writes the checkpoint; more than one file, with an index, where it exceeds max_file_bytes.

    Weights are normal with variance 1/fan-in, so that activations keep their scale through the layers. With 258
    or more entries in the vocabulary it also has a tokeniser: one token a byte.
    Raises ConfigError where the sizes make no model or the disk is full.
    """
    path = Path(model_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_config(path, asdict(sizes), dtype)
        config = ModelConfig.load(path)
        shapes = expected_shapes(config)
        files = _split(shapes, dtype.itemsize, max_file_bytes)
        generator = torch.Generator().manual_seed(seed)
        for number, names in enumerate(files, start=1):
            tensors = {name: _random(shapes[name], generator).to(dtype) for name in names}
            save_tensors(tensors, path / _file_name(number, len(files)))
            progress(number, len(files))
        if len(files) > 1:
            _write_index(path, files)
        if config.vocab_size >= _NUM_BYTES + 2:
            _write_byte_tokenizer(path)
    except OSError as error:
        raise ConfigError(f"the checkpoint cannot be written to {path}: {error.strerror or error}") from None
    except Exception as error:
        if "os error" in str(error).lower() or "I/O error" in str(error):
            raise ConfigError(f"the checkpoint cannot be written to {path}: {error}") from None
        raise
    return config


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a safetensors file that other users can read too, as they can the files beside it."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)


def write_config(path: Path, sizes: dict[str, object], dtype: torch.dtype) -> None:
    """`config.json` as Step-3's is."""
    config = {
        "architectures": ["Step3TextForCausalLM"],
        "model_type": MODEL_TYPE,
        "num_attention_groups": 1,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": False,
        **sizes,
    }
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _split(shapes: dict[str, tuple[int, ...]], itemsize: int, max_file_bytes: int) -> list[list[str]]:
    files: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = itemsize * int(torch.Size(shape).numel())
        if files[-1] and used + size > max_file_bytes:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    return files


def _file_name(number: int, num_files: int) -> str:
    return "model.safetensors" if num_files == 1 else f"model-{number:05}-of-{num_files:05}.safetensors"


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    return 1 + 0.1 * noise if len(shape) == 1 else noise * shape[-1] ** -0.5


def _write_index(path: Path, files: list[list[str]]) -> None:
    weight_map = {name: _file_name(number, len(files)) for number, names in enumerate(files, start=1) for name in names}
    (path / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2) + "\n")


def _write_byte_tokenizer(path: Path) -> None:
    """Ids 0 and 1 are <bos> and <eos>; id 2 + b is the byte b."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {"<bos>": 0, "<eos>": 1} | {char: 2 + byte for byte, char in enumerate(_byte_chars())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<bos>", special=True), AddedToken("<eos>", special=True)])
    tokenizer.save(str(path / "tokenizer.json"))


def _byte_chars() -> Iterator[str]:
    """The printable stand-in of each byte, as GPT-2's byte-level BPE writes it."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(0x100, 0x200))
    for byte in range(_NUM_BYTES):
        yield chr(byte if byte in printable else next(spare))
