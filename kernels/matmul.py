"""A matrix product of bfloat16 that a CPU's matrix units take.

XLA's CPU backend hands a product of bfloat16 to them (AMX: about five times float32's speed) only
where the result is float32, and where an operand need not be turned around first. Both hold in the
gradient too, written here as what the compiler takes.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from r1s_jax.kernels.gradients import own_gradient

_SPLIT = 4  # into how many parts rows are cut that are summed over


@own_gradient(2)
def matmul(
    x: Float[Array, "*B M D"],
    w: Float[Array, "*B D F"] | Float[Array, "*B F D"],
    turned: bool = False,
) -> Float[Array, "*B M F"]:
    """float32 `x @ w`, or `x @ w.T` where `w` is `turned`, of each of a batch.

    The result's gradient is rounded to the operands' dtype before it multiplies.
    """
    equation = "...md,...fd->...mf" if turned else "...md,...df->...mf"
    return jnp.einsum(equation, x, w, preferred_element_type=jnp.float32)


def _forward(x: Array, w: Array, turned: bool) -> tuple[Array, tuple[Array, Array]]:
    return matmul(x, w, turned), (x, w)


def _backward(turned: bool, operands: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    (x, w), g = operands, g.astype(operands[0].dtype)
    dx = matmul(g, w, not turned)
    dw = summed_over_rows(g, x) if turned else summed_over_rows(x, g)
    return dx.astype(x.dtype), dw.astype(w.dtype)


def summed_over_rows(
    x: Float[Array, "*B M A"], y: Float[Array, "*B M C"]
) -> Float[Array, "*B A C"]:
    """float32 `x.T @ y`.

    Of bfloat16, summed over two axes: over one, the compiler reads `x` against its layout, at a
    sixth of the speed. To turn the result around instead fails in its runtime (jaxlib 0.10).
    """
    if x.dtype == jnp.float32:
        return jnp.einsum("...ma,...mc->...ac", x, y)
    parts = math.gcd(x.shape[-2], _SPLIT)
    x, y = (a.reshape(*a.shape[:-2], parts, -1, a.shape[-1]) for a in (x, y))
    return jnp.einsum("...pma,...pmc->...ac", x, y, preferred_element_type=jnp.float32)


matmul.defvjp(_forward, _backward)


def turned_matmul(x: Float[Array, "M D"], w: Float[Array, "F D"]) -> Float[Array, "M F"]:
    """float32 `x @ w.T` for a few rows, as `(w @ x.T).T`; it has no fast gradient.

    What it costs is reading `w`: of bfloat16, 1.4x as fast at 8 rows (1.9x at 32) as `x @ w`.
    """
    return jnp.einsum("fd,md->fm", w, x, preferred_element_type=jnp.float32).T
