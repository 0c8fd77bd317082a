"""Memory that a frame or its answer lies in while it crosses: the same bytes for every transport but inline.

A region is a row of slots, one for each microbatch. A slot begins with a header, whose first word is the id of the
frame it holds and is written last: whoever reads the id finds the rest in place. Ids are never used twice, so a late
write for an old frame is told apart from the answer that is awaited. The tensors of T tokens follow one another after
the header; a frame is thus one run of bytes, whatever its size.

T tokens, D hidden size, K experts per token.
"""

from __future__ import annotations

import math
import mmap
import struct
import threading
import time
import weakref
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from afd.errors import InternalError, InvalidRequest
from afd.handoff.fp8 import FP8, dequantize, quantize
from afd.handoff.frame import Frame, FrameOutput, FrameRules, Timing, time_left_us, urgency_of
from afd.model.moe import Routing

_PAGE = 4096
_ALIGNMENT = 64
# frame_id, number of bytes, layer_idx, number of tokens, flags, epoch, priority, time left in µs, traceparent
_FRAME = struct.Struct("<QQiIIIiI55s")
_ANSWER = struct.Struct("<QQIIQQ")  # frame_id, number of bytes, number of tokens, of the batch's, queue_ns, compute_ns
_HEADER_BYTES = 128
_HAS_ROUTING, _IS_PROBE = 1, 2
_PIN_FOR_ALL_DEVICES, _PIN_TO_READ = 1, 8  # cudaHostRegisterPortable and cudaHostRegisterReadOnly


def aligned(num_bytes: int, alignment: int = _ALIGNMENT) -> int:
    return -(-num_bytes // alignment) * alignment


@dataclass(frozen=True)
class SlotShape:
    """What the slots of a pair hold; both sides reckon with the same one."""

    num_slots: int
    max_tokens: int
    hidden_size: int
    top_k: int
    dtype: torch.dtype  # of the model
    frame_dtype: torch.dtype  # of ffn_input on its way out: the model's, or FP8
    output_dtype: torch.dtype  # of ffn_output on its way back

    @cached_property
    def frame_stride(self) -> int:
        return aligned(self.frame_bytes(self.max_tokens), _PAGE)

    @cached_property
    def answer_stride(self) -> int:
        return aligned(self.answer_bytes(self.max_tokens), _PAGE)

    def frame_bytes(self, num_tokens: int) -> int:
        return self.part_offsets(num_tokens)[-1]

    def answer_bytes(self, num_tokens: int) -> int:
        return _HEADER_BYTES + num_tokens * self.hidden_size * self.output_dtype.itemsize

    def part_offsets(self, num_tokens: int) -> tuple[int, int, int, int, int]:
        """Where topk_ids, topk_weights, scales and ffn_input begin in a slot, and where the frame ends."""
        ids = _HEADER_BYTES
        weights = ids + num_tokens * self.top_k * 4
        scales = weights + num_tokens * self.top_k * 4
        ffn_input = aligned(scales + (num_tokens * 4 if self.frame_dtype is FP8 else 0))
        return ids, weights, scales, ffn_input, ffn_input + num_tokens * self.hidden_size * self.frame_dtype.itemsize


class Region:
    """Memory for slots, and the ways to look at it."""

    def __init__(self, memory: mmap.mmap) -> None:
        self.memory = memory
        self._unpin: weakref.finalize[..., Region] | None = None
        self.bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self.words = memoryview(memory).cast("Q")

    @classmethod
    def private(cls, num_bytes: int) -> Region:
        """Memory of this process alone."""
        return cls(mmap.mmap(-1, num_bytes))

    @property
    def address(self) -> int:
        return self.bytes.data_ptr()

    def tensor(self, offset: int, dtype: torch.dtype, *shape: int) -> Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        return self.bytes[offset : offset + num_bytes].view(dtype).view(shape)

    def pin(self, device: torch.device) -> None:
        """Locks it for copies to and from a GPU, which then need no staging and do not wait for one another. Raises
        InternalError if CUDA refuses."""
        if device.type == "cuda" and not self.bytes.is_pinned():  # NIXL pins what it registers
            runtime, num_bytes = torch.cuda.cudart(), self.bytes.nbytes
            flags = _PIN_FOR_ALL_DEVICES | (_PIN_TO_READ if self.words.readonly else 0)
            try:
                with torch.cuda.device(device):
                    torch.cuda.check_error(runtime.cudaHostRegister(self.address, num_bytes, flags))
            except torch.cuda.CudaError as error:
                raise InternalError(f"{num_bytes >> 10} KiB of slots cannot be pinned for {device}: {error}") from None
            self._unpin = weakref.finalize(self, runtime.cudaHostUnregister, self.address)
            self._unpin.atexit = False

    def unpin(self) -> None:
        if self._unpin is not None:
            self._unpin()


@dataclass(frozen=True)
class FrameParts:
    """A frame's tensors as they cross, in its slot."""

    num_bytes: int  # of the frame, header included
    topk_ids: Tensor  # [T, K] int32
    topk_weights: Tensor  # [T, K] float32
    scales: Tensor  # [T] float32, with FP8 only
    ffn_input: Tensor  # [T, D]

    @cached_property
    def routing(self) -> Routing:
        return Routing(self.topk_ids, self.topk_weights)


class FrameSlots:
    """Frames on their way out. Attention writes; the FFN reads."""

    def __init__(self, region: Region, shape: SlotShape) -> None:
        self.region = region
        self.shape = shape
        self.probing = threading.Lock()  # of the last slot
        self._parts: dict[tuple[int, int], FrameParts] = {}  # by slot and number of tokens

    def buffer(self, slot: int, num_tokens: int) -> tuple[Tensor, Routing] | None:
        """Where ffn_input and routing go as they are; None where ffn_input is encoded first."""
        parts = self.parts(slot, num_tokens)
        return None if self.shape.frame_dtype is FP8 else (parts.ffn_input, parts.routing)

    def write(self, frame: Frame) -> None:
        """Fills the frame's slot; its id comes last."""
        start, num_tokens = frame.slot * self.shape.frame_stride, frame.num_tokens
        parts = self.parts(frame.slot, num_tokens)
        self._fill(parts, frame)
        flags = (_HAS_ROUTING if frame.routing else 0) | (_IS_PROBE if frame.is_probe else 0)
        numbers = (parts.num_bytes, frame.layer_idx, num_tokens, flags, frame.epoch)
        urgency = (frame.urgency.priority, time_left_us(frame.urgency))
        _FRAME.pack_into(self.region.memory, start, 0, *numbers, *urgency, frame.traceparent.encode())
        self.region.words[start // 8] = frame.frame_id

    def read(self, slot: int, rules: FrameRules) -> Frame:
        """The frame in a slot; nothing is copied. Raises InvalidRequest if it cannot be; which experts it names
        is checked where they are used."""
        header = _FRAME.unpack_from(self.region.memory, slot * self.shape.frame_stride)
        frame_id, num_bytes, layer_idx, num_tokens, flags, epoch, priority, time_left, traceparent = header
        has_routing, is_probe = bool(flags & _HAS_ROUTING), bool(flags & _IS_PROBE)
        if not is_probe:
            rules.check(layer_idx, num_tokens, has_routing)
        if not 1 <= num_tokens <= self.shape.max_tokens:
            raise InvalidRequest(f"the frame has {num_tokens} tokens, but its slot is for {self.shape.max_tokens}")
        parts = self.parts(slot, num_tokens)
        if num_bytes != parts.num_bytes:
            raise InvalidRequest(
                f"the frame says it has {num_bytes} bytes, but {num_tokens} tokens take {parts.num_bytes}"
            )
        return Frame(
            frame_id=frame_id,
            slot=slot,
            layer_idx=layer_idx,
            ffn_input=self._ffn_input(parts),
            routing=parts.routing if has_routing else None,
            traceparent=traceparent.rstrip(b"\0").decode("ascii", "replace"),
            is_probe=is_probe,
            epoch=epoch,
            urgency=urgency_of(priority, time_left),
        )

    def parts(self, slot: int, num_tokens: int) -> FrameParts:
        parts = self._parts.get((slot, num_tokens))
        if parts is None:
            parts = self._parts[slot, num_tokens] = self._make_parts(slot, num_tokens)
        return parts

    def _make_parts(self, slot: int, num_tokens: int) -> FrameParts:
        shape, start = self.shape, slot * self.shape.frame_stride
        ids, weights, scales, ffn_input, _ = (start + offset for offset in shape.part_offsets(num_tokens))
        return FrameParts(
            num_bytes=shape.frame_bytes(num_tokens),
            topk_ids=self.region.tensor(ids, torch.int32, num_tokens, shape.top_k),
            topk_weights=self.region.tensor(weights, torch.float32, num_tokens, shape.top_k),
            scales=self.region.tensor(scales, torch.float32, num_tokens if shape.frame_dtype is FP8 else 0),
            ffn_input=self.region.tensor(ffn_input, shape.frame_dtype, num_tokens, shape.hidden_size),
        )

    def _fill(self, parts: FrameParts, frame: Frame) -> None:
        """What lies on a GPU is copied as soon as it is computed there, which is waited for."""
        if self.shape.frame_dtype is FP8:
            for part, value in zip((parts.ffn_input, parts.scales), quantize(frame.ffn_input), strict=True):
                part.copy_(value, non_blocking=True)
        elif parts.ffn_input.data_ptr() != frame.ffn_input.data_ptr():
            parts.ffn_input.copy_(frame.ffn_input, non_blocking=True)
        if frame.routing is not None and frame.routing is not parts.routing:
            parts.topk_ids.copy_(frame.routing.topk_ids, non_blocking=True)
            parts.topk_weights.copy_(frame.routing.topk_weights, non_blocking=True)
        if frame.ffn_input.is_cuda:
            torch.cuda.current_stream(frame.ffn_input.device).synchronize()

    def _ffn_input(self, parts: FrameParts) -> Tensor:
        if self.shape.frame_dtype is FP8:
            return dequantize(parts.ffn_input, parts.scales, self.shape.dtype)
        return parts.ffn_input


class AnswerSlots:
    """Partial sums on their way back. The FFN writes; attention reads."""

    def __init__(self, region: Region, shape: SlotShape) -> None:
        self.region = region
        self.shape = shape
        self._outputs: dict[tuple[int, int], Tensor] = {}  # by slot and number of tokens

    def buffer(self, slot: int, num_tokens: int) -> Tensor:
        """Where ffn_output [T, D] goes."""
        output = self._outputs.get((slot, num_tokens))
        if output is None:
            offset = slot * self.shape.answer_stride + _HEADER_BYTES
            output = self.region.tensor(offset, self.shape.output_dtype, num_tokens, self.shape.hidden_size)
            self._outputs[slot, num_tokens] = output
        return output

    def post(self, frame: Frame, timing: Timing) -> None:
        """Tells that the frame's buffer is filled."""
        start, num_tokens = frame.slot * self.shape.answer_stride, frame.num_tokens
        num_bytes = self.shape.answer_bytes(num_tokens)
        numbers = (num_tokens, timing.num_batch_tokens, timing.queue_ns, timing.compute_ns)
        _ANSWER.pack_into(self.region.memory, start, 0, num_bytes, *numbers)
        self.region.words[start // 8] = frame.frame_id

    def posted(self, slot: int) -> int:
        """The id of the frame that the answer in a slot belongs to."""
        return self.region.words[slot * self.shape.answer_stride // 8]

    def read(self, frame: Frame) -> FrameOutput:
        """The answer posted in a frame's slot; it is not copied. Raises InternalError if it is none to this frame."""
        header = _ANSWER.unpack_from(self.region.memory, frame.slot * self.shape.answer_stride)
        frame_id, num_bytes, answered_tokens, num_batch_tokens, queue_ns, compute_ns = header
        if frame_id != frame.frame_id:
            raise InternalError(f"the answer is to frame {frame_id}, not to frame {frame.frame_id}")
        if (answered_tokens, num_bytes) != (frame.num_tokens, self.shape.answer_bytes(frame.num_tokens)):
            raise InternalError(
                f"the answer has {answered_tokens} tokens in {num_bytes} bytes, but the frame had {frame.num_tokens}"
            )
        timing = Timing(queue_ns, compute_ns, num_batch_tokens)
        return FrameOutput(self.buffer(frame.slot, frame.num_tokens), timing, time.perf_counter_ns())
