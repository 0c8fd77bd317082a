"""redis-py's clients of one server, of the master that Sentinels name, and of a Cluster, made alike: a question waits
for a free connection, is asked again at once if that is closed, and leaves a server that is no master any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from redis._parsers import AsyncCommandsParser
from redis.asyncio import BlockingConnectionPool, Connection, Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode, ClusterPipeline, PipelineCommand
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import (
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    ClusterDownError,
    ConnectionError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TimeoutError,
    TryAgainError,
)

from afd.state.url import RedisUrl

_MAX_CONNECTIONS = 32  # of one process, to one server; more requests wait for their turn
_NODE_FAILURES = (ConnectionError, TimeoutError, ClusterDownError, RedisClusterException, OSError)


@asynccontextmanager
async def opened(url: RedisUrl, ca: Path | None, timeout_s: float) -> AsyncIterator[Redis]:
    """A client for what the URL names, whichever kind; a Cluster's has the same commands. `timeout_s` is the longest
    wait for a connection, and for an answer."""
    options = {
        "max_connections": _MAX_CONNECTIONS,
        **url.options,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "driver_info": None,  # saying which library this is needs a permission more
    }
    if url.tls and ca:
        options["ssl_ca_certs"] = str(ca)
    opening = {"server": _server, "sentinel": _master, "cluster": _cluster}[url.kind]
    async with opening(url, options, timeout_s) as client:
        yield client


@asynccontextmanager
async def _server(url: RedisUrl, options: dict[str, Any], timeout_s: float) -> AsyncIterator[Redis]:
    connection_class = _of_master(options.pop("connection_class", Connection))
    for host, port in url.hosts:
        options |= {"host": host, "port": port}
    pool = BlockingConnectionPool(
        **{"timeout": timeout_s, **options}, connection_class=connection_class, retry=_retry()
    )
    async with Redis.from_pool(pool) as client:
        yield client


@asynccontextmanager
async def _master(url: RedisUrl, options: dict[str, Any], timeout_s: float) -> AsyncIterator[Redis]:
    options.pop("connection_class", None)
    credentials = {name: options.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    shared = {name: value for name, value in options.items() if name.startswith(("socket_", "ssl_", "driver_"))}
    sentinel_options = {**shared, **credentials, "retry": _retry()}
    for name in ("socket_timeout", "socket_connect_timeout"):
        sentinel_options[name] = timeout_s / len(url.hosts)  # one that is lost leaves time for the others
    if url.tls:
        sentinel_options["ssl"] = True
    sentinel = Sentinel(url.hosts, sentinel_kwargs=sentinel_options)  # type: ignore[no-untyped-call]
    pool = _MasterPool(  # type: ignore[no-untyped-call]
        url.service,
        sentinel,
        **{"timeout": timeout_s, **options},
        connection_class=_of_master(SentinelManagedSSLConnection if url.tls else SentinelManagedConnection),
        retry=_retry(),
    )
    async with sentinel, Redis.from_pool(pool) as client:
        yield client


@asynccontextmanager
async def _cluster(url: RedisUrl, options: dict[str, Any], timeout_s: float) -> AsyncIterator[Redis]:
    options.pop("connection_class", None)
    client = Cluster(
        startup_nodes=[ClusterNode(host, port) for host, port in url.hosts],
        require_full_coverage=False,
        retry=_retry(),
        ssl=url.tls,
        **{**options, "max_connections": 2 * options["max_connections"]},  # commands have turns, pipelines have none
    )
    try:
        yield cast(Redis, client)
    finally:
        await client.aclose()
        await client.disconnect()


def _retry() -> Retry:
    """Once, at once: an idle connection may have been closed long ago. All that is asked can be asked twice."""
    return Retry(NoBackoff(), 1, supported_errors=(ConnectionError,))


def _of_master(connection_class: type[AbstractConnection]) -> type[AbstractConnection]:
    return type(f"Master{connection_class.__name__}", (_ToMaster, connection_class), {})


class _ToMaster(AbstractConnection):
    """Leaves a server that has become a replica: the next connection finds the master."""

    async def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().read_response(*args, **kwargs)
        except ResponseError as error:
            if "READONLY" not in str(error):  # a script's error has it in the middle
                raise
            await self.disconnect()
            raise ConnectionError("the master has become a replica") from error


class _MasterPool(SentinelConnectionPool, BlockingConnectionPool):
    """Connections to the master, as many as there may be."""


class Cluster(RedisCluster):
    """A Cluster's client that waits for a free connection, whose pipelines lose only a failing node's part, and that
    depends on no single node."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands_parser = _CommandsOfAnyNode(self)
        self._turns = asyncio.Semaphore(_MAX_CONNECTIONS)

    async def execute_command(self, *args: Any, **kwargs: Any) -> Any:
        async with self._turns:
            return await super().execute_command(*args, **kwargs)

    async def ping(self, **kwargs: Any) -> bool:
        """Raises the error of a node if none answers."""
        await self.initialize()
        asked = (node.execute_command("PING") for node in self.get_nodes())
        answers = await asyncio.gather(*asked, return_exceptions=True)
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        if len(errors) == len(answers):
            raise errors[0] if errors else ConnectionError("the Cluster has no nodes")
        return True

    def pipeline(self, transaction: Any = None, shard_hint: Any = None) -> ClusterPipeline:
        return _PipelinePerNode(self)  # type: ignore[abstract]  # as redis-py's own is

    def look_again(self) -> None:
        """Before the next command a node is asked which of them has which keys."""
        self._initialize = True

    async def disconnect(self) -> None:
        await self.nodes_manager.aclose()
        await self.nodes_manager.aclose("startup_nodes")


class _CommandsOfAnyNode(AsyncCommandsParser):
    """The table of commands, from the first node that answers; redis-py asks the same node for it again and again."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__()
        self.cluster = cluster

    async def initialize(self, node: ClusterNode | None = None) -> None:
        error: Exception = ConnectionError("the Cluster has no nodes")
        for candidate in self.cluster.get_nodes():
            if self.commands:
                return
            try:
                await super().initialize(candidate)
            except (RedisError, OSError) as failure:
                error = failure
        if not self.commands:
            raise error


class _PipelinePerNode(ClusterPipeline):
    """redis-py's own fails as a whole when one node does; here a node's failure is the reply of its commands alone.
    Commands of one key keep their order."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.cluster = cluster
        self._commands: list[tuple[Any, ...]] = []

    def execute_command(self, *args: Any, **kwargs: Any) -> ClusterPipeline:
        self._commands.append(args)
        return self

    def evalsha(self, sha: str, numkeys: int, *keys_and_args: Any) -> ClusterPipeline:
        return self.execute_command("EVALSHA", sha, numkeys, *keys_and_args)  # redis-py's own refuses it

    async def execute(self, raise_on_error: bool = True, allow_redirections: bool = True) -> list[Any]:
        await self.cluster.initialize()
        commands = [PipelineCommand(position, *command) for position, command in enumerate(self._commands)]
        self._commands = []
        parts: dict[ClusterNode, list[PipelineCommand]] = {}
        for command in commands:
            try:
                parts.setdefault(self._node_of(command), []).append(command)
            except RedisClusterException as error:  # no node has its slot
                command.result = error
        await asyncio.gather(*(self._ask(node, part) for node, part in parts.items()))
        replies = [command.result for command in commands]
        if any(isinstance(reply, _NODE_FAILURES) for reply in replies):
            self.cluster.look_again()
        failures = [reply for reply in replies if isinstance(reply, Exception)]
        if raise_on_error and failures:
            raise failures[0]
        return replies

    def _node_of(self, command: PipelineCommand) -> ClusterNode:
        name, *arguments = command.args
        node = self.cluster.get_node_from_key(arguments[2] if name == "EVALSHA" else arguments[0])
        assert node is not None
        return node

    async def _ask(self, node: ClusterNode, commands: list[PipelineCommand]) -> None:
        """Sets each command's result to its reply. A node that has its key no more says who has."""
        try:
            await node.execute_pipeline(commands)
        except (RedisError, OSError) as error:
            for command in commands:
                command.result = error
        for command in commands:
            if isinstance(command.result, TryAgainError | AskError):  # or MovedError
                try:
                    command.result = await self.cluster.execute_command(*command.args)
                except (RedisError, RedisClusterException, OSError) as error:
                    command.result = error
