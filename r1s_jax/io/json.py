"""Parses JSON from outside; errors name the damaged place and do not quote the text."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from r1s_jax.io.errors import BadInput, UserError, Where, shorten
from r1s_jax.io.text import has_surrogates, whole

_DEEPEST = 64
_SPACE = re.compile(r"[ \t\n\r]*")
_Scan = Callable[[str, int], tuple[Any, int]]


def parse(data: bytes | str, where: Where, error: type[UserError] = BadInput) -> Any:
    """The value of a JSON text, with lone surrogates in its strings replaced.

    Raises `error`, naming `where`, for bytes that are not UTF-8 (with the byte and its position),
    for text that is not JSON, and for values nested deeper than `_DEEPEST` levels.
    """
    text = decode(data, where, error) if isinstance(data, bytes) else data.removeprefix("\ufeff")
    _check_depth(text, where, error)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as wrong:
        raise _no_json(wrong, where, error) from None
    return _without_surrogates(value, text)


def parse_items(
    data: bytes | str, where: Where, error: type[UserError] = BadInput
) -> Iterator[Any]:
    """Yields the values of a JSON array in one pass over `data`.

    Raises as `parse` does, when it reaches the damaged place.
    """
    text = decode(data, where, error) if isinstance(data, bytes) else data.removeprefix("\ufeff")
    decoder: Any = json.JSONDecoder()  # typeshed leaves its scan_once out
    scan: _Scan = decoder.scan_once
    at = _after_space(text, 0)
    if text[at : at + 1] != "[":
        raise error(f"{where}: expected a JSON array")
    after, item = _after_space(text, at + 1), 0
    ended = text[after : after + 1] == "]"
    while not ended:
        item, at = item + 1, after
        try:
            value, after = scan(text, at)
            after = _after_space(text, after)
            if text[after : after + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, after)
        except StopIteration as wrong:
            missing = json.JSONDecodeError("Expecting value", text, wrong.value)
            raise _no_json(missing, where, error) from None
        except (ValueError, RecursionError) as wrong:
            raise _no_json(wrong, where, error) from None
        own = text[at:after]
        _check_depth(own, f"{where}, item {item}", error)
        yield _without_surrogates(value, own)
        ended = text[after] == "]"
        after = after if ended else _after_space(text, after + 1)
    if _after_space(text, after + 1) < len(text):
        raise _no_json(json.JSONDecodeError("Extra data", text, after + 1), where, error)


def parse_object(
    data: bytes | str, where: Where, error: type[UserError] = BadInput
) -> dict[str, Any]:
    """The JSON object that the text holds; raises as `parse` does, and for any other value."""
    value = parse(data, where, error)
    if not isinstance(value, dict):
        raise error(f"{where}: expected a JSON object, found {_name(value)}")
    return cast("dict[str, Any]", value)


def read_object(path: str | Path, error: type[UserError] = BadInput) -> dict[str, Any]:
    """The JSON object in a file; raises OSError where there is none, else as parse_object does."""
    return parse_object(Path(path).read_bytes(), path, error)


def differences(old: Any, new: Any, place: str = "") -> list[tuple[str, Any, Any]]:
    """(place, old, new) of every value in which two objects differ; None where it is missing."""
    if isinstance(old, dict) and isinstance(new, dict):
        before, now = cast(dict[str, Any], old), cast(dict[str, Any], new)
        join = f"{place}." if place else ""
        keys = sorted({*before, *now})
        return [d for k in keys for d in differences(before.get(k), now.get(k), f"{join}{k}")]
    return [] if old == new else [(place, old, new)]


def decode(data: bytes, where: Where, error: type[UserError] = BadInput) -> str:
    """Bytes as text, without a byte order mark; `error` names the first byte that is not UTF-8."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as wrong:
        line = data.count(b"\n", 0, wrong.start) + 1
        byte = data[wrong.start]
        place = f"position {wrong.start}" + (f" (line {line})" if line > 1 else "")
        raise error(f"{where}: no UTF-8: byte 0x{byte:02x} at {place}") from None


def _no_json(wrong: Exception, where: Where, error: type[UserError]) -> UserError:
    """The error for text that is not JSON, with the place if the parser gives one."""
    if isinstance(wrong, json.JSONDecodeError):
        place = f"line {wrong.lineno}, column {wrong.colno}"
        return error(f"{where}: no JSON: {wrong.msg} at {place}")
    return error(f"{where}: no JSON: {shorten(str(wrong), 100)}")  # a number of too many digits


def _after_space(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    assert space is not None  # the pattern matches the empty string
    return space.end()


def _check_depth(text: str, where: Where, error: type[UserError]) -> None:
    if text.count("[") + text.count("{") > _DEEPEST and _depth(text) > _DEEPEST:
        raise error(f"{where}: JSON nested deeper than {_DEEPEST} levels")


def _without_surrogates(value: Any, text: str) -> Any:
    """A value parsed from `text`, with lone surrogates replaced."""
    return _whole(value) if "\\ud" in text.lower() or has_surrogates(text) else value


def _depth(text: str) -> int:
    """Nesting depth of brackets outside of strings, counted to just above `_DEEPEST`."""
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
        return [_whole(item) for item in cast("list[Any]", value)]
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value).items()
        return {whole(key): _whole(item) for key, item in items}
    return value


def _name(value: object) -> str:
    names: dict[type[object], str] = {
        list: "a list",
        str: "a text",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(type(value), "a number")
