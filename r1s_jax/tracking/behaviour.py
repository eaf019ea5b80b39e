"""Metrics of the policy's behaviour in a step: how it answers, thinks and searches."""

import re
from collections.abc import Sequence

import numpy as np

from r1s_jax.protocol.solution import Solution
from r1s_jax.rewards.rules import Reward
from r1s_jax.rollout.engine import Rolled
from r1s_jax.rollout.trajectory import CUT_OFF

_CORRECT = 0.8  # an answer of at least this F1 counts as right
_WORD = re.compile(r"\w+")


def behaviour_metrics(rolled: Rolled, rewards: Sequence[Reward]) -> dict[str, float]:
    """Shares and means over the trajectories of a rollout batch.

    `answered`, `truncated`, `unanswered` (not cut off, and without an answer): shares of
    trajectories. `repeated_query_share`: share of searches whose query the trajectory had made
    before. `thought_words`: words of reasoning a turn, without queries and answers.
    `correct_logprob`: mean log-probability of the tokens of trajectories with right answers, under
    the policy that sampled them; left out where no answer is right.
    """
    t = rolled.trajectory
    queries = [[s.query for s in searches if s.query] for searches in rolled.searches]
    total = sum(map(len, queries))
    repeated = total - sum(len(set(mine)) for mine in queries)
    right = np.array([r.parts.get("answer_f1", 0.0) >= _CORRECT for r in rewards])
    correct = t.loss_mask & right[:, None]
    logprobs = t.policy_logprobs[correct]
    return {
        "answered": float(np.mean([s.answer is not None for s in rolled.solutions])),
        "truncated": float(np.isin(t.finish, CUT_OFF).mean()),
        "unanswered": float(rolled.unanswered.mean()),
        "repeated_query_share": repeated / max(total, 1),
        "thought_words": float(np.mean(list(map(_thought_words, rolled.solutions)))),
        **({"correct_logprob": float(logprobs.mean())} if len(logprobs) else {}),
    }


def _thought_words(solution: Solution) -> float:
    """Words of reasoning a turn."""
    texts = [text for kind, text in solution.pieces() if kind == "policy"]
    for tag in solution.dialect.tags:
        texts = [text.replace(tag, " ") for text in texts]
    turns = sum(by_policy for _, by_policy in solution.spans)
    return sum(len(_WORD.findall(text)) for text in texts) / max(turns, 1)
