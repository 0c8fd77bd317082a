"""Malformed HTTP: bodies that are nearly requests, and bytes that are nearly HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from random import Random
from typing import Any

from benchmarks.fuzzing.answers import HANG_S, Answer
from benchmarks.fuzzing.mutations import hostile_json, json_bytes, mutated_bytes, mutated_json

COMPLETION: dict[str, Any] = {
    "prompt": "ab", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "n": 1, "stop": ["zz"], "seed": 3,
    "logit_bias": {"5": 1.0}, "presence_penalty": 0.1, "frequency_penalty": 0.1, "top_k": 3, "min_p": 0.1,
    "repetition_penalty": 1.1, "stop_token_ids": [9], "min_tokens": 0, "ignore_eos": False, "logprobs": 1,
    "return_token_ids": True, "echo": False, "best_of": 1, "suffix": None, "stream": False, "user": "u",
    "metadata": {"a": "b"}, "request_id": None, "priority": 1, "timeout_s": 20,
}  # fmt: skip
CHAT: dict[str, Any] = {
    "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}],
    "max_completion_tokens": 2, "logprobs": True, "top_logprobs": 2, "response_format": {"type": "text"},
    "add_generation_prompt": True, "stream": True, "stream_options": {"include_usage": True},
}  # fmt: skip
_RAW_SHARE = 0.25
_PATHS = ("/v1/completions", "/v1/chat/completions")
_OTHER_PATHS = (
    "/", "/health", "/v1/models", "/v1/models/%ff%00", "/v1/models/" + "x" * 3000, "/v1/completions/",
    "//v1/completions", "/v1/completions?a=%zz", "http://x/v1/models", "*", "/\xff", "/v1/../metrics", "/metrics",
    "/%c3%28", "/openapi.json",
)  # fmt: skip
_HEADERS = (
    "Last-Event-ID: {name}/0", "Last-Event-ID: x/0.1.2", "Last-Event-ID: /", "Last-Event-ID: \xb2/\xb2",
    "Last-Event-ID: a/" + ".".join("0" * 2000), "Authorization: Bearer afd-" + "a" * 64, "Authorization: \xff\xfe",
    "Authorization: Basic", "Authorization:", "traceparent: 00-" + "f" * 32 + "-" + "0" * 16 + "-ff",
    "traceparent: \xe9",
    "Expect: 100-continue", "Upgrade: websocket\r\nConnection: Upgrade", "Content-Encoding: gzip", "Host: a b",
    "Content-Type: application/json; charset=utf-16", "Content-Type: \xff", "X: " + "y" * 3000, "Accept-Encoding: gzip",
)  # fmt: skip
_BROKEN_HEADS = (
    "Content-Length: -1", "Content-Length: 99999999999999999999", "Content-Length: 3, 3", "Content-Length: x",
    "Transfer-Encoding: chunked\r\nContent-Length: 4", "Transfer-Encoding: gzip, chunked",
    "Transfer-Encoding: xchunked",
    "Transfer-Encoding: chunked", ": empty", "No colon at all", "Na me: x", " folded", "X\0: y",
    "X: y\rZ: w", "Content-Length:",
)  # fmt: skip
_BAD_CHUNKS = (
    b"zz\r\n",
    b"-1\r\n",
    b"ffffffffffffffffff\r\n",
    b"5\r\nabc\r\n",
    b"0\r\n",
    b"3;ext=\0\r\nabc",
    b"",
    b"5\nabcde\n0\n\n",
)


class HttpThrower:
    """Keeps its connection as long as the server does."""

    def __init__(self, address: str, other_addresses: list[str], model_name: str) -> None:
        """`other_addresses` are of plain HTTP servers that get raw bytes only."""
        self.address = address
        self.other_addresses = other_addresses
        self.model_name = model_name
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def throw(self, chooser: Random) -> list[Answer]:
        if chooser.random() < _RAW_SHARE:
            return [await self._throw_raw(chooser)]
        return [await self._throw_framed(framed(self.model_name, chooser))]

    async def close(self) -> None:
        if self._streams:
            self._streams[1].close()
            with contextlib.suppress(OSError):
                await self._streams[1].wait_closed()
        self._streams = None

    async def _throw_framed(self, request: bytes) -> Answer:
        """A whole HTTP request has to be answered; on a kept connection that the server has closed it is sent again."""
        for _ in range(2):
            was_open = self._streams is not None
            reader, writer = self._streams = self._streams or await _connect(self.address)
            try:
                async with asyncio.timeout(HANG_S):
                    writer.write(request)
                    status, keeps, said = await _read_answer(reader)
            except (ConnectionError, asyncio.IncompleteReadError) as error:
                await self.close()
                if was_open:
                    continue
                return Answer("no answer", is_fault=True, detail=f"{type(error).__name__} after {request[:3000]!r}")
            if not keeps:
                await self.close()
            return _judged(status, request, said)
        raise AssertionError("a new connection is not a kept one")

    async def _throw_raw(self, chooser: Random) -> Answer:
        """Bytes on a connection of their own, which may end at any time; what counts is that it does."""
        data, half_closes = raw(self.model_name, chooser), chooser.random() < 0.97
        address = self.address if chooser.random() < 0.9 else chooser.choice(self.other_addresses)
        reader, writer = await _connect(address)
        try:
            async with asyncio.timeout(HANG_S):
                writer.write(data)
                if half_closes:
                    writer.write_eof()
                answer = await reader.read(1 << 16)
        except TimeoutError:
            raise
        except OSError:
            return Answer("closed")
        finally:
            writer.close()
        status = answer[9:12].decode("latin-1") if answer.startswith(b"HTTP/1.") else "closed"
        return _judged(status, data, answer)


async def _connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


def _judged(status: str, request: bytes, answer: bytes) -> Answer:
    its_own_deadline = status == "504" and b"timeout_s" in request
    is_fault = status.startswith("5") and status != "503" and not its_own_deadline
    return Answer(status, is_fault, f"{answer[-300:]!r} to {request[:3000]!r}" if status.startswith("5") else "")


async def _read_answer(reader: asyncio.StreamReader) -> tuple[str, bool, bytes]:
    """Status of one answer, whether the connection goes on, and the last of what it said."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    said = b""
    if head.startswith("http/1.1 100"):
        return await _read_answer(reader)
    if "transfer-encoding: chunked" in head:
        while size := int((await reader.readuntil(b"\r\n")), 16):
            said = await reader.readexactly(size + 2)
        await reader.readexactly(2)
    elif "content-length: " in head:
        said = await reader.readexactly(int(head.partition("content-length: ")[2].partition("\r")[0]))
    return head[9:12], "connection: close" not in head, said


def framed(model_name: str, chooser: Random) -> bytes:
    """A request that is well-formed HTTP; its body, headers or path are not what they should be."""
    if chooser.random() < 0.05:
        method = chooser.choice(("GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"))
        path = chooser.choice(_OTHER_PATHS)
        return f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode("latin-1")
    body = _body(model_name, chooser)
    headers = [chooser.choice(_HEADERS).format(name="fuzz")] if chooser.random() < 0.15 else []
    return request_bytes(chooser.choice(_PATHS), body, headers, chooser.random() < 0.1)


def request_bytes(path: str, body: bytes, headers: list[str], chunked: bool = False) -> bytes:
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", length, *headers]
    payload = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if chunked and body else b"0\r\n\r\n" if chunked else body
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + payload


def _body(model_name: str, chooser: Random) -> bytes:
    wanted = {**COMPLETION, **({} if chooser.random() < 0.5 else CHAT), "model": model_name}
    if "messages" in wanted:
        wanted = {name: value for name, value in wanted.items() if name in CHAT or name in _SHARED}
    kept = {name: value for name, value in wanted.items() if name in _NEEDED or chooser.random() < 0.4}
    if chooser.random() < 0.8:
        data = json_bytes(mutated_json(kept, chooser), chooser)
    elif chooser.random() < 0.3:
        data = json_bytes(hostile_json(chooser), chooser)
    else:
        data = mutated_bytes(json_bytes(kept, chooser), chooser)
    return data


_SHARED = set(COMPLETION) - {"prompt", "max_tokens", "logprobs", "echo", "best_of", "suffix"} | {"model"}
_NEEDED = ("model", "prompt", "messages", "max_tokens", "max_completion_tokens")


def raw(model_name: str, chooser: Random) -> bytes:
    """Bytes that are no HTTP, or no longer."""
    whole = framed(model_name, chooser)
    return chooser.choice(_RAW)(whole, chooser)


def _truncated(whole: bytes, chooser: Random) -> bytes:
    return whole[: chooser.randrange(len(whole))]


def _broken_head(whole: bytes, chooser: Random) -> bytes:
    first, _, rest = whole.partition(b"\r\n")
    return first + b"\r\n" + chooser.choice(_BROKEN_HEADS).encode("latin-1") + b"\r\n" + rest


def _broken_chunks(whole: bytes, chooser: Random) -> bytes:
    head = request_bytes("/v1/completions", b"", [], chunked=True).removesuffix(b"0\r\n\r\n")
    return head + b"".join(chooser.choice(_BAD_CHUNKS) for _ in range(chooser.choice((1, 2, 3))))


def _pipelined(whole: bytes, chooser: Random) -> bytes:
    return whole + chooser.choice((whole, whole, mutated_bytes(whole, chooser))) + whole


def _too_much(whole: bytes, chooser: Random) -> bytes:
    lines = b"".join(b"X-%d: %s\r\n" % (number, b"y" * 200) for number in range(chooser.choice((50, 200, 400))))
    return whole.replace(b"\r\n", b"\r\n" + lines, 1)


def _odd_first_line(whole: bytes, chooser: Random) -> bytes:
    line = chooser.choice(
        (b"", b"GET", b"GET /", b"GET / HTTP/9.9", b"PRI * HTTP/2.0", b"\x16\x03\x01\x02\x00", b"CONNECT x:1 HTTP/1.1",
         b"G\xc3\x89T / HTTP/1.1", b"POST /v1/completions HTTP/1.0", b"GET  /  HTTP/1.1", b"TRACE / HTTP/1.1",
         b"HEAD /health HTTP/1.1")
    )  # fmt: skip
    return line + b"\r\n" + whole.partition(b"\r\n")[2]


_RAW: tuple[Callable[[bytes, Random], bytes], ...] = (
    _truncated, _broken_head, _broken_chunks, _pipelined, _too_much, _odd_first_line, mutated_bytes, mutated_bytes,
)  # fmt: skip
