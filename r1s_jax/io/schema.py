"""Checks values from outside against declared types and ranges."""

from typing import Any, TypeVar

import msgspec

from r1s_jax.io.errors import BadInput, UserError, Where, reason, shorten

T = TypeVar("T")


def check(value: Any, kind: type[T], where: Where, error: type[UserError] = BadInput) -> T:
    """`value` as a `kind`: a msgspec.Struct, a TypedDict, or any type that msgspec supports.

    Keys that `kind` does not declare are ignored. Raises `error`, naming `where`, the key, its
    declared type or range, and the type found.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as wrong:
        problem, _, path = shorten(str(wrong), 250).partition(" - at `$")
        place = path.removesuffix("`").removeprefix(".").replace("[...]", "[]")
        raise error(f"{where}: {place + ': ' if place else ''}{problem}") from None
    except (ValueError, ArithmeticError, RecursionError) as wrong:
        # A lone surrogate in a text or a key, or a number too large for a float.
        raise error(f"{where}: {reason(wrong)}") from None
