"""Collects the batch of a step: rolls out, rewards, and marks the trajectories to learn from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from r1s_jax.config import AlgorithmConfig, Config, StageConfig
from r1s_jax.data.environment import Environment
from r1s_jax.learning.advantages import Terms, has_signal
from r1s_jax.learning.partial_rollouts import PartialRollouts
from r1s_jax.models.params import Params
from r1s_jax.rewards.registry import BatchReward
from r1s_jax.rewards.rules import Reward, search_worth
from r1s_jax.rollout.engine import Engine, Rolled, merge
from r1s_jax.rollout.trajectory import CUT_OFF, Finish, Trajectory, turn_numbers
from r1s_jax.system.distributed import on_main

_NOT_ITS_FAULT = (Finish.SEARCH_ERROR, Finish.ABORTED)


@dataclass(frozen=True)
class Rewarded:
    """A rewarded rollout batch and its learning signal; row i of each array is one trajectory.

    Computed once, for dynamic sampling, the choice of groups, the metrics and the update.
    """

    rolled: Rolled
    rewards: Sequence[Reward]
    values: Float[np.ndarray, " N"]  # float32; NaN where the judge gave no verdict
    # Tokens to learn from: see learnable. Of a fork that earned more than its parent also the
    # beginning of its answer, which the policy did not sample.
    mask: Bool[np.ndarray, "N W"]
    # Has tokens to learn from, and its group's rewards differ, or something else teaches.
    teaches: Bool[np.ndarray, " N"]
    worth: Float[np.ndarray, "N K"]  # of the search that ended turn k: see searches_worth

    @staticmethod
    def of(rolled: Rolled, rewards: Sequence[Reward], algorithm: AlgorithmConfig) -> "Rewarded":
        values, groups = np.array([r.value for r in rewards], np.float32), rolled.trajectory.groups
        if price := algorithm.search_price:
            searches = np.array([s.searches_answered for s in rolled.solutions])
            costs = search_costs(values, searches, groups, rolled.trunks)
            values -= price * costs
            rewards = [
                replace(r, terms=(*r.summands, (-price, float(cost))))
                for r, cost in zip(rewards, costs, strict=True)
            ]
        mask = learnable(rolled.trajectory, algorithm, rolled.unanswered, values)
        if algorithm.forks_teach and rolled.parents is not None:
            assert rolled.openings is not None
            better = values > np.where(rolled.trunks, np.inf, values[rolled.parents])
            mask |= rolled.openings & (better & mask.any(-1))[:, None]
        teaches = np.asarray(mask.any(-1))
        if not teaches_otherwise(rewards, algorithm):
            teaches[teaches] = has_signal(values[teaches], groups[teaches])
        return Rewarded(rolled, rewards, values, mask, teaches, searches_worth(rolled, values))

    def take(self, rows: Int[np.ndarray, " M"]) -> "Rewarded":
        """Only these rows."""
        return Rewarded(
            self.rolled.take(rows),
            [self.rewards[i] for i in rows.tolist()],
            self.values[rows],
            self.mask[rows],
            self.teaches[rows],
            self.worth[rows],
        )

    @property
    def trunks(self) -> "Rewarded":
        """The trajectories without their forks."""
        if self.rolled.parents is None:
            return self
        return self.take(np.flatnonzero(self.rolled.trunks))

    @property
    def groups(self) -> Int[np.ndarray, " N"]:
        return self.rolled.trajectory.groups

    @property
    def fresh(self) -> Bool[np.ndarray, "N W"]:
        """The tokens to learn from that this step's parameters sampled."""
        ages, sampled = self.rolled.ages, self.mask & self.rolled.trajectory.loss_mask
        return sampled if ages is None else sampled & (ages == 0)

    @property
    def documents(self) -> Bool[np.ndarray, "N W"]:
        """What the system wrote after the prompts of trajectories to learn from."""
        t, at = self.rolled.trajectory, np.arange(self.mask.shape[1])
        after = (at >= t.prompt_lengths[:, None]) & (at < t.lengths[:, None])
        return after & ~t.loss_mask & ~self.mask & self.mask.any(-1, keepdims=True)

    @property
    def terms(self) -> Terms:
        """The terms of the rewards; a reward that has fewer than others gets terms of weight 0."""
        summands = [reward.summands for reward in self.rewards]
        shape = len(summands), max(map(len, summands), default=0)
        terms = Terms(np.zeros(shape), np.zeros(shape))
        for row, pairs in enumerate(summands):
            for column, (weight, value) in enumerate(pairs):
                terms.weights[row, column], terms.values[row, column] = weight, value
        return terms

    def first_groups(self, count: int) -> "Rewarded":
        """The first `count` groups that teach, in order.

        Where there are fewer, groups that teach nothing fill up the batch, which keeps its shape.
        """
        teaching = set(self.groups[self.teaches].tolist())
        names = sorted(np.unique(self.groups).tolist(), key=lambda g: (g not in teaching, g))
        return self.take(np.flatnonzero(np.isin(self.groups, names[:count])))


class Collector:
    """Rolls out and rewards the batches of a run."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        environment: Environment,
        rewards: Mapping[str, BatchReward],
    ):
        """`rewards` has the reward of each stage, `stage1` and `stage2`."""
        self.config, self.engine, self.environment = config, engine, environment
        self.rewards = rewards
        self.carried = PartialRollouts(config, engine, environment)

    def collect(self, params: Params, step: int, stage: str, settings: StageConfig) -> Rewarded:
        """The batch of a step (from 0).

        With dynamic sampling, batches are added until enough groups teach.

        Raises SearchFailure, RewardError or RewardServerError.
        """
        if self.config.rollout.partial_rollouts:
            rolled = self.carried.roll(params, step, settings.questions_per_step)
            return self._noted(
                Rewarded.of(rolled, self.reward(rolled, stage), self.config.algorithm)
            )
        c, batches, rewards = self.config, [], []
        for draw in range(1 + c.algorithm.dynamic_sampling):
            batch = self.environment.batch(step, settings.questions_per_step, draw)
            rolled = self.engine.run(
                params,
                batch.questions,
                samples=c.algorithm.samples_per_question,
                seed=c.seed,
                step=step,
                draw=draw,
                retriever=batch.retriever,
            )
            rewards += self.reward(rolled, stage)
            batches.append(rolled)
            rewarded = Rewarded.of(merge(batches), rewards, c.algorithm)
            if len(np.unique(rewarded.groups[rewarded.teaches])) >= settings.questions_per_step:
                break
        return self._noted(rewarded)

    def _noted(self, rewarded: Rewarded) -> Rewarded:
        trunks = rewarded.trunks
        values = np.array([reward.value for reward in trunks.rewards])
        self.environment.note(trunks.rolled.questions, values)
        return rewarded

    def state(self) -> tuple[dict[str, Any], str | None]:
        """The state for a checkpoint: the environment's cursor and the in-flight trajectories."""
        return self.environment.state(), self.carried.state()

    def restore(self, cursor: dict[str, Any], carried: str | None) -> None:
        """Restores what `state` returned. Raises BadInput where it is damaged."""
        self.environment.restore(cursor)
        self.carried.restore(carried)

    def reward(self, rolled: Rolled, stage: str) -> list[Reward]:
        """The rewards of a batch, computed by the main process: a user's function may be random or
        read a clock or a file, and all processes must learn from the same rewards."""
        reward, prompts = self.rewards[stage], [q.question for q in rolled.questions]
        if not getattr(reward, "reads_questions", False):
            prompts = list(map(self.engine.render, prompts))
        golds = [q.answers for q in rolled.questions]
        return on_main(lambda: list(reward(prompts, rolled.solutions, golds)))


def teaches_otherwise(rewards: Sequence[Reward], algorithm: AlgorithmConfig) -> bool:
    """Whether groups of equal rewards teach too: by rewards of turns, by terms that may differ
    where their sums are equal, or by another stream of the loss."""
    a = algorithm
    turns = a.credit != "outcome" or any(reward.turns for reward in rewards)
    terms = a.estimator == "gdpo" and any(len(reward.summands) > 1 for reward in rewards)
    return turns or terms or bool(a.teacher or a.echo_coefficient)


def search_costs(
    rewards: Float[np.ndarray, " N"],
    searches: Int[np.ndarray, " N"],
    groups: Int[np.ndarray, " N"],
    trunks: Bool[np.ndarray, " N"],
) -> Float[np.ndarray, " N"]:
    """What the searches of each trajectory cost, from 0 to 1: their share of the group's most
    searches, times the group's mean reward (at least 0, at most 1).

    Forks, which are not among the `trunks`, change neither the most nor the mean. Where a question
    is seldom answered, searches cost little (after prime-rl's linear penalty).
    """
    costs = np.zeros(len(rewards), np.float32)
    for group in np.unique(groups):
        rows = (groups == group) & ~np.isnan(rewards)
        own = rows & trunks
        if own.any() and (most := searches[own].max()):
            costs[rows] = np.clip(rewards[own].mean(), 0, 1) * searches[rows] / most
    return costs


def searches_worth(rolled: Rolled, values: Float[np.ndarray, " N"]) -> Float[np.ndarray, "N K"]:
    """What the search that ended turn k was worth, by the rewards of the trajectory and of its
    forks at that search (see rewards/rules.py).

    NaN where there is no fork, where it wrote nothing (its reply had no room, or the query was
    faulty), and where it or the trajectory ended without a fault of the policy: a search failed, or
    the judge gave no verdict.
    """
    t = rolled.trajectory
    worth = np.full((len(values), turn_numbers(t.loss_mask).max(initial=-1) + 1), np.nan)
    known = ~np.isnan(values) & ~np.isin(t.finish, _NOT_ITS_FAULT) & t.loss_mask.any(-1)
    forks: dict[tuple[int, int], list[tuple[float, bool]]] = {}
    for row in np.flatnonzero(known & ~rolled.trunks):
        assert rolled.parents is not None and rolled.with_search is not None
        if (parent := int(rolled.parents[row])) >= 0 and known[parent]:
            at = parent, int(rolled.forked_turns[row])
            forks.setdefault(at, []).append((float(values[row]), bool(rolled.with_search[row])))
    for at, own in forks.items():
        worth[at] = search_worth(float(values[at[0]]), own)
    return worth


def learnable(
    t: Trajectory[np.ndarray],
    algorithm: AlgorithmConfig,
    unanswered: Bool[np.ndarray, " N"],
    rewards: Float[np.ndarray, " N"],
) -> Bool[np.ndarray, "N W"]:
    """The mask of tokens to learn from: sampled tokens, except in the trajectories left out.

    Left out are trajectories that a failed search ended or that got no reward (NaN: no verdict of
    the judge), because the policy caused neither. `algorithm` may also leave out `unanswered`
    trajectories and those cut off. Forks are left out unless `algorithm.forks_teach`; a fork's own
    tokens come after those of its parent.
    """
    ends = [*_NOT_ITS_FAULT, *CUT_OFF * algorithm.mask_truncated]
    out = np.isin(t.finish, ends) | (unanswered & algorithm.mask_unanswered) | np.isnan(rewards)
    out |= (t.forked > 0) & (not algorithm.forks_teach)
    return t.loss_mask & ~out[:, None]
