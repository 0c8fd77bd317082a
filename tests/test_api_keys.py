"""API keys: who may ask the gateway, and how much; the limits hold across gateways that share a Redis."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest
import redis

from afd import Client, SyncClient, Token
from afd.cli import main
from afd.errors import AfdError, ConfigError, InvalidRequest, Overloaded, Unauthenticated
from afd.mesh import Mesh
from afd.model.sampling_params import SamplingParams
from afd.state import api_keys
from afd.state.api_keys import ApiKeys, Limits
from afd.state.connection import connect
from afd.urgency import Urgency
from services.gateway import auth
from services.gateway.auth import Caller, Gatekeeper
from services.gateway.generation import Request
from tests.conftest import Model, StartMesh, embedded_redis

DAY_S = 86400


@dataclass
class Gateways:
    """Two of them, as far as keys go, and their Redis."""

    keys: ApiKeys
    one: Gatekeeper
    other: Gatekeeper

    async def caller(self, **limits: int) -> Caller:
        return await self.one.authenticate(f"Bearer {await self.keys.create('somebody', Limits(**limits))}")


@pytest.fixture
async def gateways(real_redis: str) -> AsyncIterator[Gateways]:
    async with connect(real_redis) as redis, connect(real_redis) as other:
        yield Gateways(ApiKeys(redis), Gatekeeper(ApiKeys(redis), True, 60), Gatekeeper(ApiKeys(other), True, 60))


_numbers = iter(range(1_000_000))


def request(
    num_prompt_tokens: int = 5,
    n: int = 1,
    request_id: str = "",
    priority: int = 0,
    resumed_at: tuple[int, ...] | None = None,
) -> Request:
    request_id = request_id or f"request-{next(_numbers)}"
    params = SamplingParams(n=n, max_tokens=9, seed=1)
    return Request(request_id, [7] * num_prompt_tokens, params, Urgency(priority), resumed_at)


async def endless() -> AsyncGenerator[int, None]:
    for token in range(1_000_000):
        yield token


async def some(number: int) -> AsyncGenerator[int, None]:
    for token in range(number):
        yield token


async def metered(
    gatekeeper: Gatekeeper, caller: Caller, wanted: Request, tokens: AsyncGenerator[int, None]
) -> AsyncGenerator[int, None]:
    async with gatekeeper.admitted(caller, [wanted]) as account:
        async for token in tokens:
            account.count(1)
            yield token


async def ask(gatekeeper: Gatekeeper, caller: Caller, num_tokens: int = 3, **wanted: Any) -> list[int]:
    return [token async for token in metered(gatekeeper, caller, request(**wanted), some(num_tokens))]


@contextlib.asynccontextmanager
async def running(gatekeeper: Gatekeeper, caller: Caller, **wanted: Any) -> AsyncIterator[AsyncGenerator[int, None]]:
    """A request that has its first token, and goes on until the block is left."""
    async with contextlib.aclosing(metered(gatekeeper, caller, request(**wanted), endless())) as tokens:
        await anext(tokens)
        yield tokens


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer afd-12", "Basic abc", f"Bearer afd-{'0' * 12}-{'0' * 64}"]
)
async def test_no_key_and_a_key_that_is_none_are_refused(gateways: Gateways, header: str | None) -> None:
    with pytest.raises(Unauthenticated) as caught:
        await gateways.one.authenticate(header)
    assert "0" * 64 not in str(caught.value)


async def test_a_wrong_secret_is_refused_and_the_right_one_is_not(gateways: Gateways) -> None:
    key = await gateways.keys.create("somebody", Limits())
    wrong = key[:-1] + ("0" if key[-1] != "0" else "1")
    for gatekeeper in (gateways.one, gateways.other, gateways.one):
        assert (await gatekeeper.authenticate(f"bearer {key}")).key_id == key.split("-")[1]
        with pytest.raises(Unauthenticated):
            await gatekeeper.authenticate(f"Bearer {wrong}")


async def test_redis_does_not_hold_the_key(gateways: Gateways) -> None:
    key = await gateways.keys.create("somebody", Limits(concurrency=2))
    caller = await gateways.one.authenticate(f"Bearer {key}")
    await ask(gateways.one, caller)
    redis = gateways.keys.redis
    secret = key.split("-")[2]
    for name in await redis.keys("*"):
        kind = (await redis.type(name)).decode()
        value = await redis.hgetall(name) if kind == "hash" else await redis.dump(name)
        assert secret.encode() not in name + repr(value).encode()


async def test_a_revoked_key_is_refused_at_once_to_generate_and_soon_for_the_rest(
    gateways: Gateways, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "_REMEMBERED_S", 0.1)
    key = await gateways.keys.create("somebody", Limits())
    caller = await gateways.one.authenticate(f"Bearer {key}")
    async with running(gateways.one, caller) as tokens:
        assert await gateways.keys.revoke(key.split("-")[1])
        assert not await gateways.keys.revoke(key.split("-")[1])
        with pytest.raises(Unauthenticated):
            await ask(gateways.one, caller)
        await anext(tokens)  # what runs goes on
    await asyncio.sleep(0.15)
    with pytest.raises(Unauthenticated):
        await gateways.one.authenticate(f"Bearer {key}")


async def test_a_key_has_a_most_urgent_priority(gateways: Gateways) -> None:
    caller = await gateways.caller(min_priority=-1)
    for priority in (5, 0, -1):
        await ask(gateways.one, caller, priority=priority)
    with pytest.raises(InvalidRequest, match="may not ask for a priority below -1") as raised:
        await ask(gateways.one, caller, priority=-2)
    assert raised.value.param == "priority"
    await ask(gateways.one, await gateways.caller(), priority=-(1 << 31))


async def test_a_rate_holds_across_gateways_and_says_when_to_come_again(gateways: Gateways) -> None:
    caller = await gateways.caller(requests_per_minute=3)
    for gatekeeper in (gateways.one, gateways.other, gateways.one):
        await ask(gatekeeper, caller)
    for gatekeeper in (gateways.one, gateways.other):
        with pytest.raises(Overloaded, match="3 requests a minute") as caught:
            await ask(gatekeeper, caller)
        assert caught.value.retry_after_s is not None
        assert 55 < caught.value.retry_after_s <= 60


async def test_a_rate_has_room_again_after_a_minute(gateways: Gateways) -> None:
    caller = await gateways.caller(requests_per_minute=2)
    await ask(gateways.one, caller)
    await ask(gateways.one, caller)
    recent, redis = f"afd:key:{{{caller.key_id}}}:recent", gateways.keys.redis
    times = [int(time) for time in await redis.lrange(recent, 0, -1)]
    await redis.lset(recent, 0, str(times[0] - 60_000))  # as if the first of them had been a minute ago
    await ask(gateways.one, caller)
    with pytest.raises(Overloaded):
        await ask(gateways.one, caller)


async def test_concurrency_holds_across_gateways_and_is_given_back(gateways: Gateways) -> None:
    caller = await gateways.caller(concurrency=2)
    async with running(gateways.one, caller):
        async with running(gateways.other, caller):
            for gatekeeper in (gateways.one, gateways.other):
                with pytest.raises(Overloaded, match="2 sequences") as caught:
                    await ask(gatekeeper, caller)
                assert caught.value.retry_after_s is not None
        await ask(gateways.one, caller)  # a client that left has given its slot back
        with pytest.raises(Overloaded):
            await ask(gateways.one, caller, n=2)


async def test_who_resumes_a_request_takes_its_slots_over_and_no_others(gateways: Gateways) -> None:
    caller = await gateways.caller(concurrency=3, requests_per_minute=3, tokens_per_day=20)
    async with (
        running(gateways.one, caller, request_id="lost", n=2, num_prompt_tokens=15),  # its gateway is gone
        running(gateways.other, caller, request_id="lost", n=2, resumed_at=(1, 1)),
        running(gateways.other, caller, request_id="other"),
    ):
        with pytest.raises(Overloaded, match="3 sequences"):
            await ask(gateways.other, caller, request_id="left", resumed_at=(0,))
        await ask(gateways.one, caller, request_id="other", resumed_at=(0,))
        with pytest.raises(Overloaded, match="20 tokens a day"):
            await ask(gateways.one, caller)
    await ask(gateways.one, caller, request_id="other", resumed_at=(0,))


async def test_many_at_once_get_no_more_than_there_is(gateways: Gateways) -> None:
    caller = await gateways.caller(concurrency=4)
    started, release = 0, asyncio.Event()

    async def hold() -> AsyncGenerator[int, None]:
        nonlocal started
        started += 1
        await release.wait()
        yield 1

    async def one(gatekeeper: Gatekeeper) -> bool:
        try:
            return [token async for token in metered(gatekeeper, caller, request(), hold())] == [1]
        except Overloaded:
            return False

    asks = [asyncio.create_task(one((gateways.one, gateways.other)[number % 2])) for number in range(24)]
    while sum(task.done() for task in asks) < 20:
        await asyncio.sleep(0.01)
    assert started == 4
    release.set()
    assert sum(await asyncio.gather(*asks)) == 4


async def test_slots_of_a_killed_gateway_are_free_again_and_those_of_a_living_one_are_not(
    gateways: Gateways, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_keys, "SLOT_TTL_S", 0.4)
    monkeypatch.setattr(auth, "_SETTLE_S", 0.1)
    caller = await gateways.caller(concurrency=2)
    alive = asyncio.create_task(gateways.one.settle())
    async with running(gateways.one, caller), running(gateways.other, caller):  # nobody renews for the other one
        with pytest.raises(Overloaded):
            await ask(gateways.one, caller)
        await asyncio.sleep(0.6)
        await ask(gateways.one, caller)
        with pytest.raises(Overloaded):
            await ask(gateways.one, caller, n=2)
    alive.cancel()


async def test_tokens_of_prompts_and_answers_count_towards_the_day_on_all_gateways(gateways: Gateways) -> None:
    caller = await gateways.caller(tokens_per_day=20)
    assert caller.key_id
    await ask(gateways.one, caller, num_prompt_tokens=5, num_tokens=3)
    assert await gateways.keys.tokens_today(caller.key_id) == 8
    with pytest.raises(Overloaded, match="20 tokens a day") as caught:
        await ask(gateways.other, caller, num_prompt_tokens=13)
    assert caught.value.retry_after_s is not None
    assert 0 < caught.value.retry_after_s <= DAY_S
    await ask(gateways.other, caller, num_prompt_tokens=12, num_tokens=50)  # one that runs may end
    assert await gateways.keys.tokens_today(caller.key_id) == 70
    with pytest.raises(Overloaded):
        await ask(gateways.one, caller, num_prompt_tokens=1)


async def test_tokens_of_a_running_answer_are_known_within_a_second(
    gateways: Gateways, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "_SETTLE_S", 0.05)
    caller = await gateways.caller(tokens_per_day=100)
    assert caller.key_id
    settling = asyncio.create_task(gateways.one.settle())
    async with running(gateways.one, caller, num_prompt_tokens=5) as tokens:
        for _ in range(30):
            await anext(tokens)
        await asyncio.sleep(0.2)
        assert await gateways.keys.tokens_today(caller.key_id) == 5 + 31
    assert await gateways.keys.tokens_today(caller.key_id) == 5 + 31
    settling.cancel()


async def test_a_quota_begins_anew_with_the_day(gateways: Gateways) -> None:
    caller = await gateways.caller(tokens_per_day=10)
    await ask(gateways.one, caller, num_prompt_tokens=10)
    name, redis = f"afd:key:{{{caller.key_id}}}:tokens", gateways.keys.redis
    await redis.hincrby(name, "day", -1)
    await ask(gateways.one, caller, num_prompt_tokens=10)


@pytest.mark.parametrize(
    ("limits", "wanted"),
    [({"tokens_per_day": 10}, {"num_prompt_tokens": 11}), ({"concurrency": 2}, {"n": 3})],
)
async def test_what_a_key_can_never_have_is_not_put_off(
    gateways: Gateways, limits: dict[str, int], wanted: dict[str, int]
) -> None:
    with pytest.raises(InvalidRequest, match="this call alone"):
        await ask(gateways.one, await gateways.caller(**limits), **wanted)


async def test_a_refused_request_uses_nothing_up(gateways: Gateways) -> None:
    caller = await gateways.caller(requests_per_minute=2, concurrency=1, tokens_per_day=100)
    async with running(gateways.one, caller):
        for _ in range(5):
            with pytest.raises(Overloaded, match="sequences"):
                await ask(gateways.one, caller)
    await ask(gateways.one, caller)


async def test_a_request_belongs_to_the_key_that_made_it(gateways: Gateways) -> None:
    owner, stranger = await gateways.caller(), await gateways.caller()
    async with running(gateways.one, owner, request_id="mine"):
        for gatekeeper in (gateways.one, gateways.other):
            assert await gatekeeper.owns(owner, "mine")
            assert not await gatekeeper.owns(stranger, "mine")
        with pytest.raises(InvalidRequest, match="taken"):
            await ask(gateways.other, stranger, request_id="mine")
    assert await gateways.other.owns(owner, "mine")


async def test_without_keys_required_any_header_goes_but_a_wrong_key_does_not(gateways: Gateways) -> None:
    gatekeeper = Gatekeeper(gateways.keys, False, 60)
    for header in (None, "Bearer none", "Bearer sk-something"):
        assert await gatekeeper.authenticate(header) == Caller()
    with pytest.raises(Unauthenticated):
        await gatekeeper.authenticate(f"Bearer afd-{'0' * 12}-{'0' * 64}")


@dataclass(frozen=True)
class Served:
    mesh: Mesh
    redis: str

    def key(self, *options: str) -> str:
        """A new one, by the command line."""
        return run("create", "somebody", "--redis", self.redis, *options).strip()

    def client(self, key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.mesh.http_url}/v1", api_key=key, max_retries=0, timeout=30)

    @property
    def model(self) -> str:
        return self.mesh.options.model.name


def run(*arguments: str) -> str:
    """What `afd keys` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main(["keys", *arguments])
    return printed.getvalue()


@pytest.fixture(scope="module")
def served(make_model: Callable[[int], Model], start_mesh: StartMesh) -> Iterator[Served]:
    with (
        embedded_redis() as redis,
        start_mesh(make_model(6).path, 1, 0, redis=redis, require_api_key=True) as mesh,
    ):
        yield Served(mesh, redis)


def test_grpc_and_http_want_a_key(served: Served) -> None:
    wrong = f"afd-{'0' * 12}-{'0' * 64}"
    for api_key in (None, wrong):
        with SyncClient(served.mesh.gateway.address, api_key=api_key) as client:
            calls: list[Callable[[], Any]] = [
                lambda: next(client.generate([5, 6])),
                client.get_model,
                lambda: client.cancel("x"),
            ]
            for call in calls:
                with pytest.raises(Unauthenticated):
                    call()
    with pytest.raises(openai.AuthenticationError):
        served.client(wrong).models.list()
    for path in ("/health", "/metrics"):
        assert urllib.request.urlopen(served.mesh.http_url + path, timeout=5).status == 200


def test_the_right_key_decodes_over_grpc_and_http(served: Served) -> None:
    key = served.key()
    with SyncClient(served.mesh.gateway.address, api_key=key) as client:
        ids = [token.id for token in client.generate([5, 6], max_tokens=5, ignore_eos=True)]
    assert len(ids) == 5
    answer = served.client(key).completions.create(
        model=served.model,
        prompt=[5, 6],
        max_tokens=5,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    assert answer.choices[0].token_ids == ids  # type: ignore[attr-defined]
    assert f" {2 * (2 + 5)} " in run("list", "--redis", served.redis).replace("│", " ")


def test_what_is_over_the_limit_says_when_to_come_again(served: Served) -> None:
    key = served.key("--requests-per-minute", "1")
    with SyncClient(served.mesh.gateway.address, api_key=key) as client:
        next(client.generate([5], max_tokens=1))
        with pytest.raises(Overloaded) as caught:
            next(client.generate([5], max_tokens=1, request_id="refused"))
    assert caught.value.retry_after_s is not None
    assert 50 < caught.value.retry_after_s <= 60
    with redis.Redis.from_url(served.redis) as server:
        assert list(server.scan_iter("afd:request:*refused*")) == [], "nothing is written down for it"
        assert len(list(server.scan_iter("afd:request:*"))) > 0
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as refused:
            served.client(key).completions.create(model=served.model, prompt=[5], max_tokens=1, stream=stream)
        assert 50 < int(refused.value.response.headers["retry-after"]) <= 60


def test_a_key_cancels_its_own_requests_only(served: Served) -> None:
    async def ask() -> None:
        address = served.mesh.gateway.address
        async with Client(address, api_key=served_keys[0]) as owner, Client(address, api_key=served_keys[1]) as other:
            stream = owner.generate([5, 6], request_id="mine", max_tokens=900, ignore_eos=True)
            await anext(stream)
            assert not await other.cancel("mine")
            await anext(stream)
            assert await owner.cancel("mine")

    served_keys = served.key(), served.key()
    asyncio.run(ask())


def test_a_client_that_leaves_a_stream_gives_its_slot_back(served: Served) -> None:
    client = served.client(served.key("--concurrency", "1"))
    for _ in range(3):
        with client.completions.create(
            model=served.model, prompt=[5], max_tokens=900, stream=True, extra_body={"ignore_eos": True}
        ) as stream:
            next(iter(stream))
            with pytest.raises(openai.RateLimitError):
                client.completions.create(model=served.model, prompt=[5], max_tokens=1)
        for _ in range(100):
            with contextlib.suppress(openai.RateLimitError):
                client.completions.create(model=served.model, prompt=[5], max_tokens=1)
                break
        else:
            pytest.fail("the slot was not given back")


def test_a_stream_goes_on_in_another_one_whatever_the_key_allows(served: Served) -> None:
    async def ask() -> list[Token]:
        async with Client(served.mesh.gateway.address, api_key=f"{key}\n") as client:
            stream = client.generate([5, 6], request_id="moving", max_tokens=300, ignore_eos=True)
            first = [await anext(stream) for _ in range(60)]
            return first + [token async for token in client.resume("moving", 60)]

    key = served.key("--concurrency", "1", "--requests-per-minute", "1", "--tokens-per-day", "50")
    assert [token.index for token in asyncio.run(ask())] == list(range(300))


def test_what_is_no_key_at_all_is_refused_before_it_is_sent(served: Served) -> None:
    for wrong in ("afd-1\nafd-2", "schlüssel"):
        with pytest.raises(ConfigError, match="api_key has characters"), SyncClient("127.0.0.1:1", api_key=wrong):
            pass


def test_ids_of_keys_are_whole_where_a_line_is_short(served: Served) -> None:
    key_id = served.key("--concurrency", "100000", "--tokens-per-day", "1000000000").split("-")[1]
    assert key_id in run("list", "--redis", served.redis)


def test_a_large_body_without_a_key_is_refused_in_words(served: Served) -> None:
    body = json.dumps({"model": served.model, "prompt": "x" * (1 << 20)}).encode()
    asked = urllib.request.Request(f"{served.mesh.http_url}/v1/completions", body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(asked, timeout=10)
    assert caught.value.code == 401
    assert caught.value.headers["WWW-Authenticate"] == "Bearer"
    assert "Authorization: Bearer" in json.load(caught.value)["error"]["message"]


def test_a_revoked_key_is_refused(served: Served) -> None:
    key = served.key()
    run("revoke", key.split("-")[1], "--redis", served.redis)
    with SyncClient(served.mesh.gateway.address, api_key=key) as client, pytest.raises(AfdError, match="not valid"):
        next(client.generate([5]))
