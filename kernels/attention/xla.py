"""Attention in plain XLA, block by block, for CPUs.

The result is that of `reference`; blocks keep scores in the processor's caches and skip keys that
no query may see.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from r1s_jax.kernels.attention.reference import MASKED, Scales, group_heads
from r1s_jax.kernels.attention.support import Support
from r1s_jax.kernels.gradients import own_gradient
from r1s_jax.kernels.matmul import matmul, summed_over_rows

SUPPORT = Support()

_BLOCK = 128  # keys of a cache
_QUERY_BLOCK = 64
# Most blocks of queries in a row: each adds code to the program.
_MAX_QUERY_BLOCKS = 16


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T N K"],
    v: Float[Array, "B T N K"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    causal: bool = True,
    scale: float | None = None,
) -> Float[Array, "B T H K"]:
    """`reference.attention`; if `causal`, a block of queries skips the keys after its end.

    The backward pass recomputes the scores of a block, so no [T, T] array is ever stored.
    """
    batch, length, heads, head_dim = q.shape
    q = group_heads(q * (head_dim**-0.5 if scale is None else scale), k.shape[2])
    # Heads first, so that a group's queries of all tokens are the rows of one matrix product.
    q, k, v = q.transpose(0, 2, 3, 1, 4), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    if segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)
    out = _attend(q, k, v, segment_ids, causal)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, -1)


@own_gradient(4)
def _attend(
    q: Float[Array, "B N G T K"],
    k: Float[Array, "B N T K"],
    v: Float[Array, "B N T K"],
    segment_ids: Int[Array, "B T"],
    causal: bool,
) -> Float[Array, "B N G T K"]:
    """Attention of grouped heads whose queries are already scaled."""
    return _forward(q, k, v, segment_ids, causal)[0]


def _forward(q: Array, k: Array, v: Array, segment_ids: Array, causal: bool):
    outs, sums = [], []
    for queries, keys in _blocks(q.shape[3], causal):
        scores, _ = _scores(q, k, segment_ids, queries, keys, causal)
        peak = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - peak)
        total = weights.sum(-1, keepdims=True)
        mix = matmul(weights.astype(v.dtype), v[:, :, keys]) / total
        outs.append(mix.reshape(q[:, :, :, queries].shape).astype(v.dtype))
        sums.append((peak + jnp.log(total)).reshape(outs[-1].shape[:-1]))
    out = jnp.where(_real(segment_ids), jnp.concatenate(outs, axis=3), 0)
    return out, (q, k, v, segment_ids, out, jnp.concatenate(sums, axis=3))


def _backward(causal: bool, residuals: tuple[Array, ...], g: Float[Array, "B N G T K"]):
    """With P the weights and O the output, dS = P * (dO V' - rowsum(dO * O)) (arXiv 2205.14135)."""
    q, k, v, segment_ids, out, sums = residuals
    g = jnp.where(_real(segment_ids), g, 0).astype(v.dtype)
    inner = (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    dq, dk, dv = [], jnp.zeros(k.shape), jnp.zeros(v.shape)
    for queries, keys in _blocks(q.shape[3], causal):
        scores, q_rows = _scores(q, k, segment_ids, queries, keys, causal)
        weights, g_rows = jnp.exp(scores - _rows(sums, queries)[..., None]), _rows(g, queries)
        dv = dv.at[:, :, keys].add(summed_over_rows(weights.astype(v.dtype), g_rows))
        change = matmul(g_rows, v[:, :, keys], True) - _rows(inner, queries)[..., None]
        change = (weights * change).astype(q.dtype)
        dq.append(matmul(change, k[:, :, keys]).reshape(q[:, :, :, queries].shape).astype(q.dtype))
        dk = dk.at[:, :, keys].add(summed_over_rows(change, q_rows))
    return jnp.concatenate(dq, axis=3), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)


def _blocks(length: int, causal: bool) -> list[tuple[slice, slice]]:
    """The queries of each block, and the keys that they may see."""
    block = max(_QUERY_BLOCK, -(-length // _MAX_QUERY_BLOCKS))
    ends = [min(first + block, length) for first in range(0, length, block)]
    return [
        (slice(first, end), slice(0, end if causal else length))
        for first, end in zip([0, *ends], ends, strict=False)
    ]


def _scores(
    q: Array, k: Array, segment_ids: Array, queries: slice, keys: slice, causal: bool
) -> tuple[Float[Array, "B N M S"], Float[Array, "B N M K"]]:
    """Masked scores of a block with its M = G * T queries as rows, and these rows of `q`."""
    rows = _rows(q, queries)
    scores = matmul(rows, k[:, :, keys], True)
    of_query, of_key = segment_ids[:, queries], segment_ids[:, keys]
    allowed = of_query[:, :, None] == of_key[:, None, :]
    if causal:
        at = jnp.arange(queries.start, queries.stop)
        allowed &= at[:, None] >= jnp.arange(keys.stop)
    grouped = scores.reshape(*q.shape[:3], *allowed.shape[1:])
    return jnp.where(allowed[:, None, None], grouped, MASKED).reshape(scores.shape), rows


def _rows(x: Float[Array, "B N G T *K"], queries: slice) -> Float[Array, "B N M *K"]:
    """A block's queries of all heads of a group, as the rows of one matrix."""
    x = x[:, :, :, queries]
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _real(segment_ids: Int[Array, "B T"]) -> Array:
    """Mask of the tokens that are not padding, broadcastable to [B, N, G, T, K]."""
    return segment_ids[:, None, None, :, None] > 0


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
