"""Dataclasses whose fields have the types that they declare, checked when they are made."""

import dataclasses
import functools
import sys
import typing
from typing import Any, Literal

from r1s_jax.border.errors import ConfigError, reason, shorten

_LARGEST = sys.float_info.max
_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


class Checked:
    """A base of frozen dataclasses."""

    def __post_init__(self) -> None:
        for name, kind in _kinds(type(self)).items():
            if not fits(value := getattr(self, name), kind):
                told = f"{type(self).__name__}.{name} must be {described(kind)}"
                raise ConfigError(f"{told}, got {shown(value)}")
        self.check_values()

    def check_values(self) -> None:
        """Raises ConfigError for values of the right types that cannot be meant."""


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a declared type; whole numbers are numbers too, and inf is none."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is tuple:  # of any length, of one kind
        return isinstance(value, tuple) and all(fits(item, inner[0]) for item in value)
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
        return f"one of {', '.join(inner)}"
    if origin is tuple:
        return f"a tuple of {'texts' if inner[0] is str else 'numbers'}"
    if inner:
        return " or ".join(map(described, inner))
    if dataclasses.is_dataclass(kind):
        return f"a {kind.__name__}"
    return _NAMES.get(kind, "None" if kind is type(None) else str(kind))


def shown(value: Any) -> str:
    """A value of somebody's for a message: short, whatever it is."""
    try:
        return shorten(repr(value), 60)
    except Exception as error:  # ten thousand digits, or an object that cannot say what it is
        return f"a {type(value).__name__} that cannot be shown ({reason(error)})"


@functools.cache
def _kinds(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)
