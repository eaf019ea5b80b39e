"""Platform-specific ways to compute the same result.

The platform of the computing devices selects the tuning, independently of the attention backend:
`policy.attention=xla` on an accelerator changes attention and nothing else.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Tuning:
    """How a decoder computes on one platform. The default suits accelerators."""

    # Sampling reads layers as a list: no copy of a layer out of its stack at each pass.
    unstack: bool = False
    # Learning unrolls the layers where nothing is recomputed: a faster gradient.
    unroll: bool = False
    # Matrix products in the form that a CPU's matrix units accept (kernels/matmul.py).
    cpu_matmul: bool = False
    # Log-probabilities and entropies in one pass over the logits (kernels/token_logprobs.py).
    fused_logprobs: bool = False
    # dtype of the KV cache; None: the decoder's compute dtype.
    cache_dtype: Any = None


ACCELERATOR = Tuning()
# To update a bfloat16 array, XLA's CPU backend converts all of it to float32 and back.
CPU = Tuning(
    unstack=True, unroll=True, cpu_matmul=True, fused_logprobs=True, cache_dtype=jnp.float32
)


def default_tuning(platform: str | None = None) -> Tuning:
    """The tuning for a platform as JAX names it (None: that of the default device)."""
    return CPU if (platform or jax.default_backend()) == "cpu" else ACCELERATOR
