"""API keys at the gateway: who asks, what the limits of the key allow, and what a request has used."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from afd.errors import AfdError, InvalidRequest, NotFound, PeerUnavailable, PermissionDenied, Unauthenticated
from afd.state.api_keys import ApiKey, ApiKeys, Demand, is_valid, slot_name, split
from services.gateway import metrics
from services.gateway.generation import Request

log = logging.getLogger(__name__)

_REMEMBERED_S = 3.0  # a revoked key is refused after so long at the latest
_SETTLE_S = 1.0
_NO_KEY = "the API key is missing: send it as `Authorization: Bearer afd-...` (SDK: api_key; command line: AFD_API_KEY)"


@dataclass(frozen=True)
class Caller:
    """Whose call it is; nobody's where no key is required."""

    key_id: str | None = None


@dataclass(eq=False)
class Account:
    """An admitted call, and the tokens of its answer that Redis does not know of yet."""

    key_id: str = ""
    slots: tuple[str, ...] = ()
    num_unsettled: int = 0

    def count(self, num_tokens: int) -> None:
        self.num_unsettled += num_tokens

    def take(self) -> int:
        taken, self.num_unsettled = self.num_unsettled, 0
        return taken


@dataclass
class Gatekeeper:
    keys: ApiKeys
    required: bool
    request_ttl_s: float  # how long it is known whose a request is
    _remembered: dict[str, tuple[float, ApiKey]] = field(default_factory=dict)
    _accounts: set[Account] = field(default_factory=set)
    _owners: dict[str, str] = field(default_factory=dict)  # of the requests that run here
    _leaving: set[asyncio.Task[None]] = field(default_factory=set)

    async def authenticate(self, authorization: str | None) -> Caller:
        """The caller by the value of its `authorization` header. Raises Unauthenticated, or PeerUnavailable without
        Redis.

        Where no key is required, what is no key of ours is ignored: OpenAI's clients always send something.
        """
        scheme, _, key = (authorization or "").strip().partition(" ")
        parts = split(key.strip()) if scheme.lower() == "bearer" else None
        if parts is None and not self.required:
            return Caller()
        if parts is None:
            metrics.REFUSED.labels(Unauthenticated.__name__).inc()
            raise Unauthenticated("the API key is not one of this mesh" if key else _NO_KEY)
        key_id, secret = parts
        if not is_valid(secret, await self._find(key_id)):
            metrics.REFUSED.labels(Unauthenticated.__name__).inc()
            raise Unauthenticated("the API key is not valid")
        return Caller(key_id)

    @contextlib.asynccontextmanager
    async def admitted(self, caller: Caller, requests: Sequence[Request]) -> AsyncIterator[Account]:
        """A call, if the caller's key has room for it; its tokens are counted by the account.

        Raises Overloaded with when to come again, or InvalidRequest for what the key can never have. A quota that is
        spent meanwhile lets the call end.
        """
        if caller.key_id is None:
            yield Account()
            return
        account = await self._admit(caller.key_id, requests)
        owned = {request.request_id: caller.key_id for request in requests}
        self._owners |= owned
        try:
            yield account
        finally:
            for request_id in owned:
                self._owners.pop(request_id, None)
            await self._leave(account)

    async def owns(self, caller: Caller, request_id: str) -> bool:
        """Whether the caller may cancel or resume a request: only its own, where keys are required."""
        owner = self._owners.get(request_id)
        if owner is None and (caller.key_id or self.required):
            owner = await self.keys.owner_of(request_id)
        return owner == caller.key_id

    async def check_operator(self, caller: Caller) -> None:
        """Where keys are required the mesh is shown to operators. Raises PermissionDenied."""
        if self.required and not ((key := await self._find(caller.key_id or "")) and key.is_operator):
            raise PermissionDenied("this API key is not an operator's: make one with `afd keys create NAME --operator`")

    async def check_owner(self, caller: Caller, request_id: str) -> None:
        """Raises NotFound for somebody else's request, as for one that is not there."""
        if not await self.owns(caller, request_id):
            raise NotFound(f"no request {request_id!r} is known")

    async def settle(self) -> None:
        """Tells Redis every second of the tokens that have come, and that what runs still does, until cancelled."""
        while True:
            await asyncio.sleep(_SETTLE_S)
            await asyncio.gather(*map(self._settle, tuple(self._accounts)))

    async def _admit(self, key_id: str, requests: Sequence[Request]) -> Account:
        call = uuid.uuid4().hex
        slots = tuple(slot_name(request.request_id, call, i) for request in requests for i in range(request.params.n))
        new = [request for request in requests if request.resumed_at is None]
        resumed = tuple(request.request_id for request in requests if request.resumed_at is not None)
        demand = Demand(len(new), sum(len(request.prompt_ids) for request in new), slots, resumed)
        try:
            _check_priority(await self._find(key_id), requests)
            await asyncio.gather(
                *(self.keys.claim(key_id, request.request_id, self.request_ttl_s) for request in requests)
            )
            await self.keys.admit(key_id, demand)
        except AfdError as error:
            metrics.REFUSED.labels(type(error).__name__).inc()
            raise
        account = Account(key_id, slots)
        self._accounts.add(account)
        return account

    async def _leave(self, account: Account) -> None:
        """Returns when the slots are free; they become so even if the caller is cancelled meanwhile."""
        self._accounts.discard(account)
        task = asyncio.create_task(self._settle(account, release=True))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        await asyncio.shield(task)

    async def _settle(self, account: Account, release: bool = False) -> None:
        num_tokens = account.take()
        try:
            await self.keys.settle(account.key_id, num_tokens, account.slots, release=release)
        except PeerUnavailable as error:
            account.num_unsettled += num_tokens
            log.warning("what API key %s uses could not be noted: %s", account.key_id, error)

    async def _find(self, key_id: str) -> ApiKey | None:
        """The key, as it was a few seconds ago at most."""
        remembered = self._remembered.pop(key_id, None)
        if remembered is None or time.monotonic() > remembered[0]:
            key = await self.keys.find(key_id)
            if key is None:
                return None
            remembered = time.monotonic() + _REMEMBERED_S, key
        self._remembered[key_id] = remembered
        return remembered[1]


def _check_priority(key: ApiKey | None, requests: Sequence[Request]) -> None:
    limit = key.limits.min_priority if key else None
    if limit is not None and any(request.urgency.priority < limit for request in requests):
        raise InvalidRequest(f"this API key may not ask for a priority below {limit}", "priority")
