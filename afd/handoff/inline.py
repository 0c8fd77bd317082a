"""The inline transport: tensor bytes in the gRPC stream. Slowest, and works everywhere."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import torch

from afd.errors import AfdError, InternalError, InvalidRequest, Mismatch, PeerUnavailable
from afd.handoff.frame import Frame, FrameOutput
from afd.handoff.handshake import refuse_mismatch
from afd.handoff.tensors import from_proto, to_proto
from afd.model.config import ModelConfig
from afd.model.moe import Routing
from afd.rpc import CHANNEL_OPTIONS, to_error
from afd.v1 import ffn_pb2 as pb
from afd.v1 import ffn_pb2_grpc

HANDSHAKE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class _Arrival:
    response: pb.ConnectResponse
    at_ns: int


class InlineTransport:
    """The attention side of a pair. Used by one thread; another one reads the stream behind it."""

    def __init__(self, address: str, hello: pb.Hello, dtype: torch.dtype, device: torch.device) -> None:
        """Connects and shakes hands. Raises PeerUnavailable, or Mismatch naming what differs."""
        self.address = address
        self.dtype = dtype
        self.device = device
        self._outbox: queue.SimpleQueue[pb.ConnectRequest | None] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[_Arrival | AfdError] = queue.SimpleQueue()
        self._answers: dict[int, FrameOutput | AfdError] = {}
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._outbox.put(pb.ConnectRequest(hello=hello))
        self._stream = ffn_pb2_grpc.FfnServiceStub(self._channel).Connect(self._requests())
        threading.Thread(target=self._read, name=f"handoff {address}", daemon=True).start()
        try:
            self.welcome = self._shake_hands(hello)
        except AfdError:
            self.close()
            raise

    def send(self, frame: Frame) -> None:
        self._shapes[frame.frame_id] = tuple(frame.ffn_input.shape)
        self._outbox.put(pb.ConnectRequest(frame=frame_to_proto(frame)))

    def receive(self, frame_id: int, timeout_s: float) -> FrameOutput:
        deadline = time.monotonic() + timeout_s
        while frame_id not in self._answers:
            self._take(self._next(deadline))
        answer = self._answers.pop(frame_id)
        if isinstance(answer, AfdError):
            raise answer
        return answer

    def drop(self, frame_id: int) -> None:
        self._answers.pop(frame_id, None)
        if self._shapes.pop(frame_id, None) is not None:
            self._outbox.put(pb.ConnectRequest(drop_frame=pb.DropFrame(frame_id=frame_id)))

    def close(self) -> None:
        self._outbox.put(None)
        self._stream.cancel()
        self._channel.close()

    def _requests(self) -> Iterator[pb.ConnectRequest]:
        while (request := self._outbox.get()) is not None:
            yield request

    def _read(self) -> None:
        try:
            for response in self._stream:
                self._inbox.put(_Arrival(response, time.perf_counter_ns()))
            self._inbox.put(PeerUnavailable(f"the FFN at {self.address} ended the stream"))
        except grpc.RpcError as error:
            reason = to_error(error)
            kind = Mismatch if isinstance(reason, Mismatch) else PeerUnavailable
            self._inbox.put(kind(f"the FFN at {self.address}: {reason}"))

    def _next(self, deadline: float) -> _Arrival:
        try:
            message = self._inbox.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise PeerUnavailable(f"the FFN at {self.address} does not answer in time") from None
        if isinstance(message, AfdError):
            self._inbox.put(message)  # every later wait fails at once, too
            raise message
        return message

    def _shake_hands(self, hello: pb.Hello) -> pb.Welcome:
        response = self._next(time.monotonic() + HANDSHAKE_TIMEOUT_S).response
        if response.WhichOneof("message") != "welcome":
            raise InternalError(f"the FFN at {self.address} did not begin with a welcome")
        refuse_mismatch(hello.topology, response.welcome.topology)
        return response.welcome

    def _take(self, arrival: _Arrival) -> None:
        response = arrival.response
        kind = response.WhichOneof("message")
        if kind == "output":
            frame_id = response.output.frame_id
            shape = self._shapes.pop(frame_id, None)
            if shape is not None:  # else it was dropped
                self._answers[frame_id] = self._output(arrival, shape)
        elif kind == "frame_error":
            frame_id, message = response.frame_error.frame_id, response.frame_error.message
            if self._shapes.pop(frame_id, None) is not None:
                self._answers[frame_id] = InternalError(f"the FFN at {self.address} refused a frame: {message}")

    def _output(self, arrival: _Arrival, shape: tuple[int, ...]) -> FrameOutput | AfdError:
        message = arrival.response.output
        try:
            ffn_output = from_proto("ffn_output", message.ffn_output, self.dtype, shape, self.device)
        except InvalidRequest as error:
            return InternalError(f"the FFN at {self.address} sent a misshapen output: {error}")
        return FrameOutput(
            frame_id=message.frame_id,
            ffn_output=ffn_output,
            queue_ns=message.queue_ns,
            compute_ns=message.compute_ns,
            num_batch_tokens=message.num_batch_tokens,
            arrived_ns=arrival.at_ns,
        )


def frame_to_proto(frame: Frame) -> pb.Frame:
    message = pb.Frame(
        frame_id=frame.frame_id,
        layer_idx=frame.layer_idx,
        ffn_input=to_proto(frame.ffn_input),
        traceparent=frame.traceparent,
    )
    if frame.routing is not None:
        message.topk_ids.CopyFrom(to_proto(frame.routing.topk_ids))
        message.topk_weights.CopyFrom(to_proto(frame.routing.topk_weights))
    return message


def frame_from_proto(
    message: pb.Frame, config: ModelConfig, dtype: torch.dtype, device: torch.device, max_tokens: int
) -> Frame:
    """The frame, checked. Raises InvalidRequest, before anything is allocated, for what this model cannot have."""
    if message.layer_idx >= config.num_layers:
        raise InvalidRequest(f"layer {message.layer_idx} does not exist; the model has {config.num_layers}")
    num_tokens = message.ffn_input.shape[0] if message.ffn_input.shape else 0
    if not 1 <= num_tokens <= max_tokens:
        raise InvalidRequest(f"the frame has {num_tokens} tokens; from 1 to {max_tokens} are allowed")
    shape = (num_tokens, config.hidden_size)
    return Frame(
        frame_id=message.frame_id,
        layer_idx=message.layer_idx,
        ffn_input=from_proto("ffn_input", message.ffn_input, dtype, shape, device),
        routing=_routing_from_proto(message, config, num_tokens, device),
        traceparent=message.traceparent,
    )


def _routing_from_proto(
    message: pb.Frame, config: ModelConfig, num_tokens: int, device: torch.device
) -> Routing | None:
    has_routing = message.HasField("topk_ids") or message.HasField("topk_weights")
    if not config.is_moe(message.layer_idx):
        if has_routing:
            raise InvalidRequest(f"layer {message.layer_idx} is dense, but the frame chooses experts")
        return None
    shape = (num_tokens, config.top_k)
    ids = from_proto("topk_ids", message.topk_ids, torch.int32, shape, device)
    weights = from_proto("topk_weights", message.topk_weights, torch.float32, shape, device)
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= config.num_experts:
        unknown = low if low < 0 else high
        raise InvalidRequest(f"expert {unknown} does not exist; the model has {config.num_experts}")
    return Routing(ids, weights)


def output_to_proto(output: FrameOutput) -> pb.FrameOutput:
    return pb.FrameOutput(
        frame_id=output.frame_id,
        ffn_output=to_proto(output.ffn_output),
        queue_ns=output.queue_ns,
        compute_ns=output.compute_ns,
        num_batch_tokens=output.num_batch_tokens,
    )
