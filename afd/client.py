"""The client SDK. Needs grpcio and protobuf, nothing else.

async with Client("localhost:50051") as client:
    async for token in client.generate("The sky is", max_tokens=16):
        print(token.text, end="", flush=True)
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import reprlib
import time
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, TypeVar, Unpack

import grpc
import grpc.aio

from afd import background
from afd.errors import AfdError, ConfigError, InternalError, InvalidRequest, NotFound, Overloaded, PeerUnavailable
from afd.model.sampling_params import MAX_CHOICES, MAX_TOP_LOGPROBS
from afd.rpc import CHANNEL_OPTIONS, read, to_error
from afd.tls import client_credentials
from afd.urgency import MOST_SECONDS, Urgency
from afd.v1 import gateway_pb2 as pb
from afd.v1 import gateway_pb2_grpc, sampling_pb2

Prompt = str | Sequence[int]
T = TypeVar("T")

_LOOK_EVERY_S = 0.005  # seconds, while it connects
_RESUME_PAUSE_S = 0.3
_NOT_OPEN = "the client is not open: use it inside `async with Client(...)`, or `with SyncClient(...)`"
_FORKED = (
    "this process was forked from one that has used a client, which gRPC does not survive: fork before that, or start "
    'processes by multiprocessing\'s "spawn"'
)
_SCHEME = re.compile("(dns|unix|unix-abstract|ipv4|ipv6|vsock|xds):")  # of gRPC's own forms
_HOST_AND_PORT = re.compile(r"(?:\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[^\s:/\[\]]+):([0-9]{1,5})")
_users: set[int] = set()  # processes that have used a client: this one, and those that it was forked from
_NUMBER = "a number"
_PRIORITY = f"a whole number from {-(2**31)} to {2**31 - 1}"
_TYPES = {  # in words, by SamplingOptions
    "max_tokens": f"a whole number from 1 to {2**31}",
    "temperature": _NUMBER,
    "top_k": "a whole number from 1 on, or -1 for all tokens",
    "top_p": _NUMBER,
    "min_p": _NUMBER,
    "repetition_penalty": _NUMBER,
    "presence_penalty": _NUMBER,
    "frequency_penalty": _NUMBER,
    "logit_bias": "a mapping of token ids to numbers",
    "seed": f"a whole number from 0 to {2**64 - 1}",
    "stop": "a text or a list of texts",
    "stop_token_ids": "a list of token ids, which are whole numbers from 0 on",
    "min_tokens": "a whole number from 0 to max_tokens",
    "ignore_eos": "True or False",
    "n": f"a whole number from 1 to {MAX_CHOICES}",
    "top_logprobs": f"a whole number from 0 to {MAX_TOP_LOGPROBS}",
}
_FINISH_REASONS: dict[int, str | None] = {
    sampling_pb2.FINISH_REASON_UNSPECIFIED: None,
    sampling_pb2.FINISH_REASON_STOP: "stop",
    sampling_pb2.FINISH_REASON_LENGTH: "length",
}


class SamplingOptions(TypedDict, total=False):
    """How tokens are chosen: keyword arguments of generate and chat. One that is None, or not given, does not apply,
    but for the defaults below. The order is logit_bias, penalties, temperature, min_p, top_k, top_p."""

    max_tokens: int | None
    """Most tokens of a choice, from 1 on; by default as many as the model's context has room for."""
    temperature: float
    """From 0 to 100. 0, the default, is greedy: the most likely token."""
    top_k: int | None
    """Keep the k most likely tokens: from 1 to the size of the vocabulary. 0 and -1 keep all, as in vLLM."""
    top_p: float | None
    """Keep the smallest set of tokens whose probabilities sum to at least this: over 0, up to 1."""
    min_p: float | None
    """Keep tokens at least this fraction as likely as the most likely one: from 0 to 1."""
    repetition_penalty: float | None
    """Over 1 makes tokens of the prompt and the output less likely, under 1 more: over 0, up to 100."""
    presence_penalty: float | None
    """Subtracted once from the logit of every token that is in the output: from -2 to 2."""
    frequency_penalty: float | None
    """Subtracted from a token's logit as often as it is in the output: from -2 to 2."""
    logit_bias: Mapping[int, float]
    """Added to the logits of these token ids, from -100 to 100 each; at most 1024 of them."""
    seed: int | None
    """From 0 to 2**64 - 1. The same request with the same seed draws the same tokens, in bfloat16 up to the rounding of
    what else is in its batch. By default the gateway picks one."""
    stop: str | Sequence[str]
    """The text ends before any of these strings, at most 16, which are not part of it."""
    stop_token_ids: Sequence[int]
    """The text ends with any of these tokens; at most 1024 of them."""
    min_tokens: int
    """Tokens before which neither an end-of-sequence token nor one of stop_token_ids is drawn: from 0, the default, to
    max_tokens."""
    ignore_eos: bool
    """Go on behind the model's end-of-sequence token. False by default."""
    n: int
    """Independent choices for the prompt, from 1, the default, to 128; `Token.choice` tells them apart."""
    top_logprobs: int
    """How many of the most likely alternatives to report with each token: from 0, the default, to 20."""


class UrgencyOptions(TypedDict, total=False):
    """Keyword arguments of generate, chat and resume: they belong to the call, and whoever resumes says them anew."""

    priority: int
    """Lower goes first where there is not room for all: from -2**31 to 2**31 - 1, by default 0."""
    timeout_s: float | None
    """Seconds for the whole answer, from 0 to 86400, a day; then DeadlineExceeded. By default the gateway's limit."""


class Options(SamplingOptions, UrgencyOptions, total=False):
    """All keyword arguments of generate and chat: those of SamplingOptions and UrgencyOptions, and `request_id`."""

    request_id: str
    """For `resume` and `cancel`: at most 128 printable ASCII characters without spaces; one is made up where none is
    given. One that runs is refused, but for another gateway, which begins the request anew, so that the earlier stream
    ends."""


@dataclass(frozen=True)
class Token:
    """One token of the answer. The texts of a choice's tokens, joined, are its text."""

    index: int
    """Its place in the choice, from 0 on."""
    id: int
    text: str
    """What it completes; empty while a character, or what may be a stop string, is not whole."""
    logprob: float
    """Natural, before penalties and temperature."""
    top_logprobs: tuple[tuple[int, float], ...]
    """Ids and log-probabilities of the most likely alternatives."""
    finish_reason: str | None
    """On the last token of a choice "stop" or "length"; None on the others."""
    choice: int
    """Which of the n choices, from 0 on."""


@dataclass(frozen=True)
class Model:
    """The model that a mesh serves."""

    name: str
    fingerprint: str
    vocab_size: int
    max_context_tokens: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Replica:
    """One running process of the mesh. protos/afd/v1/gateway.proto says more of each."""

    role: str  # "gateway", "attention" or "ffn"
    replica_id: str
    address: str
    shard: tuple[int, int] | None  # (i, M) of an FFN replica
    is_ready: bool
    links: Mapping[str, str]  # of an attention replica: transports, by FFN replica
    sequences_at: Mapping[str, int]  # of a gateway: its sequences, by attention replica
    capacity: Mapping[str, int]
    load: Mapping[str, int]
    rates: Mapping[str, float]  # counters, per second


Call = grpc.aio.UnaryStreamCall[Any, pb.GenerateResponse] | grpc.aio.UnaryStreamCall[Any, pb.ResumeResponse]


class Stream:
    """The tokens of one request. Leaving the loop, closing it or dropping it cancels the request everywhere.

    When the gateway is lost the stream goes on through another one, or the same one once it is back.
    """

    def __init__(
        self, client: Client, request: pb.GenerateRequest | pb.ResumeRequest, urgency: Urgency, call: Call
    ) -> None:
        self._client = client
        self._request = request
        self._urgency = urgency
        self._gateway, self._call = client._current, call
        self._next_index = list(request.next_index) if isinstance(request, pb.ResumeRequest) else []  # by choice
        self._unread: deque[Token] = deque()  # came with those that are shown
        self._lost_at: float | None = None
        self._is_begun = False
        self._num_refusals = 0  # before it has begun
        self._is_closed = False
        self.request_id = request.request_id
        self.num_prompt_tokens = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Token:
        """Raises the error of `afd.errors` that ended the request."""
        while not self._unread:
            if self._is_closed:
                raise StopAsyncIteration
            try:
                if (response := await read(self._call)) is None:
                    raise StopAsyncIteration
                if response.HasField("started"):
                    self._is_begun = True
                    self.num_prompt_tokens = response.started.num_prompt_tokens
                self._unread.extend(map(_token, response.tokens))
            except asyncio.CancelledError:
                if self._is_closed and not _is_being_cancelled():
                    raise StopAsyncIteration from None
                raise
            except grpc.aio.AioRpcError as error:
                go_on = self._resume if self._is_begun else self._ask_another
                if not await go_on(to_error(error)):
                    raise to_error(error) from None  # a variable would keep it, and it the call and its connection
        return self._shown(self._unread.popleft())

    def _shown(self, token: Token) -> Token:
        self._lost_at = None
        self._next_index += [0] * (token.choice + 1 - len(self._next_index))
        self._next_index[token.choice] = token.index + 1
        return token

    async def _ask_another(self, reason: AfdError) -> bool:
        """A gateway that drains, or is lost, has not begun with the request: each of the others is asked once."""
        self._num_refusals += 1
        if not isinstance(reason, PeerUnavailable) or self._num_refusals == len(self._client._addresses):
            return False
        self._turn_to_next(self._request)
        return True

    async def _resume(self, reason: AfdError) -> bool:
        """Asks the next gateway. False if it cannot be resumed, or not for too long already."""
        now = time.monotonic()
        pause_s = 0.0 if self._lost_at is None else _RESUME_PAUSE_S
        is_late = self._lost_at is not None and now + pause_s > self._lost_at + self._client.resume_timeout_s
        is_unknown = isinstance(reason, NotFound) and self._lost_at is not None and not self._next_index
        is_refused = isinstance(reason, Overloaded) and self._lost_at is not None  # nobody had room for the resumption
        if is_late or not (is_unknown or is_refused or isinstance(reason, PeerUnavailable)):
            return False
        self._lost_at = self._lost_at or now
        await asyncio.sleep(pause_s)
        priority = self._urgency.priority
        resume = pb.ResumeRequest(request_id=self.request_id, next_index=self._next_index, priority=priority)
        self._turn_to_next(self._request if is_unknown else resume)
        return True

    def _turn_to_next(self, request: pb.GenerateRequest | pb.ResumeRequest) -> None:
        self._client._turn_from(self._gateway)
        self._gateway, self._call = self._client._current, self._client._ask(request, self._urgency)

    async def aclose(self) -> None:
        """Cancels the request, if it still runs; the stream has no more tokens."""
        self._cancel()

    def _cancel(self) -> None:
        self._is_closed = True
        self._unread.clear()
        self._call.cancel()

    def __del__(self) -> None:
        with contextlib.suppress(RuntimeError):  # its event loop is closed, and with it the call
            self._call.cancel()


class Client:
    """A connection to a gateway, "host:port"; with several, which have commas between them, to the first that answers,
    and to the others when that is lost.

    `connect_timeout_s` is how long one may take to answer: it can still be starting, so that a connection that is
    refused is tried again. A stream that is lost is resumed for up to `resume_timeout_s`.

    With `tls` it is encrypted, to a gateway whose certificate this machine trusts, or that `ca` has signed, a file of
    PEM certificates. `api_key` is what `afd keys create` gave. Raises ConfigError for what cannot be.
    """

    def __init__(
        self,
        target: str,
        *,
        tls: bool | None = None,
        ca: str | os.PathLike[str] | None = None,
        api_key: str | None = None,
        connect_timeout_s: float = 10.0,
        resume_timeout_s: float = 60.0,
    ) -> None:
        self.target = target
        self._addresses = _addresses(target)
        self._channels: list[grpc.aio.Channel] = []
        self._current = 0
        self.connect_timeout_s = _seconds("connect_timeout_s", connect_timeout_s)
        self.resume_timeout_s = _seconds("resume_timeout_s", resume_timeout_s)
        if tls is False and ca is not None:
            raise ConfigError("tls=False has no use for ca: leave one of them out")
        self._is_tls = bool(tls or ca is not None)
        self._ca = Path(ca) if ca is not None else None
        self._metadata = _metadata(api_key)

    async def __aenter__(self) -> Self:
        """Raises PeerUnavailable if nothing answers there, or ConfigError for `ca`, or in a forked process."""
        _check_process()
        self._channels = [self._open_channel(address) for address in self._addresses]
        try:
            self._current = await self._first_that_answers()
        except BaseException:
            await self._close()
            raise
        return self

    @property
    def _stub(self) -> gateway_pb2_grpc.GatewayServiceAsyncStub:
        if not self._channels:
            raise ConfigError(_NOT_OPEN)
        _check_process()
        return gateway_pb2_grpc.GatewayServiceStub(self._channels[self._current])

    async def _first_that_answers(self) -> int:
        """Looks again and again: gRPC's own wait, where it is left, has events that outlive the event loop."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.connect_timeout_s):
                while True:
                    for number, channel in enumerate(self._channels):
                        if channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY:
                            return number
                    await asyncio.sleep(_LOOK_EVERY_S)
        raise PeerUnavailable(
            f"no gateway answers at {self.target} within {self.connect_timeout_s:g} s{await self._reason()}"
        )

    def _turn_from(self, gateway: int) -> None:
        """To the next one, unless another stream has turned from this one already."""
        if self._current == gateway:
            self._current = (gateway + 1) % len(self._addresses)

    def _ask(self, request: pb.GenerateRequest | pb.ResumeRequest, urgency: Urgency) -> Call:
        ask = self._stub.Resume if isinstance(request, pb.ResumeRequest) else self._stub.Generate
        return ask(request, timeout=urgency.time_left_s, metadata=self._metadata)  # type: ignore[arg-type]

    def _open_channel(self, target: str) -> grpc.aio.Channel:
        if self._is_tls:
            return grpc.aio.secure_channel(target, client_credentials(self._ca), options=CHANNEL_OPTIONS)
        return grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)

    async def _close(self) -> None:
        closing, self._channels = self._channels, []
        await asyncio.gather(*(channel.close() for channel in closing))

    async def _reason(self) -> str:
        """Why the channel does not come up, in gRPC's words."""
        try:
            await self._stub.GetModel(pb.GetModelRequest(), timeout=1.0, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            reason = error.details() or ""
            return f": {reason}{_tls_hint(reason, self._is_tls)}"
        return ""

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Stream:
        """Streams the tokens that follow a text or token ids; greedy unless a temperature is given. `Options` says what
        each option means.

        Raises InvalidRequest here or at the first token for what cannot be asked.
        """
        with _typed("prompt", "a text, or token ids, which are whole numbers from 0 on", prompt):
            if isinstance(prompt, str):
                request = pb.GenerateRequest(text=prompt)
            elif isinstance(prompt, Iterable) and not isinstance(prompt, bytes | Mapping):
                request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt))
            else:
                raise InvalidRequest(f"prompt must be a text or token ids, not {type(prompt).__name__}", "prompt")
        return self._start(request, options)

    def chat(self, messages: Sequence[Mapping[str, str]], **options: Unpack[Options]) -> Stream:
        """Streams the answer to messages like {"role": "user", "content": "..."}, by the model's chat template. A role
        is system, developer, user, assistant, tool or function. Options and errors are those of `generate`."""
        if not isinstance(messages, Iterable):
            raise InvalidRequest(f"messages must be a list, not {type(messages).__name__}", "messages")
        chat = pb.Chat(messages=[_message(f"messages.{number}", message) for number, message in enumerate(messages)])
        return self._start(pb.GenerateRequest(chat=chat), options)

    def resume(self, request_id: str, next_index: int | Sequence[int] = 0, **options: Unpack[UrgencyOptions]) -> Stream:
        """Goes on with a request that was begun through any gateway, from the token with this index on, or from one for
        each of its choices; one that is not there yet is waited for. A stream of it that is still open ends. Raises
        NotFound at the first token if it ended too long ago."""
        _refuse_unknown(options, UrgencyOptions)
        urgency = _urgency(options)
        request = pb.ResumeRequest()
        with _typed("request_id", "a text", request_id):
            request.request_id = request_id
        with _typed("next_index", "a whole number from 0 on, or a list of them", next_index):
            request.next_index.extend([next_index] if isinstance(next_index, int) else next_index)
        with _typed("priority", _PRIORITY, urgency.priority):
            request.priority = urgency.priority
        return self._streamed(request, urgency)

    async def cancel(self, request_id: str) -> bool:
        """Cancels a running request; whether there was one."""
        request = pb.CancelRequest()
        with _typed("request_id", "a text", request_id):
            request.request_id = request_id
        with _our_errors():
            return bool((await self._stub.Cancel(request, metadata=self._metadata)).found)

    async def get_model(self) -> Model:
        with _our_errors():
            model = await self._stub.GetModel(pb.GetModelRequest(), metadata=self._metadata)
        return Model(
            model.name, model.fingerprint, model.vocab_size, model.max_context_tokens, tuple(model.eos_token_ids)
        )

    async def get_mesh(self) -> list[Replica]:
        """All replicas and what they do. Raises PermissionDenied where it needs an operator's API key."""
        with _our_errors():
            mesh = await self._stub.GetMesh(pb.GetMeshRequest(), metadata=self._metadata)
        return [_replica(replica) for replica in mesh.replicas]

    def _streamed(self, request: pb.GenerateRequest | pb.ResumeRequest, urgency: Urgency) -> Stream:
        return Stream(self, request, urgency, self._ask(request, urgency))

    def _start(self, request: pb.GenerateRequest, options: Options) -> Stream:
        _refuse_unknown(options, Options)
        sampling = {name: options.get(name) for name in SamplingOptions.__annotations__}
        given = {name: value for name, value in sampling.items() if value is not None}
        if isinstance(options.get("stop"), str):
            given["stop"] = [options["stop"]]
        urgency = _urgency(options)
        request_id = options.get("request_id") or uuid.uuid4().hex
        with _typed("request_id", "a text", request_id):
            request.request_id = request_id
        with _typed("priority", _PRIORITY, urgency.priority):
            request.priority = urgency.priority
        if given.get("top_k") in (0, -1):
            del given["top_k"]
        for name, value in given.items():
            with _typed(name, _TYPES[name], value):
                if name == "n" and not value:  # which the contract takes for a field that is not set
                    raise ValueError
                request.sampling.MergeFrom(sampling_pb2.SamplingParams(**{name: value}))  # type: ignore[arg-type]
        return self._streamed(request, urgency)


class SyncClient:
    """The same without asyncio, for any number of threads: a thin form over Client."""

    def __init__(
        self,
        target: str,
        *,
        tls: bool | None = None,
        ca: str | os.PathLike[str] | None = None,
        api_key: str | None = None,
        connect_timeout_s: float = 10.0,
        resume_timeout_s: float = 60.0,
    ) -> None:
        self._client = Client(
            target,
            tls=tls,
            ca=ca,
            api_key=api_key,
            connect_timeout_s=connect_timeout_s,
            resume_timeout_s=resume_timeout_s,
        )
        self._is_open = False

    def __enter__(self) -> Self:
        """Raises PeerUnavailable if nothing answers there, or ConfigError for `ca`, or in a forked process."""
        _check_process()
        background.run(self._client.__aenter__())
        self._is_open = True
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_open = False
        if not _is_forked():
            background.run(self._client.__aexit__(None, None, None))

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Iterator[Token]:
        """As Client.generate; leaving the loop cancels the request."""
        return self._iterate(self._start(lambda: self._client.generate(prompt, **options)))

    def chat(self, messages: Sequence[Mapping[str, str]], **options: Unpack[Options]) -> Iterator[Token]:
        """As Client.chat; leaving the loop cancels the request."""
        return self._iterate(self._start(lambda: self._client.chat(messages, **options)))

    def resume(
        self, request_id: str, next_index: int | Sequence[int] = 0, **options: Unpack[UrgencyOptions]
    ) -> Iterator[Token]:
        """As Client.resume; leaving the loop cancels the request."""
        return self._iterate(self._start(lambda: self._client.resume(request_id, next_index, **options)))

    def cancel(self, request_id: str) -> bool:
        """As Client.cancel."""
        return self._run(self._client.cancel(request_id))

    def get_model(self) -> Model:
        """As Client.get_model."""
        return self._run(self._client.get_model())

    def get_mesh(self) -> list[Replica]:
        """As Client.get_mesh."""
        return self._run(self._client.get_mesh())

    def _start(self, begin: Callable[[], Stream]) -> Stream:
        async def on_loop() -> Stream:
            return begin()

        return self._run(on_loop())

    def _iterate(self, stream: Stream) -> Iterator[Token]:
        async def following() -> Token | None:
            return await anext(stream, None)

        try:
            while (token := self._run(following())) is not None:
                yield token
        finally:
            if self._is_open and not _is_forked():
                background.loop().call_soon_threadsafe(stream._cancel)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            if not self._is_open:
                raise ConfigError(_NOT_OPEN)
            _check_process()
        except ConfigError:
            work.close()
            raise
        return background.run(work)


def _is_forked() -> bool:
    """From a process that has used a client."""
    return bool(_users - {os.getpid()})


def _check_process() -> None:
    """Raises ConfigError."""
    if _is_forked():
        raise ConfigError(_FORKED)
    _users.add(os.getpid())


def _addresses(target: str) -> list[str]:
    """Of a target's gateways. Raises ConfigError."""
    if not isinstance(target, str):
        raise ConfigError(f'target must be a text like "localhost:50051", not {target!r}')
    addresses = [address for part in target.split(",") if (address := part.strip())]
    if not addresses:
        raise ConfigError("target names no gateway: give its gRPC address, host:port")
    for address in addresses:
        if re.match("https?://", address):
            raise ConfigError(f"target is the gateway's gRPC address, host:port, not a URL like {address}")
        found = _HOST_AND_PORT.fullmatch(address)
        if not _SCHEME.match(address) and not (found and 1 <= int(found[1]) <= 65535):
            raise ConfigError(
                f"target is the gateway's gRPC address, host:port, with a port from 1 to 65535 and IPv6 in brackets, "
                f"not {address!r}"
            )
    return addresses


def _metadata(api_key: str | None) -> tuple[tuple[str, str]] | None:
    """Of every call. Raises ConfigError, which does not say the key."""
    if not isinstance(api_key, str | None):
        raise ConfigError("api_key must be a text")
    key = (api_key or "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise ConfigError("api_key has characters that no API key has")
    return (("authorization", f"Bearer {key}"),) if key else None


def _seconds(name: str, value: float) -> float:
    """Raises ConfigError."""
    if not isinstance(value, int | float) or not value >= 0:  # a NaN is not
        raise ConfigError(f"{name} must be a number of seconds, not {value!r}")
    return value


def _replica(replica: pb.Replica) -> Replica:
    return Replica(
        role=replica.role,
        replica_id=replica.replica_id,
        address=replica.address,
        shard=(replica.shard, replica.num_shards) if replica.num_shards else None,
        is_ready=replica.is_ready,
        links=dict(replica.links),
        sequences_at=dict(replica.sequences_at),
        capacity=dict(replica.capacity),
        load=dict(replica.load),
        rates=dict(replica.rates),
    )


def _tls_hint(reason: str, is_tls: bool) -> str:
    """What gRPC's words mean."""
    if not is_tls:
        return "; if it wants TLS, give tls=True or ca (--tls or --ca)" if "Socket closed" in reason else ""
    if "WRONG_VERSION_NUMBER" in reason:
        return "; it speaks no TLS, so give neither tls nor ca"
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        return "; another CA has signed its certificate: give that one's as ca (--ca)"
    return ""


def _refuse_unknown(options: Mapping[str, object], known: Any) -> None:
    unknown = options.keys() - known.__annotations__.keys()
    if unknown:
        raise InvalidRequest(f"no such parameter: {', '.join(sorted(unknown))}", min(unknown))


def _message(place: str, message: Mapping[str, str]) -> pb.ChatMessage:
    """Raises InvalidRequest, in the words of the HTTP API."""
    if not isinstance(message, Mapping):
        raise InvalidRequest(f'{place}: must be like {{"role": "user", "content": "..."}}', "messages")
    for name in ("role", "content"):
        if name not in message:
            raise InvalidRequest(f"{place}.{name} is missing", "messages")
        if not isinstance(message[name], str):
            raise InvalidRequest(f"{place}.{name}: must be a text", "messages")
    if unknown := message.keys() - {"role", "content"}:
        raise InvalidRequest(f"{place} has no field {min(unknown)!r}, only role and content", "messages")
    with _typed(place, "texts", message, "messages"):
        return pb.ChatMessage(**message)


def _urgency(options: UrgencyOptions) -> Urgency:
    """From now on. Raises InvalidRequest."""
    timeout_s = options.get("timeout_s")
    with _typed("timeout_s", f"a number of seconds from 0 to {MOST_SECONDS}", timeout_s):
        if timeout_s is not None and not 0 <= timeout_s <= MOST_SECONDS:  # a NaN is in no range
            raise ValueError
    return Urgency.within(timeout_s, options.get("priority") or 0)


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


@contextlib.contextmanager
def _typed(name: str, type_: str, value: object, param: str | None = None) -> Iterator[None]:
    """Raises InvalidRequest, which says in words what type it has, for a value that protobuf does not take."""
    try:
        yield
    except UnicodeEncodeError:
        raise InvalidRequest(f"{name} has half of a surrogate pair, which is no text", param or name) from None
    except (TypeError, ValueError):
        raise InvalidRequest(f"{name} must be {type_}, not {reprlib.repr(value)}", param or name) from None


@contextlib.contextmanager
def _our_errors() -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise to_error(error) from None


def _token(message: pb.GeneratedToken) -> Token:
    if message.finish_reason not in _FINISH_REASONS:
        raise InternalError(f"the gateway gave a finish reason that this client does not know: {message.finish_reason}")
    return Token(
        index=message.index,
        id=message.id,
        text=message.text,
        logprob=message.logprob,
        top_logprobs=tuple((top.id, top.logprob) for top in message.top_logprobs),
        finish_reason=_FINISH_REASONS[message.finish_reason],
        choice=message.choice,
    )
