"""Valid things made invalid: JSON, messages, bytes. All of it is a function of the chooser."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from random import Random
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from afd.model.sampling_params import is_unicode

_MOST_CHARS = 2_000_000  # of a list's items together
AnyMessage = TypeVar("AnyMessage", bound=Message)
_LONGEST_BYTES = 4096
_LENGTHS, _LENGTH_WEIGHTS = (1, 17, 257, 2000, 300_000), (10, 10, 10, 10, 1)
_INTEGERS = (0, 1, -1, 2, 127, 255, 1 << 31, (1 << 31) - 1, (1 << 32) - 1, 1 << 63, (1 << 64) - 1, 10**30, 10**400)
_FLOATS = (0.0, -0.0, -1.0, 1e-320, 1e308, math.inf, -math.inf, math.nan, 0.5, 3.4e38)
_TEXTS = (
    "", " ", "\0", "a\nb", "\ud800", "\udfff\ud800", "é", "😀", "\u202e", "%00", "{{7*7}}", "{% raw %}", "../../etc",
    "x" * 300, "<eos>", "<bos>", "1e999", "null", "٣", "1_0", "+5", " 7 ", "9" * 5000,
)  # fmt: skip
_KEYS = (
    "model",
    "prompt",
    "messages",
    "n",
    "stop",
    "__class__",
    "model_config",
    "\ud800",
    "",
    "\0",
    "é",
    "3",
    "content",
)


def hostile_json(chooser: Random) -> Any:
    """A value that is seldom the one that was wanted."""
    return chooser.choice(_HOSTILE)(chooser)


def _deep(chooser: Random) -> Any:
    return nested(chooser.choice((3, 60, 200, 400, 900)), chooser.choice(([], {}, "x", 1)), chooser)


def _long(chooser: Random) -> Any:
    return [chooser.choice((0, "x", -1, None, 1.5, ()))] * chooser.choices(_LENGTHS, _LENGTH_WEIGHTS)[0]


_HOSTILE: tuple[Callable[[Random], Any], ...] = (
    lambda chooser: chooser.choice(_INTEGERS) * chooser.choice((1, -1)),
    lambda chooser: chooser.choice(_FLOATS),
    lambda chooser: chooser.choice(_TEXTS),
    lambda chooser: chooser.choice((None, True, False, [], {})),
    lambda chooser: [hostile_json(chooser) for _ in range(chooser.choice((1, 2, 3, 5)))],
    lambda chooser: {chooser.choice(_KEYS): hostile_json(chooser) for _ in range(chooser.choice((1, 2)))},
    _deep,
    _long,
)


def nested(depth: int, core: Any, chooser: Random) -> Any:
    in_lists = chooser.random() < 0.5
    for _ in range(depth):
        core = [core] if in_lists else {"a": core}
    return core


def mutated_json(value: Any, chooser: Random) -> Any:
    """A copy with one to three places changed."""
    value = copy.deepcopy(value)
    for _ in range(chooser.choice((1, 1, 1, 2, 3))):
        value = _changed(value, chooser)
    return value


def _changed(value: Any, chooser: Random) -> Any:
    if isinstance(value, dict) and chooser.random() < 0.9:
        key = chooser.choice([*value, chooser.choice(_KEYS)])
        if key in value and chooser.random() < 0.15:
            del value[key]
        else:
            value[key] = _changed(value[key], chooser) if key in value else hostile_json(chooser)
        return value
    if isinstance(value, list) and value and chooser.random() < 0.7:
        place = chooser.randrange(len(value))
        value[place] = _changed(value[place], chooser)
        return value
    return hostile_json(chooser)


def json_bytes(value: Any, chooser: Random) -> bytes:
    """The value as JSON in UTF-8, half of a surrogate pair as it is or escaped; sometimes with a key twice."""
    text = json.dumps(value, ensure_ascii=chooser.random() < 0.7)
    if text.startswith('{"') and chooser.random() < 0.03:
        text = text[:-1] + ', "model": ' + json.dumps(hostile_json(chooser)) + "}"
    return text.encode("utf-8", "surrogatepass")


def mutated_bytes(data: bytes, chooser: Random) -> bytes:
    for _ in range(chooser.choice((1, 1, 2, 4))):
        data = chooser.choice(_BYTE_CHANGES)(data, chooser)
    return data


def _flipped(data: bytes, chooser: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chooser.choice((1, 1, 3, 8)) if data else 0):
        changed[chooser.randrange(len(changed))] = chooser.choice((0, 0xFF, 0x80, 0x7F, chooser.randrange(256)))
    return bytes(changed)


def _inserted(data: bytes, chooser: Random) -> bytes:
    at = chooser.randint(0, len(data))
    return data[:at] + chooser.randbytes(chooser.choice((1, 2, 8, 100))) + data[at:]


def _cut(data: bytes, chooser: Random) -> bytes:
    begin, end = sorted((chooser.randint(0, len(data)), chooser.randint(0, len(data))))
    return data[:begin] + data[end:] if chooser.random() < 0.5 else data[:begin]


def _repeated(data: bytes, chooser: Random) -> bytes:
    begin, end = sorted((chooser.randint(0, len(data)), chooser.randint(0, len(data))))
    return (data[:end] + data[begin:end] * chooser.choice((1, 2, 10)) + data[end:])[: len(data) + _LONGEST_BYTES]


def _replaced(data: bytes, chooser: Random) -> bytes:
    return chooser.randbytes(chooser.choice((0, 1, 5, 64, 1000)))


_BYTE_CHANGES: tuple[Callable[[bytes, Random], bytes], ...] = (_flipped, _inserted, _cut, _repeated, _replaced)


def mutated_message(message: AnyMessage, chooser: Random) -> AnyMessage:
    """A copy with one to three fields, at whatever depth, changed to what their types can just hold."""
    changed = type(message)()
    changed.CopyFrom(message)
    for _ in range(chooser.choice((1, 1, 2, 3))):
        _change_field(changed, chooser)
    return changed


def _change_field(message: Message, chooser: Random) -> None:
    present = [field for field, _ in message.ListFields()]
    field = chooser.choice([*present, *present, *message.DESCRIPTOR.fields] or [None])
    if field is None:
        return
    if field in present and chooser.random() < 0.1:
        message.ClearField(field.name)
    elif _is_map(field):
        _change_entry(getattr(message, field.name), field, chooser)
    elif field.message_type is not None:
        _change_message(message, field, chooser)
    elif field.is_repeated:
        value, length = _scalar(field, chooser), chooser.choices(_LENGTHS, _LENGTH_WEIGHTS)[0]
        values = [value] * min(length, _MOST_CHARS // len(str(value) or "x"))
        if chooser.random() < 0.5:
            message.ClearField(field.name)
        getattr(message, field.name).extend(values)
    else:
        setattr(message, field.name, _scalar(field, chooser))


def _change_message(message: Message, field: FieldDescriptor, chooser: Random) -> None:
    held = getattr(message, field.name)
    if not field.is_repeated:
        held.SetInParent()
        _change_field(held, chooser)
    elif held and chooser.random() < 0.8:
        _change_field(chooser.choice(held), chooser)
    else:
        _change_field(held.add(), chooser)


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _change_entry(entries: Any, field: FieldDescriptor, chooser: Random) -> None:
    assert field.message_type is not None
    key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
    entries[_scalar(key, chooser)] = _scalar(value, chooser)


def _scalar(field: FieldDescriptor, chooser: Random) -> Any:
    if field.type == FieldDescriptor.TYPE_BYTES:
        return chooser.randbytes(chooser.choice((0, 1, 7, 64, 4096)))
    return chooser.choice(_SCALARS[field.cpp_type])


_SMALL = (0, 1, 2, 7, 31, 128, 10_000)
_REALS = (0.0, -1.0, 0.5, 1.0, 1e-40, 3e38, math.inf, -math.inf, math.nan)
_SCALARS: dict[int, tuple[Any, ...]] = {
    FieldDescriptor.CPPTYPE_UINT32: (*_SMALL, 1 << 31, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_UINT64: (*_SMALL, 1 << 63, (1 << 64) - 1),
    FieldDescriptor.CPPTYPE_INT32: (*_SMALL, -1, (1 << 31) - 1, -(1 << 31)),
    FieldDescriptor.CPPTYPE_INT64: (*_SMALL, -1, (1 << 63) - 1, -(1 << 63)),
    FieldDescriptor.CPPTYPE_FLOAT: _REALS,
    FieldDescriptor.CPPTYPE_DOUBLE: _REALS,
    FieldDescriptor.CPPTYPE_BOOL: (False, True),
    FieldDescriptor.CPPTYPE_ENUM: (0, 1, 2, 3, 4, 99, -1, (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_STRING: tuple(text for text in _TEXTS if is_unicode(text)),
}
