"""Asks from a LangChain chain: only ChatOpenAI's base_url is another one (pip install langchain-openai)."""

import sys

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

[base_url] = sys.argv[1:] or ["http://localhost:8000/v1"]

model = ChatOpenAI(base_url=base_url, api_key=SecretStr("none"), model="step3-nano", max_completion_tokens=16)
chain = ChatPromptTemplate.from_messages([("user", "What is {first} + {second}?")]) | model
for chunk in chain.stream({"first": 12, "second": 68}):
    print(chunk.content, end="", flush=True)
print()
