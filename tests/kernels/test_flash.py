"""The interpreted Pallas kernels: against float64, against autodiff, and with seeded errors."""

import importlib.util
import inspect
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from r1s_jax.kernels.attention import api, flash, gpu, reference, tpu, xla
from r1s_jax.kernels.attention.visibility import meeting_blocks, visits
from r1s_jax.models.kv_cache import quantize
from tests.kernels.oracle import (
    attention_oracle,
    decode_oracle,
    in_parts,
    normal,
    random_cache,
    random_qkv,
    random_trees,
    whole_rows,
)

BACKENDS = {"tpu": tpu.backend(True), "gpu": gpu.backend(True)}
MODULES = {"tpu": tpu, "gpu": gpu}
# The longest tests; `make test` runs them for one backend.
GPU_SLOW = ["tpu", pytest.param("gpu", marks=pytest.mark.slow)]
# Interprets a kernel strictly: detects races, and unwritten memory reads as NaN.
STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


@partial(jax.jit, static_argnums=0, static_argnames=("scale", "interpret"))
def decode(backend, q, k, v, layer, lengths, rows=None, *, scale, scales=None, interpret=True):
    rows = np.arange(len(lengths), dtype=np.int32) if rows is None else rows
    run = MODULES[backend].decode_attention
    operands = q, k, v, layer, lengths, rows
    return run(*operands, scale=scale, scales=scales, interpret=interpret)


def rows(backend, q, k, v, last, scale=None):
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return flash.flash_rows(backend, q, k, v, last, scale)


def gradients(attend, q, k, v, dout):
    return jax.grad(lambda *args: jnp.sum(attend(*args) * dout), (0, 1, 2))(q, k, v)


def check_rows(backend, *, length=300, heads=4, kv_heads=2, head_dim=16, seed=0):
    """Checks output and gradients of a random packed batch."""
    q, k, v = random_qkv(3, length, heads, kv_heads, head_dim, seed)
    rng = np.random.default_rng(seed)
    last = random_trees(rng, 3, length)
    last[0] = length - 1  # one sequence across all blocks
    last[1] = in_parts([length // 4] * 4, length % 4)  # several sequences per block
    dout = normal(rng, *q.shape)
    attend = jax.jit(lambda q, k, v: rows(backend, q, k, v, last))
    expected = attention_oracle(q, k, v, last, head_dim**-0.5)
    np.testing.assert_allclose(attend(q, k, v), expected, atol=5e-6)
    plain = partial(reference.attention, last_query=last)
    pairs = zip(gradients(attend, q, k, v, dout), gradients(plain, q, k, v, dout), strict=True)
    for got, expected in pairs:
        np.testing.assert_allclose(got, expected, atol=3e-5)


@pytest.mark.parametrize("backend", GPU_SLOW)
def test_packed_rows_and_their_gradients(backend):
    check_rows(BACKENDS[backend])


@pytest.mark.parametrize("backend", GPU_SLOW)
@given(
    length=st.integers(1, 400),
    kv_heads=st.integers(1, 2),
    per_group=st.integers(1, 8),
    head_dim=st.sampled_from([16, 64, 128]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=4)
def test_any_shape(backend, length, kv_heads, per_group, head_dim, seed):
    q, k, v = random_qkv(1, length, kv_heads * per_group, kv_heads, head_dim, seed)
    last = random_trees(np.random.default_rng(seed), 1, length)
    got = rows(BACKENDS[backend], q, k, v, last)
    expected = attention_oracle(q, k, v, last, head_dim**-0.5)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_given_scale(backend):
    q, k, v = random_qkv(2, 140, 3, 1, 16)
    last = whole_rows(2, 140)
    expected = attention_oracle(q, k, v, last, 1.7)
    np.testing.assert_allclose(
        rows(BACKENDS[backend], q, k, v, last, scale=1.7), expected, atol=1e-5
    )


@pytest.mark.parametrize("backend", GPU_SLOW)
def test_a_change_in_one_sequence_reaches_no_other(backend):
    q, k, v = random_qkv(1, 260, 2, 1, 16)
    last = in_parts([70, 90, 60], padding=40)
    inside = slice(70, 160)
    outside = np.delete(np.arange(260), inside)
    changed = [x.copy() for x in (q, k, v)]
    for x in changed:
        x[:, inside] = 50 * x[:, inside] + 1

    def results(q, k, v):
        attend = partial(rows, BACKENDS[backend], last=last)
        return attend(q, k, v), *gradients(attend, q, k, v, np.cos(q))

    for before, after in zip(results(q, k, v), results(*changed), strict=True):
        np.testing.assert_array_equal(before[:, outside], after[:, outside])
        assert np.isfinite(after).all()
        assert not np.array_equal(before[:, inside], after[:, inside])


def test_blocks_that_nobody_sees_are_skipped():
    """Eight parts of one block each: apart, and the first as the beginning of the others."""
    last = in_parts([128] * 8)
    meets = meeting_blocks(last, 128, 128)
    np.testing.assert_array_equal(meets[0], np.eye(8, dtype=bool))
    last[0, :128] = 1023
    meets = meeting_blocks(last, 128, 128)
    np.testing.assert_array_equal(meets[0], np.eye(8, dtype=bool) | (np.arange(8) == 0))
    counts, order = visits(meets)
    np.testing.assert_array_equal(counts, [[1, *[2] * 7]])
    np.testing.assert_array_equal(order[0, 1:, :2], [[0, i] for i in range(1, 8)])


def test_no_race_and_no_unwritten_memory(capfd):
    q, k, v = random_qkv(1, 300, 2, 1, 16)
    last = random_trees(np.random.default_rng(3), 1, 300)
    attend = partial(rows, tpu.backend(STRICT), last=last)
    np.testing.assert_allclose(attend(q, k, v), attention_oracle(q, k, v, last, 0.25), atol=1e-5)
    assert all(np.isfinite(g).all() for g in gradients(attend, q, k, v, np.cos(q)))
    lengths = np.array([0, 5, 256], np.int32)
    q, k, v = random_cache(2, 3, 2, 256, 16, 3, 4)
    got = decode("tpu", q, k, v, 1, lengths, scale=0.25, interpret=STRICT)
    np.testing.assert_allclose(got, decode_oracle(q, k, v, 1, lengths, 0.25), atol=1e-5)
    assert "RACE" not in capfd.readouterr().out.upper()


# Each replacement introduces one error of the kind that a typing mistake causes.
SABOTAGE = {
    "the future is seen": (
        "(key + j * blocks.keys <= query)",
        "(key + j * blocks.keys <= query + 1)",
    ),
    "other branches are seen": ("& (query <= last_ref[0:1, here])", ""),
    "the running sum is not rescaled": ("acc = acc * shrink +", "acc = acc +"),
    "the last block is forgotten": ("count_ref[b, i], attend", "count_ref[b, i] - 1, attend"),
    "the gradient ignores delta": ("(1, 1)) - delta)", "(1, 1)))"),
    "the gradient of keys lacks the scale": ("(dk * scale)", "(dk * 1.0)"),
    "the gradient of values is masked nowhere": (
        "scores = jnp.where((key <= at) & (at <= last), scores, MASKED)",
        "pass",
    ),
}


@pytest.mark.parametrize("slip", SABOTAGE)
def test_a_broken_kernel_fails(slip, tmp_path):
    """The checks above detect the error in each of these copies of the kernels."""
    source, (good, bad) = inspect.getsource(flash), SABOTAGE[slip]
    assert good in source
    path = tmp_path / "broken_flash.py"
    path.write_text(source.replace(good, bad))
    spec = importlib.util.spec_from_file_location("broken_flash", path)
    broken = importlib.util.module_from_spec(spec)
    sys.modules["broken_flash"] = broken
    try:
        spec.loader.exec_module(broken)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError):
            patch.setattr(sys.modules[__name__], "flash", broken)
            check_rows(tpu.backend(True), length=300, heads=2, kv_heads=1)
    finally:
        del sys.modules["broken_flash"]


@pytest.mark.parametrize("backend", MODULES)
@pytest.mark.parametrize(("capacity", "new"), [(128, 1), (384, 3), (1280, 1), (256, 70)])
def test_decode_over_ragged_lengths(backend, capacity, new):
    lengths = np.array([0, new, capacity // 2, capacity - 1, capacity, 127, 128], np.int32)
    lengths = np.where(lengths, np.clip(lengths, new, capacity), 0).astype(np.int32)
    q, k, v = random_cache(2, len(lengths), 2, capacity, 16, new, 6)
    got = decode(backend, q, k, v, 1, lengths, scale=0.25)
    np.testing.assert_allclose(got, decode_oracle(q, k, v, 1, lengths, 0.25), atol=5e-6)
    assert not np.asarray(got)[0].any()


@pytest.mark.parametrize("backend", MODULES)
@pytest.mark.parametrize("new", [1, 5])
def test_decode_of_an_int8_cache(backend, new):
    lengths = np.array([0, new, 128, 129, 255, 256], np.int32)
    q, k, v = random_cache(2, len(lengths), 2, 256, 16, new, 6)
    (k, k_scale), (v, v_scale) = (tuple(map(np.asarray, quantize(x))) for x in (k, v))
    got = decode(backend, q, k, v, 1, lengths, scale=0.25, scales=(k_scale, v_scale))
    real = k * k_scale[..., None], v * v_scale[..., None]
    np.testing.assert_allclose(got, decode_oracle(q, *real, 1, lengths, 0.25), atol=1e-5)


@pytest.mark.parametrize("backend", MODULES)
@given(
    kv_heads=st.integers(1, 3),
    per_group=st.integers(1, 8),
    head_dim=st.sampled_from([64, 128]),
    new=st.integers(1, 4),
    blocks=st.integers(1, 4),
    data=st.data(),
)
@settings(deadline=None, max_examples=4)
def test_decode_of_any_shape(backend, kv_heads, per_group, head_dim, new, blocks, data):
    lengths = data.draw(st.lists(st.integers(0, 128 * blocks), min_size=1, max_size=4))
    lengths = np.array(lengths, np.int32)
    heads = kv_heads * per_group
    q, k, v = random_cache(1, len(lengths), kv_heads, 128 * blocks, head_dim, new, heads)
    got = decode(backend, q, k, v, 0, lengths, scale=0.1)
    np.testing.assert_allclose(got, decode_oracle(q, k, v, 0, lengths, 0.1), atol=1e-5)


@pytest.mark.parametrize("backend", ["tpu", "gpu", "xla", "reference"])
def test_decode_of_some_rows_of_the_cache(backend):
    q, k, v = random_cache(2, 5, 2, 256, 16, 2, 4)
    rows, lengths = np.array([3, 0, 4], np.int32), np.array([200, 2, 129], np.int32)
    expected = decode_oracle(q[:3], k[:, rows], v[:, rows], 1, lengths, 0.25)
    if backend in MODULES:
        got = decode(backend, q[:3], k, v, 1, lengths, rows, scale=0.25)
    else:
        run = {"xla": xla, "reference": reference}[backend].decode_attention
        got = run(q[:3], k, v, 1, lengths, jnp.asarray(rows))
    np.testing.assert_allclose(got, expected, atol=5e-6)


@pytest.mark.parametrize("backend", MODULES)
def test_decoding_a_token_equals_its_row_of_the_prefill(backend):
    q, k, v = random_qkv(2, 200, 4, 2, 16)
    whole = rows(BACKENDS[backend], q, k, v, whole_rows(2, 200))
    capacity = ((0, 0), (0, 0), (0, 56), (0, 0))
    k_cache, v_cache = (np.pad(np.moveaxis(x, 1, 2), capacity)[None] for x in (k, v))
    for t in (0, 130, 199):
        lengths = np.full(2, t + 1, np.int32)
        got = decode(backend, q[:, t : t + 1], k_cache, v_cache, 0, lengths, scale=0.25)
        np.testing.assert_allclose(got[:, 0], whole[:, t], atol=5e-6)


@pytest.mark.parametrize("backend", GPU_SLOW)
def test_bfloat16_stays_near_float64(backend):
    q, k, v = random_qkv(1, 200, 4, 2, 64)
    half = [jnp.asarray(x, "bfloat16") for x in (q, k, v)]
    exact = [np.asarray(x, np.float64) for x in half]
    last = whole_rows(1, 200)
    got = rows(BACKENDS[backend], *half, last)
    assert got.dtype == "bfloat16"
    expected = attention_oracle(*exact, last, 64**-0.5)
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=0.02)
    grads = gradients(partial(rows, BACKENDS[backend], last=last), *half, jnp.cos(half[0]))
    plain = gradients(reference.attention, *map(jnp.float32, half), jnp.cos(half[0]))
    for g, p in zip(grads, plain, strict=True):
        assert g.dtype == "bfloat16"
        assert np.linalg.norm(np.float32(g) - p) < 0.02 * np.linalg.norm(p)


def test_a_cache_wider_than_the_heads():
    """Narrow heads are padded with zeros where tiles are 128 wide."""
    assert api.cache_dims(300, 64, "interpret") == (384, 128)
    assert api.cache_dims(300, 64, "xla") == (300, 64)
    q, k, v = random_cache(2, 3, 1, 384, 16, 2, 3)
    wide_k, wide_v = (np.pad(x, [(0, 0)] * 4 + [(0, 112)]) for x in (k, v))
    lengths = np.array([384, 20, 2], np.int32)
    expected = decode_oracle(q, k, v, 1, lengths, 0.25)
    for impl in ("interpret", "xla"):
        got = api.decode_attention(q, wide_k, wide_v, 1, lengths, impl=impl)
        np.testing.assert_allclose(got, expected, atol=5e-6)


def test_unsupported_shapes_are_named():
    # Bypasses the tests' check of shapes.
    attention, decode = map(inspect.unwrap, (api.attention, api.decode_attention))
    q, k, v = random_qkv(2, 8, 4, 2, 16)
    ck, cv = random_cache(1, 2, 2, 256, 16, 1, 4)[1:]
    lengths = np.array([1, 1], np.int32)
    cases = [
        ("impl='cuda' is not an attention backend", lambda: attention(q, k, v, impl="cuda")),
        ("3 query heads are not a multiple of 2", lambda: attention(q[:, :, :3], k, v)),
        ("k has shape .* v has", lambda: attention(q, k, v[:, :4])),
        ("last_query has shape", lambda: attention(q, k, v, last_query=lengths)),
        ("q is float16", lambda: attention(np.float16(q), k, v, impl="interpret")),
        (
            "head width 24: impl='gpu' serves powers of two",
            lambda: attention(*random_qkv(1, 8, 1, 1, 24), impl="gpu"),
        ),
        ("does not suit impl='tpu'",
         lambda: decode(q, ck, cv, 0, lengths, impl="tpu")),
        ("300 new tokens do not fit a cache of 256",
         lambda: decode(np.zeros((2, 300, 4, 16)), ck, cv, 0, lengths)),
        ("lengths reach 300, the cache holds 256",
         lambda: decode(q[:, :1], ck, cv, 0, 300 * lengths)),
        ("q has 1 rows, the cache 2", lambda: decode(q[:1], ck, cv, 0, lengths)),
    ]  # fmt: skip
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
