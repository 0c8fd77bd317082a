"""The inline transport: tensor bytes in the gRPC stream. Slowest, and works everywhere."""

from __future__ import annotations

import queue
from collections.abc import Callable

import torch
from torch import Tensor

from afd.errors import AfdError, InternalError, InvalidRequest
from afd.handoff.bell import Bell
from afd.handoff.control import ControlStream, refusal
from afd.handoff.fp8 import FP8, dequantize
from afd.handoff.frame import Frame, FrameOutput, FrameRules, Timing, time_left_us, urgency_of
from afd.handoff.slots import FrameSlots, SlotShape
from afd.handoff.tensors import from_proto, to_proto
from afd.model.moe import Routing
from afd.v1 import ffn_pb2 as pb


class InlineTransport:
    """The attention side of a pair."""

    name = "inline"
    regions = ()

    def __init__(self, address: str, hello: pb.Hello, frames: FrameSlots) -> None:
        self.frames = frames
        self.shape = frames.shape
        self.control = ControlStream(address, hello)
        self.bells = (self.control.bell,)

    def send(self, frame: Frame) -> None:
        self.control.expect(frame.frame_id)
        self.control.put(pb.ConnectRequest(frame=frame_to_proto(frame, self.frames)))

    def answer(self, frame: Frame) -> FrameOutput | None:
        arrival = self.control.arrivals.get(frame.frame_id)
        if arrival is None:
            self.control.check(frame.frame_id)
            return None
        self.control.forget(frame.frame_id)
        message, shape = arrival.output, (frame.num_tokens, self.shape.hidden_size)
        try:
            ffn_output = from_proto("ffn_output", message.ffn_output, self.shape.output_dtype, shape)
        except InvalidRequest as error:
            raise InternalError(f"the FFN at {self.control.address} sent a misshapen output: {error}") from None
        timing = Timing(message.queue_ns, message.compute_ns, message.num_batch_tokens)
        return FrameOutput(ffn_output, timing, arrival.at_ns)

    def drop(self, frame: Frame) -> None:
        self.control.drop(frame.frame_id)

    def close(self) -> None:
        self.control.close()


class InlineEndpoint:
    """The FFN side of a pair. The network's thread puts in; the batcher's thread polls and replies."""

    regions = ()

    def __init__(self, post: Callable[[pb.ConnectResponse], None], rules: FrameRules, shape: SlotShape) -> None:
        self.post = post
        self.rules = rules
        self.shape = shape
        self.bell = Bell.private()
        self._inbox: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self._awaited: set[int] = set()

    def put(self, message: pb.Frame) -> None:
        """Takes a frame in. Raises InvalidRequest if it cannot be."""
        frame = frame_from_proto(message, self.rules, self.shape.frame_dtype)
        self._awaited.add(frame.frame_id)
        self._inbox.put(frame)
        self.bell.ring()

    def drop(self, frame_id: int) -> None:
        self._awaited.discard(frame_id)

    def poll(self) -> list[Frame]:
        return [self._inbox.get() for _ in range(self._inbox.qsize())]

    def awaits(self, frame: Frame) -> bool:
        return frame.frame_id in self._awaited

    def buffer(self, frame: Frame) -> Tensor:
        return torch.empty((frame.num_tokens, self.shape.hidden_size), dtype=self.shape.output_dtype)

    def reply(self, frame: Frame, ffn_output: Tensor, timing: Timing) -> None:
        self._awaited.discard(frame.frame_id)
        self.post(pb.ConnectResponse(output=output_to_proto(frame.frame_id, ffn_output, timing)))

    def refuse(self, frame_id: int, error: AfdError) -> None:
        self._awaited.discard(frame_id)
        self.post(refusal(frame_id, error))

    def close(self) -> None:
        self._awaited.clear()


def frame_to_proto(frame: Frame, frames: FrameSlots) -> pb.Frame:
    """The message for a frame that was written to its slot, and is encoded there already."""
    parts = frames.parts(frame.slot, frame.num_tokens)
    message = pb.Frame(
        frame_id=frame.frame_id,
        layer_idx=frame.layer_idx,
        traceparent=frame.traceparent,
        probe=frame.is_probe,
        epoch=frame.epoch,
        priority=frame.urgency.priority,
        time_left_us=time_left_us(frame.urgency),
    )
    message.ffn_input.CopyFrom(to_proto(parts.ffn_input))
    if frames.shape.frame_dtype is FP8:
        message.scales.CopyFrom(to_proto(parts.scales))
    if frame.routing is not None:
        message.topk_ids.CopyFrom(to_proto(parts.topk_ids))
        message.topk_weights.CopyFrom(to_proto(parts.topk_weights))
    return message


def frame_from_proto(message: pb.Frame, rules: FrameRules, dtype: torch.dtype) -> Frame:
    """The frame, checked. Raises InvalidRequest, before anything is allocated, for what this model cannot have."""
    num_tokens = message.ffn_input.shape[0] if message.ffn_input.shape else 0
    has_routing = message.HasField("topk_ids") or message.HasField("topk_weights")
    rules.check_size(num_tokens)
    if not message.probe:
        rules.check(message.layer_idx, num_tokens, has_routing)
    ffn_input = from_proto("ffn_input", message.ffn_input, dtype, (num_tokens, rules.config.hidden_size))
    if dtype is FP8:
        scales = from_proto("scales", message.scales, torch.float32, (num_tokens,))
        ffn_input = dequantize(ffn_input, scales, rules.dtype)
    return Frame(
        frame_id=message.frame_id,
        slot=0,
        layer_idx=message.layer_idx,
        ffn_input=ffn_input,
        routing=_routing_from_proto(message, rules, num_tokens) if has_routing else None,
        traceparent=message.traceparent,
        is_probe=message.probe,
        epoch=message.epoch,
        urgency=urgency_of(message.priority, message.time_left_us),
    )


def _routing_from_proto(message: pb.Frame, rules: FrameRules, num_tokens: int) -> Routing:
    shape = (num_tokens, rules.config.top_k)
    ids = from_proto("topk_ids", message.topk_ids, torch.int32, shape)
    weights = from_proto("topk_weights", message.topk_weights, torch.float32, shape)
    return Routing(ids, weights)


def output_to_proto(frame_id: int, ffn_output: Tensor, timing: Timing) -> pb.FrameOutput:
    return pb.FrameOutput(
        frame_id=frame_id,
        ffn_output=to_proto(ffn_output),
        queue_ns=timing.queue_ns,
        compute_ns=timing.compute_ns,
        num_batch_tokens=timing.num_batch_tokens,
    )
