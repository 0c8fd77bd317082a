"""Checkpoints: what is read, what is refused and with which words, and how a model is recognised."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from afd.errors import CheckpointError
from afd.model.checkpoint import INDEX_NAME, Checkpoint, expected_shapes
from afd.model.config import ModelConfig
from afd.model.random_checkpoint import ModelSizes, make_checkpoint
from afd.model.weights import WeightReader, load_all, load_attention, load_ffn_shard

SIZES = ModelSizes(
    num_hidden_layers=3,
    hidden_size=10,
    num_attention_heads=3,
    head_dim=4,
    share_q_dim=7,
    intermediate_size=11,
    moe_num_experts=5,
    moe_top_k=2,
    moe_intermediate_size=6,
    share_expert_dim=3,
    moe_layers_enum="1",
    vocab_size=13,
)
CPU = torch.device("cpu")


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path, SIZES)
    return tmp_path


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def edit_tensors(model_dir: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = model_dir / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def refusal(model_dir: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(model_dir)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


# --- reading ---


@pytest.mark.parametrize("max_file_bytes", [1, 700, 1 << 30])
def test_a_checkpoint_reads_the_same_from_one_file_or_many(tmp_path: Path, max_file_bytes: int) -> None:
    make_checkpoint(tmp_path / "one", SIZES)
    make_checkpoint(tmp_path / "split", SIZES, max_file_bytes=max_file_bytes)
    one, split = (load_all(Checkpoint(tmp_path / name)) for name in ("one", "split"))
    assert (tmp_path / "split" / INDEX_NAME).exists() == (max_file_bytes < 1 << 30)
    assert one.keys() == split.keys()
    assert all(torch.equal(one[name], split[name]) for name in one)


def test_opening_a_checkpoint_reads_no_weights(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(WeightReader, "read", refuse)
    assert Checkpoint(model_dir).fingerprint


@pytest.fixture
def num_read(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Elements read of each tensor."""
    counts: dict[str, int] = {}
    read = WeightReader.read

    def counting(self: WeightReader, name: str, *cut: slice) -> torch.Tensor:
        tensor = read(self, name, *cut)
        counts[name] = counts.get(name, 0) + tensor.numel()
        return tensor

    monkeypatch.setattr(WeightReader, "read", counting)
    return counts


def is_ffn(name: str) -> bool:
    return any(part in name for part in (".mlp.", ".share_expert.", ".moe.")) and ".moe.gate." not in name


def ignore(done: int, total: int) -> None:
    pass


@pytest.mark.parametrize("num_shards", [1, 2, 3, 12])
def test_ffn_shards_together_read_every_ffn_weight_once_and_nothing_else(
    model_dir: Path, num_read: dict[str, int], num_shards: int
) -> None:
    checkpoint = Checkpoint(model_dir)
    for shard in range(num_shards):
        load_ffn_shard(checkpoint, shard, num_shards, torch.float32, CPU, ignore)
    shapes = expected_shapes(checkpoint.config)
    assert num_read == {name: math.prod(shape) for name, shape in shapes.items() if is_ffn(name)}


def test_a_shard_reads_its_share_only(model_dir: Path, num_read: dict[str, int]) -> None:
    load_ffn_shard(Checkpoint(model_dir), 1, 3, torch.float32, CPU, ignore)
    per_column = SIZES.hidden_size
    assert num_read["model.layers.0.mlp.gate_proj.weight"] == 4 * per_column  # columns 3..6 of 11
    assert num_read["model.layers.1.share_expert.down_proj.weight"] == 1 * per_column
    assert num_read["model.layers.1.moe.up_proj.weight"] == 2 * SIZES.moe_intermediate_size * per_column


def test_attention_reads_everything_but_the_ffn(model_dir: Path, num_read: dict[str, int]) -> None:
    checkpoint = Checkpoint(model_dir)
    load_attention(checkpoint, torch.float32, CPU, ignore)
    shapes = expected_shapes(checkpoint.config)
    assert num_read == {name: math.prod(shape) for name, shape in shapes.items() if not is_ffn(name)}


def test_weights_are_given_in_the_dtype_asked_for(model_dir: Path) -> None:
    checkpoint = Checkpoint(model_dir)
    wide, narrow = load_all(checkpoint)["lm_head.weight"], load_all(checkpoint, torch.bfloat16)["lm_head.weight"]
    assert torch.equal(narrow, wide.to(torch.bfloat16))


def test_loading_reports_its_progress_layer_by_layer(model_dir: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_ffn_shard(Checkpoint(model_dir), 0, 2, torch.float32, CPU, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


# --- configuration ---


def test_a_language_model_inside_a_vision_model_is_found(model_dir: Path) -> None:
    plain = ModelConfig.load(model_dir)
    text = json.loads((model_dir / "config.json").read_text())
    whole = {"model_type": "step3_vl", "text_config": text, "vision_config": {"hidden_size": 1792}}
    (model_dir / "config.json").write_text(json.dumps(whole))
    assert ModelConfig.load(model_dir) == plain


def test_layers_with_experts_default_to_all_but_the_first(model_dir: Path) -> None:
    edit_json(model_dir / "config.json", lambda config: config.pop("moe_layers_enum"))
    assert ModelConfig.load(model_dir).moe_layers == {1, 2}


@pytest.mark.parametrize(("value", "layers"), [("0,2", {0, 2}), (" 1 , 2 ", {1, 2}), ([2], {2}), ("", set())])
def test_layers_with_experts_are_a_list_in_a_string(model_dir: Path, value: object, layers: set[int]) -> None:
    edit_json(model_dir / "config.json", lambda config: config.update(moe_layers_enum=value))
    assert ModelConfig.load(model_dir).moe_layers == layers


def test_end_tokens_of_the_generation_config_go_first(model_dir: Path) -> None:
    assert ModelConfig.load(model_dir).eos_token_ids == (1,)
    (model_dir / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert ModelConfig.load(model_dir).eos_token_ids == (3, 4)


def test_the_smallest_limit_of_the_context_counts(model_dir: Path) -> None:
    edit_json(model_dir / "config.json", lambda config: config.update(max_position_embeddings=77))
    assert ModelConfig.load(model_dir).max_context_tokens == 77


def test_rope_parameters_of_newer_configs_give_the_theta(model_dir: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 12345.0}
    edit_json(model_dir / "config.json", lambda config: config.update(rope_parameters=rope))
    assert ModelConfig.load(model_dir).rope_theta == 12345.0


# --- fingerprint ---


def test_fingerprint_does_not_depend_on_how_the_weights_are_split(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "one", SIZES)
    make_checkpoint(tmp_path / "split", SIZES, max_file_bytes=700)
    assert Checkpoint(tmp_path / "one").fingerprint == Checkpoint(tmp_path / "split").fingerprint


def test_fingerprint_tells_any_changed_tensor(model_dir: Path) -> None:
    seen = {Checkpoint(model_dir).fingerprint}
    names = sorted(load_file(model_dir / "model.safetensors"))
    for name in names:
        edit_tensors(model_dir, lambda tensors, name=name: tensors[name].mul_(1.01))
        seen.add(Checkpoint(model_dir).fingerprint)
    assert len(seen) == 1 + len(names)


def test_fingerprint_tells_swapped_tensors_and_another_dtype(model_dir: Path) -> None:
    seen = {Checkpoint(model_dir).fingerprint}
    keys = [f"model.layers.{layer}.self_attn.k_proj.weight" for layer in (0, 1)]
    edit_tensors(
        model_dir, lambda tensors: tensors.update(zip(keys, [tensors[keys[1]], tensors[keys[0]]], strict=True))
    )
    seen.add(Checkpoint(model_dir).fingerprint)
    edit_tensors(model_dir, lambda tensors: tensors.update({keys[0]: tensors[keys[0]].bfloat16()}))
    seen.add(Checkpoint(model_dir).fingerprint)
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [("rope_theta", 1e4), ("rms_norm_eps", 1e-6), ("moe_top_k", 1), ("norm_expert_weight", True), ("eos_token_id", 2)],
)
def test_fingerprint_tells_a_changed_config(model_dir: Path, field: str, value: object) -> None:
    before = Checkpoint(model_dir).fingerprint
    edit_json(model_dir / "config.json", lambda config: config.update({field: value}))
    assert Checkpoint(model_dir).fingerprint != before


# --- refusals: one sentence that names file and field ---


def test_a_directory_that_is_no_model_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path} is no model directory: it has no config.json"
    assert "config.json" in refusal(tmp_path / "nowhere")
    file = tmp_path / "file"
    file.write_text("")
    assert refusal(file) == f"{file} is not a directory"


@pytest.mark.parametrize("text", ["{", "", '{"a": }', "\x00"])
def test_a_config_that_is_not_json_is_refused(model_dir: Path, text: str) -> None:
    (model_dir / "config.json").write_text(text)
    assert refusal(model_dir).startswith(f"{model_dir / 'config.json'} is not valid JSON")


def test_a_config_that_is_not_text_is_refused(model_dir: Path) -> None:
    (model_dir / "config.json").write_bytes(b"\xff\xfe{}")
    assert str(model_dir / "config.json") in refusal(model_dir)


def test_a_config_that_is_no_object_is_refused(model_dir: Path) -> None:
    (model_dir / "config.json").write_text("[1]")
    assert "does not hold a JSON object" in refusal(model_dir)


MISSING = object()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "llama"),
        ("model_type", MISSING),
        ("hidden_size", MISSING),
        ("hidden_size", None),
        ("hidden_size", 0),
        ("hidden_size", -10),
        ("hidden_size", 10.0),
        ("hidden_size", "10"),
        ("num_hidden_layers", True),
        ("max_seq_len", MISSING),
        ("head_dim", 5),
        ("moe_top_k", 6),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", math.nan),
        ("rms_norm_eps", math.inf),
        ("rope_theta", -1),
        ("rope_theta", MISSING),
        ("rope_theta", math.inf),
        ("moe_layers_enum", "1,x"),
        ("moe_layers_enum", "1,3"),
        ("moe_layers_enum", "-1"),
        ("moe_layers_enum", 1),
        ("moe_layers_enum", [[1]]),
        ("moe_layers_enum", [1.5]),
        ("norm_expert_weight", "false"),
        ("num_attention_groups", 2),
        ("hidden_act", "gelu"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4}),
        ("rope_scaling", {"type": "linear", "factor": 2}),
        ("rope_scaling", "yarn"),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 1e4}),
        ("rope_parameters", [1]),
        ("quantization_config", {"quant_method": "fp8"}),
        ("eos_token_id", 13),
        ("eos_token_id", [1, -1]),
        ("eos_token_id", "1"),
        ("eos_token_id", [[1]]),
        ("eos_token_id", 1.5),
        ("bos_token_id", 99),
        ("bos_token_id", "0"),
    ],
)
def test_a_field_that_cannot_be_served_is_refused(model_dir: Path, field: str, value: object) -> None:
    def edit(config: dict[str, Any]) -> None:
        config[field] = value
        if value is MISSING:
            del config[field]

    edit_json(model_dir / "config.json", edit)
    sentence = refusal(model_dir)
    assert sentence.startswith(f"{model_dir / 'config.json'}: ")
    assert field in sentence


def test_another_vision_language_model_is_refused(model_dir: Path) -> None:
    (model_dir / "config.json").write_text('{"model_type": "llava", "text_config": {"model_type": "llama"}}')
    assert "'llava' cannot be served" in refusal(model_dir)


def test_a_model_without_weights_is_refused(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    assert refusal(model_dir) == f"{model_dir} holds no *.safetensors file"


def test_a_missing_tensor_is_refused(model_dir: Path) -> None:
    edit_tensors(model_dir, lambda tensors: tensors.pop("model.layers.1.moe.gate.weight"))
    assert refusal(model_dir) == f"{model_dir} lacks the tensor model.layers.1.moe.gate.weight"


def test_a_misshapen_tensor_is_refused(model_dir: Path) -> None:
    edit_tensors(model_dir, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(13, 9)}))
    assert refusal(model_dir) == (
        f"{model_dir / 'model.safetensors'}: lm_head.weight is [13, 9], but config.json asks for [13, 10]"
    )


@pytest.mark.parametrize(("dtype", "name"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")])
def test_quantised_weights_are_refused(model_dir: Path, dtype: torch.dtype, name: str) -> None:
    edit_tensors(model_dir, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(13, 10).to(dtype)}))
    sentence = refusal(model_dir)
    assert f"lm_head.weight is stored as {name}" in sentence
    assert "model.safetensors" in sentence


@pytest.mark.parametrize("num_bytes", [0, 5, 8, 200, -1])
def test_a_truncated_file_is_refused(model_dir: Path, num_bytes: int) -> None:
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])
    assert refusal(model_dir).startswith(f"{path} is not a safetensors file, or is damaged: ")


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"a": 1}',
        b'{"a": {}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}',
        b'{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}',
    ],
)
def test_a_damaged_header_is_refused(model_dir: Path, header: bytes) -> None:
    path = model_dir / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    assert str(path) in refusal(model_dir)


@pytest.mark.parametrize("offsets", [[0, 0], [40, 0], [-8, 520], [0, 516]])
def test_a_tensor_whose_bytes_do_not_fit_its_shape_is_refused(model_dir: Path, offsets: list[int]) -> None:
    path = model_dir / "model.safetensors"
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header["lm_head.weight"]["data_offsets"] = offsets
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + int.from_bytes(data[:8], "little") :])
    with pytest.raises(CheckpointError, match=path.name):
        load_all(Checkpoint(model_dir))


def split_checkpoint(model_dir: Path) -> Path:
    (model_dir / "model.safetensors").unlink()
    make_checkpoint(model_dir, SIZES, max_file_bytes=700)
    return model_dir / INDEX_NAME


def test_an_index_that_names_a_missing_file_is_refused(model_dir: Path) -> None:
    split_checkpoint(model_dir)
    gone = sorted(model_dir.glob("*.safetensors"))[1]
    gone.unlink()
    assert refusal(model_dir) == f"{model_dir} lacks the file {gone.name} that its index names"


@pytest.mark.parametrize("weight_map", [MISSING, {}, [], {"lm_head.weight": 7}, {"lm_head.weight": []}])
def test_an_index_that_is_none_is_refused(model_dir: Path, weight_map: object) -> None:
    index = split_checkpoint(model_dir)
    index.write_text("{}" if weight_map is MISSING else json.dumps({"weight_map": weight_map}))
    assert str(index) in refusal(model_dir)


def test_sizes_that_make_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="head_dim: 7 is odd"):
        make_checkpoint(tmp_path, ModelSizes(head_dim=7))


def test_a_checkpoint_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match="cannot be written") as caught:
        make_checkpoint(tmp_path / "file" / "model", SIZES)
    assert "\n" not in str(caught.value)
