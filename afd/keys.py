"""`afd keys`: API keys made, listed and revoked."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.table import Column, Table

from afd.errors import NotFound
from afd.state.api_keys import ApiKey, ApiKeys, Limits
from afd.state.connection import connect

app = typer.Typer(no_args_is_help=True, help="API keys of the gateways that share a Redis.")
console = Console()
notes = Console(stderr=True)
PIPE_WIDTH = 240  # columns, for whoever reads on

T = TypeVar("T")

RedisUrl = Annotated[
    str,
    typer.Option(
        "--redis",
        envvar="AFD_REDIS",
        help="URL of the mesh's Redis; with a password use the variable: others on this machine see options",
    ),
]
RedisCa = Annotated[Path | None, typer.Option(envvar="AFD_REDIS_CA", help="CA that the TLS of Redis is checked by")]


def _run(url: str, ca: Path | None, work: Callable[[ApiKeys], Awaitable[T]]) -> T:
    async def connected() -> T:
        async with connect(url, ca) as redis:
            return await work(ApiKeys(redis))

    return asyncio.run(connected())


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="whose it is, for people")],
    redis: RedisUrl,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="each prompt of a completion is one")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="sequences decoded at once")] = None,
    tokens_per_day: Annotated[int | None, typer.Option(min=1, help="of prompts and answers, by UTC days")] = None,
    min_priority: Annotated[int | None, typer.Option(help="lower ones, which go first, are refused")] = None,
    operator: Annotated[bool, typer.Option("--operator", help="may also use `afd top` and the console")] = False,
    redis_ca: RedisCa = None,
) -> None:
    """Prints a new key: this once, it is kept nowhere."""
    if not name.strip():
        raise typer.BadParameter("a key has a name, for people")
    limits = Limits(requests_per_minute, concurrency, tokens_per_day, min_priority)
    print(_run(redis, redis_ca, lambda keys: keys.create(name, limits, operator)))


@app.command("list")
def list_keys(redis: RedisUrl, redis_ca: RedisCa = None) -> None:
    """The keys, their limits, and what they have used today."""

    async def look_up(keys: ApiKeys) -> list[tuple[ApiKey, int]]:
        return [(key, await keys.tokens_today(key.key_id)) for key in await keys.all()]

    limits_of = "requests/min", "concurrency", "tokens/day", "min priority"
    headings = "name", "created", *limits_of, "operator", "tokens today"
    table = Table(Column("id", no_wrap=True), *headings)
    for key, tokens in _run(redis, redis_ca, look_up):
        created = datetime.datetime.fromtimestamp(key.created_s, datetime.UTC)
        limits = ("-" if limit is None else str(limit) for limit in dataclasses.astuple(key.limits))
        operator = "yes" if key.is_operator else "-"
        table.add_row(key.key_id, key.name, f"{created:%Y-%m-%d}", *limits, operator, str(tokens))
    lines = console if console.is_terminal else Console(width=PIPE_WIDTH)
    lines.print(table)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="as `afd keys list` shows it")],
    redis: RedisUrl,
    redis_ca: RedisCa = None,
) -> None:
    """Gateways refuse the key a few seconds later at the latest; what already runs ends as usual."""
    if not _run(redis, redis_ca, lambda keys: keys.revoke(key_id)):
        raise NotFound(f"there is no key {key_id}")
    notes.print(f"revoked {key_id}")
