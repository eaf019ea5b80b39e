"""Losses of packed rows, each token by its weight: the policy's, and the cold start's.

Shapes: R packed rows of T tokens. Weights of 1 / (tokens of the sequence x sequences of the batch)
make a loss the token mean within a sequence, then the mean over the batch; equal weights make it
the mean over all tokens. Either way the packing changes nothing.
"""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float

from r1s_jax.config import AlgorithmConfig
from r1s_jax.learning.packing import PackedBatch

Metrics = dict[str, Array]
# (log-probabilities, micro-batch) -> (loss, metrics of the loss's own naming). Metrics add up over
# micro-batches and become means over the trained tokens; those whose names end in `max` are maxima.
TokenLoss = Callable[[Array, PackedBatch], tuple[Array, Metrics]]


def policy_loss(config: AlgorithmConfig) -> TokenLoss:
    """The loss that a config's algorithm asks for."""
    return partial(
        clipped_loss, config.clip, clip_high=config.clip_high, dual_clip=config.dual_clip
    )


def clipped_loss(
    clip: float,
    logprobs: Float[Array, "R T"],
    batch: PackedBatch,
    *,
    clip_high: float = 0.0,
    dual_clip: float = 0.0,
) -> tuple[Array, Metrics]:
    """PPO's clipped objective (arXiv 1707.06347, eq. 7) and the KL to the reference (k3).

    Args:
      clip: how far the ratio may leave 1 before it counts no more.
      clip_high: the same above 1, where it differs (DAPO, arXiv 2503.14476); 0: as `clip`.
      dual_clip: a bound on what a token of negative advantage may cost, in advantages
        (arXiv 1912.09729, eq. 5); 0: none.
      batch: `kl_weights` are a token's share of the KL, times its coefficient.
    """
    trained = batch.weights > 0
    log_ratio = jnp.where(trained, logprobs - batch.old_logprobs, 0.0)
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - clip, 1 + (clip_high or clip))
    objective = jnp.minimum(ratio * batch.advantages, clipped * batch.advantages)
    if dual_clip:
        bound = dual_clip * batch.advantages
        objective = jnp.where(batch.advantages < 0, jnp.maximum(objective, bound), objective)
    mask = trained.astype(jnp.float32)
    outside = (ratio * batch.advantages > clipped * batch.advantages).astype(jnp.float32)
    # Where there is no KL there may be no reference either: its zeros must not reach exp.
    gap = jnp.where(batch.kl_weights > 0, batch.reference_logprobs - logprobs, 0.0)
    metrics = {
        "clip_fraction": (mask * outside).sum(),
        "ratio": (mask * ratio).sum(),
        "logprob_gap_mean": (mask * jnp.abs(log_ratio)).sum(),
        "logprob_gap_max": jnp.abs(log_ratio).max(),
    }
    loss = -(batch.weights * objective).sum() + (batch.kl_weights * (jnp.expm1(gap) - gap)).sum()
    return loss, metrics


def likelihood_loss(logprobs: Float[Array, "R T"], batch: PackedBatch) -> tuple[Array, Metrics]:
    """Negative log-likelihood, each token by its weight (the supervised cold start).

    `accuracy` is the share of tokens of full weight that the policy finds likelier than not.
    """
    full = (batch.weights > 0.99 * batch.weights.max()).astype(jnp.float32)
    metrics = {
        "likely": (full * (logprobs > jnp.log(0.5))).sum(),
        "full": full.sum(),
    }
    return -(batch.weights * logprobs).sum(), metrics
