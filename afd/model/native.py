"""The kernels of `kernels.c`: compiled where a service starts, if the processor has AVX512-BF16 and there is a C
compiler. They compute what `ops.TorchOps` does, in bfloat16, and several times as fast (docs/performance.md).

T tokens, D hidden size, E experts, K experts per token, I width of an FFN.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from afd.errors import ConfigError
from afd.model.config import ModelConfig
from afd.model.mfa import AttentionBatch
from afd.model.moe import Routing
from afd.model.ops import AttentionWeights, FFNWeights, Ops, TorchOps

log = logging.getLogger(__name__)

KernelsName = Literal["auto", "compiled", "torch"]

_SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-pthread", "-shared", "-fPIC")
_COMPILE_TIMEOUT_S = 60.0
_LANES = 16

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float


class Unavailable(Exception):
    """Why there are no compiled kernels here."""


def choose_ops(
    wanted: KernelsName, config: ModelConfig, dtype: torch.dtype, device: torch.device, cpus: tuple[int, ...] = ()
) -> Ops:
    """Compiled kernels where they can be had, else torch's operations. Raises ConfigError if those that are wanted
    cannot be had."""
    if wanted == "torch":
        return TorchOps()
    try:
        _refuse_unsupported(config, dtype, device)
        return NativeOps(_library(cpus))
    except Unavailable as reason:
        if wanted == "compiled":
            raise ConfigError(f"AFD_KERNELS=compiled cannot be had: {reason}") from None
        log.info("no compiled kernels: %s", reason)
        return TorchOps()


def _refuse_unsupported(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    if device.type != "cpu" or dtype != torch.bfloat16:
        raise Unavailable(f"they are for bfloat16 on the CPU, not {dtype} on {device.type}".replace("torch.", ""))
    sizes = {"hidden_size": config.hidden_size, "share_q_dim": config.share_q_dim, "head_dim": config.head_dim}
    for name, size in sizes.items():
        if size % (2 * _LANES):
            raise Unavailable(f"they need a {name} that {2 * _LANES} divides, not {size}")


@functools.cache
def _library(cpus: tuple[int, ...] = ()) -> ctypes.CDLL:
    """Compiled into a folder that is gone again once it is loaded: nothing can be stale, or somebody else's."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Unavailable("there is no C compiler")
    with tempfile.TemporaryDirectory(prefix="afd-kernels-") as folder:
        path = Path(folder) / "kernels.so"
        command = [compiler, *_FLAGS, "-o", str(path), str(_SOURCE)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)
            library = _with_signatures(ctypes.CDLL(str(path)))
        except subprocess.CalledProcessError as error:
            why = next((line for line in error.stderr.splitlines() if "error" in line), "it failed")
            raise Unavailable(f"{compiler}: {why}") from None
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"{compiler}: {error}") from None
    _start_threads(library, cpus)
    return library


def _with_signatures(library: ctypes.CDLL) -> ctypes.CDLL:
    p, n, f = _POINTER, _LONG, _FLOAT
    signatures = {
        "afd_start_threads": [n, p],
        "afd_linear": [p, n, n, p, n, n, p],
        "afd_rms_norm": [p, n, n, n, p, f, p],
        "afd_attend": [p, p, p, p, p, p, p, p, p, p],
        "afd_ffn": [p, n, n, p, n, n, n, p, p, n, p, p],
    }
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, n
    return library


def _start_threads(library: ctypes.CDLL, cpus: tuple[int, ...]) -> None:
    """Gives the kernels as many threads as torch has. With as many processors each keeps to its own, the one that calls
    this to the first."""
    num_threads = torch.get_num_threads()
    is_pinned = len(cpus) == num_threads
    library.afd_start_threads(num_threads, (ctypes.c_int32 * num_threads)(*cpus) if is_pinned else None)
    if is_pinned:
        os.sched_setaffinity(0, cpus[:1])
    torch.set_num_threads(1)


def _padded(size: int) -> int:
    return -(-size // _LANES) * _LANES


def pack(weight: Tensor) -> Tensor:
    """A weight [out, in] as `kernels.c` reads it: [out / 16, in / 2, 16, 2], padded with zeros."""
    num_out, num_in = _padded(weight.shape[0]), _padded(weight.shape[1])
    padded = F.pad(weight, (0, num_in - weight.shape[1], 0, num_out - weight.shape[0]))
    return padded.view(num_out // _LANES, _LANES, num_in // 2, 2).permute(0, 2, 1, 3).contiguous()


def _pack_by_turns(gate: Tensor, up: Tensor) -> Tensor:
    """A block of the one, then a block of the other."""
    return torch.stack((pack(gate), pack(up)), dim=1).contiguous()


@dataclass(frozen=True)
class PackedLinear:
    library: ctypes.CDLL
    weight: Tensor  # packed
    num_out: int

    def __call__(self, x: Tensor) -> Tensor:
        num_blocks, num_pairs = self.weight.shape[:2]
        y = x.new_empty(x.shape[0], num_blocks * _LANES)
        x = x if x.stride(1) == 1 else x.contiguous()
        self.library.afd_linear(
            x.data_ptr(), x.shape[0], x.stride(0), self.weight.data_ptr(), 2 * num_pairs, y.shape[1], y.data_ptr()
        )
        return y[:, : self.num_out]


class _Batch(ctypes.Structure):
    """`AttentionBatch` as in `kernels.c`."""

    _fields_ = (
        ("rows", _LONG),
        ("cosines", _POINTER),
        ("sines", _POINTER),
        ("new_slots", _POINTER),
        ("slots", _POINTER),
        ("starts", _POINTER),
        ("lengths", _POINTER),
    )

    @classmethod
    def of(cls, batch: AttentionBatch) -> _Batch:
        tensors = (batch.rotation.cos, batch.rotation.sin, batch.new_slots, *batch.row_contexts)
        return cls(len(batch.new_slots), *(tensor.data_ptr() for tensor in tensors))


class _Layer(ctypes.Structure):
    """`AttentionLayer` as in `kernels.c`."""

    _fields_ = (
        ("input_norm", _POINTER),
        ("qkv", _POINTER),
        ("inter_norm", _POINTER),
        ("wq", _POINTER),
        ("o_proj", _POINTER),
        ("post_attention_norm", _POINTER),
        ("gate", _POINTER),
        ("size", _LONG),
        ("q_size", _LONG),
        ("heads", _LONG),
        ("head_size", _LONG),
        ("num_experts", _LONG),
        ("top_k", _LONG),
        ("renormalise", _LONG),
        ("eps", _FLOAT),
    )


class PackedAttentionLayer:
    """A layer up to the handoff in one call."""

    def __init__(self, ops: NativeOps, weights: AttentionWeights) -> None:
        self.ops = ops
        self.top_k = weights.top_k
        self.is_moe = weights.gate is not None
        q_size, heads_size = weights.inter_norm.shape[0], weights.wq.shape[0]
        self.scratch_bytes_per_row = 2 * (weights.qkv_proj.shape[0] + weights.qkv_proj.shape[1] + 2 * heads_size)
        self._tensors = [  # alive as long as this is
            weights.input_norm,
            pack(weights.qkv_proj),
            weights.inter_norm,
            pack(weights.wq),
            pack(weights.o_proj),
            weights.post_attention_norm,
            *([] if weights.gate is None else [pack(weights.gate)]),
        ]
        self._layer = _Layer(
            *([tensor.data_ptr() for tensor in self._tensors] + [None] * (not self.is_moe)),
            weights.o_proj.shape[0],
            q_size,
            heads_size // weights.head_dim,
            weights.head_dim,
            0 if weights.gate is None else weights.gate.shape[0],
            weights.top_k,
            weights.renormalise,
            weights.eps,
        )

    def attend(
        self,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        batch: AttentionBatch,
        out: tuple[Tensor, Routing] | None = None,
    ) -> tuple[Tensor, Tensor, Routing | None]:
        after = torch.empty_like(hidden_states)
        ffn_input, routing = out or self._buffers(hidden_states)
        self.ops.library.afd_attend(
            ctypes.byref(self._layer),
            ctypes.byref(self.ops.described(batch)),
            hidden_states.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            self.ops.scratch(hidden_states.shape[0] * self.scratch_bytes_per_row),
            after.data_ptr(),
            ffn_input.data_ptr(),
            routing.topk_ids.data_ptr(),
            routing.topk_weights.data_ptr(),
        )
        return after, ffn_input, routing if self.is_moe else None

    def _buffers(self, hidden_states: Tensor) -> tuple[Tensor, Routing]:
        shape = hidden_states.shape[0], self.top_k
        topk_ids, topk_weights = torch.empty(shape, dtype=torch.int32), torch.empty(shape)
        return torch.empty_like(hidden_states), Routing(topk_ids, topk_weights)


class _Part(ctypes.Structure):
    """As in `kernels.c`."""

    _fields_ = (
        ("gate_up", _POINTER),
        ("down", _POINTER),
        ("width", _LONG),
        ("num_rows", _LONG),
        ("rows", _POINTER),
        ("weights", _POINTER),
        ("hidden", _POINTER),
    )


class PackedFFN:
    """A layer's dense or shared FFN, and its routed experts from number `first` on; one call computes them all."""

    def __init__(self, ops: NativeOps, parts: list[FFNWeights], first: int, num_experts: int) -> None:
        self.ops = ops
        self.first = first
        self.num_experts = num_experts
        self.weights = [(_pack_by_turns(part.gate, part.up), pack(part.down)) for part in parts]
        self.widths = [_padded(part.down.shape[1]) for part in parts]
        self._parts = (_Part * len(parts))(
            *(
                _Part(gate_up.data_ptr(), down.data_ptr(), width)
                for (gate_up, down), width in zip(self.weights, self.widths, strict=True)
            )
        )

    def __call__(self, x: Tensor, routing: Routing | None, out: Tensor) -> None:
        num_rows, size = x.shape
        ids, weights = (routing.topk_ids, routing.topk_weights) if routing else (None, None)
        top_k = ids.shape[1] if ids is not None else 0
        is_unknown = self.ops.library.afd_ffn(
            x.data_ptr(),
            num_rows,
            size,
            self._parts,
            len(self.widths) - 1,
            self.first,
            self.num_experts,
            ids.data_ptr() if ids is not None else None,
            weights.data_ptr() if weights is not None else None,
            top_k,
            self.ops.scratch(self._scratch_bytes(num_rows, size, top_k)),
            out.data_ptr(),
        )
        if is_unknown and routing:
            routing.checked(self.num_experts)

    def _scratch_bytes(self, num_rows: int, size: int, top_k: int) -> int:
        shared, routed = self.widths[0], max(self.widths[1:], default=0)
        return num_rows * (4 * size + 8 * (1 + top_k) + 4 * top_k + 2 * (shared + top_k * routed))


class NativeOps:
    """Used by one thread."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._described: WeakKeyDictionary[AttentionBatch, _Batch] = WeakKeyDictionary()

    def scratch(self, num_bytes: int) -> int:
        """The address of memory that is good until the next call; it only grows."""
        if self._scratch.nbytes < num_bytes:
            self._scratch = torch.empty(num_bytes, dtype=torch.uint8)
        return self._scratch.data_ptr()

    def described(self, batch: AttentionBatch) -> _Batch:
        """The same batch crosses many layers, in turns with others."""
        described = self._described.get(batch)
        if described is None:
            described = self._described[batch] = _Batch.of(batch)
        return described

    def linear(self, weight: Tensor) -> PackedLinear:
        return PackedLinear(self.library, pack(weight), weight.shape[0])

    def attention_layer(self, weights: AttentionWeights) -> PackedAttentionLayer:
        return PackedAttentionLayer(self, weights)

    def dense_ffn(self, weights: FFNWeights) -> PackedFFN:
        return PackedFFN(self, [weights], 0, 0)

    def moe_ffn(self, shared: FFNWeights, experts: FFNWeights, first: int, num_experts: int) -> PackedFFN:
        routed = zip(experts.gate, experts.up, experts.down, strict=True)
        return PackedFFN(self, [shared, *(FFNWeights(*weights) for weights in routed)], first, num_experts)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = x.new_empty(x.shape)
        num_rows, size = x.shape
        self.library.afd_rms_norm(x.data_ptr(), num_rows, x.stride(0), size, weight.data_ptr(), eps, out.data_ptr())
        return out
