from functools import partial
from typing import get_args

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1s_jax.config import Impl
from r1s_jax.kernels.attention import api, reference, xla
from r1s_jax.models.kv_cache import quantize
from tests.kernels.oracle import (
    attention_oracle,
    decode_oracle,
    random_cache,
    random_qkv,
    random_trees,
    whole_rows,
)

DECODE = {
    "reference": jax.jit(reference.decode_attention),
    "xla": jax.jit(xla.decode_attention),
}


@pytest.mark.parametrize("module", [reference, api])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (4, 1)])
def test_attention_is_causal_and_grouped(module, heads, kv_heads):
    q, k, v = random_qkv(2, 11, heads, kv_heads, 8)
    expected = attention_oracle(q, k, v, whole_rows(2, 11), 8**-0.5)
    np.testing.assert_allclose(module.attention(q, k, v), expected, atol=2e-6)


@pytest.mark.parametrize("module", [reference, api])
@pytest.mark.parametrize(
    ("length", "seed"), [(13, 0), pytest.param(200, 1, marks=pytest.mark.slow), (300, 2)]
)
def test_attention_follows_its_tree(module, length, seed):
    """Output and gradients; of one block and of several, with beginnings three levels deep."""
    q, k, v = random_qkv(3, length, 4, 2, 8, seed)
    last = random_trees(np.random.default_rng(seed), 3, length)
    got = np.asarray(module.attention(q, k, v, last_query=last))
    np.testing.assert_allclose(got, attention_oracle(q, k, v, last, 8**-0.5), atol=2e-6)
    assert not got[last < 0].any(), "padding attends to nothing"

    dout = np.cos(q)

    def gradients(attend):
        def loss(q, k, v):
            return (attend(q, k, v, last_query=last) * dout).sum()

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    for mine, plain in zip(*map(gradients, (module.attention, reference.attention)), strict=True):
        np.testing.assert_allclose(mine, plain, atol=2e-5)


def test_the_future_and_other_branches_have_no_gradient():
    """Two sequences share tokens 0 and 1; a third stands alone; then padding."""
    q, k, v = random_qkv(1, 8, 2, 1, 4)
    last = np.array([[4, 4, 3, 3, 4, 6, 6, -1]], np.int32)

    def at(k, v, token):
        return reference.attention(q, k, v, last_query=last)[0, token].sum()

    for token, seen in [(1, [0, 1]), (3, [0, 1, 2, 3]), (4, [0, 1, 4]), (6, [5, 6])]:
        for gradient in jax.grad(partial(at, token=token), (0, 1))(k, v):
            touched = np.flatnonzero(np.abs(gradient[0]).sum((1, 2)))
            assert set(touched) <= set(seen)
        assert set(np.flatnonzero(np.abs(gradient[0]).sum((1, 2)))) == set(seen)


def test_attention_with_a_given_scale():
    q, k, v = random_qkv(1, 6, 2, 2, 4)
    got = reference.attention(q, k, v, scale=1.7)
    expected = attention_oracle(q, k, v, whole_rows(1, 6), 1.7)
    np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize("backend", DECODE)
@pytest.mark.parametrize(("capacity", "new"), [(7, 3), (128, 1), (200, 3), (256, 1), (300, 2)])
def test_decode_over_ragged_lengths(backend, capacity, new):
    """Empty and full rows, lengths at block edges, capacities that are no multiple of a block."""
    lengths = np.array([0, new, capacity // 2, capacity - 1, capacity, 128, 129], np.int32)
    lengths = np.minimum(lengths, capacity)
    q, k, v = random_cache(3, len(lengths), 2, capacity, 8, new, 6)
    for layer in (0, 2):
        got = DECODE[backend](q, k, v, layer, lengths)
        expected = decode_oracle(q, k, v, layer, lengths, 8**-0.5)
        np.testing.assert_allclose(got, expected, atol=3e-6)
        assert not np.asarray(got)[0].any()


@pytest.mark.parametrize("backend", DECODE)
@pytest.mark.parametrize("new", [1, 3])
def test_decode_of_an_int8_cache_equals_that_of_the_dequantised_cache(backend, new):
    lengths = np.array([0, new, 120, 199, 200], np.int32)
    q, k, v = random_cache(2, len(lengths), 2, 200, 8, new, 6)
    (k, k_scale), (v, v_scale) = (tuple(map(np.asarray, quantize(x))) for x in (k, v))
    assert k.dtype == np.int8 and np.abs(k).max() == 127
    got = DECODE[backend](q, k, v, 1, lengths, scales=(k_scale, v_scale))
    real = k * k_scale[..., None], v * v_scale[..., None]
    np.testing.assert_allclose(got, decode_oracle(q, *real, 1, lengths, 8**-0.5), atol=3e-6)


@pytest.mark.parametrize("backend", DECODE)
def test_decode_of_short_rows_in_a_long_cache(backend):
    """Large values past the end of a row must have no effect."""
    lengths = np.array([5, 1, 130], np.int32)
    q, k, v = random_cache(2, 3, 2, 500, 8, 1, 4)
    expected = decode_oracle(q, k, v, 1, lengths, 8**-0.5)
    for b, length in enumerate(lengths):
        k[:, b, :, length:] = v[:, b, :, length:] = 1e4
    np.testing.assert_allclose(DECODE[backend](q, k, v, 1, lengths), expected, atol=3e-6)


@pytest.mark.parametrize("backend", DECODE)
def test_decode_without_keys_is_zero(backend):
    q, k, v = random_cache(1, 2, 1, 9, 4, 1, 2)
    assert not np.asarray(DECODE[backend](q, k, v, 0, np.zeros(2, np.int32))).any()


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_decode_with_a_given_scale(backend):
    module = {"reference": reference, "xla": xla}[backend]
    q, k, v = random_cache(1, 2, 2, 140, 4, 2, 4)
    lengths = np.array([140, 17], np.int32)
    got = module.decode_attention(q, k, v, 0, lengths, scale=1.7)
    np.testing.assert_allclose(got, decode_oracle(q, k, v, 0, lengths, 1.7), atol=3e-6)


@pytest.mark.parametrize("backend", DECODE)
def test_large_scores_do_not_overflow(backend):
    q, k, v = random_cache(1, 2, 1, 200, 8, 1, 2)
    lengths = np.array([200, 150], np.int32)
    expected = decode_oracle(40 * q, 40 * k, v, 0, lengths, 8**-0.5)
    np.testing.assert_allclose(DECODE[backend](40 * q, 40 * k, v, 0, lengths), expected, atol=1e-3)


@given(
    layers=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    head_dim=st.sampled_from([2, 8, 16]),
    new=st.integers(1, 5),
    capacity=st.integers(5, 400),
    data=st.data(),
)
@settings(deadline=None, max_examples=8)
def test_xla_agrees_with_the_reference(layers, kv_heads, groups, head_dim, new, capacity, data):
    lengths = data.draw(st.lists(st.integers(0, capacity), min_size=1, max_size=4))
    layer = data.draw(st.integers(0, layers - 1))
    q, k, v = random_cache(
        layers, len(lengths), kv_heads, capacity, head_dim, new, groups * kv_heads
    )
    lengths = np.array(lengths, np.int32)
    got, expected = (DECODE[name](q, k, v, layer, lengths) for name in ("xla", "reference"))
    np.testing.assert_allclose(got, expected, atol=3e-6)


def test_bfloat16_in_bfloat16_out_near_float32():
    q, k, v = random_cache(1, 2, 2, 150, 16, 2, 4)
    lengths = np.array([150, 40], np.int32)
    expected = decode_oracle(q, k, v, 0, lengths, 16**-0.5)
    half = [jax.numpy.asarray(x, "bfloat16") for x in (q, k, v)]
    for decode in DECODE.values():
        got = decode(*half, 0, lengths)
        assert got.dtype == "bfloat16"
        np.testing.assert_allclose(np.asarray(got, np.float32), expected, atol=0.03)


@pytest.mark.parametrize("backend", DECODE)
def test_decoding_chunk_by_chunk_equals_attention_over_the_whole_text(backend):
    q, k, v = random_qkv(2, 12, 4, 2, 8)
    whole = attention_oracle(q, k, v, whole_rows(2, 12), 8**-0.5)
    k_cache, v_cache = (np.moveaxis(x, 1, 2)[None] for x in (k, v))
    for start, end in [(0, 4), (4, 8), (8, 12)]:
        lengths = np.full(2, end, np.int32)
        got = DECODE[backend](q[:, start:end], k_cache, v_cache, 0, lengths)
        np.testing.assert_allclose(got, whole[:, start:end], atol=3e-6)


def test_a_recipe_may_name_every_backend():
    """`config` imports no kernel, so it repeats the names."""
    assert get_args(Impl) == tuple(api.BACKENDS)
