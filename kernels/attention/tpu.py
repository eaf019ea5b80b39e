"""TPU (Mosaic): the shared flash kernels, and decoding against a cache in HBM."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
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

LANES = 128
_VMEM_LIMIT = 96 * 2**20
# Bytes of one block of keys, all heads together, and of one block of scores.
_CACHE_BLOCK, _SCORE_BLOCK = 2**20, 2**22

# A cache stores a head narrower than a tile padded with zeros; otherwise every call would copy the
# cache into that form.
SUPPORT = Support(
    cache_multiple=(LANES, LANES),
    dtypes=KERNEL_DTYPES,
    serves_width=lambda head_dim: head_dim % 16 == 0 and head_dim <= 256,
    widths="multiples of 16 to 256",
)


def _blocks(kernel: str, length: int, head_dim: int, dtype: Any) -> Blocks:
    size = next(b for b in (512, 256, 128) if length % b == 0)
    semantics = ("parallel", "parallel", "arbitrary")
    return Blocks(
        size,
        size,
        pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=_VMEM_LIMIT),
    )


def _as_column(row: Array) -> Array:
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def _as_row(column: Array) -> Array:
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1, :]


def backend(interpret: Any = False) -> Backend:
    """The kernels of `flash` on a TPU."""
    return Backend("tpu", _blocks, _as_column, _as_row, pltpu.SMEM, interpret)


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
    """`reference.decode_attention` as a Mosaic kernel; S must be a multiple of 128.

    The grid iterates over a row's cache, one block of keys of all heads at a time. Past the row's
    length the block index stays the same, so nothing more is fetched from HBM.
    """
    new, capacity = q.shape[1], k_cache.shape[3]
    rows = jnp.arange(len(q)) if rows is None else rows
    q = group_queries(q, k_cache.shape[2], q.dtype if scales else k_cache.dtype)
    batch, kv_heads, queries, head_dim = q.shape
    size = _decode_block(capacity, queries, kv_heads * head_dim * k_cache.dtype.itemsize)

    def cache_block(b: Array, s: Array, layer: Array, lengths: Array, rows: Array) -> tuple:
        last = jnp.maximum(pl.cdiv(lengths[b], size), 1) - 1
        return layer[0], rows[b], 0, jnp.minimum(s, last), 0

    by_row = pl.BlockSpec((None, kv_heads, queries, head_dim), lambda b, s, *_: (b, 0, 0, 0))
    by_block = pl.BlockSpec((None, None, kv_heads, size, head_dim), cache_block)
    by_token = pl.BlockSpec((None, None, kv_heads, size), lambda *at: cache_block(*at)[:-1])
    quantized = tuple(scales or ())
    out = pl.pallas_call(
        partial(_decode_kernel, scale * LOG2_E, new, queries // new),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, capacity // size),
            in_specs=[by_row, by_block, by_block, *[by_token] * len(quantized)],
            out_specs=by_row,
            scratch_shapes=[
                pltpu.VMEM((kv_heads, queries, 1), jnp.float32),
                pltpu.VMEM((kv_heads, queries, 1), jnp.float32),
                pltpu.VMEM((kv_heads, queries, head_dim), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_LIMIT
        ),
        interpret=interpret,
        cost_estimate=decode_cost(q.shape, k_cache),
        name="decode_attention_tpu",
    )(*as_scalars(layer, lengths, rows), q, k_cache, v_cache, *quantized)
    return ungroup_queries(out, new)


def _decode_block(capacity: int, queries: int, bytes_a_key: int) -> int:
    """Keys per block: as many as fit the budgets and divide the capacity."""
    fits = min(_CACHE_BLOCK // bytes_a_key, _SCORE_BLOCK // (4 * queries))
    largest = math.gcd(capacity, 1024)
    return max(LANES, min(largest, 2 ** int(math.log2(max(fits, LANES)))))


def _decode_kernel(
    scale,
    new,
    per_group,
    layer_ref,
    lengths_ref,
    rows_ref,
    q_ref,
    k_ref,
    v_ref,
    *refs,
):
    """One block of one row's cache, all heads; scratch carries the softmax from block to block."""
    *scale_refs, o_ref, peak, total, acc = refs
    b, s = pl.program_id(0), pl.program_id(1)
    kv_heads, size, _ = k_ref.shape
    length = lengths_ref[b]

    @pl.when(s == 0)
    def _start():
        peak[...] = jnp.full(peak.shape, LOWEST, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    @pl.when(s * size < length)
    def _attend():
        shape = (q_ref.shape[1], size)
        key = jax.lax.broadcasted_iota(jnp.int32, shape, 1) + s * size
        token = jax.lax.broadcasted_iota(jnp.int32, shape, 0) // per_group if new > 1 else 0
        allowed = key <= length - new + token
        for n in range(kv_heads):
            scores = _dot(q_ref[n], k_ref[n].astype(q_ref.dtype), (1, 1)) * scale
            if scale_refs:  # a key's one scale multiplies its score
                scores = scores * scale_refs[0][pl.ds(n, 1), :]
            scores = jnp.where(allowed, scores, MASKED)
            new_peak = jnp.maximum(peak[n], jnp.max(scores, axis=1, keepdims=True))
            probs = jnp.exp2(scores - new_peak)
            shrink = jnp.exp2(peak[n] - new_peak)
            total[n] = total[n] * shrink + jnp.sum(probs, axis=1, keepdims=True)
            if scale_refs:
                probs = probs * scale_refs[1][pl.ds(n, 1), :]
            v = v_ref[n].astype(q_ref.dtype)
            acc[n] = acc[n] * shrink + _dot(probs.astype(v.dtype), v, (1, 0))
            peak[n] = new_peak

    @pl.when(s == pl.num_programs(1) - 1)
    def _finish():
        o_ref[...] = (acc[...] / jnp.where(total[...] > 0, total[...], 1.0)).astype(o_ref.dtype)
