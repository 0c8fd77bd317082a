"""The compiled kernels against torch in float64, for any sizes, and where they cannot be had."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from afd.errors import ConfigError, InvalidRequest
from afd.model import native
from afd.model.kv_cache import DecodeContext, PrefillChunk
from afd.model.layers import Rotation, rms_norm
from afd.model.mfa import AttentionBatch
from afd.model.moe import Routing
from afd.model.native import NativeOps, choose_ops
from afd.model.ops import AttentionWeights, FFNWeights, TorchOps
from afd.model.random_checkpoint import ModelSizes
from tests.test_model import CONTEXT, serve, served_logits

CPU = torch.device("cpu")
ROUNDING = 2.0**-8  # of one bfloat16, relative

any_sizes = settings(max_examples=40, deadline=None, derandomize=True)
multiples = st.integers(1, 6).map(lambda number: 32 * number)


def _unavailable() -> str:
    try:
        native._library()
    except native.Unavailable as reason:
        return str(reason)
    return ""


needs_kernels = pytest.mark.skipif(bool(_unavailable()), reason=f"no compiled kernels here: {_unavailable()}")


@pytest.fixture(scope="module")
def ops() -> NativeOps:
    return NativeOps(native._library())


class Random:
    """Tensors of a seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def bfloat16(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).bfloat16()

    def integers(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=self.generator)


def assert_near(actual: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    """Within roundings of bfloat16 of the largest value."""
    bound = 2 * ROUNDING * scale * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound)


@needs_kernels
@any_sizes
@given(st.integers(1, 40), multiples, st.integers(1, 70), st.integers(0, 99))
def test_linear_is_the_product(ops: NativeOps, num_rows: int, num_in: int, num_out: int, seed: int) -> None:
    random = Random(seed)
    x, weight = random.bfloat16(num_rows, num_in), random.bfloat16(num_out, num_in)
    assert_near(ops.linear(weight)(x), x.double() @ weight.double().T)


@needs_kernels
def test_linear_takes_rows_that_lie_apart(ops: NativeOps) -> None:
    random = Random(0)
    wide, weight = random.bfloat16(5, 96), random.bfloat16(16, 32)
    x = wide[:, 32:64]
    assert_near(ops.linear(weight)(x), x.double() @ weight.double().T)


@needs_kernels
@any_sizes
@given(st.integers(1, 9), multiples, st.integers(0, 99))
def test_rms_norm_is_that_of_torch(ops: NativeOps, num_rows: int, size: int, seed: int) -> None:
    random = Random(seed)
    x, weight = 30 * random.bfloat16(num_rows, 2 * size)[:, :size], random.bfloat16(size)
    assert_near(ops.rms_norm(x, weight, 1e-5), rms_norm(x.double(), weight.double(), 1e-5))


NUM_SLOTS = 400


def attention_weights(random: Random, size: int, q_dim: int, heads: int, head_dim: int) -> AttentionWeights:
    def weight(num_out: int, num_in: int) -> Tensor:
        return random.bfloat16(num_out, num_in) / math.sqrt(num_in)

    return AttentionWeights(
        input_norm=random.bfloat16(size),
        qkv_proj=weight(q_dim + 2 * head_dim, size),
        inter_norm=random.bfloat16(q_dim),
        wq=weight(heads * head_dim, q_dim),
        o_proj=weight(size, heads * head_dim),
        post_attention_norm=random.bfloat16(size),
        gate=weight(19, size),
        head_dim=head_dim,
        eps=1e-5,
        top_k=4,
        renormalise=False,
    )


def attention_batch(
    random: Random, decoding: list[int], prefilling: list[tuple[int, int]], head_dim: int
) -> AttentionBatch:
    """Sequences of so many tokens that get one more, and chunks of so many new tokens after so many; no slot is in use
    twice."""
    free = iter(torch.randperm(NUM_SLOTS, generator=random.generator).split(1))

    def take(number: int) -> Tensor:
        return torch.cat([next(free) for _ in range(number)])

    contexts = [take(length + 1) for length in decoding]
    longest = max(map(len, contexts), default=0)
    padded = [torch.cat((context, context[-1:].expand(longest - len(context)))) for context in contexts]
    new_slots, positions, chunks, row = [context[-1:] for context in contexts], list(decoding), [], len(decoding)
    for num_before, num_new in prefilling:
        slots = take(num_before + num_new)
        chunks.append(PrefillChunk(row, row + num_new, slots, torch.arange(num_before, num_before + num_new) + 1))
        new_slots.append(slots[num_before:])
        positions += range(num_before, num_before + num_new)
        row += num_new
    return AttentionBatch(
        Rotation.at(torch.tensor(positions), head_dim, 1e4),
        torch.cat(new_slots),
        DecodeContext(torch.stack(padded) if padded else torch.zeros(0, 0).long(), torch.tensor(decoding).long() + 1),
        tuple(chunks),
    )


def in_double(weights: AttentionWeights) -> AttentionWeights:
    fields = {name: getattr(weights, name) for name in weights.__dataclass_fields__}
    return AttentionWeights(**{name: x.double() if isinstance(x, Tensor) else x for name, x in fields.items()})


@needs_kernels
@any_sizes
@given(
    st.lists(st.integers(0, 50), max_size=3),
    st.lists(st.tuples(st.integers(0, 30), st.integers(2, 40)), max_size=2),
    st.tuples(multiples, multiples, st.integers(1, 40), multiples),
    st.integers(0, 99),
)
def test_attention_layer_is_that_of_torch(
    ops: NativeOps,
    decoding: list[int],
    prefilling: list[tuple[int, int]],
    sizes: tuple[int, int, int, int],
    seed: int,
) -> None:
    random, (size, head_dim) = Random(seed), (sizes[0], sizes[3])
    if not decoding and not prefilling:
        decoding = [3]
    weights, batch = attention_weights(random, *sizes), attention_batch(random, decoding, prefilling, head_dim)
    hidden_states = random.bfloat16(len(batch.new_slots), size)
    keys, values = random.bfloat16(2, NUM_SLOTS, head_dim).unbind()
    expected_keys, expected_values = keys.double(), values.double()
    reference = TorchOps().attention_layer(in_double(weights))
    expected, expected_input, _ = reference.attend(hidden_states.double(), expected_keys, expected_values, batch)
    after, ffn_input, routing = ops.attention_layer(weights).attend(hidden_states, keys, values, batch)
    for actual, reference_tensor in ((keys, expected_keys), (values, expected_values), (after, expected)):
        assert_near(actual, reference_tensor, 3)
    assert_near(ffn_input, rms_norm(after.double(), weights.post_attention_norm.double(), weights.eps).double())
    assert_near(ffn_input, expected_input, 6)
    assert_routed(routing, ffn_input, weights)


def assert_routed(routing: Routing | None, ffn_input: Tensor, weights: AttentionWeights) -> None:
    """The likeliest experts with their probabilities, but for the order of those that are as likely."""
    assert routing is not None
    assert weights.gate is not None
    probs = (ffn_input.double() @ weights.gate.double().T).softmax(dim=-1)
    likeliest, _ = probs.topk(weights.top_k)
    chosen = probs.gather(1, routing.topk_ids.long())
    if weights.renormalise:
        likeliest, chosen = (part / chosen.sum(dim=-1, keepdim=True) for part in (likeliest, chosen))
    for actual in (routing.topk_weights.double(), chosen):
        torch.testing.assert_close(actual, likeliest, rtol=1e-4, atol=1e-6)
    assert all(len(set(row)) == weights.top_k for row in routing.topk_ids.tolist())


@needs_kernels
@pytest.mark.parametrize("num_rows", [1, 12, 13, 40])
def test_layer_writes_where_it_is_told_to(ops: NativeOps, num_rows: int) -> None:
    random = Random(num_rows)
    weights = replace(attention_weights(random, 64, 32, 3, 32), renormalise=True)
    batch = attention_batch(random, [5] * num_rows, [], 32)
    keys, values = random.bfloat16(2, NUM_SLOTS, 32).unbind()
    out = (
        torch.empty(num_rows, 64, dtype=torch.bfloat16),
        Routing(torch.empty(num_rows, 4).int(), torch.empty(num_rows, 4)),
    )
    _, ffn_input, routing = ops.attention_layer(weights).attend(random.bfloat16(num_rows, 64), keys, values, batch, out)
    assert (ffn_input, routing) == out
    assert_routed(routing, ffn_input, weights)


@needs_kernels
def test_dense_layer_routes_nothing(ops: NativeOps) -> None:
    random = Random(0)
    weights, batch = replace(attention_weights(random, 32, 32, 1, 32), gate=None), attention_batch(random, [1], [], 32)
    keys, values = random.bfloat16(2, NUM_SLOTS, 32).unbind()
    assert ops.attention_layer(weights).attend(random.bfloat16(1, 32), keys, values, batch)[2] is None


@needs_kernels
@any_sizes
@given(st.integers(1, 40), multiples, st.integers(1, 50), st.integers(1, 40), st.integers(0, 6), st.integers(0, 99))
def test_ffn_is_the_weighted_sum_of_the_chosen_experts_here_and_the_shared_one(
    ops: NativeOps, num_rows: int, size: int, width: int, shared_width: int, num_here: int, seed: int
) -> None:
    random, num_experts, first = Random(seed), 9, 2
    x = random.bfloat16(num_rows, size)

    def ffn_weights(*shape: int) -> FFNWeights:
        experts, width = shape[:-1], shape[-1]
        gate, up = (random.bfloat16(*experts, width, size) / math.sqrt(size) for _ in range(2))
        return FFNWeights(gate, up, random.bfloat16(*experts, size, width) / math.sqrt(width))

    def expected(weights: FFNWeights, x: Tensor) -> Tensor:
        gate, up, down = (weight.double() for weight in (weights.gate, weights.up, weights.down))
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    shared, experts = ffn_weights(shared_width), ffn_weights(num_here, width)
    topk_ids = torch.stack([torch.randperm(num_experts)[:3] for _ in range(num_rows)]).int()
    routing = Routing(topk_ids, torch.rand((num_rows, 3)))
    total = expected(shared, x.double())
    for expert in range(num_here):
        weights = FFNWeights(experts.gate[expert], experts.up[expert], experts.down[expert])
        share = (routing.topk_weights * (topk_ids == first + expert)).sum(dim=-1, keepdim=True)
        total += share.double() * expected(weights, x.double())
    out = torch.empty_like(x)
    ops.moe_ffn(shared, experts, first, num_experts)(x, routing, out)
    assert_near(out, total)
    ops.dense_ffn(shared)(x, None, out)
    assert_near(out, expected(shared, x.double()))


@needs_kernels
@pytest.mark.parametrize("expert", [-1, 4, 2**31 - 1])
def test_expert_that_does_not_exist_is_refused(ops: NativeOps, expert: int) -> None:
    random = Random(0)
    shared, experts = (FFNWeights(*(random.bfloat16(*shape, 32, 32) for _ in range(3))) for shape in ((), (2,)))
    topk_ids = torch.tensor([[0, 1], [3, expert]], dtype=torch.int32)
    x, routing = random.bfloat16(2, 32), Routing(topk_ids, torch.ones(2, 2))
    for each in (ops, TorchOps()):
        with pytest.raises(InvalidRequest, match=f"expert {expert} does not exist; the model has 4"):
            each.moe_ffn(shared, experts, 1, 4)(x, routing, torch.empty_like(x))


@needs_kernels
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_whole_model_is_as_near_to_float32_as_with_torchs_own_operations(seed: int, num_threads: int) -> None:
    sizes = ModelSizes(
        hidden_size=96, head_dim=32, num_attention_heads=3, share_q_dim=64, intermediate_size=101,
        moe_num_experts=7, moe_top_k=7, moe_intermediate_size=37, share_expert_dim=19,
    )  # fmt: skip
    errors = {}
    native._library().afd_start_threads(num_threads, None)
    for kernels in ("torch", "compiled"):
        model = serve(sizes, 3, seed, torch.bfloat16, kernels)
        pairs = served_logits(model, [CONTEXT, 17, 1], 8, seed)
        errors[kernels] = torch.cat([(actual - expected).abs() for actual, expected in pairs])
    assert errors["compiled"].mean() < 1.1 * errors["torch"].mean()
    assert errors["compiled"].max() < 1.5 * errors["torch"].max()


@needs_kernels
def test_a_number_that_is_none_does_not_become_one(ops: NativeOps) -> None:
    random, nan = Random(0), torch.full((1, 32), math.nan, dtype=torch.bfloat16)
    x, weights = random.bfloat16(1, 32), FFNWeights(*(random.bfloat16(32, 32) for _ in range(3)))
    weights.gate[3] = math.nan
    out = torch.empty_like(x)
    ops.dense_ffn(weights)(x, None, out)
    assert out.isnan().all()
    assert ops.linear(random.bfloat16(16, 32))(nan).isnan().all()
    assert ops.rms_norm(nan, random.bfloat16(32), 1e-5).isnan().all()
    weights, batch = attention_weights(random, 32, 32, 2, 32), attention_batch(random, [1], [], 32)
    keys, values = random.bfloat16(2, NUM_SLOTS, 32).unbind()
    keys[batch.decode.slots[0, 0], 5] = math.nan
    after, ffn_input, routing = ops.attention_layer(weights).attend(random.bfloat16(1, 32), keys, values, batch)
    assert routing is not None
    assert all(tensor.isnan().all() for tensor in (after, ffn_input, routing.topk_weights))
    assert sorted(set(routing.topk_ids.flatten().tolist())) == [0, 1, 2, 3]  # experts that there are, even so


def test_without_a_compiler_torchs_own_operations_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    config = serve(ModelSizes(hidden_size=32, head_dim=32, share_q_dim=32), 1).config
    monkeypatch.setenv("CC", "no-such-compiler")
    native._library.cache_clear()
    assert isinstance(choose_ops("auto", config, torch.bfloat16, CPU), TorchOps)
    with pytest.raises(ConfigError, match=r"AFD_KERNELS=compiled cannot be had: no-such-compiler: .*No such file"):
        choose_ops("compiled", config, torch.bfloat16, CPU)
    native._library.cache_clear()


def test_what_the_kernels_are_not_for_is_said() -> None:
    config = serve(ModelSizes(hidden_size=64, head_dim=16, share_q_dim=32), 1).config
    with pytest.raises(ConfigError, match="for bfloat16 on the CPU, not float32 on cpu"):
        choose_ops("compiled", config, torch.float32, CPU)
    with pytest.raises(ConfigError, match="need a head_dim that 32 divides, not 16"):
        choose_ops("compiled", config, torch.bfloat16, CPU)
