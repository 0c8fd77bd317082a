"""Tokens in the shapes of OpenAI's answers: one for completions, one for chat, each whole and in chunks."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from services.gateway.generation import Generator, Request
from services.gateway.openai_types import ChatBody, CompletionBody, SamplingBody
from services.gateway.transcript import Token

Json = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A token and the index of its choice among all choices of all prompts."""

    index: int
    token: Token


class Format(ABC):
    """How one kind of answer looks."""

    id_prefix: str
    object_whole: str
    object_chunk: str

    def __init__(self, body: SamplingBody, generator: Generator) -> None:
        self.body = body
        self.tokenizer = generator.tokenizer
        self._created = int(time.time())

    @abstractmethod
    def choice(self, index: int, tokens: Sequence[Token], admitted: Sequence[Request]) -> Json:
        """A whole choice."""

    @abstractmethod
    def chunk_choice(self, part: Part, admitted: Sequence[Request]) -> Json:
        """One token of a choice."""

    def whole(self, parts: Sequence[Part], admitted: Sequence[Request]) -> Json:
        choices: dict[int, list[Token]] = {}
        for part in parts:
            choices.setdefault(part.index, []).append(part.token)
        return {
            **self._head(self.object_whole, admitted),
            "choices": [self.choice(index, choices[index], admitted) for index in sorted(choices)],
            "usage": _usage(admitted, len(parts)),
        }

    def opening(self, admitted: Sequence[Request]) -> Sequence[Json]:
        """Chunks before the first token."""
        return ()

    def chunk(self, part: Part, admitted: Sequence[Request]) -> Json:
        return {**self._head(self.object_chunk, admitted), "choices": [self.chunk_choice(part, admitted)]}

    def usage_chunk(self, admitted: Sequence[Request], num_output: int) -> Json:
        return {**self._head(self.object_chunk, admitted), "choices": [], "usage": _usage(admitted, num_output)}

    def _head(self, kind: str, admitted: Sequence[Request]) -> Json:
        name = f"{self.id_prefix}-{admitted[0].request_id}"
        return {"id": name, "object": kind, "created": self._created, "model": self.body.model}

    def _token_text(self, token_id: int) -> str:
        return self.tokenizer.token_text(token_id) or f"token_id:{token_id}"


class CompletionFormat(Format):
    id_prefix = "cmpl"
    object_whole = object_chunk = "text_completion"
    body: CompletionBody

    def __init__(self, body: CompletionBody, generator: Generator) -> None:
        super().__init__(body, generator)
        self._ends: dict[int, int] = {}  # of each choice: where the text of its tokens so far ends

    def choice(self, index: int, tokens: Sequence[Token], admitted: Sequence[Request]) -> Json:
        return self._choice(index, tokens, admitted, first=True)

    def chunk_choice(self, part: Part, admitted: Sequence[Request]) -> Json:
        return self._choice(part.index, [part.token], admitted, first=part.token.index == 0)

    def _choice(self, index: int, tokens: Sequence[Token], admitted: Sequence[Request], first: bool) -> Json:
        request = admitted[index // admitted[0].params.n]
        text = "".join(token.text for token in tokens)
        if self.body.echo and first:
            text = self.tokenizer.decode(request.prompt_ids) + text
        choice: Json = {
            "index": index,
            "text": text,
            "logprobs": None if self.body.logprobs is None else self._logprobs(index, tokens),
            "finish_reason": tokens[-1].finish_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = [token.id for token in tokens]
            choice["prompt_token_ids"] = request.prompt_ids if first else None
        return choice

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> Json:
        texts = [self._token_text(token.id) for token in tokens]
        *offsets, end = accumulate(map(len, texts), initial=self._ends.get(index, 0))
        self._ends[index] = end
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {self._token_text(i): logprob for i, logprob in (*token.top_logprobs, (token.id, token.logprob))}
                for token in tokens
            ],
            "text_offset": offsets,
        }


class ChatFormat(Format):
    id_prefix = "chatcmpl"
    object_whole = "chat.completion"
    object_chunk = "chat.completion.chunk"
    body: ChatBody

    def whole(self, parts: Sequence[Part], admitted: Sequence[Request]) -> Json:
        answer = super().whole(parts, admitted)
        if self.body.return_token_ids:
            answer["prompt_token_ids"] = admitted[0].prompt_ids
        return answer

    def choice(self, index: int, tokens: Sequence[Token], admitted: Sequence[Request]) -> Json:
        choice: Json = {
            "index": index,
            "message": {"role": "assistant", "content": "".join(token.text for token in tokens)},
            "logprobs": self._logprobs(tokens),
            "finish_reason": tokens[-1].finish_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = [token.id for token in tokens]
        return choice

    def opening(self, admitted: Sequence[Request]) -> Sequence[Json]:
        delta = {"role": "assistant", "content": ""}
        chunks = [
            {
                **self._head(self.object_chunk, admitted),
                "choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}],
            }
            for index in range(admitted[0].params.n)
        ]
        if self.body.return_token_ids:
            chunks[0]["prompt_token_ids"] = admitted[0].prompt_ids
        return chunks

    def chunk_choice(self, part: Part, admitted: Sequence[Request]) -> Json:
        choice: Json = {
            "index": part.index,
            "delta": {"content": part.token.text},
            "logprobs": self._logprobs([part.token]),
            "finish_reason": part.token.finish_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = [part.token.id]
        return choice

    def _logprobs(self, tokens: Sequence[Token]) -> Json | None:
        if not self.body.logprobs:
            return None
        return {
            "content": [
                {
                    **self._logprob(token.id, token.logprob),
                    "top_logprobs": [self._logprob(i, logprob) for i, logprob in token.top_logprobs],
                }
                for token in tokens
            ],
            "refusal": None,
        }

    def _logprob(self, token_id: int, logprob: float) -> Json:
        text = self._token_text(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _usage(admitted: Sequence[Request], num_output: int) -> Json:
    num_prompt = sum(len(request.prompt_ids) for request in admitted)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
    }
