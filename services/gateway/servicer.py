"""The gRPC face of the gateway: translates, and does not think."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from afd import rpc
from afd.errors import InvalidRequest
from afd.protocol import finish_reason_to_proto, sampling_from_proto
from afd.urgency import Urgency
from afd.v1 import gateway_pb2 as pb
from afd.v1 import gateway_pb2_grpc, sampling_pb2
from services.gateway.auth import Account, Caller, Gatekeeper
from services.gateway.generation import Generator, Request
from services.gateway.tokenizer import MAX_MESSAGES
from services.gateway.topology import Topology
from services.gateway.transcript import Token


class GatewayServicer(gateway_pb2_grpc.GatewayServiceServicer):
    def __init__(
        self,
        generator: Generator,
        gatekeeper: Gatekeeper,
        topology: Topology,
        model_name: str,
        max_request_bytes: int,
    ) -> None:
        self.generator = generator
        self.gatekeeper = gatekeeper
        self.topology = topology
        self.model_name = model_name
        self.max_request_bytes = max_request_bytes

    async def Generate(self, request: pb.GenerateRequest, context: rpc.Context) -> AsyncIterator[pb.GenerateResponse]:
        async with rpc.aborting(context):
            caller = await self._caller(context)
            urgency = Urgency.within(context.time_remaining(), request.priority)
            prompt_ids = await self._prompt_ids(request)
            admitted = self.generator.admit(
                request.request_id, prompt_ids, sampling_from_proto(request.sampling), urgency
            )
            async with self._opened(caller, admitted, context) as (account, arriving):
                yield pb.GenerateResponse(started=_started(admitted))
                async for tokens in arriving:
                    account.count(len(tokens))
                    yield pb.GenerateResponse(tokens=[_token(token) for token in tokens])

    async def Resume(self, request: pb.ResumeRequest, context: rpc.Context) -> AsyncIterator[pb.ResumeResponse]:
        async with rpc.aborting(context):
            caller = await self._caller(context)
            await self.gatekeeper.check_owner(caller, request.request_id)
            urgency = Urgency.within(context.time_remaining(), request.priority)
            reopened = await self.generator.reopen(request.request_id, request.next_index, urgency)
            async with self._opened(caller, reopened, context) as (account, arriving):
                yield pb.ResumeResponse(started=_started(reopened))
                async for tokens in arriving:
                    account.count(len(tokens))
                    yield pb.ResumeResponse(tokens=[_token(token) for token in tokens])

    async def Cancel(self, request: pb.CancelRequest, context: rpc.Context) -> pb.CancelResponse:
        async with rpc.aborting(context):
            is_own = await self.gatekeeper.owns(await self._caller(context), request.request_id)
            return pb.CancelResponse(found=is_own and await self.generator.cancel(request.request_id))

    async def GetModel(self, request: pb.GetModelRequest, context: rpc.Context) -> pb.GetModelResponse:
        async with rpc.aborting(context):
            await self._caller(context)
            config, balancer = self.generator.config, self.generator.balancer
            return pb.GetModelResponse(
                name=self.model_name,
                fingerprint=balancer.fingerprint,
                vocab_size=config.vocab_size,
                max_context_tokens=balancer.max_context_tokens,
                eos_token_ids=config.eos_token_ids,
            )

    async def GetMesh(self, request: pb.GetMeshRequest, context: rpc.Context) -> pb.GetMeshResponse:
        async with rpc.aborting(context):
            await self.gatekeeper.check_operator(await self._caller(context))
            return await self.topology.mesh()

    @contextlib.asynccontextmanager
    async def _opened(
        self, caller: Caller, request: Request, context: rpc.Context
    ) -> AsyncIterator[tuple[Account, AsyncIterator[list[Token]]]]:
        async with (
            self.gatekeeper.admitted(caller, [request]) as account,
            self.generator.opened(request, rpc.metadata_of(context)) as arriving,
        ):
            yield account, arriving

    async def _caller(self, context: rpc.Context) -> Caller:
        """Raises Unauthenticated."""
        return await self.gatekeeper.authenticate(rpc.metadata_of(context).get("authorization"))

    async def _prompt_ids(self, request: pb.GenerateRequest) -> list[int]:
        if request.ByteSize() > self.max_request_bytes:
            raise InvalidRequest(f"the request is larger than the {self.max_request_bytes} bytes allowed")
        tokenizer = self.generator.tokenizer
        kind = request.WhichOneof("prompt")
        if kind == "text":
            return await tokenizer.encode(request.text)
        if kind == "token_ids":
            return list(request.token_ids.ids)
        if kind == "chat":
            first = request.chat.messages[: MAX_MESSAGES + 1]  # one more is refused
            return await tokenizer.encode_chat([{"role": m.role, "content": m.content} for m in first])
        raise InvalidRequest("the request has no prompt", "prompt")


def _started(request: Request) -> pb.Started:
    return pb.Started(request_id=request.request_id, num_prompt_tokens=len(request.prompt_ids))


def _token(token: Token) -> pb.GeneratedToken:
    return pb.GeneratedToken(
        choice=token.choice,
        index=token.index,
        id=token.id,
        text=token.text,
        logprob=token.logprob,
        top_logprobs=[sampling_pb2.TokenLogprob(id=i, logprob=v) for i, v in token.top_logprobs],
        finish_reason=finish_reason_to_proto(token.finish_reason),
    )
