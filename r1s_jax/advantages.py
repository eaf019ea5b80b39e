"""Advantage estimators over the whole global batch of a rollout.

Shapes: N trajectories, W token columns. The outcome reward lands on a trajectory's last sampled
token and is not discounted, so without a KL reward every sampled token of it has the same return.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def token_advantages(
    estimator: str,
    rewards: Float[Array, " N"],
    groups: Int[Array, " N"],
    mask: Bool[Array, "N W"],
    *,
    kl: Float[Array, "N W"] | None = None,
    kl_coefficient: float = 0.0,
    reward_clip: float = 10.0,
) -> Float[Array, "N W"]:
    """Advantage of every sampled token, 0 elsewhere.

    Args:
      estimator: `reinforce++` (arXiv 2501.03262: no group, whitened over the batch),
        `reinforce_baseline` (minus the group's mean, whitened), `rloo` (minus the mean of the
        group's others, arXiv 2402.14740, whitened) or `group_norm` (GRPO, arXiv 2402.03300: in
        units of the group's standard deviation, not whitened).
      rewards: outcome of each trajectory, clamped to +-reward_clip.
      groups: equal numbers in [0, N) for samples of one question.
      mask: tokens the policy sampled; a row without any takes part in no statistic.
      kl: log p - log p_ref of each token, a penalty of `kl_coefficient` a unit.
    """
    valid = mask.any(-1)
    rewards = jnp.where(valid, jnp.clip(rewards, -reward_clip, reward_clip), 0.0)
    outcome = _shape_outcome(estimator, rewards, groups, valid)
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=-1)
    at_last = (jnp.arange(mask.shape[1]) == last[:, None]) & mask
    token_rewards = jnp.where(at_last, outcome[:, None], 0.0)
    if kl is not None:
        token_rewards -= jnp.where(mask, kl_coefficient * kl, 0.0)
    returns = jnp.cumsum(token_rewards[:, ::-1], axis=-1)[:, ::-1]
    if estimator != "group_norm":
        returns = whiten(returns, mask)
    return jnp.where(mask, returns, 0.0)


def whiten(values: Float[Array, "N W"], mask: Bool[Array, "N W"]) -> Float[Array, "N W"]:
    """Zero mean and unit variance over the masked entries of the whole batch."""
    count = jnp.maximum(mask.sum(), 1)
    mean = jnp.where(mask, values, 0.0).sum() / count
    variance = jnp.where(mask, (values - mean) ** 2, 0.0).sum() / count
    return jnp.where(mask, (values - mean) * jax.lax.rsqrt(variance + 1e-8), 0.0)


def _shape_outcome(estimator: str, rewards: Array, groups: Array, valid: Array) -> Array:
    """Reward of each trajectory relative to its group."""

    def group_sum(values: Array) -> Array:
        return jax.ops.segment_sum(jnp.where(valid, values, 0.0), groups, rewards.shape[0])[groups]

    if estimator == "reinforce++":
        return rewards
    count = jnp.maximum(group_sum(jnp.ones_like(rewards)), 1.0)
    # Counted from the group's best, equal rewards differ from their mean by exactly 0: rounding
    # would grow to full size in units of the standard deviation.
    best = jax.ops.segment_max(jnp.where(valid, rewards, -jnp.inf), groups, rewards.shape[0])
    rewards = jnp.where(valid, rewards - best[groups], 0.0)
    mean = group_sum(rewards) / count
    if estimator == "reinforce_baseline":
        return rewards - mean
    if estimator == "rloo":
        # r - (sum of the others) / (count - 1); alone in its group, a sample has no signal.
        return (rewards - mean) * count / jnp.maximum(count - 1, 1.0)
    if estimator == "group_norm":
        # The sample's standard deviation (over count - 1), as in the released code.
        variance = group_sum((rewards - mean) ** 2) / jnp.maximum(count - 1, 1.0)
        return (rewards - mean) / (jnp.sqrt(variance) + 1e-9)
    raise ValueError(f"unknown estimator {estimator!r}")
