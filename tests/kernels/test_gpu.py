"""On a real GPU: the compiled kernels against float32 at realistic sizes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.attention import last_queries, normal, untuned
from r1s_jax.kernels.attention import api, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="no CUDA GPU (see JAX_PLATFORMS)"),
]
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def assert_near(got, expected, dtype):
    """Within the tolerance of the dtype, relative to the largest value."""
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        g, e = np.asarray(g, np.float32), np.asarray(e, np.float32)
        assert np.abs(g - e).max() <= TOLERANCE[dtype] * np.abs(e).max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (28, 4, 128), (8, 8, 16)])
@pytest.mark.parametrize(("length", "mode"), [(1000, "packed"), (1000, "shared"), (2048, "causal")])
def test_rows_and_their_gradients(dtype, heads, kv_heads, head_dim, length, mode):
    shapes = [(2, length, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    q, k, v = normal(dtype, *shapes)
    last = None if mode == "causal" else jnp.asarray(last_queries(mode, 2, length))

    def loss(attend, q, k, v):
        out = attend(q, k, v, last_query=last)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    exact = partial(api.attention, impl="xla")
    grads = partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    (_, got), got_grads = jax.jit(grads(partial(loss, api.attention)))(q, k, v)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    with jax.default_matmul_precision("highest"):
        run = jax.jit(grads(partial(loss, exact)), compiler_options=untuned())
        (_, expected), expected_grads = run(*wide)
    assert_near(got, expected, dtype)
    assert_near(got_grads, expected_grads, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (28, 4, 128), (8, 8, 16)])
@pytest.mark.parametrize("new", [1, 70])
def test_decode(dtype, heads, kv_heads, head_dim, new):
    rows, capacity = 6, 2048
    cache = (2, rows, kv_heads, capacity, head_dim)
    q, k, v = normal(dtype, (rows, new, heads, head_dim), cache, cache)
    lengths = jnp.asarray([0, new, 777, 1024, capacity - 1, capacity], jnp.int32)
    got = jax.jit(api.decode_attention)(q, k, v, 1, lengths)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    with jax.default_matmul_precision("highest"):
        expected = reference.decode_attention(*wide, 1, lengths)
    assert_near(got, expected, dtype)
