"""Accelerators: what a card computes, reads and sends, and what it costs; from `accelerators.toml` or a user's file."""

from __future__ import annotations

import difflib
import json
import re
import reprlib
import tomllib
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from afd.errors import ConfigError

_SHIPPED = Path(__file__).with_name("accelerators.toml")
_MOST_CHARACTERS = 1_000_000

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Accelerator(BaseModel):
    """One card. Rates are peaks, of dense arithmetic and of one direction; the link is within a server, the NIC leaves
    it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    bf16_flops: Positive
    fp8_flops: Positive | None = None
    memory_bytes_per_s: Positive
    memory_bytes: Positive
    link_bytes_per_s: Positive
    nic_bytes_per_s: Positive
    cards_per_server: Annotated[int, Field(gt=0)]
    dollars_per_hour: Positive
    source: str

    def flops_per_s(self, bytes_per_element: float) -> float:
        """With operands of this width; what has no FP8 computes 8-bit operands in BF16."""
        return self.fp8_flops or self.bf16_flops if bytes_per_element <= 1 else self.bf16_flops

    @property
    def unit_flop(self) -> float:
        """Dollars per FLOP, of the fastest there is."""
        return self.dollars_per_hour / 3600 / self.flops_per_s(1)

    @property
    def unit_byte(self) -> float:
        """Dollars per byte of memory traffic."""
        return self.dollars_per_hour / 3600 / self.memory_bytes_per_s

    @property
    def roofline(self) -> float:
        """FLOPs that the fastest arithmetic does while a byte is read."""
        return self.flops_per_s(1) / self.memory_bytes_per_s

    def toml(self) -> str:
        """The table of this card in a file of accelerators."""
        values = self.model_dump(exclude={"name"}, exclude_none=True)
        return "\n".join([f"[{_key(self.name)}]", *(f"{field} = {_value(value)}" for field, value in values.items())])


def _key(name: str) -> str:
    return name if re.fullmatch("[A-Za-z0-9_-]+", name) else _value(name)


def _value(value: float | str) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"{value}" if isinstance(value, int) else f"{Decimal(repr(value)).normalize()}".lower().replace("e+", "e")


class _Range(NamedTuple):
    """What a field can be within reason. A value in another unit, like GB, is outside."""

    least: float
    most: float
    unit: str


_FLOPS = _Range(1e9, 1e18, "FLOP/s, 9.89e14 for 989 TFLOP/s")
_RANGES = {
    "bf16_flops": _FLOPS,
    "fp8_flops": _FLOPS,
    "memory_bytes_per_s": _Range(1e8, 1e15, "bytes per second, 3.35e12 for 3.35 TB/s"),
    "memory_bytes": _Range(1e8, 1e15, "bytes, 8e10 for 80 GB"),
    "link_bytes_per_s": _Range(1e6, 1e15, "bytes per second in one direction, 4.5e11 for 450 GB/s"),
    "nic_bytes_per_s": _Range(1e6, 1e13, "bytes per second in one direction, 5e10 for 400 Gbit/s"),
    "cards_per_server": _Range(1, 1024, "cards"),
    "dollars_per_hour": _Range(1e-4, 1e4, "dollars for an hour of one card"),
}


def load_accelerators(*more: Path) -> dict[str, Accelerator]:
    """All by name; a later file's go before an earlier one's. Raises ConfigError, naming file, card and field."""
    cards: dict[str, Accelerator] = {}
    for path in (_SHIPPED, *more):
        cards |= {name: _accelerator(path, name, fields) for name, fields in _read(path).items()}
    return cards


def accelerator(name: str, cards: dict[str, Accelerator]) -> Accelerator:
    if name not in cards:
        raise ConfigError(f"there is no card {name!r}; there are {', '.join(cards)}, and those of --accelerators")
    return cards[name]


def _read(path: Path) -> dict[str, object]:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MOST_CHARACTERS + 1)
        tables = tomllib.loads(text) if len(text) <= _MOST_CHARACTERS else None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    if tables is None:
        raise ConfigError(f"{path} has more than {_MOST_CHARACTERS} characters, so it is no file of accelerators")
    if not tables:
        raise ConfigError(f"{path} has no cards; {_EXAMPLE}")
    return tables


_EXAMPLE = "`afd plan cards H100` shows how one looks"
_OWN = [field for field in Accelerator.model_fields if field != "name"]


def _accelerator(path: Path, name: str, fields: object) -> Accelerator:
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: {name} is not a card, which is a table like [{_key(name)}]; {_EXAMPLE}")
    where = f"{path}: [{_key(name)}]"
    for field in fields:
        if field not in _OWN:
            raise ConfigError(f"{where} {field} is no field of a card{_closest(field)}")
    try:
        card = Accelerator.model_validate({**fields, "name": name})
    except ValidationError as error:
        raise ConfigError(f"{where} {_refusal(error.errors()[0])}; {_EXAMPLE}") from None
    for field, (least, most, unit) in _RANGES.items():
        value = getattr(card, field)
        if value is not None and not least <= value <= most:
            raise ConfigError(f"{where} {field}: {value:g} is not within {least:g}..{most:g}; it is in {unit}")
    return card


def _closest(field: str) -> str:
    close = difflib.get_close_matches(field, _OWN, n=1)
    return f", did you mean {close[0]}?" if close else f"; they are {', '.join(_OWN)}"


def _refusal(problem: Any) -> str:
    """A problem of pydantic's in words."""
    (field,) = problem["loc"]
    if problem["type"] == "missing":
        return f"{field} is missing"
    wanted = {"source": "text in quotes", "cards_per_server": "a whole number above 0"}.get(
        field, "a finite number above 0"
    )
    return f"{field}: {reprlib.repr(problem['input'])} is not {wanted}"
