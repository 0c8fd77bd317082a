"""What a model is: the numbers of a Hugging Face `config.json`, checked. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from afd.model.fields import Fields, read_json

MODEL_TYPE = "step3_text"
VLM_TYPES = ("step3_vl", "step3")  # with the text part inside


@dataclass(frozen=True)
class ModelConfig:
    """Step-3's text decoder (arXiv 2507.19427; field names as in its `config.json` where they exist)."""

    num_layers: int
    hidden_size: int
    vocab_size: int
    max_context_tokens: int
    num_heads: int
    head_dim: int
    share_q_dim: int
    intermediate_size: int
    num_experts: int
    top_k: int
    moe_intermediate_size: int
    share_expert_dim: int
    moe_layers: frozenset[int]
    norm_expert_weight: bool
    rope_theta: float
    rms_norm_eps: float
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def is_moe(self, layer_idx: int) -> bool:
        return layer_idx in self.moe_layers

    @property
    def digest(self) -> str:
        """Equal for equal configurations; the first part of a checkpoint's fingerprint."""
        values = {**asdict(self), "moe_layers": sorted(self.moe_layers)}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]

    @classmethod
    def load(cls, model_dir: str | Path) -> ModelConfig:
        """Reads `config.json` (and the end tokens of `generation_config.json`).

        Raises CheckpointError, naming the file and the field, for anything this project cannot serve.
        """
        path = Path(model_dir) / "config.json"
        raw = read_json(path)
        fields = Step3Fields(path, _text_part(raw))
        model_type = fields.raw("model_type")
        if model_type != MODEL_TYPE:
            fields.refuse("model_type", f"{model_type!r} cannot be served; the supported one is {MODEL_TYPE!r}")
        fields.refuse_unsupported()
        generation_path = path.with_name("generation_config.json")
        generation = read_json(generation_path) if generation_path.exists() else {}
        config = cls(
            num_layers=fields.num_layers(),
            hidden_size=fields.count("hidden_size"),
            vocab_size=fields.count("vocab_size"),
            max_context_tokens=fields.least("max_seq_len", "max_position_embedding", "max_position_embeddings"),
            num_heads=fields.count("num_attention_heads"),
            head_dim=fields.count("head_dim"),
            share_q_dim=fields.count("share_q_dim"),
            intermediate_size=fields.count("intermediate_size"),
            num_experts=fields.count("moe_num_experts"),
            top_k=fields.count("moe_top_k"),
            moe_intermediate_size=fields.count("moe_intermediate_size"),
            share_expert_dim=fields.count("share_expert_dim"),
            moe_layers=fields.moe_layers(),
            norm_expert_weight=fields.flag("norm_expert_weight"),
            rope_theta=fields.rope_theta(),
            rms_norm_eps=fields.positive("rms_norm_eps"),
            bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
            eos_token_ids=Fields(generation_path, generation).token_ids("eos_token_id")
            or fields.token_ids("eos_token_id"),
        )
        fields.check(config)
        return config


class Step3Fields(Fields):
    """Those of Step-3's file."""

    def moe_layers(self) -> frozenset[int]:
        """`moe_layers_enum` is a string "4,5,6" (or a list); without it every layer but the first has experts."""
        num_layers = self.num_layers()
        value = self.values.get("moe_layers_enum")
        if value is None:
            return frozenset(range(1, num_layers))
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list) or not all(str(part).strip().isdecimal() for part in parts if part != ""):
            self.refuse("moe_layers_enum", f"{value!r} is not a list of layers like '1,2,3'")
        layers = frozenset(int(part) for part in parts if part != "")
        if any(not 0 <= layer < num_layers for layer in layers):
            self.refuse("moe_layers_enum", f"{value!r} names a layer outside 0..{num_layers - 1}")
        return layers

    def rope_theta(self) -> float:
        """`rope_parameters`, as transformers 5 writes it, goes before the plain field."""
        rope = self.table("rope_parameters")
        if "rope_theta" in rope:
            return Fields(self.path, rope).positive("rope_theta")
        return self.positive("rope_theta")

    def refuse_unsupported(self) -> None:
        """Refuses what would change the arithmetic, and is not implemented."""
        if self.values.get("quantization_config"):
            self.refuse("quantization_config", "quantised checkpoints cannot be served yet; use one in bfloat16")
        if self.values.get("num_attention_groups") not in (None, 1):
            self.refuse("num_attention_groups", "MFA has one key and one value head, so this must be 1")
        if self.values.get("hidden_act") not in (None, "silu"):
            self.refuse("hidden_act", f"{self.values['hidden_act']!r} is not supported; it must be 'silu'")
        for name in ("rope_scaling", "rope_parameters"):
            rope = self.table(name)
            kind = rope.get("rope_type", rope.get("type", "default"))
            if kind != "default" or rope.get("partial_rotary_factor", 1) != 1:
                self.refuse(name, "scaled or partial rotary embeddings are not supported, only 'default' ones")

    def check(self, config: ModelConfig) -> None:
        if config.head_dim % 2:
            self.refuse("head_dim", f"{config.head_dim} is odd, but rotary embeddings need pairs")
        if config.top_k > config.num_experts:
            self.refuse("moe_top_k", f"{config.top_k} is more than moe_num_experts, {config.num_experts}")
        for token_id in (*config.eos_token_ids, config.bos_token_id or 0):
            if not 0 <= token_id < config.vocab_size:
                self.refuse(
                    "eos_token_id / bos_token_id", f"{token_id} is outside the vocabulary of {config.vocab_size}"
                )


def _text_part(raw: dict[str, Any]) -> dict[str, Any]:
    """The language model's fields: of a vision-language model they sit under `text_config`."""
    if not isinstance(raw.get("text_config"), dict):
        return raw
    return {**raw, "model_type": MODEL_TYPE, **raw["text_config"]} if raw.get("model_type") in VLM_TYPES else raw
