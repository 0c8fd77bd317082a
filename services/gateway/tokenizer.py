"""Text to token ids and back, by the model's own tokenizer.json and chat template."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers.decoders import DecodeStream

from afd.errors import CheckpointError, InvalidRequest
from afd.model.fields import read_json
from afd.model.sampling_params import is_unicode

MAX_MESSAGES = 4096  # of a chat
ROLES = ("system", "developer", "user", "assistant", "tool", "function")  # those of OpenAI's API
_LONG_TEXT = 10_000  # characters: a few milliseconds


class Tokenizer:
    """A model without tokenizer.json can still be asked with token ids; its texts are then empty."""

    def __init__(self, model_dir: Path, max_tokens: int) -> None:
        """`max_tokens` is the model's context: a text that cannot fit is refused before it is encoded."""
        self.max_tokens = max_tokens
        self._tokenizer = _load_tokenizer(model_dir / "tokenizer.json")
        vocabulary = self._tokenizer.get_vocab() if self._tokenizer else {}
        self._longest_token = max(map(len, vocabulary), default=0)  # characters
        config_path = model_dir / "tokenizer_config.json"
        self._config = read_json(config_path) if config_path.exists() else {}
        self._chat_template = _load_chat_template(model_dir, self._config)

    async def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer adds to one."""
        return await self._encode(text, add_special_tokens=True)

    async def encode_chat(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation, by the chat template, which writes the special tokens itself."""
        _check_messages(messages)
        if self._chat_template is None:
            raise InvalidRequest("this model has no chat template; use a completion", "messages")
        try:
            text = self._chat_template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._special_tokens()
            )
        except Exception as error:  # a template can fail like any program
            raise InvalidRequest(f"the chat template refuses these messages: {error}", "messages") from None
        return await self._encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids))) if self._tokenizer else ""

    def token_text(self, token_id: int) -> str:
        """The token by itself, special tokens included, for log-probabilities."""
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False)) if self._tokenizer else ""

    def stream(self) -> TextStream:
        return TextStream(self, self._tokenizer)

    async def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """A long text is encoded on another thread, so that the streams of others go on meanwhile."""
        backend = self._needed()
        if not is_unicode(text):
            raise InvalidRequest("the prompt has half of a surrogate pair, which is no text", "prompt")
        if len(text) > self.max_tokens * self._longest_token:
            raise InvalidRequest(
                f"the prompt has {len(text)} characters, more than fit into a context of {self.max_tokens} tokens",
                "prompt",
            )
        if len(text) < _LONG_TEXT:
            return list(backend.encode(text, add_special_tokens=add_special_tokens).ids)

        def encode() -> list[int]:
            # Unlike encode, encode_batch lets other threads run.
            return list(backend.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids)

        return await asyncio.to_thread(encode)

    def _needed(self) -> HuggingFaceTokenizer:
        if self._tokenizer is None:
            raise InvalidRequest("this model has no tokenizer.json; send token ids", "prompt")
        return self._tokenizer

    def _special_tokens(self) -> dict[str, str]:
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        tokens = {name: self._config.get(name) for name in names}
        return {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items() if token}


class TextStream:
    """Turns tokens into text one by one; a token that ends in the middle of a character gives nothing yet."""

    def __init__(self, tokenizer: Tokenizer, backend: HuggingFaceTokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._backend = backend
        self._decode = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._num_chars = 0

    def push(self, token_id: int) -> str:
        """The text that this token completes."""
        if self._backend is None:
            return ""
        self._ids.append(token_id)
        text = self._decode.step(self._backend, token_id) or ""
        self._num_chars += len(text)
        return text

    def rest(self) -> str:
        """What is left at the end: an incomplete character, as the replacement character."""
        return self._tokenizer.decode(self._ids)[self._num_chars :]


def _check_messages(messages: Sequence[dict[str, Any]]) -> None:
    """Raises InvalidRequest. Templates write any role, and what a role says, as it is into the prompt."""
    if not messages:
        raise InvalidRequest("the chat has no messages", "messages")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(f"a chat can have {MAX_MESSAGES} messages at most", "messages")
    for number, message in enumerate(messages):
        if message["role"] not in ROLES:
            names = ", ".join(ROLES)
            raise InvalidRequest(f"messages.{number}.role must be one of {names}, not {message['role']!r}", "messages")


def _load_tokenizer(path: Path) -> HuggingFaceTokenizer | None:
    if not path.exists():
        return None
    try:
        return HuggingFaceTokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path} is not a tokenizer: {error}") from None


def _load_chat_template(model_dir: Path, config: dict[str, Any]) -> jinja2.Template | None:
    path = model_dir / "chat_template.jinja"
    try:
        source = path.read_text(encoding="utf-8") if path.exists() else config.get("chat_template")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if source is None:
        return None
    # As Hugging Face's templates expect it.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.filters["tojson"] = _to_json
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, TypeError) as error:
        raise CheckpointError(f"the chat template in {model_dir} is not valid: {error}") from None


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
