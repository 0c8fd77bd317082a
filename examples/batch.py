"""Asks twenty questions, eight at once; a mesh that has no room for one now says when to ask again."""

import asyncio
import sys

from afd import Client
from afd.errors import Overloaded

[target] = sys.argv[1:] or ["localhost:50051"]

AT_ONCE = 8
QUESTIONS = [f"What is {first} + 68?" for first in range(20)]


async def answer(client: Client, turns: asyncio.Semaphore, question: str) -> str:
    async with turns:
        while True:
            try:
                tokens = client.chat([{"role": "user", "content": question}], max_tokens=16)
                return "".join([token.text async for token in tokens])
            except Overloaded as error:
                await asyncio.sleep(error.retry_after_s or 1.0)


async def main() -> None:
    turns = asyncio.Semaphore(AT_ONCE)
    async with Client(target) as client:
        answers = await asyncio.gather(*(answer(client, turns, question) for question in QUESTIONS))
    for question, text in zip(QUESTIONS, answers, strict=True):
        print(question, text)


asyncio.run(main())
