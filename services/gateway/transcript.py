"""What a choice has said so far: its tokens, and the text that they make."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from afd.state.requests import FinishReason, JournaledToken
from services.gateway.stop_strings import StopStrings
from services.gateway.tokenizer import Tokenizer


@dataclass(frozen=True)
class Token:
    """One token of one choice, with the text that it completes; the last one of a choice has a finish reason."""

    choice: int
    index: int
    id: int
    text: str
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]
    finish_reason: FinishReason | None


class Transcript:
    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], choice: int) -> None:
        self.choice = choice
        self.tokens: list[JournaledToken] = []
        self.is_ended = False
        self._text = tokenizer.stream()
        self._stops = StopStrings(stop)

    def extend(self, tokens: Iterable[JournaledToken]) -> list[Token]:
        """The next tokens, as they are shown; none behind the end."""
        shown = []
        for token in tokens:
            if self.is_ended:
                break
            shown.append(self._add(token))
        return shown

    def _add(self, token: JournaledToken) -> Token:
        shown = self._stops.push(self._text.push(token.id))
        reason = "stop" if self._stops.hit else token.finish_reason
        if reason and not self._stops.hit:
            shown += self._stops.push(self._text.rest()) + self._stops.rest()
            reason = "stop" if self._stops.hit else reason
        self.tokens.append(token)
        self.is_ended = reason is not None
        index = len(self.tokens) - 1
        return Token(self.choice, index, token.id, shown, token.logprob, token.top_logprobs, reason)
