"""The gRPC face of an attention replica: translates, and does not think."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

from opentelemetry import trace

from afd import rpc, telemetry
from afd.errors import AfdError, InvalidRequest, NotFound, Overloaded, PeerUnavailable
from afd.model.config import ModelConfig
from afd.model.sampling_params import check_token_ids
from afd.protocol import MOST_TOKENS_AT_ONCE, finish_reason_to_proto, sampling_from_proto
from afd.state.requests import SequenceKey
from afd.urgency import Urgency
from afd.v1 import attention_pb2 as pb
from afd.v1 import attention_pb2_grpc, sampling_pb2
from services.attention.engine import Engine
from services.attention.recent_steps import RecentStep
from services.attention.sequence import Sequence, TokenEvent
from services.attention.timeline import PARTS

_RETRY_AFTER_S = 1.0


class AttentionServicer(attention_pb2_grpc.AttentionServiceServicer):
    def __init__(self, engine: Engine, config: ModelConfig, max_context_tokens: int, max_open: int) -> None:
        self.engine = engine
        self.config = config
        self.max_context_tokens = max_context_tokens
        self.max_open = max_open
        self.num_open = 0
        self.draining = False

    async def Decode(self, request: pb.DecodeRequest, context: rpc.Context) -> AsyncIterator[pb.DecodeResponse]:
        async with rpc.aborting(context):
            span = telemetry.tracer.start_span("attention.decode", telemetry.context_of(rpc.metadata_of(context)))
            urgency = Urgency.within(context.time_remaining(), request.priority)
            sequence = self._sequence(request, urgency, span.get_span_context())
            await context.send_initial_metadata(((rpc.ACCEPTED, "1"),))
            self.engine.submit(sequence)
            self.num_open += 1
            try:
                finish_reason = None
                while finish_reason is None:
                    events = await next_tokens(sequence.outbox)
                    yield pb.DecodeResponse(tokens=[_token(event) for event in events])
                    finish_reason = events[-1].finish_reason
            finally:
                self.num_open -= 1
                self.engine.cancel(sequence)
                span.end()

    async def GetLoad(self, request: pb.GetLoadRequest, context: rpc.Context) -> pb.GetLoadResponse:
        scheduler, counters = self.engine.scheduler, self.engine.counters
        seconds = {part: counters.part_ns[part] / 1e9 for part in PARTS}
        shards = list(counters.shards.values())
        return pb.GetLoadResponse(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_kv_blocks=scheduler.blocks.num_blocks,
            num_kv_blocks_used=scheduler.blocks.num_used,
            num_frames_in_flight=self.engine.num_in_flight,
            num_steps=counters.num_steps,
            num_preemptions=scheduler.num_preemptions,
            step_seconds=seconds | {
                "step": counters.step_ns / 1e9,
                "ffn_queue": sum(shard.queue_ns for shard in shards) / 1e9,
                "ffn_compute": sum(shard.compute_ns for shard in shards) / 1e9,
                "crossing": sum(shard.crossing_ns for shard in shards) / 1e9,
            },
        )  # fmt: skip

    async def GetStep(self, request: pb.GetStepRequest, context: rpc.Context) -> pb.GetStepResponse:
        async with rpc.aborting(context):
            step = self.engine.recent.find(request.slowest)
            if step is None:
                raise NotFound("this attention replica has not decoded anything yet")
            return _recent_step(step, self.engine.decoder.ffn.transport_names)

    def _sequence(self, request: pb.DecodeRequest, urgency: Urgency, span_context: trace.SpanContext) -> Sequence:
        if self.draining:
            raise PeerUnavailable("this attention replica is draining")
        if self.num_open >= self.max_open and not request.is_begun:
            raise Overloaded(f"{self.num_open} sequences are decoded or wait already", retry_after_s=_RETRY_AFTER_S)
        params = sampling_from_proto(request.sampling)
        params.check(self.config.vocab_size)
        token_ids = list(request.token_ids)
        num_prompt = len(token_ids) - request.num_generated
        if num_prompt < 1:
            raise InvalidRequest("the prompt is empty", "token_ids")
        if len(token_ids) >= self.max_context_tokens:
            raise InvalidRequest(
                f"{len(token_ids)} tokens leave no room in this replica's context of {self.max_context_tokens}",
                "token_ids",
            )
        check_token_ids("token_ids", token_ids, self.config.vocab_size)
        return Sequence(
            key=SequenceKey(request.request_id, request.choice),
            epoch=request.epoch,
            prompt_ids=token_ids[:num_prompt],
            output_ids=token_ids[num_prompt:],
            params=params,
            eos_token_ids=self.config.eos_token_ids,
            max_context_tokens=self.max_context_tokens,
            span_context=span_context,
            urgency=urgency,
        )


async def next_tokens(outbox: asyncio.Queue[TokenEvent | AfdError]) -> list[TokenEvent]:
    """The tokens that wait, at least one. Raises the error that ends a sequence once no token is before it."""
    tokens: list[TokenEvent] = []
    while not tokens or (len(tokens) < MOST_TOKENS_AT_ONCE and not outbox.empty()):
        event = await outbox.get()
        if isinstance(event, TokenEvent):
            tokens.append(event)
        elif tokens:
            outbox.put_nowait(event)
            break
        else:
            raise event
    return tokens


def _token(event: TokenEvent) -> pb.DecodedToken:
    return pb.DecodedToken(
        index=event.index,
        id=event.token.id,
        logprob=event.token.logprob,
        top_logprobs=[sampling_pb2.TokenLogprob(id=i, logprob=v) for i, v in event.token.top_logprobs],
        finish_reason=finish_reason_to_proto(event.finish_reason),
    )


def _recent_step(step: RecentStep, transport_names: Iterable[str]) -> pb.GetStepResponse:
    origin_ns = step.timeline.start_ns
    return pb.GetStepResponse(
        duration_ns=step.timeline.duration_ns,
        num_sequences=step.num_sequences,
        num_tokens=step.num_tokens,
        transports=transport_names,
        intervals=[
            pb.StepInterval(
                part=each.part,
                layer_idx=each.layer_idx,
                microbatch=each.slot,
                start_ns=each.start_ns - origin_ns,
                end_ns=each.end_ns - origin_ns,
            )
            for each in step.intervals
        ],
        handoffs=[
            pb.StepHandoff(
                shard=each.shard,
                layer_idx=each.layer_idx,
                microbatch=each.slot,
                sent_ns=each.sent_ns - origin_ns,
                arrived_ns=each.arrived_ns - origin_ns,
                queue_ns=each.timing.queue_ns,
                compute_ns=each.timing.compute_ns,
            )
            for each in step.crossings
        ],
    )
