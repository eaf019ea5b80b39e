"""The CPU's matrix product against float64, in every compiled form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1s_jax.kernels.matmul import matmul

# (batch, rows, width, columns): odd sizes, ones, and sizes for the matrix units.
SHAPES = [((), 1, 3, 5), ((), 7, 8, 3), ((), 64, 24, 40), ((2, 3), 32, 16, 48), ((), 36, 128, 16)]
CLOSE = {"float32": 1e-5, "bfloat16": 2e-2}


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_and_its_gradients(shape, turned, dtype):
    batch, rows, width, columns = shape
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(*batch, rows, width)), dtype)
    w = rng.normal(size=(*batch, columns, width) if turned else (*batch, width, columns))
    w, g = jnp.asarray(w, dtype), jnp.asarray(rng.normal(size=(*batch, rows, columns)), dtype)

    @jax.jit
    def program(x, w, g):
        out, pull = jax.vjp(lambda x, w: matmul(x, w, turned), x, w)
        return out, *pull(g.astype(jnp.float32))

    out, dx, dw = program(x, w, g)
    assert (out.dtype, dx.dtype, dw.dtype) == (jnp.float32, dtype, dtype)
    x, w, g = (np.asarray(a, np.float64) for a in (x, w, g))
    w = w.swapaxes(-1, -2) if turned else w
    of_w = x.swapaxes(-1, -2) @ g
    expected = x @ w, g @ w.swapaxes(-1, -2), of_w.swapaxes(-1, -2) if turned else of_w
    for got, right in zip((out, dx, dw), expected, strict=True):
        scale = np.abs(right).max()
        np.testing.assert_allclose(np.asarray(got, np.float64), right, atol=CLOSE[dtype] * scale)
