"""Functions with a gradient of their own."""

from collections.abc import Callable
from typing import TypeVar, cast

import jax

T = TypeVar("T")


def own_gradient(*fixed: int) -> Callable[[Callable[..., T]], "jax.custom_vjp[T]"]:
    """`jax.custom_vjp` for a function whose arguments at `fixed` are not differentiated.

    As a decorator with arguments it would hide from type checkers what the function returns.
    """

    def decorate(function: Callable[..., T]) -> "jax.custom_vjp[T]":
        return cast("jax.custom_vjp[T]", jax.custom_vjp(function, nondiff_argnums=fixed))

    return decorate
