"""Operands and cost estimate that the decode kernels of TPU and GPU share."""

import math
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float


def group_queries(q: Float[Array, "B T H K"], kv_heads: int, dtype: Any) -> Float[Array, "B N M K"]:
    """Puts the M = T * H/N queries of a KV head on one axis, ordered by token; casts to `dtype`."""
    batch, new, heads, head_dim = q.shape
    q = q.reshape(batch, new, kv_heads, heads // kv_heads, head_dim).swapaxes(1, 2)
    return q.reshape(batch, kv_heads, -1, head_dim).astype(dtype)


def ungroup_queries(out: Float[Array, "B N M K"], new: int) -> Float[Array, "B T H K"]:
    """The inverse of `group_queries` for T = `new` tokens."""
    batch, kv_heads, queries, head_dim = out.shape
    out = out.reshape(batch, kv_heads, new, queries // new, head_dim).swapaxes(1, 2)
    return out.reshape(batch, new, -1, head_dim)


def as_scalars(layer: Array | int, lengths: Array, rows: Array) -> tuple[Array, Array, Array]:
    """The int32 scalars of a decode kernel: `layer` as [1], `lengths`, `rows`."""
    layer, lengths, rows = (jnp.asarray(x, jnp.int32) for x in (layer, lengths, rows))
    return layer.reshape(1), lengths, rows


def decode_cost(q_shape: tuple, k_cache: Array) -> pl.CostEstimate:
    """Cost of queries [B, N, M, K] against full caches."""
    batch, kv_heads, queries, head_dim = q_shape
    pairs = batch * kv_heads * queries * k_cache.shape[3]
    keys = batch * math.prod(k_cache.shape[2:])
    return pl.CostEstimate(
        flops=4 * pairs * head_dim,
        transcendentals=pairs,
        bytes_accessed=2 * keys * k_cache.dtype.itemsize,
    )
