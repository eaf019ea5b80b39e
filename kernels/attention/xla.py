"""Decode attention in plain XLA that reads only as much of the cache as rows have filled."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from r1s_jax.kernels.attention.reference import MASKED, group_heads

_BLOCK = 128


def decode_attention(
    q: Float[Array, "B T H K"],
    k_cache: Float[Array, "L B N S K"],
    v_cache: Float[Array, "L B N S K"],
    layer: Int[Array, ""],
    lengths: Int[Array, " B"],
    *,
    scale: float | None = None,
) -> Float[Array, "B T H K"]:
    """Same meaning as `reference.decode_attention`, by online softmax over blocks of keys.

    The number of blocks follows the longest row, so a cache with room for thousands of tokens
    costs what its text costs. Blocks are sliced straight out of the stacked cache: taking one
    layer first would copy it.
    """
    batch, new, _, head_dim = q.shape
    kv_heads, capacity = k_cache.shape[2:4]
    block = min(_BLOCK, capacity)
    dtype, q = q.dtype, group_heads(q, kv_heads).transpose(0, 2, 1, 3, 4)
    groups = q.shape[3]
    # Tokens and the heads of a group share their keys: one row axis M keeps the matmuls plain.
    q = (q * (head_dim**-0.5 if scale is None else scale)).reshape(batch, kv_heads, -1, head_dim)
    position = jnp.repeat(lengths[:, None] - new + jnp.arange(new), groups, axis=1)

    def attend_block(i: Array, carry: tuple) -> tuple:
        peak, total, out = carry
        # The last block of a capacity that is no multiple slides back; its overlap is masked.
        first = jnp.minimum(i * block, capacity - block)
        at, size = (layer, 0, 0, first, 0), (1, batch, kv_heads, block, head_dim)
        k, v = lax.dynamic_slice(k_cache, at, size)[0], lax.dynamic_slice(v_cache, at, size)[0]
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

    rows = q.shape[:-1]
    start = (jnp.full(rows, MASKED), jnp.zeros(rows), jnp.zeros(q.shape))
    blocks = (jnp.max(lengths) + block - 1) // block
    _, total, out = lax.fori_loop(0, blocks, attend_block, start)
    out = out / jnp.maximum(total, 1e-30)[..., None]
    out = out.reshape(batch, kv_heads, new, groups, head_dim).transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, new, -1, head_dim).astype(dtype)
