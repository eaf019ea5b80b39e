"""Dataclasses that check the declared types and bounds of their fields when created."""

import dataclasses
import functools
import operator
import sys
import typing
from typing import Annotated, Any, Literal, cast

from msgspec import Meta

from r1s_jax.io.errors import ConfigError, reason, shorten

_LARGEST = sys.float_info.max
_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
_SIDES = {
    "ge": ("at least", operator.ge),
    "gt": ("above", operator.gt),
    "le": ("at most", operator.le),
    "lt": ("below", operator.lt),
}


class Checked:
    """Base class of frozen dataclasses; messages about bounds name `section.field`."""

    _section = ""

    def __init_subclass__(cls, section: str = "", **others: Any) -> None:
        super().__init_subclass__(**others)
        cls._section = section or cls.__name__

    def __post_init__(self) -> None:
        fields = declared(type(self))
        for name, (kind, _) in fields.items():
            if not fits(value := getattr(self, name), kind):
                place = f"{type(self).__name__}.{name}"
                raise ConfigError(f"{place} must be {described(kind)}, got {shown(value)}")
        for name, (_, bounds) in fields.items():
            check_bounds(f"{self._section}.{name}", getattr(self, name), bounds)
        self.check_values()

    def check_values(self) -> None:
        """Raises ConfigError for values that are each allowed but exclude each other."""


def check(ok: bool, message: str) -> None:
    """Raises ConfigError unless `ok`."""
    if not ok:
        raise ConfigError(message)


@functools.cache
def declared(cls: type) -> dict[str, tuple[Any, Meta | None]]:
    """The type and the bounds, if any, of each field of a dataclass."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: _parted(hints[field.name]) for field in dataclasses.fields(cls)}


def _parted(hint: Any) -> tuple[Any, Meta | None]:
    if typing.get_origin(hint) is not Annotated:
        return hint, None
    kind, *notes = typing.get_args(hint)
    return kind, next((note for note in notes if isinstance(note, Meta)), None)


def check_bounds(name: str, value: Any, bounds: Meta | None) -> None:
    """Raises ConfigError for a number out of bounds.

    The message quotes the `description` of the bounds, or else the violated bound.
    """
    for side, (words, holds) in _SIDES.items() if bounds else ():
        bound = getattr(bounds, side)
        if bound is not None and not holds(value, bound):
            allowed = getattr(bounds, "description", None) or f"{words} {number(bound)}"
            raise ConfigError(f"{name} must be {allowed}, got {shown(value)}")


def number(value: float) -> str:
    """A bound in a message: whole numbers with all their digits, others short."""
    return str(value) if isinstance(value, int) else f"{value:g}"


def fits(value: Any, kind: Any) -> bool:
    """Whether a value has a declared type; a float may be an int, but not inf or NaN."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is tuple:  # any number of items of one type
        items = cast("tuple[Any, ...]", value)
        return isinstance(value, tuple) and all(fits(item, inner[0]) for item in items)
    if inner:  # a union
        return any(fits(value, one) for one in inner)
    if isinstance(value, bool) or kind not in (int, float):
        return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if kind is int:
        return isinstance(value, int)
    return isinstance(value, int | float) and -_LARGEST <= value <= _LARGEST


def described(kind: Any) -> str:
    """A declared type in words."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(one or 'empty' for one in inner)}"
    if origin is tuple:
        return f"a tuple of {'texts' if inner[0] is str else 'numbers'}"
    if inner:
        return " or ".join(map(described, inner))
    if dataclasses.is_dataclass(kind):
        return f"a {cast('type[object]', kind).__name__}"
    return _NAMES.get(kind, "None" if kind is type(None) else str(kind))


def shown(value: Any) -> str:
    """A short representation of any value, for a message."""
    try:
        return shorten(repr(value), 60)
    except Exception as error:  # an int of too many digits, or a __repr__ that raises
        return f"a {type(value).__name__} that cannot be shown ({reason(error)})"
