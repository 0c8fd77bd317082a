"""Files that commands write."""

from __future__ import annotations

import json
from pathlib import Path

from afd.errors import ConfigError


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Raises ConfigError, in a sentence."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
