"""A decorator for functions with a custom gradient."""

from collections.abc import Callable
from typing import TypeVar, cast

import jax

T = TypeVar("T")


def own_gradient(*fixed: int) -> Callable[[Callable[..., T]], "jax.custom_vjp[T]"]:
    """`jax.custom_vjp` for a function whose arguments at `fixed` are not differentiated.

    Used directly as a decorator with arguments, `jax.custom_vjp` would hide the function's return
    type from type checkers.
    """

    def decorate(function: Callable[..., T]) -> "jax.custom_vjp[T]":
        return cast("jax.custom_vjp[T]", jax.custom_vjp(function, nondiff_argnums=fixed))

    return decorate
