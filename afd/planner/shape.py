"""A model as the planner sees it: the layers that its Hugging Face `config.json` describes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from afd.errors import ConfigError
from afd.model.config import Step3Fields
from afd.model.fields import Fields, read_json
from afd.planner.layers import Attention, Ffn, GroupedQuery, Lightning, MultiLatent, MultiMatrix

_SHIPPED = Path(__file__).with_name("models")


@dataclass(frozen=True)
class ModelShape:
    """Layers, and what is around them."""

    name: str
    hidden_size: int
    vocab_size: int
    max_context_tokens: int
    layers: tuple[tuple[Attention, Ffn], ...]

    @cached_property
    def attentions(self) -> Counter[Attention]:
        """How many layers have which attention."""
        return Counter(attention for attention, _ in self.layers)

    @cached_property
    def ffns(self) -> Counter[Ffn]:
        return Counter(ffn for _, ffn in self.layers)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def attention_parameters(self) -> int:
        return sum(count * attention.parameters for attention, count in self.attentions.items())

    @property
    def ffn_parameters(self) -> float:
        return sum(count * ffn.parameters for ffn, count in self.ffns.items())

    @property
    def vocabulary_parameters(self) -> int:
        """Of embedding and head."""
        return 2 * self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> float:
        """All but routers and norms; a head that shares the embedding's counts too."""
        return self.attention_parameters + self.ffn_parameters + self.vocabulary_parameters

    @property
    def active_parameters(self) -> float:
        """Those that a token is multiplied with: no embedding, and of a MoE its experts."""
        ffn = sum(count * ffn.flops / 2 for ffn, count in self.ffns.items())
        return self.attention_parameters + ffn + self.vocabulary_parameters / 2

    def kv_growth(self, element_bytes: float = 1) -> float:
        """Bytes that a token of context adds to the KV cache, as long as no window is full."""
        return sum(
            count * float(attention.kv_bytes(2, element_bytes) - attention.kv_bytes(1, element_bytes))
            for attention, count in self.attentions.items()
        )

    @property
    def moe(self) -> Ffn | None:
        """The MoE layer that there are most of."""
        return next((ffn for ffn, _ in self.ffns.most_common() if ffn.is_moe), None)

    def check_context(self, context: float) -> None:
        if not 0 < context <= self.max_context_tokens:
            raise ConfigError(
                f"a context of {context:g} tokens is not within 1..{self.max_context_tokens}, the limit of {self.name}"
            )


def shipped() -> dict[str, Path]:
    """The descriptions that come with the planner, by name."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.json"))}


def load_shape(name: str) -> ModelShape:
    """A shipped description by its name, or a `config.json`, or the folder with it. Raises ConfigError."""
    if name in shipped():
        return read_shape(shipped()[name], name)
    if not os.path.exists(name):  # where Path.exists would raise, if the name is too long
        raise ConfigError(f"there is no model {name}: it is neither a file nor one of {', '.join(shipped())}")
    path = Path(name, "config.json") if os.path.isdir(name) else Path(name)
    return read_shape(path, path.parent.resolve().name if path.name == "config.json" else path.stem)


def read_shape(path: Path, name: str) -> ModelShape:
    raw = read_json(path)
    fields = Fields(path, raw | Fields(path, raw).table("text_config"))
    model_type = fields.raw("model_type")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        fields.refuse("model_type", f"{model_type!r} is none that is known: {', '.join(sorted(_FAMILIES))}")
    layers = _FAMILIES[model_type](fields)
    return ModelShape(
        name=name,
        hidden_size=fields.count("hidden_size"),
        vocab_size=fields.count("vocab_size"),
        max_context_tokens=fields.least("max_position_embeddings", "max_position_embedding", "max_seq_len"),
        layers=tuple(layers),
    )


Layers = list[tuple[Attention, Ffn]]


def _step3(fields: Fields) -> Layers:
    attention = MultiMatrix(
        fields.count("hidden_size"),
        fields.count("num_attention_heads"),
        fields.count("head_dim"),
        fields.count("share_q_dim"),
    )
    moe = _experts(fields, "moe_num_experts", "moe_top_k", shared_size=fields.count("share_expert_dim"))
    moe_layers = Step3Fields(fields.path, fields.values).moe_layers()
    return _layers(fields, [attention] * fields.num_layers(), lambda layer: moe if layer in moe_layers else None)


def _deepseek(fields: Fields) -> Layers:
    """DeepSeek-V2 and V3, and what is built like them."""
    attention = MultiLatent(
        fields.count("hidden_size"),
        fields.count("num_attention_heads"),
        fields.whole("q_lora_rank", 0),
        fields.count("kv_lora_rank"),
        fields.count("qk_nope_head_dim"),
        fields.count("qk_rope_head_dim"),
        fields.count("v_head_dim"),
    )
    shared_size = fields.whole("n_shared_experts", 0) * fields.count("moe_intermediate_size")
    moe = _experts(fields, "n_routed_experts", "num_experts_per_tok", shared_size=shared_size)
    first, every = fields.whole("first_k_dense_replace", 0), fields.count("moe_layer_freq", 1)
    attentions = [attention] * fields.num_layers()
    return _layers(fields, attentions, lambda layer: moe if layer >= first and layer % every == 0 else None)


def _dense(fields: Fields) -> Layers:
    return _layers(fields, _grouped_layers(fields))


def _mixtral(fields: Fields) -> Layers:
    moe = _experts(fields, "num_local_experts", "num_experts_per_tok", width="intermediate_size")
    return _layers(fields, _grouped_layers(fields), lambda layer: moe)


def _qwen_moe(fields: Fields) -> Layers:
    shared_size = fields.whole("shared_expert_intermediate_size", 0)
    moe = _experts(fields, "num_experts", "num_experts_per_tok", shared_size=shared_size)
    every, dense = fields.count("decoder_sparse_step", 1), fields.whole_numbers("mlp_only_layers")
    attentions = _grouped_layers(fields)
    return _layers(fields, attentions, lambda layer: None if layer in dense or (layer + 1) % every else moe)


def _ernie(fields: Fields) -> Layers:
    shared_size = fields.whole("moe_num_shared_experts", 0) * fields.count("moe_intermediate_size")
    moe = _experts(fields, "moe_num_experts", "moe_k", shared_size=shared_size)
    first, every = fields.whole("moe_layer_start_index", 0), fields.count("moe_layer_interval", 1)
    last = fields.num_layers() - 1
    if fields.values.get("moe_layer_end_index") != -1:  # which is the last one, too
        last = fields.whole("moe_layer_end_index", last)
    attentions = _grouped_layers(fields)
    return _layers(
        fields, attentions, lambda layer: moe if first <= layer <= last and not (layer + 1) % every else None
    )


def _llama4(fields: Fields) -> Layers:
    """Attention in chunks, but for layers without rotary embedding, every fourth by default, which see all."""
    num_layers, chunk = fields.num_layers(), fields.count("attention_chunk_size")
    has_rope = fields.whole_numbers("no_rope_layers") or [int((layer + 1) % 4 != 0) for layer in range(num_layers)]
    shared_size = fields.count("intermediate_size")
    moe = _experts(fields, "num_local_experts", "num_experts_per_tok", "intermediate_size", shared_size)
    every = fields.count("interleave_moe_layer_step", 1)
    attentions = [_grouped(fields, chunk if rope else None) for rope in has_rope]
    return _layers(fields, attentions, lambda layer: None if (layer + 1) % every else moe, "intermediate_size_mlp")


def _minimax(fields: Fields) -> Layers:
    """Lightning attention, and every now and then a full one."""
    full = _grouped(fields)
    lightning = Lightning(full.hidden_size, full.num_heads, full.head_dim)
    shared_size = fields.whole("shared_intermediate_size", 0)
    moe = _experts(fields, "num_local_experts", "num_experts_per_tok", "intermediate_size", shared_size)
    attentions = [full if kind else lightning for kind in fields.whole_numbers("attn_type_list")]
    return _layers(fields, attentions, lambda layer: moe)


def _grouped(fields: Fields, window: int | None = None) -> GroupedQuery:
    hidden_size, num_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    num_kv_heads = fields.count("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        fields.refuse("num_attention_heads", f"{num_heads} is not a multiple of num_key_value_heads, {num_kv_heads}")
    if fields.values.get("head_dim") is None and hidden_size % num_heads:
        fields.refuse(
            "head_dim", f"it is missing, and hidden_size, {hidden_size}, is not a multiple of {num_heads} heads"
        )
    head_dim = fields.count("head_dim", hidden_size // num_heads)
    return GroupedQuery(hidden_size, num_heads, num_kv_heads, head_dim, window)


def _grouped_layers(fields: Fields) -> list[GroupedQuery]:
    """One for each layer; `layer_types` can say which of them slide."""
    slides = fields.values.get("use_sliding_window") is not False
    window = fields.whole("sliding_window", 0) or None if slides else None
    whole, sliding = _grouped(fields), _grouped(fields, window)
    kinds = fields.values.get("layer_types")
    if kinds is None:
        return [sliding] * fields.num_layers()
    if not isinstance(kinds, list):
        fields.refuse("layer_types", f"{kinds!r} is not a list with a kind of attention for each layer")
    return [sliding if kind == "sliding_attention" else whole for kind in kinds]


def _experts(
    fields: Fields, num_experts: str, top_k: str, width: str = "moe_intermediate_size", shared_size: int = 0
) -> Ffn:
    hidden_size = fields.count("hidden_size")
    moe = Ffn(hidden_size, fields.count(width), fields.count(num_experts), fields.count(top_k), shared_size)
    if moe.top_k > moe.num_experts:
        fields.refuse(top_k, f"{moe.top_k} is more than {num_experts}, {moe.num_experts}")
    return moe


def _layers(
    fields: Fields,
    attentions: Sequence[Attention],
    moe_of: Callable[[int], Ffn | None] = lambda layer: None,
    dense_width: str = "intermediate_size",
) -> Layers:
    """All layers: an attention for each; a MoE of the layer's index, or else a dense FFN."""
    num_layers = fields.num_layers()
    if len(attentions) != num_layers:
        fields.refuse("num_hidden_layers", f"{num_layers}, but {len(attentions)} layers have a kind of attention")

    def dense() -> Ffn:
        return Ffn(fields.count("hidden_size"), fields.count(dense_width))

    return [(attention, moe_of(layer) or dense()) for layer, attention in enumerate(attentions)]


_FAMILIES: dict[Any, Callable[[Fields], Layers]] = {
    "step3_text": _step3,
    "step3": _step3,
    "step3_vl": _step3,
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k2"), _deepseek),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _dense),
    **dict.fromkeys(("mixtral", "gpt_oss"), _mixtral),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe"), _qwen_moe),
    **dict.fromkeys(("llama4", "llama4_text"), _llama4),
    **dict.fromkeys(("minimax_m1", "minimax_text_01", "MiniMaxM1"), _minimax),
    "ernie4_5_moe": _ernie,
    **dict.fromkeys(("PanguProMoE", "pangu_pro_moe"), _qwen_moe),
}
