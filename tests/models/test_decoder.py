"""The KV cache: chunked prefill and decode steps equal a forward pass over the whole row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1s_jax.config import ModelConfig, RopeScaling
from r1s_jax.kernels.tuning import ACCELERATOR, CPU
from r1s_jax.models.decoder import Policy
from r1s_jax.models.kv_cache import KVCache
from r1s_jax.models.params import init_params, unstack_layers

FAMILIES = {
    "llama": ModelConfig(
        61, 48, 64, 3, 6, 2, 16, rope_theta=500.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16)
    ),
    "qwen2": ModelConfig(61, 48, 64, 3, 6, 3, 16, qkv_bias=True, tie_embeddings=True),
    "qwen3": ModelConfig(61, 48, 64, 3, 4, 1, 32, qk_norm=True),
}
LENGTH, CHUNK, SLOTS = 30, 8, 5


def randomised(params, seed=1):
    """Also randomises biases and gains, which start as zeros and ones."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


@pytest.mark.parametrize(
    ("family", "impl", "stacked"),
    [
        pytest.param("llama", "xla", True, marks=pytest.mark.slow),
        pytest.param("llama", "xla", False, marks=pytest.mark.slow),
        pytest.param("llama", "interpret", True, marks=pytest.mark.slow),
        ("qwen2", "xla", False),
        ("qwen3", "interpret", True),
    ],
)
def test_cached_decoding_equals_the_full_forward_pass(family, impl, stacked):
    config = FAMILIES[family]
    params = randomised(init_params(config, 0))
    tokens = np.random.default_rng(0).integers(0, 61, (2, LENGTH))
    expected = jax.jit(lambda t: Policy(config, params, tuning=CPU)(t))(jnp.asarray(tokens))

    params = params if stacked else unstack_layers(params)
    form = CPU if impl == "xla" else ACCELERATOR

    @jax.jit
    def prefill(tokens, rows, starts, cache):
        policy = Policy(config, params, impl=impl, tuning=form)
        hidden, cache = policy.prefill(tokens, rows, starts, cache)
        return policy.logits(hidden), cache

    @jax.jit
    def decode(tokens, starts, cache):
        policy = Policy(config, params, impl=impl, tuning=form)
        hidden, cache = policy.decode(tokens[:, None], starts, cache)
        return policy.logits(hidden[:, 0]), cache

    cache = KVCache.empty(config, SLOTS, 64, config.num_kv_heads, jnp.float32, impl)
    rows, fed = np.array([3, 1]), np.array([2 * CHUNK, 3 * CHUNK])  # chunks, then single tokens
    got = np.zeros(expected.shape, np.float32)
    for start in range(0, fed.max(), CHUNK):
        some = np.flatnonzero(fed > start)
        chunk = jnp.asarray(tokens[some, start : start + CHUNK])
        starts = jnp.full(len(some), start)
        logits, cache = prefill(chunk, jnp.asarray(rows[some]), starts, cache)
        got[some, start : start + CHUNK] = logits
    at = fed.copy()
    while (at < LENGTH).any():
        token, starts = np.zeros(SLOTS, np.int32), np.zeros(SLOTS, np.int32)
        token[rows], starts[rows] = tokens[[0, 1], np.minimum(at, LENGTH - 1)], at
        logits, cache = decode(jnp.asarray(token), jnp.asarray(starts), cache)
        for i in np.flatnonzero(at < LENGTH):
            got[i, at[i]] = logits[rows[i]]
        at += 1
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("slots", [1, 2, 8])
@pytest.mark.parametrize("step", ["decode", "prefill"])
@pytest.mark.parametrize("quantized", [False, True])
def test_no_step_copies_the_cache(slots, step, quantized):
    """Compares the temporary memory of a compiled step with the size of the cache."""
    config, impl = FAMILIES["llama"], "xla"
    params = unstack_layers(init_params(config, 0))
    heads = config.num_kv_heads
    cache = KVCache.empty(config, slots, 8192, heads, jnp.float32, impl, quantized=quantized)
    tokens, starts = jnp.zeros((slots, 3), jnp.int32), jnp.arange(slots)

    def run(params, cache):
        policy = Policy(config, params, impl=impl, tuning=CPU)
        if step == "decode":
            return policy.decode(tokens, starts, cache)
        return policy.prefill(tokens, jnp.arange(slots), starts, cache)

    compiled = jax.jit(run, donate_argnums=1).lower(params, cache).compile()
    held = sum(x.nbytes for x in jax.tree.leaves(cache))
    assert compiled.memory_analysis().temp_size_in_bytes < 0.2 * held
