"""From a rewarded rollout to optimizer steps: advantages over the whole batch, then updates."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from r1s_jax.config import Config
from r1s_jax.io.seals import digest
from r1s_jax.learning.advantages import TurnRewards, kl_divergence, token_advantages
from r1s_jax.learning.collect import Rewarded
from r1s_jax.learning.gold import gold_logprobs, with_credit
from r1s_jax.learning.learner import Learner, LearnerState
from r1s_jax.learning.micro_batch_rows import micro_batch_rows
from r1s_jax.learning.packing import Sizes, pack, row_length
from r1s_jax.learning.teacher import Teacher, shown_logprobs
from r1s_jax.models.lora import combine
from r1s_jax.models.params import Params
from r1s_jax.models.sharding import batch_shards
from r1s_jax.rollout.engine import Engine
from r1s_jax.rollout.forks import renumbered
from r1s_jax.rollout.trajectory import Trajectory, turn_numbers

GAP_METRICS = ("logprob_diff_mean", "logprob_diff_max")


@dataclass(frozen=True)
class Learned:
    """The advantages and metrics of a step's updates."""

    advantages: Float[np.ndarray, "N W"]  # float32
    updates: list[dict[str, float]]  # metrics of each update, in order
    kl: float | None  # to the reference or teacher, mean over scored tokens; None without any
    importance_weight: float  # mean over sampled tokens; 1 without tis_cap
    # Mean and maximum of |learner's - sampler's log-probability| before any update, over the tokens
    # that this step's parameters sampled; empty without such tokens.
    logprob_diff: dict[str, float] = field(default_factory=dict)
    credit: dict[str, float] = field(default_factory=dict)  # metrics of turns and teachers
    # Estimated KL of each sampled token to the reference or teacher, float64; None without one.
    token_kl: Float[np.ndarray, "N W"] | None = None
    inputs: str = ""  # a digest of what the updates were given besides the state


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

    def __init__(
        self,
        config: Config,
        learner: Learner,
        engine: Engine | None = None,
        teacher: Teacher | None = None,
    ):
        """`engine` tokenises what some settings of `algorithm` show or ask; `teacher` is the policy
        that `algorithm.teacher` names (see load_teacher)."""
        self.config, self.learner = config, learner
        self.engine, self.teacher = engine, teacher
        self._rows: int | None = None  # of a micro-batch, chosen before the first update
        self._sequences = 0  # of an update, at most

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

        Statistics are taken once, over the whole batch, before the first update. The batch has
        forks only if they teach.
        """
        a, t, mask = self.config.algorithm, rewarded.rolled.trajectory, rewarded.mask
        parts = self._parts(rewarded, step)
        self._rows = self._rows or self._choose_rows(state)
        old, correction, gap = self._old_logprobs(state, rewarded, parts)
        plain = t.policy_logprobs if t.kept.shape[2] else old
        reference, scored = self._reference(state, rewarded, parts)
        kl = np.zeros(mask.shape)
        if reference is not None:
            kl = np.where(scored, kl_divergence(a.kl_estimator, plain, reference), 0.0)
        turns, credit = self._turn_rewards(state, rewarded)
        advantages = self._advantages(rewarded, turns, kl, kl_coefficient)
        signal = {"advantages": advantages, "old_logprobs": old, "kept": t.kept}
        signal |= {"reference_logprobs": reference, "fresh": rewarded.fresh}
        rows: list[dict[str, float]] = []
        inputs = digest(learning_rate_scale)
        for part in parts:
            weights = self._weights(rewarded, part, scored, kl_coefficient)
            weights["weights"] = weights["weights"] * correction[part]
            own = {name: x[part] for name, x in signal.items() if x is not None}
            if rewarded.rolled.parents is not None:
                own["parents"] = renumbered(rewarded.rolled.parents, part)
            batch, _, micro = self._pack(t, part, **weights, **own)
            inputs = digest(inputs, *jax.tree.leaves(batch), micro)
            state, row = self.learner.update(state, batch, micro, learning_rate_scale)
            update_gap = _pop_gap(row)
            gap = update_gap if gap is None else gap  # of the first: later ones see a moved policy
            if documents := row.pop("documents", 0.0):  # the mean over all tokens of the update
                row["documents_nll"] /= documents
            rows.append(row)
        if a.teacher:
            credit["teacher_scored"] = float(scored.sum() / max(1, mask.sum()))
        return state, Learned(
            advantages,
            rows,
            kl=float(kl[scored].mean()) if scored.any() else None,
            importance_weight=float(correction[mask].mean()) if mask.any() else 1.0,
            logprob_diff=gap or {},
            credit=credit,
            token_kl=None if reference is None else kl,
            inputs=inputs,
        )

    def _advantages(
        self,
        rewarded: Rewarded,
        turns: TurnRewards | None,
        kl: Float[np.ndarray, "N W"],
        kl_coefficient: float,
    ) -> Float[np.ndarray, "N W"]:
        a = self.config.algorithm
        advantages = token_advantages(
            a.estimator,
            rewarded.values,
            rewarded.groups,
            rewarded.mask,
            turns=turns,
            terms=rewarded.terms if a.estimator == "gdpo" else None,
            kl=kl if a.kl_penalty == "reward" else None,
            kl_coefficient=kl_coefficient,
            reward_clip=a.reward_clip,
        )
        if a.credit == "fork":
            advantages = advantages + fork_advantages(rewarded)
        return opening_advantages(rewarded, advantages)

    def _weights(
        self,
        rewarded: Rewarded,
        part: np.ndarray,
        scored: Bool[np.ndarray, "N W"],
        kl_coefficient: float,
    ) -> dict[str, np.ndarray]:
        """The weights of the three streams of the loss (see losses.py) for these rows."""
        a, longest = self.config.algorithm, self.config.rollout.max_length
        weights = {"weights": token_weights(rewarded.mask[part], a.loss_average, longest)}
        if a.kl_penalty == "loss":
            shares = token_weights(scored[part], a.loss_average, longest)
            weights["kl_weights"] = kl_coefficient * shares
        if a.echo_coefficient:
            shares = token_weights(rewarded.documents[part], "token")
            weights["ce_weights"] = a.echo_coefficient * shares
        return weights

    def _old_logprobs(
        self, state: LearnerState, rewarded: Rewarded, parts: Sequence[np.ndarray]
    ) -> tuple[Float[np.ndarray, "N W"], Float[np.ndarray, "N W"], dict[str, float] | None]:
        """The log-probabilities that ratios compare with, within each token's nucleus, its
        correction of the sampler's numerics, and the difference between the two programs where it
        is known already."""
        a, t, mask = self.config.algorithm, rewarded.rolled.trajectory, rewarded.mask
        correction, sampled = np.ones(mask.shape), t.policy_logprobs - t.log_kept
        if (given := mask & ~t.loss_mask).any():  # never sampled: as if drawn now
            sampled = np.where(given, self._logprobs(state.params, t, given, parts), sampled)
        if not self._uses_learner_logprobs():
            return sampled, correction, None
        old = self._logprobs(state.params, t, mask, parts, within_nucleus=True)
        if a.tis_cap:
            correction = np.where(mask, importance_weights(old, sampled, a.tis_cap), 1)
        return old, correction, gap_metrics(old, sampled, rewarded.fresh)

    def _reference(
        self, state: LearnerState, rewarded: Rewarded, parts: Sequence[np.ndarray]
    ) -> tuple[Float[np.ndarray, "N W"] | None, Bool[np.ndarray, "N W"]]:
        """Log-probabilities of sampled tokens under the reference or teacher, if there is one, and
        which tokens have one."""
        a, t, mask = self.config.algorithm, rewarded.rolled.trajectory, rewarded.mask
        if not a.kl_coefficient:
            return None, mask
        if self.teacher:
            learner, params = self.teacher
            logprobs = learner.sequence_logprobs(params, t.tokens, t.lengths, mask, self._sizes)
            return logprobs, mask
        if a.teacher:
            assert self.engine  # a run has one
            params, prompt = state.params, self.engine.prompt_tokens
            return shown_logprobs(self.learner, params, rewarded, a.teacher, prompt, self._sizes)
        assert state.reference is not None  # kept for a kl_coefficient
        params = combine(state.params, state.reference)
        return self._logprobs(params, t, mask, parts), mask

    def _turn_rewards(
        self, state: LearnerState, rewarded: Rewarded
    ) -> tuple[TurnRewards | None, dict[str, float]]:
        """The rewards of turns, from the reward and from `algorithm.credit`, and metrics."""
        a, t = self.config.algorithm, rewarded.rolled.trajectory
        given, scored = [r.turns for r in rewarded.rewards], a.credit in ("tips", "igpo")
        if not scored and not any(given):
            return None, {}
        count = int(turn_numbers(t.loss_mask).max(initial=0)) + 2
        rewards, shaping = np.full((len(given), count), np.nan), np.zeros((len(given), count))
        for row, values in enumerate(given):
            if any(given):  # a reward that names no turns gives each of them 0
                rewards[row, : rewarded.rolled.solutions[row].turns_answered] = 0.0
            rewards[row, : len(values)] = values
        turns = TurnRewards(turn_numbers(rewarded.mask), rewards, shaping, a.credit == "igpo")
        if not scored:
            return turns, {}
        assert self.engine  # a run has one
        params = state.params
        if a.credit == "tips":
            assert state.reference is not None
            params = combine(params, state.reference)
        golds = [q.answers for q in rewarded.rolled.questions]
        scores = gold_logprobs(
            self.learner, params, t, golds, self.engine.answer_tokens, self._sizes
        )
        return with_credit(a.credit, turns, scores)

    @property
    def _sizes(self) -> Sizes:
        assert self._rows is not None  # set by learn
        rows = self._rows * batch_shards(self.learner.mesh)
        return Sizes(row_length(self.config), rows, self._sequences)

    def _uses_learner_logprobs(self) -> bool:
        """Whether ratios use the learner's own old log-probabilities, not the sampler's.

        With `tis_cap`, and with gspo in bfloat16, whose clip of about 3e-4 is finer than the
        rounding difference between the two programs.
        """
        a = self.config.algorithm
        rounded = self.learner.compute_dtype != np.dtype("float32")
        return a.tis_cap > 0 or (a.loss == "gspo" and rounded)

    def _parts(self, rewarded: Rewarded, step: int) -> list[Int[np.ndarray, " M"]]:
        """The rows of each update, drawn at random; forks stay with their trajectories."""
        trunks, a = rewarded.rolled.trunks, self.config.algorithm
        order = np.random.default_rng((self.config.seed, step)).permutation(int(trunks.sum()))
        trees = np.split(np.arange(len(trunks)), np.flatnonzero(trunks)[1:])
        split = np.array_split(order, a.updates_per_rollout)
        # With forks as many as there can be, so that the update compiles once.
        most = self.config.rollout.tree_rows if a.forks_teach else 1
        self._sequences = most * max(map(len, split))
        return [np.concatenate([trees[i] for i in part]) for part in split]

    def _choose_rows(self, state: LearnerState) -> int:
        return micro_batch_rows(self.config, self.learner, state, self._sequences)

    def _logprobs(
        self,
        params: Params,
        t: Trajectory[np.ndarray],
        mask: Bool[np.ndarray, "N W"],
        parts: Sequence[np.ndarray],
        *,
        within_nucleus: bool = False,
    ) -> Float[np.ndarray, "N W"]:
        """The learner's log-probability of every token of `mask` under `params`; 0 elsewhere.

        Packed by `parts`, as the updates are, so that both round alike.
        """
        out = np.zeros(mask.shape, np.float32)
        for part in parts:
            kept = t.kept[part] if within_nucleus else None
            out[part] = self.learner.sequence_logprobs(
                params, t.tokens[part], t.lengths[part], mask[part], self._sizes, kept
            )
        return out

    def _pack(self, t: Trajectory[np.ndarray], rows: np.ndarray, **values: Any):
        return pack(t.tokens[rows], t.lengths[rows], **values, **self._sizes._asdict())


def fork_advantages(rewarded: Rewarded) -> Float[np.ndarray, "N W"]:
    """How much more than others the search at the end of a turn was worth, at every token of that
    turn; float32, 0 where it is not known.

    Minus the mean of the batch: a policy that searches already learns from it where searches are
    worth more or less, and not to search ever more surely.
    """
    turns = turn_numbers(rewarded.mask)
    worth, known = rewarded.worth, ~np.isnan(rewarded.worth)
    worth = np.where(known, worth - worth[known].mean() if known.any() else 0.0, 0.0)
    if not worth.size:
        return np.zeros(turns.shape, np.float32)
    gains = np.take_along_axis(worth, np.clip(turns, 0, worth.shape[1] - 1), axis=1)
    return np.where(turns >= 0, gains, 0.0).astype(np.float32)


def opening_advantages(
    rewarded: Rewarded, advantages: Float[np.ndarray, "N W"]
) -> Float[np.ndarray, "N W"]:
    """`advantages`, but at the given beginning of a fork's answer by how much it earned more than
    its parent: no sample of the group made that choice."""
    rolled = rewarded.rolled
    if rolled.openings is None or rolled.parents is None:
        return advantages
    gap = np.nan_to_num(rewarded.values - rewarded.values[rolled.parents])[:, None]
    return np.where(rewarded.mask & rolled.openings, gap, advantages).astype(np.float32)


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
