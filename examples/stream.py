"""Shows an answer token by token, as the mesh decodes it."""

import asyncio
import sys

from afd import Client

[target] = sys.argv[1:] or ["localhost:50051"]


async def main() -> None:
    messages = [{"role": "user", "content": "Which day comes 7 days after Monday?"}]
    async with Client(target) as client:
        async for token in client.chat(messages, max_tokens=64):
            print(token.text, end="", flush=True)
    print()


asyncio.run(main())
