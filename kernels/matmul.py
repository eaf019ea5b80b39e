"""bfloat16 matrix products in the form that XLA's CPU backend runs on matrix units.

The backend uses the matrix units (AMX: about five times float32's speed) only where the result is
float32 and no operand has to be transposed first. The gradients here meet both conditions too.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from r1s_jax.kernels.gradients import own_gradient

_SPLIT = 4  # parts of the rows in `summed_over_rows`


@own_gradient(2)
def matmul(
    x: Float[Array, "*B M D"],
    w: Float[Array, "*B D F"] | Float[Array, "*B F D"],
    transposed: bool = False,
) -> Float[Array, "*B M F"]:
    """float32 `x @ w`, or `x @ w.T` if `transposed`, for each element of the batch.

    The backward pass rounds the result's gradient to the operands' dtype before multiplying.
    """
    equation = "...md,...fd->...mf" if transposed else "...md,...df->...mf"
    return jnp.einsum(equation, x, w, preferred_element_type=jnp.float32)


def _forward(x: Array, w: Array, transposed: bool) -> tuple[Array, tuple[Array, Array]]:
    return matmul(x, w, transposed), (x, w)


def _backward(transposed: bool, operands: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    (x, w), g = operands, g.astype(operands[0].dtype)
    dx = matmul(g, w, not transposed)
    dw = summed_over_rows(g, x) if transposed else summed_over_rows(x, g)
    return dx.astype(x.dtype), dw.astype(w.dtype)


def summed_over_rows(
    x: Float[Array, "*B M A"], y: Float[Array, "*B M C"]
) -> Float[Array, "*B A C"]:
    """float32 `x.T @ y`.

    bfloat16 operands are summed over two axes: with one axis, the compiler reads `x` against its
    layout, at a sixth of the speed. Transposing the result instead fails in XLA's CPU runtime
    (jaxlib 0.10).
    """
    if x.dtype == jnp.float32:
        return jnp.einsum("...ma,...mc->...ac", x, y)
    parts = math.gcd(x.shape[-2], _SPLIT)
    x, y = (a.reshape(*a.shape[:-2], parts, -1, a.shape[-1]) for a in (x, y))
    return jnp.einsum("...pma,...pmc->...ac", x, y, preferred_element_type=jnp.float32)


matmul.defvjp(_forward, _backward)
