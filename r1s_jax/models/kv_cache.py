"""The keys and values that a rollout keeps of every token it has fed.

Shapes: L layers, S slots, N key/value heads, C capacity in tokens, K head width.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from r1s_jax.config import Impl, ModelConfig
from r1s_jax.kernels.attention.api import cache_dims


class KVCache(NamedTuple):
    """Keys and values of every layer, updated in place as the layer scan's carry."""

    k: Float[Array, "L S N C K"]
    v: Float[Array, "L S N C K"]

    @staticmethod
    def empty(
        config: ModelConfig,
        slots: int,
        capacity: int,
        kv_heads: int,
        dtype: Any,
        impl: Impl | None = None,
    ) -> "KVCache":
        """Zeros; C and K grow to what the attention backend `impl` wants of a cache.

        On a CPU they are float32: its compiler writes into an array of bfloat16 by turning all of
        it into float32 and back.
        """
        dtype = jnp.float32 if impl == "xla" else dtype
        dims = cache_dims(capacity, config.head_dim, impl)
        shape = (config.num_layers, slots, kv_heads, *dims)
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def fit(self, x: Float[Array, "*B k"]) -> Float[Array, "*B K"]:
        """New keys or values as the cache stores them."""
        pad = [(0, 0)] * (x.ndim - 1) + [(0, self.k.shape[-1] - x.shape[-1])]
        return jnp.pad(x.astype(self.k.dtype), pad)
