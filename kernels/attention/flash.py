"""Flash attention for whole rows, forward and backward: one body for every accelerator.

The online softmax is that of FlashAttention-2 (arXiv 2307.08691). `Backend` holds the differences
between backends: block sizes, memory spaces, compiler parameters.

Inside, arrays are [B, H, T, K]. A block of queries visits only the blocks of keys that some query
of it sees. Exponentials are taken to base 2: the scale includes the factor log2(e).
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
from jaxtyping import Array, Float, Int

from r1s_jax.kernels.attention.visibility import meeting_blocks, visits
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


def flash_rows(
    backend: Backend,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T N K"],
    v: Float[Array, "B T N K"],
    last_query: Int[Array, "B T"],
    scale: float,
) -> Float[Array, "B T H K"]:
    """Runs the flash kernels of one backend on rows of any length, padded to whole blocks."""
    length = q.shape[1]
    pad = -length % _ROW_MULTIPLE
    last = jnp.pad(last_query, ((0, 0), (0, pad)), constant_values=-1)[:, None]
    q, k, v = (jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, pad), (0, 0))) for x in (q, k, v))
    return flash_attention(backend, scale, q, k, v, last)[:, :, :length].swapaxes(1, 2)


@own_gradient(0, 1)
def flash_attention(
    backend: Backend,
    scale: float,
    q: Float[Array, "B H T K"],
    k: Float[Array, "B N T K"],
    v: Float[Array, "B N T K"],
    last: Int[Array, "B 1 T"],
) -> Float[Array, "B H T K"]:
    """Query t attends to the keys s with s <= t <= last[s]; without keys it gives zeros.

    T must be a multiple of every block size of `backend`.
    """
    return _forward(backend, scale, q, k, v, last)[0]


def _flash_fwd(backend: Backend, scale: float, q, k, v, last):
    out, lse = _forward(backend, scale, q, k, v, last)
    return out, (q, k, v, last, out, lse)


def _flash_bwd(backend: Backend, scale: float, saved: tuple, dout: Array):
    q, k, v, last, out, lse = saved
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)[:, :, None]
    dq = _dq(backend, scale, q, k, v, last, dout, lse, delta)
    dk, dv = _dkv(backend, scale, q, k, v, last, dout, lse, delta)
    return dq, dk, dv, None


flash_attention.defvjp(_flash_fwd, _flash_bwd)


def _forward(backend: Backend, scale: float, q, k, v, last):
    """Output, and the base-2 log-normaliser float32[B, H, 1, T] that the backward pass needs."""
    batch, heads, length, head_dim = q.shape
    blocks = backend.blocks("forward", length, head_dim, q.dtype)
    meets = meeting_blocks(last[:, 0], blocks.queries, blocks.keys)
    by_query, by_row, by_kv = _query_specs(blocks.queries, q.shape, k.shape[1])
    return _call(
        partial(_forward_kernel, backend, scale * LOG2_E, blocks),
        backend,
        blocks,
        grid=(batch, heads, length // blocks.queries),
        cost_estimate=_cost(q.shape, products=2),
        in_specs=[
            *_visit_specs(backend),
            _last_spec(length, lambda b, h, i: (b, 0, 0)),
            by_query,
            by_kv,
            by_kv,
        ],
        out_specs=[by_query, by_row],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
        ],
    )(*visits(meets), last, q, k, v)


def _dq(backend: Backend, scale: float, q, k, v, last, dout, lse, delta):
    batch, heads, length, head_dim = q.shape
    blocks = backend.blocks("dq", length, head_dim, q.dtype)
    meets = meeting_blocks(last[:, 0], blocks.queries, blocks.keys)
    by_query, by_row, by_kv = _query_specs(blocks.queries, q.shape, k.shape[1])
    return _call(
        partial(_dq_kernel, backend, scale, blocks),
        backend,
        blocks,
        grid=(batch, heads, length // blocks.queries),
        cost_estimate=_cost(q.shape, products=3),
        in_specs=[
            *_visit_specs(backend),
            _last_spec(length, lambda b, h, i: (b, 0, 0)),
            *(by_query, by_kv, by_kv, by_query, by_row, by_row),
        ],
        out_specs=by_query,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    )(*visits(meets), last, q, k, v, dout, lse, delta)


def _dkv(backend: Backend, scale: float, q, k, v, last, dout, lse, delta):
    """Each query head writes its own share, summed afterwards: no two programs share an output."""
    batch, heads, length, head_dim = q.shape
    kv_heads = k.shape[1]
    per_group = heads // kv_heads
    blocks = backend.blocks("dkv", length, head_dim, q.dtype)
    meets = meeting_blocks(last[:, 0], blocks.queries, blocks.keys)
    all_queries = pl.BlockSpec((None, None, length, head_dim), lambda b, h, j: (b, h, 0, 0))
    all_rows = pl.BlockSpec((None, None, 1, length), lambda b, h, j: (b, h, 0, 0))
    by_key = pl.BlockSpec(
        (None, None, blocks.keys, head_dim), lambda b, h, j: (b, h // per_group, j, 0)
    )
    out = pl.BlockSpec((None, None, blocks.keys, head_dim), lambda b, h, j: (b, h, j, 0))
    share = jax.ShapeDtypeStruct(q.shape, k.dtype if per_group == 1 else jnp.float32)
    dk, dv = _call(
        partial(_dkv_kernel, backend, scale, blocks),
        backend,
        blocks,
        grid=(batch, heads, length // blocks.keys),
        cost_estimate=_cost(q.shape, products=4),
        in_specs=[
            *_visit_specs(backend),
            _last_spec(blocks.keys, lambda b, h, j: (b, 0, j)),
            *(all_queries, by_key, by_key, all_queries, all_rows, all_rows),
        ],
        out_specs=[out, out],
        out_shape=[share, share],
    )(*visits(meets.swapaxes(1, 2)), last, q, k, v, dout, lse, delta)

    def add_groups(x: Array, like: Array) -> Array:
        return x.reshape(batch, kv_heads, per_group, length, head_dim).sum(2).astype(like.dtype)

    return add_groups(dk, k), add_groups(dv, v)


def _forward_kernel(
    backend, scale, blocks, count_ref, order_ref, last_ref, q_ref, k_ref, v_ref, o_ref, lse_ref
):
    """One block of queries against the keys that it may see."""
    b, i = pl.program_id(0), pl.program_id(2)
    q = q_ref[...]
    query, key = _indices((blocks.queries, blocks.keys), i)

    def attend(n: Array, carry: tuple) -> tuple:
        peak, total, acc = carry
        j = order_ref[b, i, n]
        here = pl.ds(pl.multiple_of(j * blocks.keys, blocks.keys), blocks.keys)
        scores = _dot(q, k_ref[here, :], (1, 1)) * scale
        seen = (key + j * blocks.keys <= query) & (query <= last_ref[0:1, here])
        scores = jnp.where(seen, scores, MASKED)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=1, keepdims=True))
        probs = jnp.exp2(scores - new_peak)
        shrink = jnp.exp2(peak - new_peak)
        v = v_ref[here, :]
        acc = acc * shrink + _dot(probs.astype(v.dtype), v, (1, 0))
        return new_peak, total * shrink + jnp.sum(probs, axis=1, keepdims=True), acc

    column = (blocks.queries, 1)
    start = (jnp.full(column, LOWEST, jnp.float32), jnp.zeros(column, jnp.float32))
    peak, total, acc = lax.fori_loop(
        0, count_ref[b, i], attend, (*start, jnp.zeros(q.shape, jnp.float32))
    )
    seen = total > 0
    o_ref[...] = (acc / jnp.where(seen, total, 1.0)).astype(o_ref.dtype)
    lse = jnp.where(seen, peak + jnp.log2(jnp.where(seen, total, 1.0)), 0.0)
    lse_ref[...] = backend.as_row(lse)


def _dq_kernel(
    backend,
    scale,
    blocks,
    count_ref,
    order_ref,
    last_ref,
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
    lse, delta = backend.as_column(lse_ref[...]), backend.as_column(delta_ref[...])
    query, key = _indices((blocks.queries, blocks.keys), i)

    def add(n: Array, dq: Array) -> Array:
        j = order_ref[b, i, n]
        here = pl.ds(pl.multiple_of(j * blocks.keys, blocks.keys), blocks.keys)
        k = k_ref[here, :]
        scores = _dot(q, k, (1, 1)) * (scale * LOG2_E)
        seen = (key + j * blocks.keys <= query) & (query <= last_ref[0:1, here])
        scores = jnp.where(seen, scores, MASKED)
        dscores = jnp.exp2(scores - lse) * (_dot(dout, v_ref[here, :], (1, 1)) - delta)
        return dq + _dot(dscores.astype(k.dtype), k, (1, 0))

    dq = lax.fori_loop(0, count_ref[b, i], add, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = (dq * scale).astype(dq_ref.dtype)


def _dkv_kernel(
    backend,
    scale,
    blocks,
    count_ref,
    order_ref,
    last_ref,
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
    key, query = _indices((blocks.keys, blocks.queries), j)
    last = backend.as_column(last_ref[...])

    def add(n: Array, carry: tuple) -> tuple:
        dk, dv = carry
        i = order_ref[b, j, n]
        here = pl.ds(pl.multiple_of(i * blocks.queries, blocks.queries), blocks.queries)
        q, dout = q_ref[here, :], dout_ref[here, :]
        scores = _dot(k, q, (1, 1)) * (scale * LOG2_E)
        at = query + i * blocks.queries
        scores = jnp.where((key <= at) & (at <= last), scores, MASKED)
        probs = jnp.exp2(scores - lse_ref[:, here])
        dv = dv + _dot(probs.astype(dout.dtype), dout, (1, 0))
        dscores = probs * (_dot(v, dout, (1, 1)) - delta_ref[:, here])
        return dk + _dot(dscores.astype(q.dtype), q, (1, 0)), dv

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = lax.fori_loop(0, count_ref[b, j], add, (zeros, zeros))
    dk_ref[...] = (dk * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def _indices(shape: tuple[int, int], block: Array) -> tuple[Array, Array]:
    """Row indices of this block's tokens along axis 0, and along axis 1 those within any block."""
    here, there = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return here + block * shape[0], there


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


def _last_spec(block: int, index_map: Callable) -> pl.BlockSpec:
    return pl.BlockSpec((None, 1, block), index_map)


def _visit_specs(backend: Backend) -> list[pl.BlockSpec]:
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
