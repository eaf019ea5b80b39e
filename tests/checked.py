"""Checks annotated shapes and dtypes of arrays at every call: see conftest.py."""

from collections.abc import Callable
from functools import reduce
from operator import or_
from types import UnionType
from typing import Any, Generic, Union, get_args, get_origin

from beartype import beartype
from jaxtyping import AbstractArray


def checked(function: Callable) -> Callable:
    """`beartype` for parameters that are arrays; tests may pass fakes for all others.

    `beartype` does not support generic NamedTuples, so annotations with one are skipped.
    """
    hints = function.__annotations__.items()
    arrays = {n: hint for n, hint in hints if _has(hint, AbstractArray) and not _has(hint, Generic)}
    function.__annotations__ = {name: _of_any_library(hint) for name, hint in arrays.items()}
    return beartype(function) if arrays else function


def _has(hint: Any, kind: type) -> bool:
    own = get_origin(hint) or hint
    if isinstance(own, type) and issubclass(own, kind):
        return True
    inner = hint if isinstance(hint, list) else get_args(hint)
    return any(_has(part, kind) for part in inner)


def _of_any_library(hint: Any) -> Any:
    """Accepts NumPy arrays where JAX arrays are annotated, as every function of JAX does."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return hint.dtype[Any, hint.dim_str]
    inner = tuple(map(_of_any_library, get_args(hint)))
    if get_origin(hint) is tuple:
        return tuple[inner]
    return reduce(or_, inner) if get_origin(hint) in (Union, UnionType) else hint
