"""The definition of attention in plain XLA: tests compare every backend with it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from r1s_jax.kernels.attention.visibility import seen_keys

# Large enough to vanish after softmax, small enough that a fully masked row stays finite.
MASKED = -1e30


# float32[L, R, N, S] each: the scales of a cache's int8 keys and of its int8 values.
Scales = tuple[Array, Array]


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T N K"],
    v: Float[Array, "B T N K"],
    *,
    last_query: Int[Array, "B T"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B T H K"]:
    """Grouped-query attention over packed rows, softmax in float32.

    Query head `h` reads key/value head `h // (H // N)`. Token t of a row attends to the tokens s
    with s <= t <= last_query[s] (None: to all up to itself; see `visibility`). A token without any,
    as padding, gives zeros. `scale` defaults to `K ** -0.5`.
    """
    head_dim = q.shape[3]
    factor = head_dim**-0.5 if scale is None else scale
    q = group_heads(q, k.shape[2])
    scores = jnp.einsum("btngk,bsnk->bngts", q, k, preferred_element_type=jnp.float32) * factor
    if last_query is None:
        last_query = jnp.full(k.shape[:2], k.shape[1] - 1)
    seen = seen_keys(last_query)
    scores = jnp.where(seen[:, None, None], scores, MASKED)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bngts,bsnk->btngk", probs, v)
    out = jnp.where(seen.any(-1)[:, :, None, None, None], out, 0)
    return out.reshape(*out.shape[:2], -1, head_dim)


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
    """Attention of each row's last T tokens to one layer of its cache, softmax in float32.

    The cache already holds the keys and values of the T tokens: row `b` has `lengths[b]` valid
    entries and query `t` stands at position `lengths[b] - T + t`. Rows of length 0 give zeros.
    Row `b` of the queries reads row `rows[b]` of the cache (None: row `b`). `scales` multiply the
    keys and values of an int8 cache, one scale per token and head.
    """
    head_dim, new = q.shape[3], q.shape[1]
    rows = jnp.arange(q.shape[0]) if rows is None else rows
    k_cache, v_cache = k_cache[layer, rows], v_cache[layer, rows]
    if scales is not None:
        k_cache, v_cache = (
            (x * scale[layer, rows][..., None]).astype(q.dtype)
            for x, scale in zip((k_cache, v_cache), scales, strict=True)
        )
    factor = head_dim**-0.5 if scale is None else scale
    q = group_heads(q, k_cache.shape[1])
    scores = jnp.einsum("btngk,bnsk->bntgs", q, k_cache, preferred_element_type=jnp.float32)
    position = lengths[:, None] - new + jnp.arange(new)
    allowed = jnp.arange(k_cache.shape[2])[None, None, :] <= position[:, :, None]
    scores = jnp.where(allowed[:, None, :, None], scores * factor, MASKED)
    probs = jax.nn.softmax(scores, axis=-1) * allowed[:, None, :, None]
    out = jnp.einsum("bntgs,bnsk->btngk", probs.astype(v_cache.dtype), v_cache)
    return out.reshape(*out.shape[:2], -1, head_dim)


def group_heads(q: Float[Array, "B T H K"], kv_heads: int) -> Float[Array, "B T N G K"]:
    """Splits the query heads into one group per key/value head."""
    batch, length, heads, head_dim = q.shape
    return q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
