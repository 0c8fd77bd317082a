"""Loses an answer midway, and comes back for the rest of it by its request id.

A gateway that is lost needs none of this: a stream goes on by itself. This is for a client that was lost.
"""

import asyncio
import sys

from afd import Client

[target] = sys.argv[1:] or ["localhost:50051"]


async def begin(num_tokens: int) -> str:
    """The request's id, once so many tokens were shown."""
    async with Client(target) as client:
        stream = client.chat([{"role": "user", "content": "Which day comes 7 days after Monday?"}], max_tokens=64)
        async for token in stream:
            print(token.text, end="", flush=True)
            if token.index + 1 == num_tokens:
                break
    return stream.request_id


async def main() -> None:
    request_id = await begin(num_tokens=5)
    print(" | ", end="")
    async with Client(target) as client:  # in another process, on another machine, some minutes later
        async for token in client.resume(request_id, next_index=5):
            print(token.text, end="", flush=True)
    print()


asyncio.run(main())
