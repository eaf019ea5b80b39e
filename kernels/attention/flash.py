"""Flash attention for whole rows, forward and backward: one body for every accelerator.

The online softmax is that of FlashAttention-2 (arXiv 2307.08691). `Backend` holds the differences
between backends: block sizes, memory spaces, compiler parameters.

Inside, arrays are [B, H, T, K], and every query `t` may attend to the contiguous keys
`ranges[b, 0, t] .. ranges[b, 1, t]`, both ends included. Causal order and packed segments both
reduce to such a range, and whole blocks outside of it are never visited. Exponentials are taken
to base 2: the scale includes the factor log2(e).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from r1s_jax.kernels.gradients import own_gradient

LOG2_E = math.log2(math.e)
# A masked score lies far below the lowest running maximum: its exponential is an exact zero even
# in a row that has seen no allowed key yet.
MASKED, LOWEST = -1e30, -5e29
# Rows are padded to a multiple of this many tokens.
_ROW_MULTIPLE = 128


@dataclass(frozen=True)
class Blocks:
    """Block sizes of one kernel, in queries and keys, and its compiler parameters."""

    queries: int
    keys: int
    compiler: Any


@dataclass(frozen=True)
class Backend:
    """The parts of the kernels that depend on the accelerator.

    `blocks(kernel, length, head_dim, dtype)` gives the `Blocks` of "forward", "dq" or "dkv";
    `as_column` and `as_row` turn [1, n] into [n, 1] and back.
    """

    name: str
    blocks: Callable[[str, int, int, Any], Blocks]
    as_column: Callable[[Array], Array]
    as_row: Callable[[Array], Array]
    scalars: Any  # memory space of the loop bounds
    interpret: Any = False


def key_ranges(
    length: int, segment_ids: Int[Array, "B T"] | None, causal: bool, batch: int
) -> Int[Array, "B 2 T"]:
    """First and last key of every query; an empty range (first > last) for segment 0.

    A segment is a run of equal ids: the same id may not come back later in the row.
    """
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    if segment_ids is None:
        first, last = jnp.zeros_like(index), jnp.full_like(index, length - 1)
        return jnp.stack([first, index if causal else last], axis=1)
    change = segment_ids[:, 1:] != segment_ids[:, :-1]
    edge = jnp.ones((batch, 1), bool)
    first = lax.cummax(jnp.where(jnp.concatenate([edge, change], 1), index, 0), axis=1)
    last = jnp.where(jnp.concatenate([change, edge], 1), index, length - 1)
    last = index if causal else lax.cummin(last, axis=1, reverse=True)
    real = segment_ids > 0
    return jnp.stack([jnp.where(real, first, length), jnp.where(real, last, -1)], axis=1)


def flash_rows(
    backend: Backend,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T N K"],
    v: Float[Array, "B T N K"],
    segment_ids: Int[Array, "B T"] | None,
    causal: bool,
    scale: float,
) -> Float[Array, "B T H K"]:
    """Runs the flash kernels of one backend on rows of any length, padded to whole blocks."""
    batch, length = q.shape[:2]
    pad = -length % _ROW_MULTIPLE
    ranges = key_ranges(length, segment_ids, causal, batch)
    nothing = jnp.array([[length + pad], [-1]], jnp.int32)
    ranges = jnp.concatenate([ranges, jnp.broadcast_to(nothing, (batch, 2, pad))], axis=2)
    q, k, v = (jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, pad), (0, 0))) for x in (q, k, v))
    return flash_attention(backend, scale, q, k, v, ranges)[:, :, :length].swapaxes(1, 2)


@own_gradient(0, 1)
def flash_attention(
    backend: Backend,
    scale: float,
    q: Float[Array, "B H T K"],
    k: Float[Array, "B N T K"],
    v: Float[Array, "B N T K"],
    ranges: Int[Array, "B 2 T"],
) -> Float[Array, "B H T K"]:
    """Attention of each query to its range of keys; rows with an empty range give zeros.

    T must be a multiple of every block size of `backend`.
    """
    return _forward(backend, scale, q, k, v, ranges)[0]


def _flash_fwd(backend: Backend, scale: float, q, k, v, ranges):
    out, lse = _forward(backend, scale, q, k, v, ranges)
    return out, (q, k, v, ranges, out, lse)


def _flash_bwd(backend: Backend, scale: float, saved: tuple, dout: Array):
    q, k, v, ranges, out, lse = saved
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)[:, :, None]
    dq = _dq(backend, scale, q, k, v, ranges, dout, lse, delta)
    dk, dv = _dkv(backend, scale, q, k, v, ranges, dout, lse, delta)
    return dq, dk, dv, None


flash_attention.defvjp(_flash_fwd, _flash_bwd)


def _forward(backend: Backend, scale: float, q, k, v, ranges):
    """Output, and the base-2 log-normaliser float32[B, H, 1, T] that the backward pass needs."""
    batch, heads, length, head_dim = q.shape
    blocks = backend.blocks("forward", length, head_dim, q.dtype)
    meets = _meeting_blocks(ranges, blocks)
    by_query, by_row, by_kv = _query_specs(blocks.queries, q.shape, k.shape[1])
    return _call(
        partial(_forward_kernel, backend, scale * LOG2_E, blocks),
        backend,
        blocks,
        grid=(batch, heads, length // blocks.queries),
        cost_estimate=_cost(q.shape, products=2),
        in_specs=[
            *_bound_specs(backend),
            _ranges_spec(blocks.queries, lambda b, h, i: (b, 0, i)),
            by_query,
            by_kv,
            by_kv,
        ],
        out_specs=[by_query, by_row],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
        ],
    )(*_span(meets, axis=2), ranges, q, k, v)


def _dq(backend: Backend, scale: float, q, k, v, ranges, dout, lse, delta):
    batch, heads, length, head_dim = q.shape
    blocks = backend.blocks("dq", length, head_dim, q.dtype)
    meets = _meeting_blocks(ranges, blocks)
    by_query, by_row, by_kv = _query_specs(blocks.queries, q.shape, k.shape[1])
    return _call(
        partial(_dq_kernel, backend, scale, blocks),
        backend,
        blocks,
        grid=(batch, heads, length // blocks.queries),
        cost_estimate=_cost(q.shape, products=3),
        in_specs=[
            *_bound_specs(backend),
            _ranges_spec(blocks.queries, lambda b, h, i: (b, 0, i)),
            *(by_query, by_kv, by_kv, by_query, by_row, by_row),
        ],
        out_specs=by_query,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    )(*_span(meets, axis=2), ranges, q, k, v, dout, lse, delta)


def _dkv(backend: Backend, scale: float, q, k, v, ranges, dout, lse, delta):
    """Each query head writes its own share, summed afterwards: no two programs share an output."""
    batch, heads, length, head_dim = q.shape
    kv_heads = k.shape[1]
    per_group = heads // kv_heads
    blocks = backend.blocks("dkv", length, head_dim, q.dtype)
    meets = _meeting_blocks(ranges, blocks)
    all_queries = pl.BlockSpec((None, None, length, head_dim), lambda b, h, j: (b, h, 0, 0))
    all_rows = pl.BlockSpec((None, None, 1, length), lambda b, h, j: (b, h, 0, 0))
    by_key = pl.BlockSpec(
        (None, None, blocks.keys, head_dim), lambda b, h, j: (b, h // per_group, j, 0)
    )
    out = pl.BlockSpec((None, None, blocks.keys, head_dim), lambda b, h, j: (b, h, j, 0))
    share = jax.ShapeDtypeStruct(q.shape, k.dtype if per_group == 1 else jnp.float32)
    dk, dv = _call(
        partial(_dkv_kernel, scale, blocks),
        backend,
        blocks,
        grid=(batch, heads, length // blocks.keys),
        cost_estimate=_cost(q.shape, products=4),
        in_specs=[
            *_bound_specs(backend),
            _ranges_spec(length, lambda b, h, j: (b, 0, 0)),
            *(all_queries, by_key, by_key, all_queries, all_rows, all_rows),
        ],
        out_specs=[out, out],
        out_shape=[share, share],
    )(*_span(meets, axis=1), ranges, q, k, v, dout, lse, delta)

    def add_groups(x: Array, like: Array) -> Array:
        return x.reshape(batch, kv_heads, per_group, length, head_dim).sum(2).astype(like.dtype)

    return add_groups(dk, k), add_groups(dv, v)


def _forward_kernel(
    backend, scale, blocks, lo_ref, hi_ref, ranges_ref, q_ref, k_ref, v_ref, o_ref, lse_ref
):
    """One block of queries against the keys that it may see."""
    b, i = pl.program_id(0), pl.program_id(2)
    q = q_ref[...]
    first, last = backend.as_column(ranges_ref[0:1, :]), backend.as_column(ranges_ref[1:2, :])
    key = lax.broadcasted_iota(jnp.int32, (blocks.queries, blocks.keys), 1)

    def attend(j: Array, carry: tuple) -> tuple:
        peak, total, acc = carry
        here = pl.ds(pl.multiple_of(j * blocks.keys, blocks.keys), blocks.keys)
        scores = _dot(q, k_ref[here, :], (1, 1)) * scale
        at = key + j * blocks.keys
        scores = jnp.where((at >= first) & (at <= last), scores, MASKED)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=1, keepdims=True))
        probs = jnp.exp2(scores - new_peak)
        shrink = jnp.exp2(peak - new_peak)
        v = v_ref[here, :]
        acc = acc * shrink + _dot(probs.astype(v.dtype), v, (1, 0))
        return new_peak, total * shrink + jnp.sum(probs, axis=1, keepdims=True), acc

    column = (blocks.queries, 1)
    start = (jnp.full(column, LOWEST, jnp.float32), jnp.zeros(column, jnp.float32))
    peak, total, acc = lax.fori_loop(
        lo_ref[b, i], hi_ref[b, i], attend, (*start, jnp.zeros(q.shape, jnp.float32))
    )
    seen = total > 0
    o_ref[...] = (acc / jnp.where(seen, total, 1.0)).astype(o_ref.dtype)
    lse = jnp.where(seen, peak + jnp.log2(jnp.where(seen, total, 1.0)), 0.0)
    lse_ref[...] = backend.as_row(lse)


def _dq_kernel(
    backend,
    scale,
    blocks,
    lo_ref,
    hi_ref,
    ranges_ref,
    q_ref,
    k_ref,
    v_ref,
    dout_ref,
    lse_ref,
    delta_ref,
    dq_ref,
):
    """The gradient of one block of queries."""
    b, i = pl.program_id(0), pl.program_id(2)
    q, dout = q_ref[...], dout_ref[...]
    first, last = backend.as_column(ranges_ref[0:1, :]), backend.as_column(ranges_ref[1:2, :])
    lse, delta = backend.as_column(lse_ref[...]), backend.as_column(delta_ref[...])
    key = lax.broadcasted_iota(jnp.int32, (blocks.queries, blocks.keys), 1)

    def add(j: Array, dq: Array) -> Array:
        here = pl.ds(pl.multiple_of(j * blocks.keys, blocks.keys), blocks.keys)
        k = k_ref[here, :]
        at = key + j * blocks.keys
        scores = _dot(q, k, (1, 1)) * (scale * LOG2_E)
        scores = jnp.where((at >= first) & (at <= last), scores, MASKED)
        dscores = jnp.exp2(scores - lse) * (_dot(dout, v_ref[here, :], (1, 1)) - delta)
        return dq + _dot(dscores.astype(k.dtype), k, (1, 0))

    dq = lax.fori_loop(lo_ref[b, i], hi_ref[b, i], add, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = (dq * scale).astype(dq_ref.dtype)


def _dkv_kernel(
    scale,
    blocks,
    lo_ref,
    hi_ref,
    ranges_ref,
    q_ref,
    k_ref,
    v_ref,
    dout_ref,
    lse_ref,
    delta_ref,
    dk_ref,
    dv_ref,
):
    """The gradients of one block of keys and values: scores are [keys, queries] here."""
    b, j = pl.program_id(0), pl.program_id(2)
    k, v = k_ref[...], v_ref[...]
    at = lax.broadcasted_iota(jnp.int32, (blocks.keys, blocks.queries), 0) + j * blocks.keys

    def add(i: Array, carry: tuple) -> tuple:
        dk, dv = carry
        here = pl.ds(pl.multiple_of(i * blocks.queries, blocks.queries), blocks.queries)
        q, dout = q_ref[here, :], dout_ref[here, :]
        scores = _dot(k, q, (1, 1)) * (scale * LOG2_E)
        allowed = (at >= ranges_ref[0:1, here]) & (at <= ranges_ref[1:2, here])
        probs = jnp.exp2(jnp.where(allowed, scores, MASKED) - lse_ref[:, here])
        dv = dv + _dot(probs.astype(dout.dtype), dout, (1, 0))
        dscores = probs * (_dot(v, dout, (1, 1)) - delta_ref[:, here])
        return dk + _dot(dscores.astype(q.dtype), q, (1, 0)), dv

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = lax.fori_loop(lo_ref[b, j], hi_ref[b, j], add, (zeros, zeros))
    dk_ref[...] = (dk * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def _meeting_blocks(ranges: Int[Array, "B 2 T"], blocks: Blocks) -> Bool[Array, "B I J"]:
    """Whether any query of block i may see any key of block j."""
    batch, _, length = ranges.shape
    first, last = ranges[:, 0], ranges[:, 1]
    first = first.reshape(batch, -1, blocks.queries).min(-1)[:, :, None]
    last = last.reshape(batch, -1, blocks.queries).max(-1)[:, :, None]
    begin = jnp.arange(0, length, blocks.keys)
    return (first < begin + blocks.keys) & (last >= begin)


def _span(meets: Bool[Array, "B I J"], axis: int) -> tuple[Array, Array]:
    """First and one past the last block to visit along `axis` (an empty span where none meets)."""
    lo = jnp.argmax(meets, axis)
    hi = meets.shape[axis] - jnp.argmax(jnp.flip(meets, axis), axis)
    some = meets.any(axis)
    lo, hi = (jnp.where(some, x, 0).astype(jnp.int32) for x in (lo, hi))
    return lo, hi


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Matrix product in float32; float32 operands keep their full precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _query_specs(block: int, shape: tuple, kv_heads: int):
    """Specs of a query block, of its per-query scalars, and of all keys of its group."""
    per_group, (length, head_dim) = shape[1] // kv_heads, shape[2:]
    return (
        pl.BlockSpec((None, None, block, head_dim), lambda b, h, i: (b, h, i, 0)),
        pl.BlockSpec((None, None, 1, block), lambda b, h, i: (b, h, 0, i)),
        pl.BlockSpec((None, None, length, head_dim), lambda b, h, i: (b, h // per_group, 0, 0)),
    )


def _ranges_spec(block: int, index_map: Callable) -> pl.BlockSpec:
    return pl.BlockSpec((None, 2, block), index_map)


def _bound_specs(backend: Backend) -> list[pl.BlockSpec]:
    return [pl.BlockSpec(memory_space=backend.scalars)] * 2


def _cost(shape: tuple, products: int) -> pl.CostEstimate:
    """Cost of `products` matrix products over half of all token pairs, as in one causal segment."""
    batch, heads, length, head_dim = shape
    pairs = batch * heads * length * length // 2
    return pl.CostEstimate(
        flops=2 * products * pairs * head_dim,
        transcendentals=pairs,
        bytes_accessed=4 * math.prod(shape) * 2,
    )


def _call(kernel: Callable, backend: Backend, blocks: Blocks, **spec: Any) -> Callable:
    return pl.pallas_call(
        kernel,
        compiler_params=None if backend.interpret else blocks.compiler,
        interpret=backend.interpret,
        name=f"{kernel.func.__name__.strip('_')}_{backend.name}",
        **spec,
    )
