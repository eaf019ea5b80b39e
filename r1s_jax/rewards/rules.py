"""Reward rules: pure functions of text.

`stage1` and `stage2` follow R1-Searcher's paper (arXiv 2503.05592), except that the format is
judged only by the policy's text, so that a tag quoted in a retrieved passage costs nothing.
`released.py` holds the rules of the released servers.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import nan
from statistics import fmean as mean

from r1s_jax.protocol.r1_searcher import has_cjk as has_cjk
from r1s_jax.protocol.solution import Solution
from r1s_jax.rewards.answer_scores import score_answer

SEARCH_BONUS = 0.5
FORMAT_PENALTY = -2.0


@dataclass(frozen=True)
class Reward:
    """`value` trains the policy; `parts` are for the logs and need not add up to it.

    `turns` are rewards of the turns that the system answered, in order, beside `value`; none means
    0 for each. `terms` are the (weight, value) of a sum's terms; none means one term, `value`.
    """

    value: float
    parts: dict[str, float]
    turns: tuple[float, ...] = ()
    terms: tuple[tuple[float, float], ...] = ()

    @property
    def summands(self) -> tuple[tuple[float, float], ...]:
        """`terms`, or the one term that `value` is."""
        return self.terms or ((1.0, self.value),)


def as_reward(value: "Reward | float") -> Reward:
    """What a rule returned, as a Reward."""
    return value if isinstance(value, Reward) else Reward(float(value), {})


def search_worth(reward: float, forks: Iterable[tuple[float, bool]]) -> float:
    """What a search of a trajectory with this reward was worth, by its forks (rollout/forks.py).

    The mean reward with the search, `reward` and those of forks that made it (true), minus the mean
    reward of forks without it. NaN if there is none.
    """
    rewards = {True: [reward], False: list[float]()}
    for value, made in forks:
        rewards[made].append(value)
    return mean(rewards[True]) - mean(rewards[False]) if rewards[False] else nan


def searches_answered(solution: Solution) -> int:
    """The policy's searches that the system answered (see Solution.searches_answered)."""
    return solution.searches_answered


def format_holds(solution: Solution) -> bool:
    """Whether the policy kept the format of its dialect."""
    return solution.well_formed


def reward_parts(solution: Solution, golds: str | Sequence[str]) -> dict[str, float]:
    """The parts that every stage reports, rewarded or not. No answer scores as an empty one."""
    score = score_answer(solution.answer, golds)
    return {
        "format": float(format_holds(solution)),
        "searched": float(searches_answered(solution) > 0),
        "answer_f1": score.f1,
        "exact_match": float(score.exact_match),
        "cover_exact_match": float(score.cover_exact_match),
    }


def stage1(solution: Solution, golds: str | Sequence[str]) -> Reward:
    """Teaches to search: a bonus for a search in the right format, nothing for the answer."""
    parts = reward_parts(solution, golds)
    return Reward(SEARCH_BONUS * parts["format"] * parts["searched"], parts | {"penalty": 0.0})


def stage2(solution: Solution, golds: str | Sequence[str]) -> Reward:
    """Teaches to answer: the answer's F1, less a penalty when the format fails."""
    parts = reward_parts(solution, golds)
    penalty = 0.0 if parts["format"] else FORMAT_PENALTY
    terms = ((1.0, parts["answer_f1"]), (1.0, penalty))
    return Reward(parts["answer_f1"] + penalty, parts | {"penalty": penalty}, terms=terms)


def _answer_rule(value: str) -> "RewardRule":
    """A rule whose value is one of the parts."""

    def rule(solution: Solution, golds: str | Sequence[str]) -> Reward:
        parts = reward_parts(solution, golds)
        return Reward(parts[value], parts)

    return rule


RewardRule = Callable[[Solution, str | Sequence[str]], Reward]
exact_match_only = _answer_rule("exact_match")
cover_exact_match_only = _answer_rule("cover_exact_match")
f1_only = _answer_rule("answer_f1")
