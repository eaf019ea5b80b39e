"""The KV cache of a rollout.

Shapes: L layers, S slots, N key/value heads, C capacity in tokens, K head width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from r1s_jax.config import Impl, ModelConfig
from r1s_jax.kernels.attention.api import cache_dims

_INT8_MAX = 127
# Puts the new entries [B, N, T, ...] of some slots into a buffer [L, S, N, C, ...].
Write = Callable[[Array, Array], Array]


class KVCache(NamedTuple):
    """Keys and values of every layer, updated in place as the layer scan's carry.

    In int8, each token and head has a scale that multiplies its entries: about half the bytes of
    bfloat16.
    """

    k: Float[Array, "L S N C K"] | Int[Array, "L S N C K"]
    v: Float[Array, "L S N C K"] | Int[Array, "L S N C K"]
    k_scale: Float[Array, "L S N C"] | None = None
    v_scale: Float[Array, "L S N C"] | None = None

    @staticmethod
    def empty(
        config: ModelConfig,
        slots: int,
        capacity: int,
        kv_heads: int,
        dtype: Any,
        impl: Impl | None = None,
        *,
        quantized: bool = False,
    ) -> "KVCache":
        """Zeros; C and K are rounded up to the multiples that the backend `impl` needs."""
        dtype = jnp.int8 if quantized else dtype
        dims = cache_dims(capacity, config.head_dim, impl)
        shape = (config.num_layers, slots, kv_heads, *dims)
        scale = jnp.zeros(shape[:-1], jnp.float32) if quantized else None
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), scale, scale)

    @property
    def scales(self) -> tuple[Array, Array] | None:
        """The scales of int8 keys and values, as attention backends take them; None otherwise."""
        if self.k_scale is None or self.v_scale is None:
            return None
        return self.k_scale, self.v_scale

    def written(
        self, k: Float[Array, "B T N k"], v: Float[Array, "B T N k"], write: Write
    ) -> "KVCache":
        """The cache with new keys and values, placed by `write`."""
        k, v = (self._padded(x.swapaxes(1, 2)) for x in (k, v))
        if self.k_scale is None or self.v_scale is None:
            k, v = k.astype(self.k.dtype), v.astype(self.v.dtype)
            return KVCache(write(self.k, k), write(self.v, v))
        (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
        return KVCache(
            write(self.k, k),
            write(self.v, v),
            write(self.k_scale, k_scale),
            write(self.v_scale, v_scale),
        )

    def _padded(self, x: Float[Array, "*B k"]) -> Float[Array, "*B K"]:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, self.k.shape[-1] - x.shape[-1])])


def quantize(x: Float[Array, "*B K"]) -> tuple[Int[Array, "*B K"], Float[Array, "*B"]]:
    """int8 values and the float32 scale of each row: their product approximates `x`."""
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1) / _INT8_MAX
    rounded = jnp.round(x / jnp.maximum(scale, 1e-30)[..., None])
    return rounded.astype(jnp.int8), scale
