"""Where Redis is, as a URL says it."""

from __future__ import annotations

import pytest

from afd.config import FFNSettings
from afd.errors import ConfigError
from afd.state.connection import connect
from afd.state.url import RedisUrl


@pytest.mark.parametrize(
    ("url", "kind", "tls", "hosts", "service", "options"),
    [
        ("redis://host", "server", False, (("host", 6379),), "", {}),
        ("redis://u:p%40@host:7000/1", "server", False, (("host", 7000),), "",
         {"username": "u", "password": "p@", "db": 1}),
        ("redis://[::1]:7000", "server", False, (("::1", 7000),), "", {}),
        ("unix://:pw@/tmp/redis.sock", "server", False, (), "", {"password": "pw", "path": "/tmp/redis.sock"}),
        ("redis+sentinel://a:1,b/main", "sentinel", False, (("a", 1), ("b", 26379)), "main", {}),
        ("rediss+sentinel://u:p/w#@:%x@a:1/main/2?sentinel_password=pw", "sentinel", True, (("a", 1),), "main",
         {"username": "u", "password": "p/w#@:%x", "db": 2, "sentinel_password": "pw"}),
        ("redis+cluster://:pw@a:1,b:2", "cluster", False, (("a", 1), ("b", 2)), "", {"password": "pw"}),
        ("rediss+cluster://a", "cluster", True, (("a", 6379),), "", {}),
    ],
)  # fmt: skip
def test_a_url_says_what_redis_is(
    url: str, kind: str, tls: bool, hosts: tuple[tuple[str, int], ...], service: str, options: dict[str, object]
) -> None:
    parsed = RedisUrl.parse(url)
    assert (parsed.kind, parsed.tls, parsed.hosts, parsed.service) == (kind, tls, hosts, service)
    assert {name: value for name, value in parsed.options.items() if name != "connection_class"} == options
    assert FFNSettings(model="m", redis=url).redis == url  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://:secret@host", "give redis://host:port/db"),
        ("unix+sentinel:///secret", "give redis://host:port/db"),
        ("redis+sentinel://:secret@a:1", "the name of the master"),
        ("redis+sentinel://:secret@a:1/", "the name of the master"),
        ("redis://u:secret@a:1,b:2", "more than one host"),
        ("redis://u:sec?ret@a:1", "write a ? in a URL's user or password as %3F"),
        ("redis://u:secret@a:99999", "a host is given as name:port"),
        ("redis+cluster://u:secret@a:1,,b:2", "a host is given as name:port"),
        ("rediss://u:secret@127.0.0.1:1", "Error 111"),
        ("redis://u:secret@127.0.0.1:1?nonsense=1", "nonsense"),
        ("redis://u:secret@127.0.0.1:1?max_connections=1&timeout=1", "Error 111"),
        ("redis+cluster://u:secret@127.0.0.1:1", "cannot be connected"),
        ("redis+cluster://u:secret@127.0.0.1:1/1", "db"),
        ("redis+sentinel://u:secret@127.0.0.1:1,127.0.0.1:2/main", "No master found for 'main'"),
    ],
)
async def test_a_url_that_cannot_be_is_refused_in_a_sentence_without_its_password(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match="no Redis answers at") as caught:
        async with connect(url):
            pass
    assert words in str(caught.value)
    assert not {"secret", "sec?ret"} & set(str(caught.value).replace("@", ":").split(":"))
