"""Evaluating a policy on held-out questions, with the rollout engine that training uses."""

from dataclasses import dataclass

import numpy as np

from r1s_jax.data.environment import Batch
from r1s_jax.models.params import Params
from r1s_jax.rewards.answer_scores import score_answer
from r1s_jax.rollout.engine import Engine, Rolled


@dataclass(frozen=True)
class Evaluation:
    """Mean scores of one greedy pass over questions, shares in [0, 1]."""

    f1: float
    cover_em: float
    f1_one_hop: float | None  # None: no question is known to be of that kind
    f1_two_hop: float | None
    searches: float  # a question
    rolled: Rolled

    def scores(self) -> dict[str, float]:
        """What is compared before and after learning."""
        return {"f1": self.f1, "cover_em": self.cover_em, "searches": self.searches}


def evaluate(engine: Engine, params: Params, batch: Batch) -> Evaluation:
    """Answers every question once; `engine` should sample at temperature 0."""
    rolled = engine.run(
        params, batch.questions, samples=1, seed=0, step=0, retriever=batch.retriever
    )
    scores = [
        score_answer(solution.answer, question.answers)
        for solution, question in zip(rolled.solutions, rolled.questions, strict=True)
    ]
    f1 = np.array([score.f1 for score in scores])
    hops = np.array([question.hops for question in rolled.questions])
    return Evaluation(
        f1=float(f1.mean()),
        cover_em=float(np.mean([score.cover_exact_match for score in scores])),
        f1_one_hop=_mean(f1[hops == 1]),
        f1_two_hop=_mean(f1[hops == 2]),
        searches=float(rolled.trajectory.searches.mean()),
        rolled=rolled,
    )


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None
