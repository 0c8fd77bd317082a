"""Where Redis is: one server, the master that Sentinels name, or a Cluster."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, Self, cast
from urllib.parse import quote, unquote

from redis.asyncio.connection import parse_url

_FORMS = (
    "redis://host:port/db, unix://path, redis+sentinel://host:port,host:port/service/db or "
    "redis+cluster://host:port,host:port; with TLS rediss://, rediss+sentinel:// or rediss+cluster://"
)
_URL = re.compile(
    r"(?P<scheme>rediss|redis|unix)(?:\+(?P<kind>sentinel|cluster))?://"
    r"(?:(?P<userinfo>[^?]*)@)?(?P<hosts>[^/?]*)(?P<path>/[^?]*)?(?P<query>\?.*)?"
)
_HOST = re.compile(r"(?P<host>\[[^\]]+\]|[^:\[\]]+)(?::(?P<port>\d+))?")
_PORTS = {"server": 6379, "sentinel": 26379, "cluster": 6379}

Kind = Literal["server", "sentinel", "cluster"]


@dataclass(frozen=True)
class RedisUrl:
    """A URL's parts. `options` are those of a connection, as redis-py names them."""

    kind: Kind
    tls: bool
    hosts: tuple[tuple[str, int], ...]  # none of a unix socket
    service: str  # the master's name among the Sentinels
    options: dict[str, Any]

    @classmethod
    def parse(cls, url: str) -> Self:
        """Raises ValueError with a sentence that has no password in it."""
        match = _URL.fullmatch(url)
        if match is None or (match["scheme"] == "unix" and match["kind"]):
            raise ValueError(f"give {_FORMS}")
        kind = cast(Kind, match["kind"] or "server")
        service, path = _service(match["path"] or "") if kind == "sentinel" else ("", match["path"] or "")
        is_socket = match["scheme"] == "unix"
        if "@" in (match["query"] or "") and ":" in match["hosts"] and not match["userinfo"]:
            raise ValueError(
                "write a ? in a URL's user or password as %3F; REDIS_PASSWORD of compose.yaml cannot have one"
            )
        hosts = () if is_socket else _hosts(match["hosts"] or "localhost", kind)
        plain = f"{match['scheme']}://{_quoted(match['userinfo'])}{'' if is_socket else 'host'}{path}"
        options: dict[str, Any] = dict(parse_url(plain + (match["query"] or "")))
        options.pop("host", None)
        return cls(kind, match["scheme"] == "rediss", hosts, service, options)


def without_password(url: str) -> str:
    """The URL for logs and errors. What could be a password is hidden, also one with characters that should have been
    escaped."""
    url = re.sub(r"(://[^:@/?]*):.*@", r"\1:***@", url)
    return re.sub(r"(password=)[^&]*", r"\1***", url)


def _service(path: str) -> tuple[str, str]:
    """/service/db, as the service and /db."""
    service, _, db = path.removeprefix("/").partition("/")
    if not service:
        raise ValueError("give the name of the master that the Sentinels watch: host:port,host:port/NAME")
    return unquote(service), f"/{db}"


def _hosts(text: str, kind: Kind) -> tuple[tuple[str, int], ...]:
    matches = [_HOST.fullmatch(part) for part in text.split(",")]
    hosts = tuple((match["host"].strip("[]"), int(match["port"] or _PORTS[kind])) for match in matches if match)
    if not all(matches) or not all(0 < port < 65536 for _, port in hosts):
        raise ValueError("a host is given as name:port")
    if kind == "server" and len(hosts) > 1:
        raise ValueError(f"more than one host is for Sentinels and Clusters; give {_FORMS}")
    return hosts


def _quoted(userinfo: str | None) -> str:
    """user:password@, whatever characters they have."""
    if userinfo is None:
        return ""
    user, colon, password = userinfo.partition(":")
    return f"{quote(unquote(user), safe='')}{colon}{quote(unquote(password), safe='')}@"
