"""Accelerators: what a card computes, reads and sends, and what it costs; from `accelerators.toml` or a user's file."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from afd.errors import ConfigError

_SHIPPED = Path(__file__).with_name("accelerators.toml")

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
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _accelerator(path: Path, name: str, fields: object) -> Accelerator:
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: {name} is not a table of an accelerator's fields, [{name}]")
    try:
        return Accelerator.model_validate({**fields, "name": name})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: [{name}] {where}: {first['msg']}; see `afd plan cards` for how one looks") from None
