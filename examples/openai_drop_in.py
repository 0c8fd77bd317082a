"""Asks with OpenAI's own client: only its base_url is another one (pip install openai)."""

import sys

from openai import OpenAI

[base_url] = sys.argv[1:] or ["http://localhost:8000/v1"]

client = OpenAI(base_url=base_url, api_key="none")
chunks = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": "What is 12 + 68?"}],
    max_tokens=16,
    stream=True,
)
for chunk in chunks:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
