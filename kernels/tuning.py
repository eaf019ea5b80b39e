"""What one platform computes differently from another, with the same result.

Chosen here once, by the platform of the devices that compute, and apart from the attention
backend: `policy.attention=xla` on an accelerator changes attention and nothing else.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Tuning:
    """How a decoder computes on one platform. The default suits accelerators."""

    # Sampling reads layers as a list, matrices turned: no copy of a layer at each of its passes.
    unstack: bool = False
    # Learning writes layers out one by one where nothing is recomputed: a faster gradient.
    unroll: bool = False
    # Matrix products in the form that a CPU's matrix units take (kernels/matmul.py).
    cpu_matmul: bool = False
    # Log-probabilities and entropies in one pass over the logits (kernels/token_logprobs.py).
    fused_logprobs: bool = False
    # What keys and values are kept in; None: what the decoder computes in.
    cache_dtype: Any = None


ACCELERATOR = Tuning()
# XLA's CPU backend writes into an array of bfloat16 by turning all of it into float32 and back.
CPU = Tuning(
    unstack=True, unroll=True, cpu_matmul=True, fused_logprobs=True, cache_dtype=jnp.float32
)


def default_tuning(platform: str | None = None) -> Tuning:
    """What suits a platform as JAX names it (None: that of the default device)."""
    return CPU if (platform or jax.default_backend()) == "cpu" else ACCELERATOR
