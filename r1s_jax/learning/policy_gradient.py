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
from r1s_jax.learning.packing import pack, row_length, unpack
from r1s_jax.models.lora import combine
from r1s_jax.models.params import Params
from r1s_jax.models.sharding import batch_shards
from r1s_jax.rollout.trajectory import Trajectory

GAP_METRICS = ("logprob_diff_mean", "logprob_diff_max")


@dataclass(frozen=True)
class Learned:
    """The advantages and metrics of a step's updates."""

    advantages: Float[np.ndarray, "N W"]  # float32
    updates: list[dict[str, float]]  # metrics of each update, in order
    kl: float  # to the reference, mean over sampled tokens; 0 without a reference
    importance_weight: float  # mean over sampled tokens; 1 without tis_cap
    # Mean and maximum of |learner's - sampler's log-probability| before any update, over the tokens
    # that this step's parameters sampled; empty without such tokens.
    logprob_diff: dict[str, float] = field(default_factory=dict)


def token_weights(
    mask: Bool[np.ndarray, "N W"], average: str, longest: int = 0
) -> Float[np.ndarray, "N W"]:
    """Each token's share of the loss: see `AlgorithmConfig.loss_average`.

    The shares add up to 1, except with "constant": there each is 1 / (`longest` x sequences),
    whatever the sequence's length (Dr. GRPO, arXiv 2503.20783).
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
        self._rows: int | None = None  # of a micro-batch, chosen before the first update

    def learn(
        self,
        state: LearnerState,
        rewarded: Rewarded,
        *,
        step: int,
        kl_coefficient: float,
        learning_rate_scale: float,
    ) -> tuple[LearnerState, Learned]:
        """Takes `updates_per_rollout` optimizer steps; donates `state`.

        Statistics are taken once, over the whole batch, before the first update.
        """
        a, t, mask = self.config.algorithm, rewarded.rolled.trajectory, rewarded.mask
        self._rows = self._rows or self._choose_rows(state, len(t.lengths))
        order = np.random.default_rng((self.config.seed, step)).permutation(len(mask))
        parts = np.array_split(order, a.updates_per_rollout)
        old, gap = t.policy_logprobs, None
        if self._uses_learner_logprobs():
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
            update_gap = _pop_gap(row)
            gap = update_gap if gap is None else gap  # of the first: later ones see a moved policy
            rows.append(row)
        means = (float(x[mask].mean()) for x in (kl, correction)) if mask.any() else (0.0, 1.0)
        return state, Learned(advantages, rows, *means, logprob_diff=gap or {})

    def _uses_learner_logprobs(self) -> bool:
        """Whether ratios use the learner's own old log-probabilities, not the sampler's.

        With `tis_cap`, and with gspo in bfloat16, whose clip of about 3e-4 is finer than the
        rounding difference between the two programs.
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
        """The learner's log-probability of every sampled token under `params`; 0 elsewhere.

        Packed by `parts`, as the updates are, so that both round alike.
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
        assert self._rows is not None  # set by learn
        return pack(
            t.tokens[rows],
            t.lengths[rows],
            **values,
            capacity=row_length(self.config),
            micro_batch_rows=self._rows * batch_shards(self.learner.mesh),
        )


def _pop_gap(row: dict[str, float]) -> dict[str, float]:
    """Removes the logprob difference from an update's metrics and returns it.

    Metrics are means over all tokens of the update; the returned mean is over `fresh` tokens.
    """
    fresh, mean, largest = (row.pop(name, 0.0) for name in ("fresh", *GAP_METRICS))
    return dict(zip(GAP_METRICS, (mean / fresh, largest), strict=True)) if fresh else {}


def gap_metrics(
    learning: Float[np.ndarray, "N W"],
    sampling: Float[np.ndarray, "N W"],
    fresh: Bool[np.ndarray, "N W"],
) -> dict[str, float]:
    """Mean and maximum of |learner's - sampler's log-probability| over `fresh` tokens, if any."""
    gap = np.abs(learning - sampling)[fresh]
    return (
        dict(zip(GAP_METRICS, map(float, (gap.mean(), gap.max())), strict=True)) if gap.size else {}
    )


def importance_weights(
    learning: Float[np.ndarray, "..."], sampling: Float[np.ndarray, "..."], cap: float
) -> Float[np.ndarray, "..."]:
    """Truncated importance weights p_learning / p_sampling, at most `cap`.

    They correct for the rounding difference between the sampling and the learning program (Yao et
    al. 2025, "Your efficient RL framework secretly brings you off-policy RL training").
    """
    return np.minimum(np.exp(learning - sampling), cap)
