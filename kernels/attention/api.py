"""The entry point to attention: callers import from here, whichever backend runs.

`impl` names the backend: "xla" (any device), "tpu" (Mosaic), "gpu" (Triton),
or "interpret" (the TPU kernels, interpreted: slow, for tests). None takes the backend of JAX's
default device. A backend that cannot serve a shape raises an error; there is no silent fallback.
"""

from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Num

from r1s_jax.kernels.attention import gpu, interpret, tpu, xla
from r1s_jax.kernels.attention.reference import Scales

Impl = Literal["xla", "tpu", "gpu", "interpret"]
# Each module has `attention`, `decode_attention` and SUPPORT, its limits.
BACKENDS: dict[Impl, ModuleType] = {"xla": xla, "tpu": tpu, "gpu": gpu, "interpret": interpret}


def default_impl(platform: str | None = None) -> Impl:
    """The backend for a platform as JAX names it (None: that of the default device)."""
    backends: dict[str, Impl] = {"tpu": "tpu", "gpu": "gpu", "cuda": "gpu"}
    return backends.get(platform or jax.default_backend(), "xla")


def cache_dims(capacity: int, head_dim: int, impl: Impl | None = None) -> tuple[int, int]:
    """`capacity` and `head_dim` rounded up to the multiples that a cache of `impl` needs."""
    multiples = BACKENDS[_resolve(impl)].SUPPORT.cache_multiple
    return tuple(-(-n // m) * m for n, m in zip((capacity, head_dim), multiples, strict=True))


def check_support(impl: Impl, head_dim: int, dtypes: dict[str, str]) -> None:
    """Raises ValueError for a head width, or dtypes of named arrays, that `impl` does not serve."""
    support = BACKENDS[_resolve(impl)].SUPPORT
    for name, dtype in dtypes.items():
        if support.dtypes is not None and dtype not in support.dtypes:
            raise ValueError(f"{name} is {dtype}, impl={impl!r} serves {support.dtypes}")
    if not support.serves_width(head_dim):
        raise ValueError(f"head width {head_dim}: impl={impl!r} serves {support.widths}")


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T N K"],
    v: Float[Array, "B T N K"],
    *,
    last_query: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    impl: Impl | None = None,
) -> Float[Array, "B T H K"]:
    """Grouped-query attention over packed rows, forward and backward; see `reference.attention`.

    Raises ValueError, when traced, for heads, dtypes or head widths that `impl` does not serve.
    """
    impl = _resolve(impl)
    _check_heads(q, k, v, k.shape[2], impl)
    if q.shape[:2] != k.shape[:2]:
        raise ValueError(f"q has rows x tokens {q.shape[:2]}, k and v have {k.shape[:2]}")
    if last_query is None:
        last_query = jnp.full(q.shape[:2], q.shape[1] - 1)
    if last_query.shape != q.shape[:2]:
        raise ValueError(f"last_query has shape {last_query.shape}, expected {q.shape[:2]}")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return BACKENDS[impl].attention(q, k, v, last_query=last_query, scale=scale)


def decode_attention(
    q: Float[Array, "B T H K"],
    k_cache: Num[Array, "L R N S W"],
    v_cache: Num[Array, "L R N S W"],
    layer: Int[Array, ""] | int,
    lengths: Int[Array, " B"],
    rows: Int[Array, " B"] | None = None,
    *,
    scale: float | None = None,
    scales: Scales | None = None,
    impl: Impl | None = None,
) -> Float[Array, "B T H K"]:
    """Attention of each row's last T tokens to its cache; see `reference.decode_attention`.

    The cache may be wider than the heads (W >= K, zeros beside them): see `cache_dims`. Raises
    ValueError, when traced, for shapes or dtypes that `impl` does not serve.
    """
    impl = _resolve(impl)
    batch, new, _, head_dim = q.shape
    kv_heads, capacity, width = k_cache.shape[2:]
    _check_heads(q, k_cache, v_cache, kv_heads, impl, quantized=scales is not None)
    if scales is not None and any(x.shape != k_cache.shape[:-1] for x in scales):
        raise ValueError(f"scales must have the shape {k_cache.shape[:-1]} of the cache's tokens")
    if rows is None and k_cache.shape[1] != batch:
        raise ValueError(f"q has {batch} rows, the cache {k_cache.shape[1]}: name them with `rows`")
    for name, x in (("lengths", lengths), ("rows", rows)):
        if x is not None and x.shape != (batch,):
            raise ValueError(f"q has {batch} rows, {name} the shape {x.shape}")
    if new > capacity:
        raise ValueError(f"{new} new tokens do not fit a cache of {capacity}")
    longest = 0 if isinstance(lengths, Tracer) else max(np.asarray(lengths), default=0)
    if longest > capacity:
        raise ValueError(f"lengths reach {longest}, the cache holds {capacity}")
    if cache_dims(capacity, width, impl) != (capacity, width):
        raise ValueError(
            f"a cache of {capacity} tokens x {width} does not suit impl={impl!r}: it needs "
            f"multiples of {BACKENDS[impl].SUPPORT.cache_multiple} (see cache_dims)"
        )
    scale = head_dim**-0.5 if scale is None else scale
    if width > head_dim:
        q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, width - head_dim)))
    decode = BACKENDS[impl].decode_attention
    operands = q, k_cache, v_cache, layer, lengths, rows
    return decode(*operands, scale=scale, scales=scales)[..., :head_dim]


def _resolve(impl: Impl | None) -> Impl:
    if impl is None:
        return default_impl()
    if impl not in BACKENDS:
        raise ValueError(f"impl={impl!r} is not an attention backend: take one of {list(BACKENDS)}")
    return impl


def _check_heads(
    q: Array, k: Array, v: Array, kv_heads: int, impl: Impl, *, quantized: bool = False
) -> None:
    """Checks that whole rows and a cache share. Raises ValueError."""
    heads, head_dim = q.shape[2:]
    if k.shape != v.shape:
        raise ValueError(f"k has shape {k.shape}, v has {v.shape}: they must be equal")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key/value heads")
    if k.shape[-1] < head_dim:
        raise ValueError(f"head width: q has {head_dim}, k and v have {k.shape[-1]}")
    cached = {} if quantized else {"k": k.dtype.name, "v": v.dtype.name}
    check_support(impl, head_dim, {"q": q.dtype.name, **cached})
