"""Evaluating a policy on held-out questions, with the rollout engine that training uses."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float

from r1s_jax.data.environment import Batch
from r1s_jax.data.question_forms import Question
from r1s_jax.eval.audit import Finding
from r1s_jax.eval.explain import budget, cause
from r1s_jax.eval.score import interval
from r1s_jax.models.params import Params
from r1s_jax.rewards.answer_scores import score_answer
from r1s_jax.rollout.engine import Engine, Rolled


@dataclass(frozen=True)
class Evaluation:
    """Mean scores of one greedy pass over questions, shares in [0, 1]."""

    f1: float
    cover_em: float
    f1_one_hop: float | None  # None: no question is known to have one hop
    f1_two_hop: float | None
    searches: float  # per question
    # Shares of all questions: answered right after a search, and without one.
    solved_with_search: float
    solved_without_search: float
    rolled: Rolled
    sampled: dict[str, float] = field(default_factory=dict)  # see evaluate_samples
    by_need: dict[str, float] = field(default_factory=dict)  # see search_by_need
    lost: dict[str, float] = field(default_factory=dict)  # see losses

    def scores(self) -> dict[str, float]:
        """The scores that are compared before and after learning."""
        names = ("f1", "cover_em", "searches", "solved_with_search", "solved_without_search")
        return (
            {name: getattr(self, name) for name in names} | self.sampled | self.by_need | self.lost
        )


def evaluate_samples(
    engine: Engine, params: Params, batch: Batch, samples: int
) -> dict[str, float]:
    """F1 and exact match of `samples` sampled answers per question, with 95 % intervals.

    `avg_at_k_f1` is the mean F1 of all answers, `pass_at_k` the share of questions with at least
    one exact match; `_low` and `_high` of each are by bootstrap over the questions.
    """
    rolled = engine.run(
        params, batch.questions, samples=samples, seed=0, step=1, retriever=batch.retriever
    )
    scores = [
        score_answer(solution.answer, question.answers)
        for solution, question in zip(rolled.solutions, rolled.questions, strict=True)
    ]
    f1 = np.array([score.f1 for score in scores]).reshape(-1, samples).mean(-1)
    right = np.array([score.exact_match for score in scores]).reshape(-1, samples).any(-1)
    result = {}
    for name, values in {"avg_at_k_f1": f1, "pass_at_k": right.astype(float)}.items():
        low, high = interval(values)
        result |= {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}
    return result


def evaluate(
    engine: Engine,
    params: Params,
    batch: Batch,
    sampler: Engine | None = None,
    samples: int = 0,
    findings: Sequence[Finding] = (),
) -> Evaluation:
    """Answers every question once; `engine` should sample at temperature 0.

    With `samples`, `sampler` also answers each that many times, at its own temperature. `findings`,
    one for each question, say what the corpus has (see eval/audit.py).
    """
    rolled = engine.run(
        params, batch.questions, samples=1, seed=0, step=0, retriever=batch.retriever
    )
    scores = [
        score_answer(solution.answer, question.answers)
        for solution, question in zip(rolled.solutions, rolled.questions, strict=True)
    ]
    f1 = np.array([score.f1 for score in scores])
    right = np.array([score.exact_match for score in scores])
    searched = rolled.trajectory.searches > 0
    hops = np.array([question.hops for question in rolled.questions])
    return Evaluation(
        f1=float(f1.mean()),
        cover_em=float(np.mean([score.cover_exact_match for score in scores])),
        f1_one_hop=_mean(f1[hops == 1]),
        f1_two_hop=_mean(f1[hops == 2]),
        searches=float(rolled.trajectory.searches.mean()),
        solved_with_search=float((right & searched).mean()),
        solved_without_search=float((right & ~searched).mean()),
        rolled=rolled,
        sampled=evaluate_samples(sampler, params, batch, samples) if sampler and samples else {},
        by_need=search_by_need(rolled.questions, searched, f1),
        lost=losses(rolled, findings, f1, engine.config.documents_per_query) if findings else {},
    )


def losses(
    rolled: Rolled, findings: Sequence[Finding], f1: Float[np.ndarray, " N"], documents: int
) -> dict[str, float]:
    """The part of 1 - F1 that each cause has, as `lost_<cause>` (see eval/explain.py)."""
    causes = [
        cause(finding, solution.answer or "", solution.found, documents)
        for finding, solution in zip(findings, rolled.solutions, strict=True)
    ]
    shares = budget(f1, causes)
    return {f"lost_{name}": part["share"] for name, part in shares.items()}


def search_by_need(
    questions: Sequence[Question],
    searched: Bool[np.ndarray, " N"],
    f1: Float[np.ndarray, " N"],
) -> dict[str, float]:
    """Whether a policy searches when it must: the share of questions with a search, and F1.

    Both are given for questions whose facts the policy cannot know (`needed`) and for questions
    that it may have memorised (`memorised`). {} unless both kinds occur.
    """
    memorised = np.array([question.memorised for question in questions])
    if memorised.all() or not memorised.any():
        return {}
    kinds = {"needed": ~memorised, "memorised": memorised}
    rates = {f"searched_{kind}": float(searched[at].mean()) for kind, at in kinds.items()}
    return rates | {f"f1_{kind}": float(f1[at].mean()) for kind, at in kinds.items()}


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None
