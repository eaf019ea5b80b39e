"""How likely the policy finds the gold answer at each turn: log p(gold answer | the text so far).

One packed pass of the learner, without gradients, over a continuation of every trajectory at every
turn: the text that would answer now, with the gold answer in it. All of them share the trajectory's
own text, which is computed once.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from r1s_jax.config import Credit
from r1s_jax.learning.advantages import TurnRewards
from r1s_jax.learning.learner import Learner
from r1s_jax.learning.packing import Sizes
from r1s_jax.models.params import Params
from r1s_jax.rollout.trajectory import Trajectory, turn_begins

# (answer, whether the turn is the first) -> tokens from the end of the text so far to the answer,
# and the answer's tokens
AnswerTokens = Callable[[str, bool], tuple[list[int], list[int]]]

# TIPS: the differences of a batch are scaled to this mean size, as in the authors' code.
_TIPS_SCALE = 0.11
_AT_ONCE = 512  # continuations of a pass: packing compares each with all others


class GoldLogprobs(NamedTuple):
    """Log-probabilities of the likeliest gold answer when turn k could begin, k = 0, 1, ...

    NaN where a trajectory has no such turn, its question no gold answer, or the text no room.
    """

    total: Float[np.ndarray, "N K"]
    mean: Float[np.ndarray, "N K"]  # by token of the answer


def with_credit(
    credit: Credit, turns: TurnRewards, scores: GoldLogprobs
) -> tuple[TurnRewards, dict[str, float]]:
    """Adds to the rewards of turns what each turn did for the gold answer; and metrics of it.

    `igpo`: by how much the turn's documents raised the answer's probability, exp of its mean
    log-probability (IGPO, arXiv 2510.14967, eq. 3-4). `tips`: the potential-based difference of its
    mean log-probability (TIPS, ICLR 2026); the last turn gives back what the others got. Both are
    nothing where a score is missing.
    """
    values = np.exp(scores.mean) if credit == "igpo" else scores.mean
    gains = np.diff(values, axis=1)
    known = ~np.isnan(gains)
    rewards, shaping = turns.rewards.copy(), turns.shaping.copy()
    width = gains.shape[1]
    at_start = np.exp(scores.mean[:, :1])
    metrics = {
        "gold_probability": _mean(at_start[~np.isnan(at_start)]),
        "gold_gain": _mean(gains[known]),
    }
    if credit == "igpo":
        own = rewards[:, :width]
        rewards[:, :width] = np.where(known, np.nan_to_num(own) + gains, own)
    elif known.any():
        gains = np.where(known, gains, 0.0)
        gains *= _TIPS_SCALE / max(np.abs(gains[known]).mean(), 1e-9)
        shaping[:, :width] = gains
        last = turns.turns.max(1)
        shaping[np.arange(len(last)), np.maximum(last, 0)] -= gains.sum(1)
    return turns._replace(rewards=rewards, shaping=shaping), metrics


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else 0.0


class _Continuation(NamedTuple):
    row: int
    turn: int
    tokens: np.ndarray
    answer: int  # number of last tokens that are the gold answer


def gold_logprobs(
    learner: Learner,
    params: Params,
    t: Trajectory[np.ndarray],
    golds: Sequence[Sequence[str]],
    answer_tokens: AnswerTokens,
    sizes: Sizes,
) -> GoldLogprobs:
    """Scores the gold answers of every trajectory at every turn under `params`.

    `golds` are the right answers to each trajectory's question; `sizes` are those of the update.
    """
    begins = [turn_begins(t, row) for row in range(len(t.lengths))]
    each = [
        c
        for row, (places, answers) in enumerate(zip(begins, golds, strict=True))
        for c in _continuations(t, row, places, answers, answer_tokens)
        if len(c.tokens) <= sizes.capacity
    ]
    shape = (len(begins), max(map(len, begins), default=0))
    out = GoldLogprobs(np.full(shape, np.nan), np.full(shape, np.nan))
    if not each:
        return out
    totals = [
        total
        for first in range(0, len(each), _AT_ONCE)
        for total in _score(learner, params, each[first : first + _AT_ONCE], sizes)
    ]
    for c, total in zip(each, totals, strict=True):
        at = c.row, c.turn
        if not total <= out.total[at]:  # the first, or a likelier one
            out.total[at], out.mean[at] = total, total / c.answer
    return out


def _continuations(
    t: Trajectory[np.ndarray],
    row: int,
    places: Sequence[int],
    answers: Sequence[str],
    answer_tokens: AnswerTokens,
) -> list[_Continuation]:
    out = []
    for turn, place in enumerate(places):
        for answer in answers:
            before, gold = answer_tokens(answer, turn == 0)
            tokens = np.concatenate([t.tokens[row, :place], before, gold]).astype(np.int32)
            if gold:
                out.append(_Continuation(row, turn, tokens, len(gold)))
    return out


def _score(
    learner: Learner,
    params: Params,
    each: Sequence[_Continuation],
    sizes: Sizes,
) -> Float[np.ndarray, " C"]:
    """The log-probability of each continuation's answer."""
    # A power of two, so that few numbers of continuations compile a program of their own.
    count = 1 << (len(each) - 1).bit_length()
    lengths = np.ones(count, np.int64)
    lengths[: len(each)] = [len(c.tokens) for c in each]
    tokens = np.zeros((count, lengths.max()), np.int32)
    wanted = np.zeros(tokens.shape, bool)
    for i, c in enumerate(each):
        tokens[i, : len(c.tokens)] = c.tokens
        wanted[i, len(c.tokens) - c.answer : len(c.tokens)] = True
    logprobs = learner.sequence_logprobs(params, tokens, lengths, wanted, sizes)
    return logprobs.sum(-1, dtype=np.float64)[: len(each)]
