"""Log-probability and entropy from logits in few passes, for CPUs.

XLA's CPU backend is slow at a sum whose terms it computes in the same pass, and fast at that sum as
a matrix product with ones.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_COLUMNS = 8  # of ones: with fewer, the compiler does not emit a matrix product


@jax.custom_vjp
def logprobs_and_entropies(
    logits: Float[Array, "*B V"], targets: Int[Array, "*B"]
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """float32 log-probability of each target, and the entropy, which has no gradient."""
    return _forward(logits, targets)[0]


def _forward(logits: Array, targets: Array):
    centred = logits - logits.max(-1, keepdims=True)
    chosen = jnp.take_along_axis(centred, targets[..., None], axis=-1)[..., 0]
    weights = jnp.exp(centred)
    total = weights.sum(-1)
    ones = jnp.ones((logits.shape[-1], _COLUMNS))
    mean = (weights * centred @ ones)[..., 0] / total
    normalizer = jnp.log(total)
    return (chosen - normalizer, normalizer - mean), (weights, targets, total)


def _backward(residuals: tuple[Array, ...], gradients: tuple[Array, Array]):
    weights, targets, total = residuals
    g = gradients[0]
    here = jnp.arange(weights.shape[-1]) == targets[..., None]
    return weights * (-g / total)[..., None] + jnp.where(here, g[..., None], 0), None


logprobs_and_entropies.defvjp(_forward, _backward)
