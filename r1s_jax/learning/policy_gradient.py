"""From a rewarded rollout to optimizer steps: advantages over the whole batch, then updates."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from r1s_jax.config import Config
from r1s_jax.learning.advantages import kl_divergence, token_advantages
from r1s_jax.learning.collect import Rewarded
from r1s_jax.learning.learner import Learner, LearnerState
from r1s_jax.learning.micro_batch_rows import micro_batch_rows
from r1s_jax.learning.packing import pack, unpack
from r1s_jax.models.lora import combine
from r1s_jax.models.params import Params
from r1s_jax.models.sharding import batch_shards
from r1s_jax.rollout.trajectory import Trajectory

GAP_METRICS = ("logprob_diff_mean", "logprob_diff_max")


@dataclass(frozen=True)
class Learned:
    """What was learned from: `advantages` float32[N, W], and each update's metrics, in order."""

    advantages: Float[np.ndarray, "N W"]
    updates: list[dict[str, float]]
    kl: float  # to the reference, mean over sampled tokens; 0 without one
    importance_weight: float  # mean over sampled tokens; 1 without the correction
    # Mean and maximum over the tokens that this step's parameters drew: |learner's - sampler's
    # log-probability|, before any update. Empty where they drew none.
    logprob_diff: dict[str, float] = field(default_factory=dict)


def token_weights(
    mask: Bool[np.ndarray, "N W"], average: str, longest: int = 0
) -> Float[np.ndarray, "N W"]:
    """Each token's share of the loss: see `AlgorithmConfig.loss_average`.

    They add up to 1, but "constant" ones, which are 1 / (`longest` x sequences) whatever a
    sequence's length (Dr. GRPO, arXiv 2503.20783).
    """
    if average == "token":
        return mask / max(1, mask.sum())
    if average == "constant":
        return mask / (longest * max(1, int(mask.any(-1).sum())))
    counts = mask.sum(-1, keepdims=True)
    return mask / (np.maximum(counts, 1) * max(1, int((counts > 0).sum())))


class PolicyGradient:
    """Reinforce++ and its relatives over one rollout batch at a time."""

    def __init__(self, config: Config, learner: Learner):
        self.config, self.learner = config, learner
        self._rows: int | None = None  # of a pass, once an update has been seen

    def learn(
        self,
        state: LearnerState,
        rewarded: Rewarded,
        *,
        step: int,
        kl_coefficient: float,
        learning_rate_scale: float,
    ) -> tuple[LearnerState, Learned]:
        """`updates_per_rollout` optimizer steps; donates `state`.

        Every statistic is over the whole batch and taken once, before the first of them.
        """
        a, t, mask = self.config.algorithm, rewarded.rolled.trajectory, rewarded.mask
        self._rows = self._rows or self._choose_rows(state, len(t.lengths))
        order = np.random.default_rng((self.config.seed, step)).permutation(len(mask))
        parts = np.array_split(order, a.updates_per_rollout)
        old, gap = t.policy_logprobs, None
        if self._asks_learner():
            old = self._logprobs(state.params, t, mask, parts)
            gap = gap_metrics(old, t.policy_logprobs, rewarded.fresh)
        correction = np.ones(mask.shape)
        if a.tis_cap:
            weights = importance_weights(old, t.policy_logprobs, a.tis_cap)
            correction = np.where(mask, weights, 1)
        reference = None
        kl = np.zeros(mask.shape)
        if state.reference is not None:
            reference = self._logprobs(combine(state.params, state.reference), t, mask, parts)
            kl = np.where(mask, kl_divergence(a.kl_estimator, old, reference), 0.0)
        advantages = token_advantages(
            a.estimator,
            rewarded.values,
            t.groups,
            mask,
            kl=kl if a.kl_penalty == "reward" else None,
            kl_coefficient=kl_coefficient,
            reward_clip=a.reward_clip,
        )
        rows: list[dict[str, float]] = []
        for part in parts:
            weights = token_weights(mask[part], a.loss_average, self.config.rollout.max_length)
            batch, _, micro = self._pack(
                t,
                part,
                weights=weights * correction[part],
                advantages=advantages[part],
                old_logprobs=old[part],
                reference_logprobs=None if reference is None else reference[part],
                kl_weights=kl_coefficient * weights if a.kl_penalty == "loss" else None,
                fresh=rewarded.fresh[part],
            )
            state, row = self.learner.update(state, batch, micro, learning_rate_scale)
            seen = _seen_gap(row)
            gap = seen if gap is None else gap  # later updates see a policy that the first moved
            rows.append(row)
        means = (float(x[mask].mean()) for x in (kl, correction)) if mask.any() else (0.0, 1.0)
        return state, Learned(advantages, rows, *means, logprob_diff=gap or {})

    def _asks_learner(self) -> bool:
        """Whether ratios compare with the learner's own log-probabilities, not the sampler's.

        So does gspo in bfloat16: its clip, some 3e-4, is finer than the two programs round.
        """
        a = self.config.algorithm
        rounded = self.learner.compute_dtype != np.dtype("float32")
        return a.tis_cap > 0 or (a.loss == "gspo" and rounded)

    def _choose_rows(self, state: LearnerState, trajectories: int) -> int:
        sequences = -(-trajectories // self.config.algorithm.updates_per_rollout)
        return micro_batch_rows(self.config, self.learner, state, sequences)

    def _logprobs(
        self,
        params: Params,
        t: Trajectory[np.ndarray],
        mask: Bool[np.ndarray, "N W"],
        parts: Sequence[np.ndarray],
    ) -> Float[np.ndarray, "N W"]:
        """Of every sampled token under `params`, as the learner computes them; 0 elsewhere.

        Packed in `parts` as the updates are, so that they round alike.
        """
        out = np.zeros(mask.shape, np.float32)
        for part in parts:
            nothing = np.zeros(mask[part].shape, np.float32)
            batch, layout, micro = self._pack(
                t, part, weights=mask[part], advantages=nothing, old_logprobs=nothing
            )
            packed = self.learner.logprobs(params, batch, micro)
            out[part] = unpack(packed, layout, t.lengths[part], mask.shape[1])
        return np.where(mask, out, 0.0)

    def _pack(self, t: Trajectory[np.ndarray], rows: np.ndarray, **values: Any):
        c = self.config
        assert self._rows is not None  # learn has chosen
        return pack(
            t.tokens[rows],
            t.lengths[rows],
            **values,
            capacity=c.optimizer.pack_length or c.rollout.max_length,
            micro_batch_rows=self._rows * batch_shards(self.learner.mesh),
        )


def _seen_gap(row: dict[str, float]) -> dict[str, float]:
    """Takes the gap out of an update's metrics, whose means are over all tokens of the update."""
    fresh, mean, largest = (row.pop(name, 0.0) for name in ("fresh", *GAP_METRICS))
    return dict(zip(GAP_METRICS, (mean / fresh, largest), strict=True)) if fresh else {}


def gap_metrics(
    learning: Float[np.ndarray, "N W"],
    sampling: Float[np.ndarray, "N W"],
    fresh: Bool[np.ndarray, "N W"],
) -> dict[str, float]:
    """How far the learner's log-probabilities of `fresh` tokens lie from the sampler's."""
    gap = np.abs(learning - sampling)[fresh]
    return (
        dict(zip(GAP_METRICS, map(float, (gap.mean(), gap.max())), strict=True)) if gap.size else {}
    )


def importance_weights(
    learning: Float[np.ndarray, "..."], sampling: Float[np.ndarray, "..."], cap: float
) -> Float[np.ndarray, "..."]:
    """Truncated importance weights p_learning / p_sampling, at most `cap`.

    The program that samples and the one that learns round differently; where that grows to a gap,
    tokens drawn from the one are weighed for the other (Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training").
    """
    return np.minimum(np.exp(learning - sampling), cap)
