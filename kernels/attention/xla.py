"""Attention in plain XLA, block by block, for CPUs.

The result is that of `reference`; blocks keep scores in the processor's caches, and a block of
queries visits only the blocks of keys that some query of it sees.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from r1s_jax.kernels.attention.reference import MASKED, Scales, group_heads
from r1s_jax.kernels.attention.support import Support
from r1s_jax.kernels.attention.visibility import meeting_blocks, visits
from r1s_jax.kernels.gradients import own_gradient
from r1s_jax.kernels.matmul import matmul, summed_over_rows

SUPPORT = Support()

_BLOCK = 128  # keys of a cache
_ROW_BLOCK = 128  # most tokens of a row's block


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T N K"],
    v: Float[Array, "B T N K"],
    *,
    last_query: Int[Array, "B T"],
    scale: float,
) -> Float[Array, "B T H K"]:
    """`reference.attention`; the backward pass recomputes a block's scores."""
    batch, length, heads, head_dim = q.shape
    blocks = -(-length // _ROW_BLOCK)
    pad = -length % blocks
    last = jnp.pad(last_query, ((0, 0), (0, pad)), constant_values=-1)
    size = (length + pad) // blocks

    def split(x: Float[Array, "B T N *G K"]) -> Float[Array, "I B N M K"]:
        """Blocks first, then heads: the queries of a group are the rows of one matrix product."""
        x = jnp.pad(x, ((0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)))
        x = jnp.moveaxis(x.reshape(batch, blocks, size, *x.shape[2:]), 2, -2)
        return x.swapaxes(0, 1).reshape(blocks, batch, x.shape[2], -1, head_dim)

    out = _attend(split(group_heads(q * scale, k.shape[2])), split(k), split(v), last)
    out = out.reshape(blocks, batch, heads, size, head_dim).transpose(1, 0, 3, 2, 4)
    return out.reshape(batch, length + pad, heads, head_dim)[:, :length]


@own_gradient()
def _attend(
    q: Float[Array, "I B N M K"],
    k: Float[Array, "I B N S K"],
    v: Float[Array, "I B N S K"],
    last: Int[Array, "B T"],
) -> Float[Array, "I B N M K"]:
    """Attention of I blocks of S tokens; M = G * S are the scaled queries of a group of heads."""
    return _forward(q, k, v, last)[0]


def _forward(q: Array, k: Array, v: Array, last: Array):
    def attend(block: tuple[Array, ...]) -> tuple[Array, Array]:
        i, queries, count, order = block

        def visit(n: Array, carry: tuple) -> tuple:
            peak, total, out = carry
            j = order[n]
            scores = _scores(queries, k[j], last, i, j)
            new_peak = jnp.maximum(peak, scores.max(-1, keepdims=True))
            weights, shrink = jnp.exp(scores - new_peak), jnp.exp(peak - new_peak)
            total = total * shrink + weights.sum(-1, keepdims=True)
            return new_peak, total, out * shrink + matmul(weights.astype(v.dtype), v[j])

        column = (*queries.shape[:-1], 1)
        # Above a masked score, so that its weight is zero even before any key is seen.
        start = jnp.full(column, MASKED / 2), jnp.zeros(column), jnp.zeros(queries.shape)
        peak, total, out = lax.fori_loop(0, count, visit, start)
        total = jnp.where(total > 0, total, 1.0)
        return (out / total).astype(v.dtype), peak + jnp.log(total)

    out, sums = lax.map(attend, (jnp.arange(len(q)), q, *_visits(last, len(q))))
    return out, (q, k, v, last, out, sums)


def _backward(residuals: tuple[Array, ...], g: Float[Array, "I B N M K"]):
    """With P the weights and O the output, dS = P * (dO V' - rowsum(dO * O)) (arXiv 2205.14135)."""
    q, k, v, last, out, sums = residuals
    g = g.astype(v.dtype)
    inner = (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)

    def attend(carry: tuple[Array, Array], block: tuple[Array, ...]):
        i, queries, outer, total, mean, count, order = block

        def visit(n: Array, carry: tuple) -> tuple:
            dq, dk, dv = carry
            j = order[n]
            weights = jnp.exp(_scores(queries, k[j], last, i, j) - total)
            dv = dv.at[j].add(summed_over_rows(weights.astype(v.dtype), outer))
            change = (weights * (matmul(outer, v[j], True) - mean)).astype(q.dtype)
            dk = dk.at[j].add(summed_over_rows(change, queries))
            return dq + matmul(change, k[j]), dk, dv

        dq, dk, dv = lax.fori_loop(0, count, visit, (jnp.zeros(queries.shape), *carry))
        return (dk, dv), dq.astype(q.dtype)

    blocks = jnp.arange(len(q)), q, g, sums, inner, *_visits(last, len(q))
    (dk, dv), dq = lax.scan(attend, (jnp.zeros(k.shape), jnp.zeros(v.shape)), blocks)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)


def _visits(last: Int[Array, "B T"], blocks: int) -> tuple[Int[Array, " I"], Int[Array, "I J"]]:
    """The blocks of keys that each block of queries visits: those that it sees in any row."""
    size = last.shape[1] // blocks
    return visits(meeting_blocks(last, size, size).any(0))


def _scores(
    queries: Float[Array, "B N M K"], keys: Float[Array, "B N S K"], last: Array, i: Array, j: Array
) -> Float[Array, "B N M S"]:
    """Masked scores of the queries of block i and the keys of block j."""
    size = keys.shape[2]
    query, key = i * size + jnp.arange(size)[:, None], j * size + jnp.arange(size)
    until = lax.dynamic_slice_in_dim(last, j * size, size, axis=1)[:, None]
    seen = ((key <= query) & (query <= until))[:, None, None]
    scores = matmul(queries, keys, True)
    grouped = scores.reshape(*scores.shape[:2], -1, size, size)
    return jnp.where(seen, grouped, MASKED).reshape(scores.shape)


def decode_attention(
    q: Float[Array, "B T H K"],
    k_cache: Num[Array, "L R N S K"],
    v_cache: Num[Array, "L R N S K"],
    layer: Int[Array, ""] | int,
    lengths: Int[Array, " B"],
    rows: Int[Array, " B"] | None = None,
    *,
    scale: float | None = None,
    scales: Scales | None = None,
) -> Float[Array, "B T H K"]:
    """`reference.decode_attention` by online softmax over blocks of keys.

    The number of blocks follows the longest row, so unused capacity costs nothing. Blocks are
    sliced directly from the stacked cache: slicing a layer or rows first would copy the cache.
    """
    batch, new, _, head_dim = q.shape
    kv_heads, capacity = k_cache.shape[2:4]
    block = min(_BLOCK, capacity)
    dtype, q = q.dtype, group_heads(q, kv_heads).transpose(0, 2, 1, 3, 4)
    groups = q.shape[3]
    # Tokens and heads of a group share keys: one row axis M makes each product a plain matmul.
    q = (q * (head_dim**-0.5 if scale is None else scale)).reshape(batch, kv_heads, -1, head_dim)
    position = jnp.repeat(lengths[:, None] - new + jnp.arange(new), groups, axis=1)

    def read(cache: Array, first: Array) -> Array:
        return _read(cache, layer, rows, batch, first, block)

    def attend_block(i: Array, carry: tuple) -> tuple:
        peak, total, out = carry
        # If blocks do not divide the capacity, the last one starts earlier; its overlap is masked.
        first = jnp.minimum(i * block, capacity - block)
        k, v = read(k_cache, first), read(v_cache, first)
        if scales is not None:
            k_scale, v_scale = (read(x, first)[..., None] for x in scales)
            k, v = (k * k_scale).astype(q.dtype), (v * v_scale).astype(q.dtype)
        key_index = first + jnp.arange(block)
        allowed = (key_index <= position[:, :, None]) & (key_index >= i * block)
        allowed = allowed[:, None]
        scores = jnp.einsum("bnmk,bnsk->bnms", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(allowed, scores, MASKED)
        new_peak = jnp.maximum(peak, scores.max(-1))
        shrink = jnp.exp(peak - new_peak)
        weight = jnp.exp(scores - new_peak[..., None]) * allowed
        mix = jnp.einsum(
            "bnms,bnsk->bnmk", weight.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        return new_peak, total * shrink + weight.sum(-1), out * shrink[..., None] + mix

    shape = q.shape[:-1]
    start = (jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros(q.shape))
    blocks = (jnp.max(lengths) + block - 1) // block
    _, total, out = lax.fori_loop(0, blocks, attend_block, start)
    out = out / jnp.maximum(total, 1e-30)[..., None]
    out = out.reshape(batch, kv_heads, new, groups, head_dim).transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, new, -1, head_dim).astype(dtype)


def _read(
    cache: Num[Array, "L R N S *K"],
    layer: Array | int,
    rows: Array | None,
    batch: int,
    first: Array,
    block: int,
) -> Num[Array, "B N M *K"]:
    """M = `block` tokens of the rows of one layer, from `first` on."""
    kv_heads, width = cache.shape[2], cache.shape[4:]
    rest = (0,) * len(width)
    if rows is None:
        size = (1, batch, kv_heads, block, *width)
        return lax.dynamic_slice(cache, (layer, 0, 0, first, *rest), size)[0]
    size = (1, 1, kv_heads, block, *width)
    each = [lax.dynamic_slice(cache, (layer, row, 0, first, *rest), size)[0] for row in rows]
    return jnp.concatenate(each)
