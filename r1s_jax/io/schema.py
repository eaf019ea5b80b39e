"""Declared shapes of what is read: types and ranges checked in one call."""

from typing import Any, TypeVar

import msgspec

from r1s_jax.io.errors import BadInput, UserError, Where, reason, shorten

T = TypeVar("T")


def check(value: Any, kind: type[T], where: Where, error: type[UserError] = BadInput) -> T:
    """`value` as a `kind`: a msgspec.Struct, a TypedDict, or any type that msgspec knows.

    Keys that the kind does not name pass. Raises `error` that names `where`, the key, what it must
    be and what it is.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as wrong:
        said, _, path = shorten(str(wrong), 250).partition(" - at `$")
        place = path.removesuffix("`").removeprefix(".").replace("[...]", "[]")
        raise error(f"{where}: {place + ': ' if place else ''}{said}") from None
    except (ValueError, ArithmeticError, RecursionError) as wrong:
        # Half of a surrogate pair in a text or a key, a number that no float holds.
        raise error(f"{where}: {reason(wrong)}") from None
