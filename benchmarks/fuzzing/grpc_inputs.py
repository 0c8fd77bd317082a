"""Malformed gRPC: messages with values that cannot be, bytes that are no messages, and bytes that are nearly HTTP/2."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from random import Random
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message

from afd.v1 import attention_pb2, ffn_pb2, gateway_pb2, sampling_pb2
from benchmarks.fuzzing.answers import HANG_S, Answer
from benchmarks.fuzzing.mutations import mutated_bytes, mutated_message

FAULTS = ("UNKNOWN", "INTERNAL", "DATA_LOSS")
_METADATA = (
    ("authorization", "Bearer afd-" + "a" * 64),
    ("authorization", "Basic x"),
    ("traceparent", "00-zz"),
    ("traceparent", "00-" + "f" * 32 + "-" + "0" * 16 + "-01"),
    ("x", "y" * 3000),
    ("x-bin", b"\xff\x00"),
)


SAMPLING = sampling_pb2.SamplingParams(
    temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.1, presence_penalty=0.1,
    logit_bias={5: 1.0}, seed=3, stop=["zz"], stop_token_ids=[9], max_tokens=2, n=1, top_logprobs=2,
)  # fmt: skip


@dataclass(frozen=True)
class Method:
    role: str
    path: str
    valid: Message
    streams: bool


def methods() -> list[Method]:
    """Every method, with a request that it would take."""
    prompts = (
        {"token_ids": gateway_pb2.TokenIds(ids=[5, 6])},
        {"text": "ab"},
        {"chat": gateway_pb2.Chat(messages=[gateway_pb2.ChatMessage(role="user", content="a")])},
    )
    generates = [gateway_pb2.GenerateRequest(sampling=SAMPLING, **prompt) for prompt in prompts]
    decode = attention_pb2.DecodeRequest(request_id="fuzz", epoch=1, token_ids=[5, 6, 7], sampling=SAMPLING)
    gateway, attention, ffn = "/afd.v1.GatewayService/", "/afd.v1.AttentionService/", "/afd.v1.FfnService/"
    return [
        *(Method("gateway", gateway + "Generate", request, True) for request in generates),
        Method("gateway", gateway + "Resume", gateway_pb2.ResumeRequest(request_id="fuzz", next_index=[1]), True),
        Method("gateway", gateway + "Cancel", gateway_pb2.CancelRequest(request_id="fuzz"), False),
        Method("gateway", gateway + "GetModel", gateway_pb2.GetModelRequest(), False),
        Method("attention", attention + "Decode", decode, True),
        Method("attention", attention + "Decode", decode, True),
        Method("attention", attention + "GetLoad", attention_pb2.GetLoadRequest(), False),
        Method("ffn", ffn + "GetTopology", ffn_pb2.GetTopologyRequest(), False),
        Method("ffn", ffn + "GetFfnLoad", ffn_pb2.GetFfnLoadRequest(), False),
        Method("ffn", ffn + "Connect", ffn_pb2.ConnectRequest(drop_frame=ffn_pb2.DropFrame(frame_id=1)), True),
    ]


class GrpcThrower:
    """A channel to each service."""

    def __init__(self, addresses: dict[str, str], conversations: dict[str, bytes]) -> None:
        self.addresses = addresses
        self.conversations = conversations  # what a client sends to each role, from the first byte
        self._channels = {role: grpc.aio.insecure_channel(address) for role, address in addresses.items()}
        self._methods = methods()

    async def throw(self, chooser: Random) -> list[Answer]:
        if chooser.random() < 0.1:
            role = chooser.choice(sorted(self.addresses))
            return [await throw_bytes(self.addresses[role], mutated_bytes(self.conversations[role], chooser))]
        method = chooser.choice(self._methods)
        return [await self._call(method, _request(method, chooser), chooser)]

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()

    async def _call(self, method: Method, request: bytes, chooser: Random) -> Answer:
        path = (
            method.path if chooser.random() < 0.98 else chooser.choice((method.path + "x", "/", "/a/b", "/afd.v1.X/Y"))
        )
        metadata = (chooser.choice(_METADATA),) if chooser.random() < 0.1 else ()
        channel, leaves_after = self._channels[method.role], chooser.choice((None, None, None, 1))
        multicallable = channel.unary_stream if method.streams else channel.unary_unary
        call: Any = multicallable(path)(request, metadata=metadata)  # type: ignore[arg-type]  # the stubs want messages
        try:
            async with asyncio.timeout(HANG_S):
                await _read_to_the_end(call, method.streams, leaves_after)
            return Answer("OK")
        except grpc.aio.AioRpcError as error:
            code = error.code().name
            detail = f"{method.path} {request[:2000]!r} {metadata}: {error.details()}"
            return Answer(code, code in FAULTS, detail if code in (*FAULTS, "UNAVAILABLE") else "")
        finally:
            call.cancel()


async def _read_to_the_end(call: Any, streams: bool, leaves_after: int | None) -> None:
    if not streams:
        await call
        return
    num_read = 0
    async for _ in call:
        num_read += 1
        if num_read == leaves_after:
            return


def _request(method: Method, chooser: Random) -> bytes:
    if chooser.random() < 0.7:
        return mutated_message(method.valid, chooser).SerializeToString()
    return mutated_bytes(method.valid.SerializeToString(), chooser)


async def throw_bytes(address: str, data: bytes) -> Answer:
    """Bytes on a connection of their own: it has to end when they do."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        async with asyncio.timeout(HANG_S):
            writer.write(data)
            writer.write_eof()
            while await reader.read(1 << 16):
                pass
    except TimeoutError:
        raise
    except OSError:
        return Answer("closed")
    finally:
        writer.close()
    return Answer("closed")


async def recorded(method: Method, address: str) -> bytes:
    """What a client sends for one call, from the first byte of its connection on."""
    host, _, port = address.rpartition(":")
    sent = bytearray()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, log: bytearray | None) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if log is not None:
                    log += data
                writer.write(data)
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pump(reader, server_writer, sent), pump(server_reader, writer, None))

    server = await asyncio.start_server(relay, "127.0.0.1")
    async with server, grpc.aio.insecure_channel(f"127.0.0.1:{server.sockets[0].getsockname()[1]}") as channel:
        call: Any = (channel.unary_stream if method.streams else channel.unary_unary)(method.path)
        with contextlib.suppress(grpc.aio.AioRpcError):
            await _read_to_the_end(call(method.valid.SerializeToString()), method.streams, None)
        server.close()
    return bytes(sent)
