"""Attention in plain XLA, block by block: what runs on CPU.

The meaning is that of `reference`; the blocks keep scores in the processor's caches and skip what
nobody may see.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from r1s_jax.kernels.attention.reference import MASKED, group_heads
from r1s_jax.kernels.attention.support import Support

SUPPORT = Support()

_BLOCK = 128  # of keys in a cache
_QUERY_BLOCK = 64
# A long row is cut into no more than this many blocks of queries: each is a piece of program.
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
    """Same meaning as `reference.attention`; a block of queries sees no key after its end.

    The backward pass computes the scores of a block again, so no [T, T] array is ever kept.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q = group_heads(q * (head_dim**-0.5 if scale is None else scale), kv_heads)
    # Heads first: a group's queries, whatever their tokens, are the rows of one matrix product.
    q, k, v = q.transpose(0, 2, 3, 1, 4), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    if segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)
    block = max(_QUERY_BLOCK, -(-length // _MAX_QUERY_BLOCKS))
    attend = jax.checkpoint(partial(_attend_block, causal=causal), static_argnums=4)
    out = []
    for first in range(0, length, block):
        queries = slice(first, min(first + block, length))
        keys = slice(0, queries.stop if causal else length)
        ids = segment_ids[:, queries], segment_ids[:, keys]
        out.append(attend(q[:, :, :, queries], k[:, :, keys], v[:, :, keys], ids, first))
    return jnp.concatenate(out, axis=3).transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, -1)


def _attend_block(
    q: Float[Array, "B N G T K"],
    k: Float[Array, "B N S K"],
    v: Float[Array, "B N S K"],
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]],
    first: int,
    *,
    causal: bool,
) -> Float[Array, "B N G T K"]:
    """The queries from `first` on against S keys, the scale being in them already."""
    (batch, kv_heads, groups, length, head_dim), (of_query, of_key) = q.shape, segment_ids
    rows = q.reshape(batch, kv_heads, groups * length, head_dim)
    scores = jnp.einsum("bnmk,bnsk->bnms", rows, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, groups, length, -1)
    allowed = of_query[:, :, None] == of_key[:, None, :]
    if causal:
        allowed &= (first + jnp.arange(length))[:, None] >= jnp.arange(k.shape[2])
    scores = jnp.where(allowed[:, None, None], scores, MASKED)
    peak = lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - peak)
    total = weights.sum(-1)
    weights = weights.reshape(batch, kv_heads, groups * length, -1).astype(v.dtype)
    mix = jnp.einsum("bnms,bnsk->bnmk", weights, v, preferred_element_type=jnp.float32)
    out = mix.reshape(q.shape) / total[..., None]
    return jnp.where(of_query[:, None, None, :, None] > 0, out, 0).astype(v.dtype)


def decode_attention(
    q: Float[Array, "B T H K"],
    k_cache: Float[Array, "L R N S K"],
    v_cache: Float[Array, "L R N S K"],
    layer: Int[Array, ""],
    lengths: Int[Array, " B"],
    rows: Int[Array, " B"] | None = None,
    *,
    scale: float | None = None,
) -> Float[Array, "B T H K"]:
    """Same meaning as `reference.decode_attention`, by online softmax over blocks of keys.

    The number of blocks follows the longest row, so a cache with room for thousands of tokens
    costs what its text costs. Blocks are sliced straight out of the stacked cache: taking one
    layer, or some rows, first would copy it.
    """
    batch, new, _, head_dim = q.shape
    kv_heads, capacity = k_cache.shape[2:4]
    block = min(_BLOCK, capacity)
    dtype, q = q.dtype, group_heads(q, kv_heads).transpose(0, 2, 1, 3, 4)
    groups = q.shape[3]
    # Tokens and the heads of a group share their keys: one row axis M keeps the matmuls plain.
    q = (q * (head_dim**-0.5 if scale is None else scale)).reshape(batch, kv_heads, -1, head_dim)
    position = jnp.repeat(lengths[:, None] - new + jnp.arange(new), groups, axis=1)

    def read(cache: Array, first: Array) -> Array:
        if rows is None:
            size = (1, batch, kv_heads, block, head_dim)
            return lax.dynamic_slice(cache, (layer, 0, 0, first, 0), size)[0]
        size = (1, 1, kv_heads, block, head_dim)
        each = [lax.dynamic_slice(cache, (layer, row, 0, first, 0), size)[0] for row in rows]
        return jnp.concatenate(each)

    def attend_block(i: Array, carry: tuple) -> tuple:
        peak, total, out = carry
        # The last block of a capacity that is no multiple slides back; its overlap is masked.
        first = jnp.minimum(i * block, capacity - block)
        k, v = read(k_cache, first), read(v_cache, first)
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
