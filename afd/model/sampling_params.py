"""How one sequence's tokens are chosen: the settings, checked. Imports no torch."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from afd.errors import InvalidRequest

MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIASES = 1024
_SMALLEST = 2.0**-20  # of what must be over 0; exact as a float32, which the contract has


@dataclass(frozen=True)
class SamplingParams:
    """None (or an empty collection) means "do not apply". protos/afd/v1/sampling.proto says what each one does."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    n: int = 1
    top_logprobs: int = 0

    def check(self, vocab_size: int) -> None:
        """Raises InvalidRequest, naming the parameter, for a value that means nothing."""
        _range("temperature", self.temperature, 0, 100)
        _range("top_k", self.top_k, 1, vocab_size)
        _range("top_p", self.top_p, _SMALLEST, 1)
        _range("min_p", self.min_p, 0, 1)
        _range("repetition_penalty", self.repetition_penalty, _SMALLEST, 100)
        _range("presence_penalty", self.presence_penalty, -2, 2)
        _range("frequency_penalty", self.frequency_penalty, -2, 2)
        _range("seed", self.seed, 0, 2**64 - 1)
        _range("max_tokens", self.max_tokens, 1, 2**31)
        _range("min_tokens", self.min_tokens, 0, 2**31 if self.max_tokens is None else self.max_tokens)
        _range("n", self.n, 1, MAX_CHOICES)
        _range("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"stop has {len(self.stop)} strings; at most {MAX_STOP_STRINGS} are allowed", "stop")
        _at_most("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
        _at_most("logit_bias", self.logit_bias, MAX_LOGIT_BIASES)
        if "" in self.stop:
            raise InvalidRequest("stop contains an empty string, which would end every text at once", "stop")
        if not all(map(is_unicode, self.stop)):
            raise InvalidRequest("stop has half of a surrogate pair, which is no text", "stop")
        check_token_ids("stop_token_ids", self.stop_token_ids, vocab_size)
        check_token_ids("logit_bias", self.logit_bias, vocab_size)
        for token_id, bias in self.logit_bias.items():
            _range(f"logit_bias of token {token_id}", bias, -100, 100)


def is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8; JSON can say what cannot: half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_token_ids(name: str, token_ids: Mapping[int, float] | tuple[int, ...] | list[int], vocab_size: int) -> None:
    """Raises InvalidRequest for the first id that is not in the vocabulary."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(f"{name}: token id {token_id} is outside the vocabulary of {vocab_size}", name)


def _at_most(name: str, items: Collection[int], most: int) -> None:
    if len(items) > most:
        raise InvalidRequest(f"{name} has {len(items)} token ids; at most {most} are allowed", name)


def _range(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:  # a NaN is in no range
        raise InvalidRequest(f"{name} must be from {low} to {high}, not {_shown(value)}", name.split(maxsplit=1)[0])


def _shown(value: float) -> str:
    """A float32, which the contract has, in the fewest digits that tell it from others: 1.1, not 1.100000023841858."""
    if isinstance(value, int):
        return str(value)
    texts = (f"{value:.{digits}g}" for digits in range(6, 10))
    return next((text for text in texts if ctypes.c_float(float(text)).value == value), str(value))
