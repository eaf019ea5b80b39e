"""A step's batch: rolled out, rewarded, and of it the trajectories that teach something."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from r1s_jax.config import AlgorithmConfig, Config, StageConfig
from r1s_jax.data.environment import Environment
from r1s_jax.learning.advantages import has_signal
from r1s_jax.learning.carry_over import CarryOver
from r1s_jax.models.params import Params
from r1s_jax.rewards.registry import BatchReward
from r1s_jax.rewards.rules import Reward
from r1s_jax.rollout.engine import Engine, Rolled, merge
from r1s_jax.rollout.trajectory import Finish, Trajectory


class Collector:
    """Rolls out and rewards the batches of a run; rewards are resolved once, by stage."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        environment: Environment,
        rewards: Mapping[str, BatchReward],
    ):
        """`rewards` by the name of the stage, `stage1` or `stage2`."""
        self.config, self.engine, self.environment = config, engine, environment
        self.rewards = rewards
        self.carried = CarryOver(config, engine, environment)

    def collect(
        self, params: Params, step: int, stage: str, settings: StageConfig
    ) -> tuple[Rolled, list[Reward]]:
        """The batch of a step (from 0); more than one where groups without signal abound.

        Raises SearchFailure, RewardError or RewardServerError.
        """
        if self.config.rollout.carry_over:
            rolled = self.carried.roll(params, step, settings.questions_per_step)
            return rolled, self._reward(rolled, stage)
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
            rewards += self._reward(rolled, stage)
            batches.append(rolled)
            whole, values = merge(batches), np.array([r.value for r in rewards])
            groups = whole.trajectory.groups
            if len(np.unique(groups[has_signal(values, groups)])) >= settings.questions_per_step:
                break
        return whole, rewards

    def teaching_rows(
        self, rolled: Rolled, rewards: Float[np.ndarray, " N"], groups: int
    ) -> np.ndarray:
        """The rows to learn from; see rows_with_signal."""
        t = rolled.trajectory
        mask = learnable(t, self.config.algorithm, rolled.void, rewards)
        return rows_with_signal(mask, t.groups, rewards, groups)

    def state(self) -> tuple[dict[str, Any], str | None]:
        """What a checkpoint keeps: the environment's cursor, and what is in flight."""
        return self.environment.state(), self.carried.state()

    def restore(self, cursor: dict[str, Any], carried: str | None) -> None:
        """Goes on from there. Raises BadInput where it is damaged."""
        self.environment.restore(cursor)
        self.carried.restore(carried)

    def _reward(self, rolled: Rolled, stage: str) -> list[Reward]:
        reward, asked = self.rewards[stage], [q.question for q in rolled.questions]
        if not getattr(reward, "reads_questions", False):
            asked = list(map(self.engine.render, asked))
        golds = [q.answers for q in rolled.questions]
        return list(reward(asked, rolled.solutions, golds))


# Ends for want of tokens, searches or time: what would have come is not known.
_TRUNCATED = (Finish.LENGTH, Finish.SEARCH_LIMIT, Finish.TOO_OLD)


def learnable(
    t: Trajectory,
    algorithm: AlgorithmConfig,
    void: Bool[np.ndarray, " N"],
    rewards: Float[np.ndarray, " N"],
) -> Bool[np.ndarray, "N W"]:
    """The tokens to learn from: sampled, and not in a trajectory that a failed search ended, or
    which no judge would judge (a reward that is not a number).

    Neither is the policy's doing. `void` trajectories and those cut off are left
    out too, where the algorithm says so.
    """
    ends = [Finish.SEARCH_ERROR, Finish.ABORTED, *_TRUNCATED * algorithm.mask_truncated]
    out = np.isin(t.finish, ends) | (void & algorithm.mask_void) | np.isnan(rewards)
    return t.loss_mask & ~out[:, None]


def rows_with_signal(
    mask: Bool[np.ndarray, "N W"],
    groups_of: Int[np.ndarray, " N"],
    rewards: Float[np.ndarray, " N"],
    groups_wanted: int,
) -> np.ndarray:
    """Rows of the first `groups_wanted` groups whose rewards differ, in order.

    Where there are too few, groups that are all alike make up the number: they teach nothing, and
    the batch keeps its shape. Rows of which the `mask` (see learnable) has nothing have no say.
    """
    valid = mask.any(-1)
    with_signal = set(groups_of[valid][has_signal(rewards[valid], groups_of[valid])].tolist())
    groups = sorted(np.unique(groups_of).tolist(), key=lambda g: (g not in with_signal, g))
    return np.flatnonzero(np.isin(groups_of, groups[:groups_wanted]))
