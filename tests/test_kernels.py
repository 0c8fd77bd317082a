"""The compiled kernels against torch in float64, for any sizes, and where they cannot be had."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from afd.errors import ConfigError, InvalidRequest
from afd.model import native
from afd.model.kv_cache import DecodeContext, PrefillChunk
from afd.model.layers import Rotation, rms_norm
from afd.model.moe import Routing
from afd.model.native import NativeOps, choose_ops
from afd.model.ops import FFNWeights, TorchOps
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
    assert_near(ops.rms_norm(x, weight, 1e-5), rms_norm(x, weight.double(), 1e-5).double())


@needs_kernels
@any_sizes
@given(st.integers(1, 9), st.integers(1, 20), multiples, st.integers(0, 99))
def test_rotation_and_cache_are_those_of_torch(ops: NativeOps, num: int, heads: int, size: int, seed: int) -> None:
    random = Random(seed)
    q, kv = random.bfloat16(num, heads, size), random.bfloat16(num, 2 * size)
    rotation, slots = Rotation.at(random.integers(5000, num), size, 1e4), torch.randperm(2 * num)[:num]
    results = []
    for each in (ops, TorchOps()):
        keys, values = torch.zeros(2, 2 * num, size, dtype=torch.bfloat16).unbind()
        rotated = each.rotate_and_cache(q.clone(), kv[:, :size], kv[:, size:], rotation, slots, keys, values)
        results.append((rotated, keys, values))
    for actual, expected in zip(*results, strict=True):
        assert_near(actual, expected.double())


@needs_kernels
@any_sizes
@given(st.lists(st.integers(1, 70), min_size=1, max_size=5), st.integers(1, 40), multiples, st.integers(0, 99))
def test_decode_attention_is_that_of_the_definition(
    ops: NativeOps, lengths: list[int], heads: int, size: int, seed: int
) -> None:
    random = Random(seed)
    q = random.bfloat16(len(lengths), heads, size)
    keys, values = random.bfloat16(2, 200, size).unbind()
    slots = random.integers(200, len(lengths), max(lengths))
    actual = ops.decode_attention(q, keys, values, DecodeContext(slots, torch.tensor(lengths)))
    for row, length in enumerate(lengths):
        k, v = keys[slots[row, :length]].double(), values[slots[row, :length]].double()
        probs = (q[row].double() @ k.T / math.sqrt(size)).softmax(dim=-1)
        assert_near(actual[row], probs @ v)


@needs_kernels
@any_sizes
@given(st.integers(0, 70), st.integers(1, 30), st.integers(1, 40), multiples, st.integers(0, 99))
def test_prefill_attention_looks_at_nothing_that_comes_later(
    ops: NativeOps, num_before: int, num_new: int, heads: int, size: int, seed: int
) -> None:
    random = Random(seed)
    q = random.bfloat16(num_new, heads, size)
    keys, values = random.bfloat16(2, 200, size).unbind()
    slots, lengths = random.integers(200, num_before + num_new), torch.arange(num_before, num_before + num_new) + 1
    chunk = PrefillChunk(0, num_new, slots, lengths)
    assert_near(
        ops.prefill_attention(q, keys, values, chunk),
        TorchOps().prefill_attention(q.double(), keys.double(), values.double(), chunk),
    )


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
    context = DecodeContext(torch.tensor([[0, 1]]), torch.tensor([2]))
    keys, values = random.bfloat16(2, 2, 32).unbind()
    keys[1, 5] = math.nan
    assert ops.decode_attention(random.bfloat16(1, 2, 32), keys, values, context).isnan().all()


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
