"""A request's way through the gateway: admitted, recorded, decoded on an attention replica, turned into text."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
import secrets
import struct
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import NoReturn

import grpc.aio
from opentelemetry import trace

from afd import rpc, telemetry
from afd.errors import Cancelled, DeadlineExceeded, InvalidRequest, PeerUnavailable
from afd.model.config import ModelConfig
from afd.model.sampling_params import SamplingParams, check_token_ids
from afd.protocol import sampling_to_proto
from afd.state.requests import RequestRecord, RequestStore, SequenceKey, Status
from afd.v1 import attention_pb2, sampling_pb2
from services.gateway import metrics
from services.gateway.balancer import AttentionReplica, Balancer
from services.gateway.merge import merged
from services.gateway.stop_strings import StopStrings
from services.gateway.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[!-~]{0,128}")


@dataclass(frozen=True)
class Token:
    """One token of one choice, with the text that it completes; the last one of a choice has a finish reason."""

    choice: int
    index: int
    id: int
    text: str
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]
    finish_reason: str | None  # "stop" or "length"


@dataclass(frozen=True)
class Request:
    """An admitted request."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams  # seed and max_tokens are set


class Generator:
    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        balancer: Balancer,
        store: RequestStore,
        timeout_s: float,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.balancer = balancer
        self.store = store
        self.timeout_s = timeout_s
        self.draining = False
        self._running: dict[str, asyncio.Event] = {}

    @property
    def num_running(self) -> int:
        return len(self._running)

    def admit(self, request_id: str, prompt_ids: list[int], params: SamplingParams) -> Request:
        """Checks everything that can be checked before the request costs anything. Raises InvalidRequest, or
        PeerUnavailable while there is nobody to decode it."""
        if self.draining:
            raise PeerUnavailable("this gateway is draining; ask another one")
        max_context = self.balancer.max_context_tokens
        if not max_context:
            raise PeerUnavailable("no attention replica is ready")
        if not _REQUEST_ID.fullmatch(request_id):
            raise InvalidRequest(
                "request_id must be at most 128 printable ASCII characters without spaces", "request_id"
            )
        self._refuse_running(request_id)
        if not prompt_ids:
            raise InvalidRequest("the prompt is empty", "prompt")
        check_token_ids("prompt", prompt_ids, self.config.vocab_size)
        params.check(self.config.vocab_size)
        room = max_context - len(prompt_ids)
        if room < 1:
            raise InvalidRequest(
                f"the prompt has {len(prompt_ids)} tokens, but the context is {max_context} for prompt and output "
                "together",
                "prompt",
            )
        if params.max_tokens is not None and params.max_tokens > room:
            raise InvalidRequest(
                f"max_tokens is {params.max_tokens}, but a prompt of {len(prompt_ids)} tokens leaves room for {room} "
                f"in the context of {max_context}",
                "max_tokens",
            )
        if params.min_tokens > room:
            raise InvalidRequest(f"min_tokens is {params.min_tokens}, but there is room for {room}", "min_tokens")
        seed = secrets.randbits(63) if params.seed is None else params.seed
        return Request(
            request_id or uuid.uuid4().hex,
            prompt_ids,
            replace(params, seed=seed, max_tokens=params.max_tokens or room),
        )

    def _refuse_running(self, request_id: str) -> None:
        if request_id in self._running:
            raise InvalidRequest(f"a request {request_id!r} is already running", "request_id")

    def cancel(self, request_id: str) -> bool:
        """Ends a running request with Cancelled; whether there was one."""
        cancelled = self._running.get(request_id)
        if cancelled is not None:
            cancelled.set()
        return cancelled is not None

    async def generate(self, request: Request, parent: dict[str, str] | None = None) -> AsyncGenerator[Token, None]:
        """The tokens of all choices as they come. Closing the iterator cancels the request everywhere.

        Raises PeerUnavailable, DeadlineExceeded, Cancelled, or what the attention replica refuses.
        """
        self._refuse_running(request.request_id)
        cancelled = self._running[request.request_id] = asyncio.Event()
        span = telemetry.tracer.start_span("generate", telemetry.context_of(parent or {}), attributes={
            "gen_ai.operation.name": "text_completion",
            "gen_ai.usage.input_tokens": len(request.prompt_ids),
            "afd.request_id": request.request_id,
        })  # fmt: skip
        observed = metrics.RequestTimes()
        try:
            choices = [self._choice(request, choice, span) for choice in range(request.params.n)]
            async with contextlib.aclosing(merged(choices, self._limits(request, cancelled))) as tokens:
                async for token in tokens:
                    observed.token(token.choice)
                    yield token
            observed.end("ok")
        except BaseException as error:
            observed.end(type(error).__name__)
            raise
        finally:
            del self._running[request.request_id]
            span.set_attribute("gen_ai.usage.output_tokens", observed.num_tokens)
            span.end()

    async def _limits(self, request: Request, cancelled: asyncio.Event) -> NoReturn:
        """Ends the request when it is cancelled or takes too long."""
        try:
            await asyncio.wait_for(cancelled.wait(), self.timeout_s)
        except TimeoutError:
            raise DeadlineExceeded(f"the request took longer than {self.timeout_s:g} s") from None
        raise Cancelled(f"request {request.request_id} was cancelled")

    async def _choice(self, request: Request, choice: int, span: trace.Span) -> AsyncGenerator[Token, None]:
        """The tokens of one choice. A replica that is lost before its first token is replaced by another one."""
        lost: set[AttentionReplica] = set()
        while True:
            num_tokens = 0
            async with self.balancer.picked(lost) as entry:
                tokens = self._choice_on(entry, request, choice, epoch=len(lost) + 1, span=span)
                try:
                    async with contextlib.aclosing(tokens):
                        async for token in tokens:
                            num_tokens += 1
                            yield token
                    return
                except PeerUnavailable:
                    lost.add(entry)
                    if num_tokens or not self.balancer.has_other_than(lost):
                        raise

    async def _choice_on(
        self, entry: AttentionReplica, request: Request, choice: int, *, epoch: int, span: trace.Span
    ) -> AsyncGenerator[Token, None]:
        """The tokens of one choice from one attention replica, which owns it in this epoch."""
        key = SequenceKey(request.request_id, choice)
        params = replace(request.params, n=1, stop=(), seed=_seed_of_choice(request.params.seed or 0, choice))
        sampling = sampling_to_proto(params)
        owner = entry.replica.replica_id
        record = RequestRecord(tuple(request.prompt_ids), sampling.SerializeToString(), owner, epoch)
        await self.store.create(key, record)
        message = attention_pb2.DecodeRequest(
            request_id=request.request_id,
            choice=choice,
            epoch=epoch,
            token_ids=request.prompt_ids,
            sampling=sampling,
        )
        status: Status = "failed"
        try:
            async with contextlib.aclosing(self._decode(entry, message, request.params.stop, span)) as tokens:
                async for token in tokens:
                    yield token
            status = "finished"
        except (asyncio.CancelledError, GeneratorExit):
            status = "cancelled"
            raise
        finally:
            self._note_end(key, epoch, status)

    async def _decode(
        self,
        entry: AttentionReplica,
        message: attention_pb2.DecodeRequest,
        stop: tuple[str, ...],
        span: trace.Span,
    ) -> AsyncGenerator[Token, None]:
        text, stops = self.tokenizer.stream(), StopStrings(stop)
        traceparent = telemetry.traceparent(span)
        call = entry.stub.Decode(message, metadata=(("traceparent", traceparent),) if traceparent else None)
        try:
            async for response in call:
                shown = stops.push(text.push(response.id))
                reason = "stop" if stops.hit else _FINISH_REASONS[response.finish_reason]
                if reason and not stops.hit:
                    shown += stops.push(text.rest()) + stops.rest()
                yield Token(
                    choice=message.choice,
                    index=response.index,
                    id=response.id,
                    text=shown,
                    logprob=response.logprob,
                    top_logprobs=tuple((top.id, top.logprob) for top in response.top_logprobs),
                    finish_reason="stop" if stops.hit else reason,
                )
                if reason:
                    return
            raise PeerUnavailable(f"attention replica {entry.replica.replica_id} ended the stream early")
        except grpc.aio.AioRpcError as error:
            raise rpc.to_peer_error(error) from None
        finally:
            call.cancel()

    def _note_end(self, key: SequenceKey, epoch: int, status: Status) -> None:
        """Writes the status behind the answer: nobody waits for it."""

        async def note() -> None:
            with contextlib.suppress(PeerUnavailable):
                await self.store.finish(key, epoch, status)

        task = asyncio.create_task(note())
        _BACKGROUND.add(task)
        task.add_done_callback(_BACKGROUND.discard)


_BACKGROUND: set[asyncio.Task[None]] = set()
_FINISH_REASONS: dict[int, str | None] = {
    sampling_pb2.FINISH_REASON_UNSPECIFIED: None,
    sampling_pb2.FINISH_REASON_STOP: "stop",
    sampling_pb2.FINISH_REASON_LENGTH: "length",
}


def _seed_of_choice(seed: int, choice: int) -> int:
    """Choice 0 has the request's seed; the others one derived from it."""
    if choice == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(struct.pack("<QQ", seed, choice), digest_size=8).digest(), "little") >> 1
