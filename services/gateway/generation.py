"""A request's way through the gateway: admitted, recorded, decoded on an attention replica, turned into text."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import secrets
import struct
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import grpc.aio
from opentelemetry import trace

from afd import rpc, telemetry
from afd.errors import (
    AfdError,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    Mismatch,
    NotFound,
    Overloaded,
    PeerUnavailable,
    StaleEpoch,
)
from afd.model.config import ModelConfig
from afd.model.sampling_params import SamplingParams, check_token_ids
from afd.protocol import MOST_TOKENS_AT_ONCE, finish_reason_from_proto, sampling_from_proto, sampling_to_proto
from afd.state.requests import JournaledToken, RequestRecord, RequestStore, SequenceKey, Status
from afd.urgency import Urgency
from afd.v1 import attention_pb2, sampling_pb2
from services.gateway import metrics
from services.gateway.balancer import AttentionReplica, Balancer
from services.gateway.calls import OpenCalls
from services.gateway.failover import Failover
from services.gateway.merge import merged
from services.gateway.tokenizer import Tokenizer
from services.gateway.transcript import Token, Transcript

_RETRY_AFTER_S = 2.0  # a replica that was started again takes about so long
_SUPERSEDE_TIMEOUT_S = 5.0
_REQUEST_ID = re.compile(r"[!-~]{0,128}")


@dataclass(frozen=True)
class Request:
    """An admitted request."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams  # seed and max_tokens are set
    urgency: Urgency
    resumed_at: tuple[int, ...] | None = None  # index of the first token wanted of each choice; None: it begins
    epochs: tuple[int, ...] = ()  # of the records of its choices, once they are written
    # An attention replica has taken the first sequence of the call. The others wait for that, and are not refused.
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    calls: OpenCalls = field(default_factory=OpenCalls)
    is_first: bool = True  # of the requests of the call

    def is_for(self, prompt_ids: list[int], params: SamplingParams) -> bool:
        """Whether this could have come of that; what is not given could have been anything."""
        own, given = self.params, sampling_from_proto(sampling_to_proto(params))  # as it is recorded
        seed = own.seed if given.seed is None else given.seed
        return prompt_ids == self.prompt_ids and own == replace(
            given, seed=seed, max_tokens=given.max_tokens or own.max_tokens
        )


class _Lost(Exception):
    """An attention replica does not go on with a choice."""

    def __init__(self, reason: PeerUnavailable | Overloaded) -> None:
        super().__init__(str(reason))
        self.reason = reason


@dataclass
class _Running:
    """A request that this gateway follows, and what is to end it before its time."""

    reason: AfdError | None = None
    ending: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self, reason: AfdError) -> None:
        self.reason = self.reason or reason
        self.ending.set()


class _Ownership:
    """Whose a choice is: its record, whose epoch is this gateway's last word on it."""

    def __init__(self, store: RequestStore, key: SequenceKey, record: RequestRecord, is_new: bool) -> None:
        self.store = store
        self.key = key
        self.record = record
        self._is_own = is_new  # this gateway began the epoch
        self._is_new = is_new  # nobody has decoded in this epoch yet
        self._claim = uuid.uuid4().bytes  # names the next epoch, however often it is asked for

    async def claim(self, owner: str, transcript: Transcript) -> list[JournaledToken]:
        """Begins the next epoch, with an attention replica as the owner; the first has that of the new record. Returns
        what the journal has behind the transcript. Raises StaleEpoch if another gateway has claimed it since."""
        if self._is_new:
            self._is_new = False
            return []
        try:
            return await self._take_over(owner, transcript)
        except StaleEpoch:
            if self._is_own:
                raise
        # The gateway that it comes from has still moved it, or somebody has cancelled it.
        self.record = await self.store.record(self.key) or self.record
        if self.record.status == "cancelled":
            raise _cancelled(self.key.request_id)
        return await self._take_over(owner, transcript)

    async def _take_over(self, owner: str, transcript: Transcript) -> list[JournaledToken]:
        record = replace(self.record, owner=owner, status="running")
        journal = await self.store.take_over(self.key, record, self._claim, transcript.tokens)
        self.record = replace(record, epoch=record.epoch + 1)
        self._is_own, self._claim = True, uuid.uuid4().bytes
        return journal[len(transcript.tokens) :]


class Generator:
    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        balancer: Balancer,
        store: RequestStore,
        timeout_s: float,
        failover_timeout_s: float,
        max_requests: int,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.balancer = balancer
        self.store = store
        self.timeout_s = timeout_s
        self.failover_timeout_s = failover_timeout_s
        self.max_requests = max_requests
        self.draining = False
        self._running: dict[str, _Running] = {}

    @property
    def num_running(self) -> int:
        return len(self._running)

    def admit(self, request_id: str, prompt_ids: list[int], params: SamplingParams, urgency: Urgency) -> Request:
        """Checks everything that can be checked before the request costs anything. Raises InvalidRequest, Overloaded,
        or PeerUnavailable while there is nobody to decode it."""
        if self.draining:
            raise PeerUnavailable("this gateway is draining; ask another one")
        if not _REQUEST_ID.fullmatch(request_id):
            raise InvalidRequest(
                "request_id must be at most 128 printable ASCII characters without spaces", "request_id"
            )
        if not prompt_ids:
            raise InvalidRequest("the prompt is empty", "prompt")
        check_token_ids("prompt", prompt_ids, self.config.vocab_size)
        params.check(self.config.vocab_size)
        self._refuse_running(request_id)
        max_context = self.balancer.max_context_tokens
        if not self.balancer.num_ready:
            missing = "an FFN shard has no replica" if max_context else "no attention replica is ready"
            raise PeerUnavailable(missing, retry_after_s=_RETRY_AFTER_S)
        if self.num_running >= self.max_requests:
            raise Overloaded(f"{self.num_running} requests are open at this gateway", retry_after_s=_RETRY_AFTER_S)
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
            urgency,
        )

    async def _supersede(self, request_id: str) -> None:
        """Ends the streams that a request has here: of several that want it, the last one gets it."""
        while running := self._running.get(request_id):
            running.end(StaleEpoch(f"request {request_id} was resumed in another stream"))
            await _until_ended(running, request_id)

    def _refuse_running(self, request_id: str) -> None:
        if request_id in self._running:
            raise InvalidRequest(f"a request {request_id!r} is already running", "request_id")

    async def cancel(self, request_id: str) -> bool:
        """Ends a running request with Cancelled, at another gateway with its next token; whether there was one."""
        if running := self._running.get(request_id):
            running.end(_cancelled(request_id))
            return True
        record = await self.store.record(SequenceKey(request_id))
        num_choices = _params(record).n if record else 0
        keys = [SequenceKey(request_id, choice) for choice in range(num_choices)]
        return any(await asyncio.gather(*map(self.store.cancel, keys)))

    def give_up(self) -> None:
        """Ends what still runs here; its clients can go on with it at another gateway."""
        for running in self._running.values():
            running.end(PeerUnavailable("this gateway stops; go on with the request at another one"))

    async def reopen(self, request_id: str, next_index: Sequence[int], urgency: Urgency) -> Request:
        """A request that somebody began here or at another gateway, to be shown from these indices on, one for each
        choice.

        Raises NotFound if no record of it is left, or that of another model, Cancelled if that is how it ended.
        """
        if self.draining:
            raise PeerUnavailable("this gateway is draining; ask another one")
        record = await self.store.record(SequenceKey(request_id))
        if record is None:
            raise NotFound(f"no request {request_id!r} is known; it ended long ago, or never began")
        if record.status == "cancelled":
            raise _cancelled(request_id)
        known = {record.fingerprint, self.balancer.fingerprint} - {
            ""
        }  # "" was written, or is, where no replica is there
        if len(known) > 1:
            raise NotFound(f"request {request_id} began with another model than there is now; ask it anew")
        params = _params(record)
        if len(next_index) > params.n:
            raise InvalidRequest(f"the request has {params.n} choices, not {len(next_index)}", "next_index")
        resumed_at = (*next_index, *[0] * (params.n - len(next_index)))
        return Request(request_id, list(record.prompt_ids), params, urgency, resumed_at)

    @contextlib.asynccontextmanager
    async def opened(
        self, request: Request, parent: dict[str, str] | None = None
    ) -> AsyncGenerator[AsyncGenerator[list[Token], None], None]:
        """The tokens of all choices of an admitted or reopened request, as they come; those of one choice that come at
        once are together. On entering, its id is taken at once and what it takes to resume it is written down: from
        then on it is not lost. Leaving cancels the request everywhere, if it still runs.

        Raises InvalidRequest if the id runs already, PeerUnavailable, DeadlineExceeded, Cancelled, or what the
        attention replica refuses.
        """
        if request.resumed_at is None:
            self._refuse_running(request.request_id)
        else:
            await self._supersede(request.request_id)
        running = self._running[request.request_id] = _Running()
        try:
            if request.resumed_at is None:
                request = await self._begin(request)
            async with contextlib.aclosing(self._generate(request, running, parent or {})) as tokens:
                yield tokens
        finally:
            del self._running[request.request_id]
            running.reason = None  # where it was raised, its traceback refers to this again
            running.ended.set()

    async def _begin(self, request: Request) -> Request:
        keys = [SequenceKey(request.request_id, choice) for choice in range(request.params.n)]
        epochs = await asyncio.gather(*(self.store.create(key, self._record(request, epoch=0)) for key in keys))
        return replace(request, epochs=tuple(epochs))

    async def _generate(
        self, request: Request, running: _Running, parent: dict[str, str]
    ) -> AsyncGenerator[list[Token], None]:
        span = telemetry.tracer.start_span("generate", telemetry.context_of(parent), attributes={
            "gen_ai.operation.name": "text_completion",
            "gen_ai.usage.input_tokens": len(request.prompt_ids),
            "afd.request_id": request.request_id,
        })  # fmt: skip
        observed = metrics.RequestTimes(telemetry.exemplar(span))
        try:
            choices = [self._choice(request, choice, running, span) for choice in range(request.params.n)]
            limits = self._limits(running, request.urgency)
            async with contextlib.aclosing(merged(choices, limits, request.calls.hang_up)) as arriving:
                async for tokens in arriving:
                    observed.tokens(tokens[0].choice, len(tokens))
                    yield tokens
            observed.end("ok")
        except BaseException as error:
            observed.end(type(error).__name__)
            raise
        finally:
            span.set_attribute("gen_ai.usage.output_tokens", observed.num_tokens)
            span.end()

    async def _limits(self, running: _Running, urgency: Urgency) -> NoReturn:
        """Ends the request when it is cancelled, resumed in another stream, or takes too long."""
        left_s = urgency.time_left_s
        is_own = left_s is not None and left_s < self.timeout_s
        try:
            async with asyncio.timeout(left_s if is_own else self.timeout_s):
                await running.ending.wait()
        except TimeoutError:
            limit = "its deadline allows" if is_own else f"{self.timeout_s:g} s"
            raise DeadlineExceeded(f"the request took longer than {limit}") from None
        assert running.reason is not None
        raise running.reason

    async def _choice(
        self, request: Request, choice: int, running: _Running, span: trace.Span
    ) -> AsyncGenerator[list[Token], None]:
        """The tokens of one choice, from as many attention replicas as it takes: when one is lost another one goes on
        behind the journal."""
        ownership = await self._ownership(request, choice)
        transcript = Transcript(self.tokenizer, request.params.stop, choice)
        wanted_from = request.resumed_at[choice] if request.resumed_at else 0
        status: Status = "failed"
        try:
            async with contextlib.aclosing(self._follow(request, ownership, transcript, span)) as arriving:
                async for tokens in arriving:
                    wanted = [token for token in tokens if token.index >= wanted_from]
                    for start in range(0, len(wanted), MOST_TOKENS_AT_ONCE):
                        yield wanted[start : start + MOST_TOKENS_AT_ONCE]
            status = "finished"
            if wanted_from > (num_tokens := len(transcript.tokens)):
                raise InvalidRequest(f"the answer has {num_tokens} tokens, none with index {wanted_from}", "next_index")
        except Mismatch as error:
            raise await self._why_over(ownership.key, error) from None
        except (asyncio.CancelledError, GeneratorExit):
            status = "cancelled" if isinstance(running.reason, Cancelled) else "left"
            raise
        finally:
            self._note_end(ownership, status)

    async def _why_over(self, key: SequenceKey, error: Mismatch) -> AfdError:
        """Why this gateway's epoch is: another one has cancelled the request, or the error says it."""
        with contextlib.suppress(PeerUnavailable):
            record = await self.store.record(key)
            if record and record.status == "cancelled":
                return _cancelled(key.request_id)
        return error

    async def _ownership(self, request: Request, choice: int) -> _Ownership:
        key = SequenceKey(request.request_id, choice)
        if request.resumed_at is None:
            return _Ownership(self.store, key, self._record(request, request.epochs[choice]), is_new=True)
        record = await self.store.record(key) or self._record(request, epoch=0)
        return _Ownership(self.store, key, record, is_new=False)

    def _record(self, request: Request, epoch: int) -> RequestRecord:
        sampling = sampling_to_proto(request.params).SerializeToString()
        return RequestRecord(tuple(request.prompt_ids), sampling, "", self.balancer.fingerprint, epoch)

    async def _follow(
        self, request: Request, ownership: _Ownership, transcript: Transcript, span: trace.Span
    ) -> AsyncGenerator[list[Token], None]:
        """All tokens: the journaled ones, then those that an attention replica gives, and another one after that."""
        if request.resumed_at is not None:
            request.begun.set()
            yield transcript.extend(await self.store.journal(ownership.key))
        elif ownership.key.choice or not request.is_first:
            await request.begun.wait()
        failover = Failover(self.balancer, self.failover_timeout_s, request.begun)
        while not transcript.is_ended:
            async with failover.picked() as entry:
                try:
                    journaled = await ownership.claim(entry.replica.replica_id, transcript)
                except PeerUnavailable as error:
                    failover.failed(None, error)
                    continue
                yield transcript.extend(journaled)
                try:
                    decoded = self._decode(entry, request, ownership, transcript, span)
                    async with contextlib.aclosing(decoded) as arriving:
                        async for tokens in arriving:
                            failover.succeeded()
                            yield tokens
                except _Lost as lost:
                    failover.failed(entry, lost.reason)

    def _decode_request(
        self, request: Request, ownership: _Ownership, transcript: Transcript
    ) -> attention_pb2.DecodeRequest:
        choice = ownership.key.choice
        params = replace(request.params, n=1, stop=(), seed=_seed_of_choice(request.params.seed or 0, choice))
        return attention_pb2.DecodeRequest(
            request_id=request.request_id,
            choice=choice,
            epoch=ownership.record.epoch,
            token_ids=[*request.prompt_ids, *(token.id for token in transcript.tokens)],
            num_generated=len(transcript.tokens),
            sampling=sampling_to_proto(params),
            priority=request.urgency.priority,
            is_begun=request.begun.is_set(),
        )

    async def _decode(
        self,
        entry: AttentionReplica,
        request: Request,
        ownership: _Ownership,
        transcript: Transcript,
        span: trace.Span,
    ) -> AsyncGenerator[list[Token], None]:
        """The tokens that an attention replica gives behind the transcript. Raises _Lost, or what it refuses."""
        if transcript.is_ended:
            return
        traceparent = telemetry.traceparent(span)
        call = entry.stub.Decode(
            self._decode_request(request, ownership, transcript),
            timeout=request.urgency.time_left_s,
            metadata=(("traceparent", traceparent),) if traceparent else None,
        )
        try:
            with request.calls.cancelled_after(call):
                if await _is_accepted(call):
                    request.begun.set()
                while (response := await rpc.read(call)) is not None:
                    yield transcript.extend(map(_journaled, response.tokens))
                    if transcript.is_ended:
                        return
            raise _Lost(PeerUnavailable(f"attention replica {entry.replica.replica_id} ended the stream early"))
        except grpc.aio.AioRpcError as error:
            reason = rpc.to_peer_error(error)
            if isinstance(reason, PeerUnavailable | Overloaded):
                raise _Lost(reason) from None
            raise reason from None

    def _note_end(self, ownership: _Ownership, status: Status) -> None:
        """Writes the status behind the answer: nobody waits for it."""

        async def note() -> None:
            with contextlib.suppress(PeerUnavailable):
                await self.store.finish(ownership.key, ownership.record.epoch, status)

        task = asyncio.create_task(note())
        _BACKGROUND.add(task)
        task.add_done_callback(_BACKGROUND.discard)


_BACKGROUND: set[asyncio.Task[None]] = set()


def _params(record: RequestRecord) -> SamplingParams:
    return sampling_from_proto(sampling_pb2.SamplingParams.FromString(record.sampling))


def _cancelled(request_id: str) -> Cancelled:
    return Cancelled(f"request {request_id} was cancelled")


def _journaled(token: attention_pb2.DecodedToken) -> JournaledToken:
    return JournaledToken(
        token.id,
        token.logprob,
        tuple((top.id, top.logprob) for top in token.top_logprobs),
        finish_reason_from_proto(token.finish_reason),
    )


async def _until_ended(running: _Running, request_id: str) -> None:
    """A stream ends when its client reads on, or is found to be gone. Raises PeerUnavailable if that takes too long."""
    try:
        async with asyncio.timeout(_SUPERSEDE_TIMEOUT_S):
            await running.ended.wait()
    except TimeoutError:
        raise PeerUnavailable(f"request {request_id} has another stream, whose client does not read it") from None


async def _is_accepted(call: grpc.aio.UnaryStreamCall[Any, Any]) -> bool:
    """Whether an attention replica takes the sequence, rather than refuse it."""
    return any(key == rpc.ACCEPTED for key, _ in await call.initial_metadata() or ())


def _seed_of_choice(seed: int, choice: int) -> int:
    """Choice 0 has the request's seed; the others one derived from it."""
    if choice == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(struct.pack("<QQ", seed, choice), digest_size=8).digest(), "little") >> 1
