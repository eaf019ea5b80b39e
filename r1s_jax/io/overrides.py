"""A value given as text (`section.field=value`) put into a tree of frozen dataclasses."""

import contextlib
import dataclasses
import difflib
import typing
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, cast

from r1s_jax.io.errors import ConfigError, shorten
from r1s_jax.io.fields import check_bounds, declared, described, fits
from r1s_jax.io.renamed import VALUES, retired

T = TypeVar("T")


def override(config: T, assignments: Sequence[str]) -> T:
    """Applies `section.field=value` strings together; of several for one field the last counts.

    Raises ConfigError for an unknown field (naming the nearest one), for a renamed or removed field
    (naming the replacement), for a value that does not fit its type or bounds, and for values that
    the sections do not allow together.
    """
    changes: list[tuple[list[str], str, str]] = []
    for assignment in assignments:
        path, sep, text = assignment.partition("=")
        if not sep:
            raise ConfigError(f"{assignment!r} is no override: write section.field=value")
        changes.append((path.strip().split("."), text.strip(), path.strip()))
    return _apply(config, changes)


def _apply(node: Any, changes: Sequence[tuple[list[str], str, str]]) -> Any:
    """`node` with (path from here, value as text, whole path) changed."""
    values: dict[str, Any] = {}
    sections: dict[str, list[tuple[list[str], str, str]]] = {}
    kinds = declared(cast(Any, type(node)))
    paths: dict[str, str] = {}
    for (name, *rest), text, whole in changes:
        if rest:
            sections.setdefault(_field(node, name, whole), []).append((rest, text, whole))
        elif dataclasses.is_dataclass(getattr(node, _field(node, name, whole))):
            raise ConfigError(
                f"{whole!r} is a section: name one of its fields, as {whole}.field=value"
            )
        else:
            values[name], paths[name] = _parse(kinds[name][0], text, whole), whole
    for name, whole in paths.items():
        check_bounds(whole, values[name], kinds[name][1])
    for name, inner in sections.items():
        if not dataclasses.is_dataclass(getattr(node, name)):
            raise ConfigError(f"unknown config field {inner[0][2]!r}: {name!r} has no fields")
        values[name] = _apply(getattr(node, name), inner)
    return dataclasses.replace(node, **values) if values else node


def _field(node: Any, name: str, whole: str) -> str:
    """`name`, if it is a field of `node`; raises ConfigError otherwise."""
    fields = {f.name for f in dataclasses.fields(node)}
    if name not in fields:
        if message := retired(whole):
            raise ConfigError(message)
        near = difflib.get_close_matches(name, fields, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(fields))}"
        raise ConfigError(f"unknown config field {whole!r}: no {name!r} here{hint}")
    return name


def _parse(kind: Any, text: str, whole: str) -> Any:
    """Parses `text` as a `kind`; raises ConfigError, naming the field, where that fails."""
    value: Any = text
    if kind is bool:
        value = {"true": True, "false": False}.get(text.lower(), text)
    elif kind in (int, float) and text.isascii():  # int() also takes other scripts' digits
        with contextlib.suppress(ValueError):
            value = kind(text)
    elif kind in (tuple[str, ...], tuple[float, ...]):
        item = typing.get_args(kind)[0]
        return tuple(_parse(item, part.strip(), whole) for part in text.split(",") if part.strip())
    elif kind is not str and typing.get_origin(kind) is not Literal and kind not in (int, float):
        raise ConfigError(f"{whole} cannot be set from the command line ({described(kind)})")
    if not fits(value, kind):
        renamed = f"; {text} is called {new} now" if (new := VALUES.get(text)) else ""
        raise ConfigError(f"{whole}={shorten(text, 80)!r}: must be {described(kind)}{renamed}")
    return value
