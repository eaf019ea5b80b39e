"""JSON of others: bytes to values, with what is wrong named by place instead of printed."""

import json
from pathlib import Path
from typing import Any

from r1s_jax.border.errors import BadInput, UserError, shorten
from r1s_jax.border.text import has_surrogates, whole

_DEEPEST = 64


def parse(data: bytes | str, where: str | Path, error: type[UserError] = BadInput) -> Any:
    """The value that JSON text holds, lone surrogates in its texts replaced.

    Raises `error`, naming `where`, for bytes that are no UTF-8 (which, and where), for what is no
    JSON, and for values nested deeper than any that is read here.
    """
    text = decode(data, where, error) if isinstance(data, bytes) else data.removeprefix("\ufeff")
    if text.count("[") + text.count("{") > _DEEPEST and _depth(text) > _DEEPEST:
        raise error(f"{where}: JSON nested deeper than {_DEEPEST} levels")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as wrong:
        place = f"line {wrong.lineno}, column {wrong.colno}"
        raise error(f"{where}: no JSON: {wrong.msg} at {place}") from None
    except (ValueError, RecursionError) as wrong:  # a number of thousands of digits
        raise error(f"{where}: no JSON: {shorten(str(wrong), 100)}") from None
    return _whole(value) if "\\ud" in text.lower() or has_surrogates(text) else value


def parse_object(
    data: bytes | str, where: str | Path, error: type[UserError] = BadInput
) -> dict[str, Any]:
    """The JSON object that the text holds; raises as `parse` does, and for any other value."""
    value = parse(data, where, error)
    if not isinstance(value, dict):
        raise error(f"{where}: expected a JSON object, found {_name(value)}")
    return value


def read_object(path: str | Path, error: type[UserError] = BadInput) -> dict[str, Any]:
    """The JSON object in a file; raises OSError where there is none, else as parse_object does."""
    return parse_object(Path(path).read_bytes(), path, error)


def decode(data: bytes, where: str | Path, error: type[UserError] = BadInput) -> str:
    """Bytes as text, a byte order mark apart; raises `error` that says where they are no UTF-8."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as wrong:
        line = data.count(b"\n", 0, wrong.start) + 1
        byte = data[wrong.start]
        place = f"position {wrong.start}" + (f" (line {line})" if line > 1 else "")
        raise error(f"{where}: no UTF-8: byte 0x{byte:02x} at {place}") from None


def _depth(text: str) -> int:
    """How deep brackets outside of texts are nested."""
    depth = deepest = 0
    inside = escaped = False
    for character in text:
        if inside:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                inside = False
        elif character == '"':
            inside = True
        elif character in "[{":
            depth += 1
            deepest = max(deepest, depth)
            if deepest > _DEEPEST:
                return deepest
        elif character in "]}":
            depth -= 1
    return deepest


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {whole(key): _whole(item) for key, item in value.items()}
    return value


def _name(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
