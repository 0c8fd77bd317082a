"""The serving path's arithmetic against the oracle's, for random odd sizes, and the oracle's against formulas."""

from __future__ import annotations

import math
import random
import tempfile
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from afd.model.checkpoint import Checkpoint
from afd.model.config import ModelConfig
from afd.model.ffn import FFNShard
from afd.model.kv_cache import KVCache
from afd.model.layers import Rotation, SwiGLU, rms_norm
from afd.model.linear import PlainLinear
from afd.model.moe import Experts, GroupedExperts, Router, Routing
from afd.model.native import KernelsName
from afd.model.random_checkpoint import ModelSizes, make_checkpoint
from afd.model.sampling_params import SamplingParams
from afd.model.stack import AttentionStack
from afd.model.transformer import Transformer
from afd.model.weights import load_all, load_attention, load_ffn_shard
from afd.state.requests import SequenceKey
from services.attention.chunk import Chunk
from services.attention.microbatch import MicrobatchBuilder
from services.attention.sequence import Sequence
from tests.conftest import DEVICES

CPU = torch.device("cpu")
CONTEXT = 64
FLOAT32_BOUND = 2e-4
BFLOAT16_MEAN_BOUND = 0.04  # of log-probabilities, over all tokens and positions
BFLOAT16_BOUND = 0.15  # of each of them, where no rounding can change which experts are chosen

odd_examples = settings(max_examples=30, deadline=None, derandomize=True)


@st.composite
def odd_sizes(draw: st.DrawFn) -> ModelSizes:
    num_layers = draw(st.integers(1, 4))
    moe_layers = draw(st.sets(st.integers(0, num_layers - 1)))
    num_experts = draw(st.integers(1, 7))
    return ModelSizes(
        num_hidden_layers=num_layers,
        hidden_size=draw(st.integers(4, 40)),
        num_attention_heads=draw(st.integers(1, 7)),
        head_dim=2 * draw(st.integers(1, 9)),
        share_q_dim=draw(st.integers(1, 33)),
        intermediate_size=draw(st.integers(1, 50)),
        moe_num_experts=num_experts,
        moe_top_k=draw(st.integers(1, num_experts)),
        moe_intermediate_size=draw(st.integers(1, 23)),
        share_expert_dim=draw(st.integers(1, 23)),
        moe_layers_enum=",".join(map(str, sorted(moe_layers))),
        vocab_size=draw(st.integers(5, 60)),
        max_seq_len=CONTEXT,
        norm_expert_weight=draw(st.booleans()),
    )


@dataclass(frozen=True)
class Served:
    """A model as the services hold it, and the oracle of the same weights in float32."""

    config: ModelConfig
    oracle: Transformer
    stack: AttentionStack
    shards: list[FFNShard]

    @torch.inference_mode()
    def logits_of_all_rows(self, microbatch, cache: KVCache) -> Tensor:  # type: ignore[no-untyped-def]
        hidden_states = self.stack.embed(microbatch.token_ids)
        for layer_idx, layer in enumerate(self.stack.layers):
            hidden_states, ffn_input, routing = layer.attend(
                hidden_states, cache.keys[layer_idx], cache.values[layer_idx], microbatch.attention
            )
            partials = [shard(layer_idx, ffn_input, routing) for shard in self.shards]
            hidden_states = hidden_states + torch.stack(partials).sum(dim=0)
        return self.stack.logits(hidden_states)


def serve(
    sizes: ModelSizes,
    num_shards: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    kernels: KernelsName = "auto",
    device: torch.device = CPU,
) -> Served:
    with tempfile.TemporaryDirectory() as path:
        make_checkpoint(path, sizes, seed=seed, dtype=dtype)
        checkpoint = Checkpoint(path)

        def ignore(done: int, total: int) -> None:
            pass

        return Served(
            checkpoint.config,
            Transformer(checkpoint.config, load_all(checkpoint)),
            load_attention(checkpoint, dtype, device, ignore, kernels),
            [
                load_ffn_shard(checkpoint, shard, num_shards, dtype, device, ignore, kernels)
                for shard in range(num_shards)
            ],
        )


def scrambled_sequences(
    model: Served, lengths: list[int], block_size: int, chooser: random.Random
) -> tuple[list[Sequence], KVCache]:
    """Sequences of random tokens whose blocks lie anywhere in a cache that is full of what others left behind."""
    num_needed = [-(-length // block_size) for length in lengths]
    blocks = list(range(sum(num_needed) + 3))
    chooser.shuffle(blocks)
    sequences = []
    for number, length in enumerate(lengths):
        tokens = [chooser.randrange(model.config.vocab_size) for _ in range(length)]
        num_prompt = chooser.randint(1, length)
        sequence = Sequence(
            SequenceKey(str(number)), 1, tokens[:num_prompt], tokens[num_prompt:], SamplingParams(), (), CONTEXT
        )
        sequence.block_table = [blocks.pop() for _ in range(num_needed[number])]
        sequences.append(sequence)
    config, embedding, num_slots = model.config, model.stack.embedding, (sum(num_needed) + 3) * block_size
    cache = KVCache.allocate(config.num_layers, num_slots, config.head_dim, embedding.dtype, embedding.device)
    for layer in (*cache.keys, *cache.values):
        layer.fill_(math.nan)
    return sequences, cache


def served_logits(model: Served, lengths: list[int], block_size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """(the services' logits, the oracle's) [tokens, V] of each sequence, computed in random chunks side by side."""
    chooser = random.Random(seed)
    sequences, cache = scrambled_sequences(model, lengths, block_size, chooser)
    builder = MicrobatchBuilder(
        block_size,
        model.config.head_dim,
        model.config.rope_theta,
        model.stack.embedding.dtype,
        model.stack.embedding.device,
    )
    rows: dict[Sequence, list[Tensor]] = {sequence: [] for sequence in sequences}
    while unfinished := [sequence for sequence in sequences if sequence.num_uncomputed]:
        chosen = [sequence for sequence in unfinished if chooser.random() < 0.8] or unfinished[:1]
        chunks = [Chunk(s, chooser.choice([1, chooser.randint(1, s.num_uncomputed)])) for s in chosen]
        microbatches = chooser.randint(1, 3)
        for own in filter(None, (chunks[slot::microbatches] for slot in range(microbatches))):
            microbatch = builder.build(0, own)
            logits = model.logits_of_all_rows(microbatch, cache)
            for chunk, part in zip(
                microbatch.chunks, logits.split([chunk.num_tokens for chunk in microbatch.chunks]), strict=True
            ):
                rows[chunk.sequence].append(part.cpu())
                chunk.sequence.num_computed += chunk.num_tokens
    with torch.inference_mode():
        return [(torch.cat(rows[s]), model.oracle(torch.tensor([s.token_ids(0, s.num_tokens)]))[0]) for s in sequences]


@odd_examples
@given(odd_sizes(), st.integers(1, 60), st.integers(1, 9), st.integers(0, 99))
def test_partial_sums_of_any_number_of_shards_add_up_to_the_oracles_ffn(
    sizes: ModelSizes, num_shards: int, num_tokens: int, seed: int
) -> None:
    model = serve(sizes, num_shards, seed)
    x = torch.randn(num_tokens, sizes.hidden_size, generator=torch.Generator().manual_seed(seed))
    for layer_idx, layer in enumerate(model.stack.layers):
        prefix = f"model.layers.{layer_idx}."
        is_moe = model.config.is_moe(layer_idx)
        expected = model.oracle.moe(x, prefix) if is_moe else model.oracle.swiglu(x, prefix + "mlp.")
        routing = layer.router(x) if layer.router else None
        total = sum(shard(layer_idx, x, routing) for shard in model.shards)
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)


@odd_examples
@given(
    odd_sizes(),
    st.lists(st.integers(1, CONTEXT), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_chunked_prefill_and_decode_over_scrambled_blocks_equal_the_oracle(
    sizes: ModelSizes, lengths: list[int], block_size: int, num_shards: int, seed: int
) -> None:
    model = serve(sizes, num_shards, seed)
    for actual, expected in served_logits(model, lengths, block_size, seed):
        torch.testing.assert_close(actual, expected, rtol=0, atol=FLOAT32_BOUND)


@odd_examples
@given(odd_sizes(), st.integers(0, 99))
def test_oracle_in_float32_agrees_with_itself_in_float64(sizes: ModelSizes, seed: int) -> None:
    oracle = serve(sizes, 1, seed).oracle
    wide = Transformer(oracle.config, {name: weight.double() for name, weight in oracle.weights.items()})
    tokens = torch.randint(sizes.vocab_size, (2, 20), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(oracle(tokens), wide(tokens), rtol=0, atol=FLOAT32_BOUND)


def bfloat16_errors(sizes: ModelSizes, seed: int, device: str) -> Tensor:
    """Of every log-probability that the services give in bfloat16, against the oracle in float32."""
    model = serve(sizes, 3, seed, torch.bfloat16, device=torch.device(device))
    pairs = served_logits(model, [CONTEXT, 17], 8, seed)
    return torch.cat([(actual.log_softmax(dim=-1) - expected.log_softmax(dim=-1)).abs() for actual, expected in pairs])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(4))
def test_bfloat16_stays_near_float32(seed: int, device: str) -> None:
    assert float(bfloat16_errors(ModelSizes(), seed, device).mean()) < BFLOAT16_MEAN_BOUND


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(4))
def test_bfloat16_stays_near_float32_at_every_token_where_all_experts_are_chosen(seed: int, device: str) -> None:
    assert float(bfloat16_errors(ModelSizes(moe_top_k=6), seed, device).max()) < BFLOAT16_BOUND


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(20))
def test_grouped_experts_are_the_experts_one_by_one(seed: int, device: str) -> None:
    chooser, random_numbers = random.Random(seed), torch.Generator().manual_seed(seed)
    num_tokens, num_here, elsewhere = chooser.randint(1, 70), chooser.randint(1, 9), chooser.randint(0, 9)
    hidden_size, width, first = 8 * chooser.randint(1, 12), 8 * chooser.randint(1, 12), chooser.randint(0, elsewhere)
    top_k = chooser.randint(1, num_here + elsewhere)
    x, gate_up, down = (
        torch.randn(shape, generator=random_numbers).bfloat16().to(device)
        for shape in ((num_tokens, hidden_size), (num_here, 2 * width, hidden_size), (num_here, hidden_size, width))
    )
    chosen = torch.rand(num_tokens, num_here + elsewhere, generator=random_numbers).topk(top_k)
    routing = Routing(chosen.indices.int().to(device), chosen.values.to(device))
    one_by_one = [SwiGLU(PlainLinear(a), PlainLinear(b)) for a, b in zip(gate_up, down, strict=True)]
    expected = Experts(first, one_by_one)(x, routing)
    grouped = GroupedExperts(first, gate_up, down)(x, routing)
    scale = float(expected.abs().max()) or 1.0
    torch.testing.assert_close(grouped / scale, expected / scale, rtol=0, atol=2**-7)
    if device == "cuda":
        assert GroupedExperts.can_hold(gate_up, down)


def test_a_later_token_changes_nothing_before_it() -> None:
    oracle = serve(ModelSizes(), 1).oracle
    tokens = torch.randint(512, (1, 20), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[0, 12] += 1
    before, after = oracle(tokens)[0], oracle(changed % 512)[0]
    torch.testing.assert_close(before[:12], after[:12], rtol=0, atol=1e-5)
    assert not torch.allclose(before[12], after[12], atol=1e-2)


def test_oracle_continues_greedily_up_to_the_stop_token() -> None:
    oracle = serve(ModelSizes(), 1).oracle
    tokens, logprobs = oracle.generate([5, 6, 7], 8)
    logits = oracle(torch.tensor([[5, 6, 7, *tokens]]))[0, 2:-1]
    assert tokens == logits.argmax(dim=-1).tolist()
    assert logprobs == pytest.approx(logits.log_softmax(dim=-1).amax(dim=-1).tolist(), abs=1e-4)
    stopped, _ = oracle.generate([5, 6, 7], 8, stop_ids=(tokens[3],))
    assert stopped == tokens[: tokens.index(tokens[3]) + 1]


@odd_examples
@given(st.integers(0, 65535), st.integers(1, 8), st.sampled_from([1e4, 5e5]), st.integers(0, 99))
def test_rotary_embedding_turns_the_pairs_i_and_i_plus_half(position: int, half: int, theta: float, seed: int) -> None:
    x = torch.randn(1, 3, 2 * half, generator=torch.Generator().manual_seed(seed))
    turned = Rotation.at(torch.tensor([position]), 2 * half, theta).rotate(x)
    for pair in range(half):
        angle = position * theta ** (-pair / half)
        turn = complex(math.cos(angle), math.sin(angle))
        for head in range(3):
            expected = complex(x[0, head, pair], x[0, head, pair + half]) * turn
            actual = complex(turned[0, head, pair], turned[0, head, pair + half])
            assert abs(actual - expected) < 1e-6 * position + 1e-5  # float32 angles


def test_rotated_products_depend_on_the_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(0)).unbind()

    def product(q_position: int, k_position: int) -> float:
        rotate_q, rotate_k = (Rotation.at(torch.tensor([p]), 16, 1e4) for p in (q_position, k_position))
        return float((rotate_q.rotate(q) * rotate_k.rotate(k)).sum())

    assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-4)
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-2)


@odd_examples
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=9), st.floats(1e-6, 1e-2))
def test_rms_norm_divides_by_the_root_mean_square(values: list[float], eps: float) -> None:
    weight = [0.5 + index for index in range(len(values))]
    root = math.sqrt(sum(value * value for value in values) / len(values) + eps)
    actual = rms_norm(torch.tensor(values), torch.tensor(weight), eps).tolist()
    assert actual == pytest.approx([v / root * w for v, w in zip(values, weight, strict=True)], rel=1e-5, abs=1e-6)


def test_rms_norm_of_bfloat16_is_computed_in_float32() -> None:
    x = (3000 * torch.randn(64, generator=torch.Generator().manual_seed(0))).bfloat16()
    expected = rms_norm(x.float(), torch.ones(64), 1e-5).bfloat16()
    assert torch.equal(rms_norm(x, torch.ones(64, dtype=torch.bfloat16), 1e-5), expected)


@pytest.mark.parametrize("renormalise", [False, True])
def test_router_weighs_by_softmax_over_all_experts(renormalise: bool) -> None:
    weight = torch.tensor([[math.log(1)], [math.log(5)], [math.log(2)], [math.log(2.5)]])
    routing = Router(PlainLinear(weight), 2, renormalise)(torch.ones(1, 1))
    total = 7.5 if renormalise else 10.5
    assert routing.topk_ids.tolist() == [[1, 3]]
    assert routing.topk_weights.tolist()[0] == pytest.approx([5 / total, 2.5 / total])
