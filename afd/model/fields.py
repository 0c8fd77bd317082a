"""The fields of a JSON file of a model, each checked as it is read. Imports no torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from afd.errors import CheckpointError

_MOST = 10**8  # of anything: what is more is a slip
_MOST_LAYERS = 10_000
_MOST_CHARACTERS = 2**26  # an index of a checkpoint with many experts has ten million


class Fields:
    """The fields of one config file; every refusal names the file, the field and the way out."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    def refuse(self, name: str, why: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {name}: {why}")

    def raw(self, name: str) -> Any:
        if self.values.get(name) is None:
            raise CheckpointError(f"{self.path}: {name} is missing")
        return self.values[name]

    def count(self, name: str, default: int | None = None) -> int:
        """A positive whole number; `default`, if one is given, where the field is absent or null."""
        value = self.raw(name) if default is None else self.values.get(name, default)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.refuse(name, f"{value!r} is not a positive whole number")
        return self._at_most(_MOST, name, value)

    def num_layers(self) -> int:
        name = "num_hidden_layers"
        return self._at_most(_MOST_LAYERS, name, self.count(name))

    def _at_most(self, most: int, name: str, value: int) -> int:
        if value > most:
            self.refuse(name, f"{value} is more than any model has; the limit is {most}")
        return value

    def whole(self, name: str, default: int) -> int:
        """A whole number that is not negative; `default` where the field is absent or null."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            self.refuse(name, f"{value!r} is not a whole number")
        return self._at_most(_MOST, name, value)

    def whole_numbers(self, name: str) -> list[int]:
        value = self.values.get(name) or []
        if not isinstance(value, list) or any(type(part) is not int for part in value):
            self.refuse(name, f"{value!r} is not a list of whole numbers")
        return list(value)

    def least(self, *names: str) -> int:
        """The smallest of several fields that limit the same thing; one must be there."""
        given = [name for name in names if self.values.get(name) is not None]
        return min(self.count(name) for name in given or names[:1])

    def positive(self, name: str) -> float:
        value = self.raw(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            self.refuse(name, f"{value!r} is not a positive number")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.values.get(name, False)
        if not isinstance(value, bool):
            self.refuse(name, f"{value!r} is neither true nor false")
        return bool(value)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id or a list of them; none where the field is absent or null."""
        value = self.values.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in ids:
            if type(token_id) is not int:
                self.refuse(name, f"{token_id!r} is not a token id")
        return tuple(ids)

    def table(self, name: str) -> dict[str, Any]:
        value = self.values.get(name)
        if not isinstance(value, dict | None):
            self.refuse(name, f"{value!r} is not a JSON object")
        return value or {}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; CheckpointError with a sentence if there is none."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MOST_CHARACTERS + 1)
        value = json.loads(text) if len(text) <= _MOST_CHARACTERS else None
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is no model directory: it has no {path.name}") from None
    except NotADirectoryError:
        raise CheckpointError(f"{path.parent} is not a directory") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if len(text) > _MOST_CHARACTERS:
        raise CheckpointError(f"{path} has more than {_MOST_CHARACTERS} characters, so it describes no model")
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value
