"""Advantage estimators over the whole global batch of a rollout.

Shapes: N trajectories, W token columns, K turns, P terms of a reward. The outcome reward lands on a
trajectory's last sampled token and is not discounted, so without a KL penalty and without rewards
of turns all its sampled tokens have the same return.

Computed on the host in float64: rewards come from the host, every process has all of them, and
whitening subtracts numbers that lie close together.
"""

from typing import NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from r1s_jax.config import Estimator, KlEstimator

# These use group-relative advantages as they are.
_NOT_WHITENED = ("grpo", "dr_grpo", "max_rl")
# Lower bound of the deviation: where rewards are equal, whitening would amplify the noise of a KL
# penalty. One trajectory in a thousand that earns 1 more than the others gives three times this.
_LEAST_DEVIATION = 0.01
# Bound on a token's KL in the reward: k3 grows exponentially with the log-ratio.
_MOST_KL = 10.0


class TurnRewards(NamedTuple):
    """Rewards of the turns of each trajectory beside its outcome.

    A token has the rewards of its own turn and of all later ones, not discounted.
    """

    turns: Int[np.ndarray, "N W"]  # turn of each sampled token (see trajectory.turn_numbers)
    rewards: Float[np.ndarray, "N K"]  # compared within the group; NaN where there is none
    # Added as they are: the differences of a potential, which leave the best policy the best.
    shaping: Float[np.ndarray, "N K"]
    joint: bool = False  # compared together with the outcomes, instead of among themselves


class Terms(NamedTuple):
    """The terms of a reward that is a sum."""

    values: Float[np.ndarray, "N P"]
    weights: Float[np.ndarray, "N P"]


def token_advantages(
    estimator: Estimator,
    rewards: Float[np.ndarray, " N"],
    groups: Int[np.ndarray, " N"],
    mask: Bool[np.ndarray, "N W"],
    *,
    turns: TurnRewards | None = None,
    terms: Terms | None = None,
    kl: Float[np.ndarray, "N W"] | None = None,
    kl_coefficient: float = 0.0,
    reward_clip: float = 10.0,
) -> Float[np.ndarray, "N W"]:
    """Advantage of every sampled token, float32, 0 elsewhere.

    Args:
      estimator: `reinforce++` (arXiv 2501.03262: no group, whitened over the batch),
        `reinforce_baseline` (minus the group's mean, whitened), `rloo` (minus the mean of the
        group's others, arXiv 2402.14740, whitened), `grpo` (GRPO, arXiv 2402.03300: in
        units of the group's standard deviation, not whitened), `dr_grpo` (arXiv 2503.20783:
        minus the group's mean and nothing else; goes with `loss_average=constant`), `max_rl` (arXiv
        2602.02710: minus the group's mean and in units of it, 0 where it is not positive, not
        whitened) or `gdpo` (arXiv 2601.05242: `grpo` for every term of the reward by itself,
        added by weight, whitened).
      rewards: outcome of each trajectory, clamped to +-reward_clip (0: not clamped).
      groups: equal numbers for samples of one question.
      mask: tokens the policy sampled; rows without any are left out of all statistics.
      turns: rewards of turns, if any.
      terms: those of the outcome, for `gdpo`; None: the outcome itself.
      kl: divergence from the reference at each token; the reward loses `kl_coefficient` times it.

    Raises ValueError for an unknown estimator.
    """
    if estimator not in get_args(Estimator):
        raise ValueError(f"unknown estimator {estimator!r}: {', '.join(get_args(Estimator))}")
    valid = np.asarray(mask.any(-1))
    bound = reward_clip or np.inf
    outcome = np.where(valid, np.clip(rewards.astype(np.float64), -bound, bound), 0.0)
    returns = np.zeros(mask.shape)
    if turns is None:
        outcome[valid] = _relative_to_group(estimator, outcome[valid], groups[valid])
    else:
        outcome, gains = _with_turns(estimator, outcome, groups, valid, turns)
        returns += np.take_along_axis(gains, np.maximum(turns.turns, 0), axis=1)
    if estimator == "gdpo" and terms is not None:
        outcome = _sum_of_terms(np.clip(terms.values, -bound, bound), terms, groups, valid)
    returns = np.where(mask, returns + outcome[:, None], 0.0)
    if kl is not None:
        bounded = np.clip(kl.astype(np.float64), -_MOST_KL, _MOST_KL)
        penalty = np.where(mask, kl_coefficient * bounded, 0.0)
        returns -= np.cumsum(penalty[:, ::-1], axis=-1)[:, ::-1]  # of this token and all later ones
    if estimator not in _NOT_WHITENED:
        returns = whiten(returns, mask)
    return np.where(mask, returns, 0.0).astype(np.float32)


def whiten(
    values: Float[np.ndarray, "N W"], mask: Bool[np.ndarray, "N W"]
) -> Float[np.ndarray, "N W"]:
    """Zero mean and unit variance over the masked entries of the whole batch, 0 elsewhere.

    The deviation counts as at least `_LEAST_DEVIATION`, so that nearly equal values stay small.
    """
    chosen = values[mask].astype(np.float64)
    out = np.zeros(values.shape)
    if len(chosen):
        deviation = max(np.sqrt(chosen.var() + 1e-8), _LEAST_DEVIATION)
        out[mask] = (chosen - chosen.mean()) / deviation
    return out


def kl_divergence(
    estimator: KlEstimator,
    logprobs: Float[np.ndarray, "..."],
    reference: Float[np.ndarray, "..."],
) -> Float[np.ndarray, "..."]:
    """Estimate of KL(policy || reference) at each sampled token (Schulman, "Approximating KL").

    `k1` is log p - log q: unbiased, may be negative. `k2` is half its square: biased, never
    negative. `k3` is q/p - 1 - log(q/p): unbiased, never negative.
    """
    gap = reference - logprobs
    if estimator == "k2":
        return gap**2 / 2
    return -gap if estimator == "k1" else np.expm1(gap) - gap


def adapted_kl_coefficient(coefficient: float, kl: float, target: float) -> float:
    """Moves the coefficient so that the KL nears its target (arXiv 1909.08593, section 2.2)."""
    return coefficient * (1 + 0.1 * float(np.clip(kl / target - 1, -0.2, 0.2)))


def has_signal(
    rewards: Float[np.ndarray, " N"], groups: Int[np.ndarray, " N"]
) -> Bool[np.ndarray, " N"]:
    """Whether the rewards of a trajectory's group differ; groups of equal rewards teach nothing."""
    names, at = np.unique(groups, return_inverse=True)
    low, high = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    np.minimum.at(low, at, rewards)
    np.maximum.at(high, at, rewards)
    return (high > low)[at]


def _with_turns(
    estimator: Estimator,
    outcome: Float[np.ndarray, " N"],
    groups: Int[np.ndarray, " N"],
    valid: Bool[np.ndarray, " N"],
    turns: TurnRewards,
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, "N K"]]:
    """The outcome relative to its group, and what each turn adds to it: its own reward and those of
    all later turns."""
    given = ~np.isnan(turns.rewards) & valid[:, None]
    rows = np.nonzero(given)[0]
    values = np.concatenate([outcome[valid], turns.rewards[given]])
    kinds = np.concatenate([2 * groups[valid], 2 * groups[rows] + (not turns.joint)])
    relative, count = _relative_to_group(estimator, values, kinds), int(valid.sum())
    outcome, gains = np.zeros(len(outcome)), np.zeros(given.shape)
    outcome[valid], gains[given] = relative[:count], relative[count:]
    gains += turns.shaping
    return outcome, np.cumsum(gains[:, ::-1], axis=1)[:, ::-1]


def _sum_of_terms(
    values: Float[np.ndarray, "N P"],
    terms: Terms,
    groups: Int[np.ndarray, " N"],
    valid: Bool[np.ndarray, " N"],
) -> Float[np.ndarray, " N"]:
    """The weighted sum of all terms, each in units of its deviation in the group."""
    out = np.zeros(len(groups))
    for value, weight in zip(values.T, terms.weights.T, strict=True):
        out[valid] += weight[valid] * _relative_to_group("gdpo", value[valid], groups[valid])
    return out


def _relative_to_group(
    estimator: Estimator, rewards: Float[np.ndarray, " N"], groups: Int[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """Reward of each trajectory relative to its group; 0 in a group of one.

    `reinforce++` has no groups: its rewards are returned unchanged.
    """
    if estimator == "reinforce++":
        return rewards
    _, at = np.unique(groups, return_inverse=True)
    count = np.bincount(at)

    def mean_of(values: Float[np.ndarray, " N"], over: np.ndarray) -> Float[np.ndarray, " N"]:
        return (np.bincount(at, values) / np.maximum(over, 1))[at]

    centred = rewards - mean_of(rewards, count)
    # Equal rewards may differ from their mean by rounding, which grpo would scale up.
    centred[~has_signal(rewards, groups)] = 0.0
    if estimator == "rloo":  # r - (sum of the others) / (count - 1)
        return centred * (count / np.maximum(count - 1, 1))[at]
    if estimator == "max_rl":
        mean = mean_of(rewards, count)
        return np.where(mean > 0, centred / np.where(mean > 0, mean, 1.0), 0.0)
    if estimator in ("grpo", "gdpo"):
        # The sample's standard deviation (over count - 1), as in the released code.
        return centred / (np.sqrt(mean_of(centred**2, count - 1)) + 1e-9)
    return centred
