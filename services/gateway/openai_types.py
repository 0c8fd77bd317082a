"""The requests of the OpenAI HTTP API, with vLLM's additions. An unknown field is refused, never ignored.

Of a list with a million wrong items pydantic would make a million errors, which take minutes and gigabytes: what may
be long is bounded before it looks, or by hand.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    model_validator,
)

from afd.errors import InvalidRequest
from afd.model.sampling_params import MAX_LOGIT_BIASES, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS, SamplingParams
from afd.urgency import MOST_SECONDS, Urgency
from services.gateway.tokenizer import MAX_MESSAGES

Number = StrictFloat | StrictInt
TokenId = StrictInt
_MAX_PARTS = 1024  # of a message
Prompt = str | list[str] | list[int] | list[list[int]]


def _at_most(most: int) -> BeforeValidator:
    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > most:
            raise ValueError(f"has {len(value)} items; at most {most} are allowed")
        return value

    return BeforeValidator(check)


def _check_prompt(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    if all(type(item) is str for item in items) or (value is items and _are_ids(items)):
        return value
    if value is items and all(type(item) is list and _are_ids(item) for item in items):
        return value
    raise ValueError("must be a text, a list of texts, a list of token ids, or a list of lists of token ids")


def _are_ids(items: list[Any]) -> bool:
    return all(type(item) is int for item in items)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _with_one_unknown(cls, value: Any) -> Any:
        """Of all fields that do not exist the first one is enough."""
        if not isinstance(value, dict):
            return value
        known = {name: value[name] for name in cls.model_fields if name in value}
        unknown = next((name for name in value if name not in cls.model_fields), None)
        return known if unknown is None else {**known, unknown: value[unknown]}


class StreamOptions(_Body):
    include_usage: StrictBool = False


class SamplingBody(_Body):
    """What completions and chat completions have in common."""

    model: StrictStr
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    n: StrictInt | None = None
    stop: Annotated[StrictStr | list[StrictStr] | None, _at_most(MAX_STOP_STRINGS)] = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: Annotated[dict[str, Number] | None, _at_most(MAX_LOGIT_BIASES)] = None
    seed: StrictInt | None = None
    user: StrictStr | None = None
    metadata: dict[str, Any] | None = None
    # vLLM's additions
    top_k: StrictInt | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    stop_token_ids: Annotated[list[TokenId] | None, _at_most(MAX_STOP_TOKEN_IDS)] = None
    min_tokens: StrictInt = 0
    ignore_eos: StrictBool = False
    return_token_ids: StrictBool = False
    request_id: StrictStr | None = None
    priority: Annotated[StrictInt, Field(ge=-(1 << 31), lt=1 << 31)] = 0
    # ours
    timeout_s: Annotated[Number, Field(gt=0, le=MOST_SECONDS)] | None = None

    def urgency(self) -> Urgency:
        """From now on."""
        return Urgency.within(self.timeout_s, self.priority)

    def sampling(self, max_tokens: int | None, top_logprobs: int) -> SamplingParams:
        """Temperature is 1 where none is given, as in OpenAI's API; top_k of 0 or -1 means none, as in vLLM."""
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=None if self.top_k in (0, -1) else self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=_logit_bias(self.logit_bias or {}),
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            n=1 if self.n is None else self.n,
            top_logprobs=top_logprobs,
        )


class CompletionBody(SamplingBody):
    prompt: Annotated[Prompt, PlainValidator(_check_prompt)]
    max_tokens: StrictInt | None = 16
    logprobs: StrictInt | None = None
    echo: StrictBool = False
    best_of: StrictInt | None = None
    suffix: None = None

    def prompts(self) -> list[str | list[TokenId]]:
        """The prompts one by one: a text, a list of texts, token ids, or a list of lists of them."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        token_ids = [item for item in self.prompt if isinstance(item, int)]
        return [token_ids] if token_ids else [item for item in self.prompt if not isinstance(item, int)]


def _text_of(content: Any) -> Any:
    """A message's text; that of all parts, joined."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list) and all(map(_is_text_part, content)):
        return "".join(part["text"] for part in content)
    raise ValueError('must be a text, or a list of parts like {"type": "text", "text": "..."}')


def _is_text_part(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and part.keys() == {"type", "text"}
        and part["type"] == "text"
        and isinstance(part["text"], str)
    )


class Message(BaseModel):
    model_config = ConfigDict(extra="allow")  # templates may use more fields, such as `name`

    role: StrictStr
    content: Annotated[str | None, PlainValidator(_text_of), _at_most(_MAX_PARTS)] = None

    @model_validator(mode="before")
    @classmethod
    def _is_object(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError('must be like {"role": "user", "content": "..."}')
        return value

    def for_template(self, number: int) -> dict[str, Any]:
        """Raises InvalidRequest."""
        if self.content is None and self.role != "assistant":  # whose message can be a call of a tool
            raise InvalidRequest(f"messages.{number}.content is missing", "messages")
        return {**self.model_dump(), "content": self.content or ""}


class TextFormat(_Body):
    type: Literal["text"]


class ChatBody(SamplingBody):
    messages: Annotated[list[Message], FailFast(), _at_most(MAX_MESSAGES)]
    max_tokens: StrictInt | None = None
    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt | None = None
    response_format: TextFormat | None = None
    add_generation_prompt: StrictBool = True


def _logit_bias(biases: dict[str, Any]) -> dict[int, float]:
    try:
        return {int(token_id): bias for token_id, bias in biases.items()}
    except ValueError:
        raise InvalidRequest("logit_bias must map token ids to numbers", "logit_bias") from None
