"""Where a stream of events is: what `Last-Event-ID` says when it is resumed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from afd.errors import InvalidRequest
from services.gateway.generation import Request

_MOST_DIGITS = 9


def request_ids(name: str, num_prompts: int) -> list[str]:
    """Those of the requests of one call, a prompt each."""
    return [name] if num_prompts == 1 else [f"{name}-{number}" for number in range(num_prompts)]


@dataclass
class Place:
    """`name/3.5`: the call `name`, of whose choices, prompts first, the next tokens have the indices 3 and 5."""

    name: str
    num_prompts: int
    next_index: list[int]

    @classmethod
    def of(cls, requests: Sequence[Request]) -> Self:
        """The beginning, or where they are resumed."""
        starts = [start for request in requests for start in request.resumed_at or (0,) * request.params.n]
        name = requests[0].request_id
        return cls(name if len(requests) == 1 else name.removesuffix("-0"), len(requests), starts)

    @classmethod
    def parse(cls, text: str, num_prompts: int) -> Self:
        """Raises InvalidRequest for what no event of a call with so many prompts had as its id."""
        name, slash, numbers = text.rpartition("/")
        indices = numbers.split(".")
        well_formed = slash and all(re.fullmatch(rf"\d{{1,{_MOST_DIGITS}}}", index) for index in indices)
        if not well_formed or len(indices) % num_prompts:
            raise InvalidRequest("Last-Event-ID is not that of an event of such a call", "Last-Event-ID")
        return cls(name, num_prompts, [int(index) for index in indices])

    @property
    def names(self) -> list[str]:
        return request_ids(self.name, self.num_prompts)

    def of_prompt(self, number: int) -> list[int]:
        num_choices = len(self.next_index) // self.num_prompts
        return self.next_index[number * num_choices : (number + 1) * num_choices]

    def __str__(self) -> str:
        return f"{self.name}/{'.'.join(map(str, self.next_index))}"
