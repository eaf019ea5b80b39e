"""GPU (Triton): the shared flash kernels, and decoding with the cache split over programs."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, Num

from r1s_jax.kernels.attention.decode import (
    as_scalars,
    decode_cost,
    group_queries,
    ungroup_queries,
)
from r1s_jax.kernels.attention.flash import (
    LOG2_E,
    LOWEST,
    MASKED,
    Backend,
    Blocks,
    _dot,
    flash_rows,
)
from r1s_jax.kernels.attention.reference import Scales
from r1s_jax.kernels.attention.support import KERNEL_DTYPES, Support

# (queries, keys, warps, stages) that compile for an H100 without spilling registers.
_BLOCKS = {
    "forward": (128, 64, 8, 2),
    "dq": (128, 64, 8, 2),
    "dkv": (64, 64, 4, 1),
}
# float32 operands take twice the registers and shared memory.
_BLOCKS_FLOAT32 = {
    "forward": (32, 16, 4, 1),
    "dq": (64, 32, 8, 2),
    "dkv": (32, 16, 4, 1),
}
_DECODE_KEYS, _DECODE_ROWS, _DECODE_ROWS_FLOAT32 = 64, 64, 16
# Programs to run at a time: two per multiprocessor of an H100.
_PROGRAMS = 264

SUPPORT = Support(
    cache_multiple=(_DECODE_KEYS, 16),
    dtypes=KERNEL_DTYPES,
    serves_width=lambda head_dim: 16 <= head_dim <= 256 and head_dim & (head_dim - 1) == 0,
    widths="powers of two from 16 to 256",
)


def _blocks(kernel: str, length: int, head_dim: int, dtype: Any) -> Blocks:
    table = _BLOCKS_FLOAT32 if dtype == jnp.float32 else _BLOCKS
    queries, keys, warps, stages = table[kernel]
    return Blocks(queries, keys, plgpu.CompilerParams(num_warps=warps, num_stages=stages))


def backend(interpret: Any = False) -> Backend:
    """The kernels of `flash` on a GPU."""
    return Backend(
        name="gpu",
        blocks=_blocks,
        as_column=lambda row: row.reshape(-1, 1),
        as_row=lambda column: column.reshape(1, -1),
        scalars=None,
        interpret=interpret,
    )


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T N K"],
    v: Float[Array, "B T N K"],
    *,
    last_query: Int[Array, "B T"],
    scale: float,
    interpret: Any = False,
) -> Float[Array, "B T H K"]:
    """`reference.attention` by the shared flash kernels."""
    return flash_rows(backend(interpret), q, k, v, last_query, scale)


def decode_attention(
    q: Float[Array, "B T H K"],
    k_cache: Num[Array, "L R N S K"],
    v_cache: Num[Array, "L R N S K"],
    layer: Int[Array, ""] | int,
    lengths: Int[Array, " B"],
    rows: Int[Array, " B"] | None = None,
    *,
    scale: float,
    scales: Scales | None = None,
    interpret: Any = False,
) -> Float[Array, "B T H K"]:
    """`reference.decode_attention` as a Triton kernel; S must be a multiple of 64.

    A row's cache is divided over as many programs as the device needs to be busy
    (flash-decoding); their partial softmaxes are merged afterwards.
    """
    new = q.shape[1]
    rows = jnp.arange(len(q)) if rows is None else rows
    q = group_queries(q, k_cache.shape[2], q.dtype if scales else k_cache.dtype)
    queries = q.shape[2]
    most = _DECODE_ROWS_FLOAT32 if q.dtype == jnp.float32 else _DECODE_ROWS
    block = min(most, max(16, pl.next_power_of_2(queries)))
    q = jnp.pad(q, ((0, 0), (0, 0), (0, -queries % block), (0, 0)))
    scalars = as_scalars(layer, lengths, rows)
    kernel = partial(_decode_kernel, scale * LOG2_E, new, queries // new)
    cache = k_cache, v_cache, *(scales or ())
    partials = _decode_partials(kernel, block, scalars, q, cache, interpret)
    return ungroup_queries(_merge(*partials)[:, :, :queries].astype(q.dtype), new)


def _decode_partials(
    kernel: Callable,
    block: int,
    scalars: tuple[Array, Array, Array],
    q: Float[Array, "B N M K"],
    cache: tuple[Array, ...],
    interpret: Any,
) -> tuple[Float[Array, "B N P M"], Float[Array, "B N P M"], Float[Array, "B N P M K"]]:
    """Peak, sum and weighted values of the softmax over each of P shares of a row's cache.

    `cache` holds keys [L, R, N, S, K], values, and the scales of both if they are int8.
    """
    batch, kv_heads, padded, head_dim = q.shape
    key_blocks = cache[0].shape[3] // _DECODE_KEYS
    programs = batch * kv_heads * (padded // block)
    splits = max(1, min(key_blocks, _PROGRAMS // programs))
    whole = pl.no_block_spec
    queries = pl.BlockSpec(
        (None, None, block, head_dim), lambda bn, s, m: (bn // kv_heads, bn % kv_heads, m, 0)
    )
    partial_shape = (batch, kv_heads, splits, padded)
    return pl.pallas_call(
        partial(kernel, math.ceil(key_blocks / splits)),
        grid=(batch * kv_heads, splits, padded // block),
        in_specs=[whole, whole, whole, queries, *[whole] * len(cache)],
        out_specs=[
            _partial_spec(kv_heads, (block,)),
            _partial_spec(kv_heads, (block,)),
            _partial_spec(kv_heads, (block, head_dim)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(partial_shape, jnp.float32),
            jax.ShapeDtypeStruct(partial_shape, jnp.float32),
            jax.ShapeDtypeStruct((*partial_shape, head_dim), jnp.float32),
        ],
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        cost_estimate=decode_cost(q.shape, cache[0]),
        name="decode_attention_gpu",
    )(*scalars, q, *cache)


def _partial_spec(kv_heads: int, block: tuple[int, ...]) -> pl.BlockSpec:
    rest = (0,) * (len(block) - 1)
    return pl.BlockSpec(
        (None, None, None, *block),
        lambda bn, s, m: (bn // kv_heads, bn % kv_heads, s, m, *rest),
    )


def _decode_kernel(
    scale,
    new,
    per_group,
    per_split,
    layer_ref,
    lengths_ref,
    rows_ref,
    q_ref,
    k_ref,
    v_ref,
    *refs,
):
    """A block of query rows of one head against one share of its cache."""
    *scale_refs, peak_ref, total_ref, acc_ref = refs
    kv_heads = k_ref.shape[2]
    b, n = pl.program_id(0) // kv_heads, pl.program_id(0) % kv_heads
    layer, length, row = layer_ref[0], lengths_ref[b], rows_ref[b]
    q = q_ref[...]
    block = q.shape[0]
    shape = (block, _DECODE_KEYS)
    token = (lax.broadcasted_iota(jnp.int32, shape, 0) + pl.program_id(2) * block) // per_group
    last = length - new + token
    key = lax.broadcasted_iota(jnp.int32, shape, 1)

    def attend(j: Array, carry: tuple) -> tuple:
        peak, total, acc = carry
        here = pl.ds(j * _DECODE_KEYS, _DECODE_KEYS)
        scores = _dot(q, k_ref[layer, row, n, here, :].astype(q.dtype), (1, 1)) * scale
        if scale_refs:  # a key's one scale multiplies its score
            scores = scores * scale_refs[0][layer, row, n, here][None, :]
        scores = jnp.where(key + j * _DECODE_KEYS <= last, scores, MASKED)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=1))
        probs = jnp.exp2(scores - new_peak[:, None])
        shrink = jnp.exp2(peak - new_peak)
        total = total * shrink + jnp.sum(probs, axis=1)
        if scale_refs:
            probs = probs * scale_refs[1][layer, row, n, here][None, :]
        v = v_ref[layer, row, n, here, :].astype(q.dtype)
        acc = acc * shrink[:, None] + _dot(probs.astype(v.dtype), v, (1, 0))
        return new_peak, total, acc

    begin = pl.program_id(1) * per_split
    end = jnp.minimum(begin + per_split, (length + _DECODE_KEYS - 1) // _DECODE_KEYS)
    start = (jnp.full((block,), LOWEST, jnp.float32), jnp.zeros((block,), jnp.float32))
    peak, total, acc = lax.fori_loop(begin, end, attend, (*start, jnp.zeros(q.shape, jnp.float32)))
    peak_ref[...], total_ref[...], acc_ref[...] = peak, total, acc


def _merge(
    peak: Float[Array, "B N P M"], total: Float[Array, "B N P M"], acc: Float[Array, "B N P M K"]
) -> Float[Array, "B N M K"]:
    """Merges P partial softmaxes into one; zeros where none saw a key."""
    weight = jnp.exp2(peak - peak.max(2, keepdims=True))
    total = (total * weight).sum(2)
    return (acc * weight[..., None]).sum(2) / jnp.where(total > 0, total, 1.0)[..., None]
