"""What a policy does with its turns: how it answers, thinks and searches, in numbers of a step."""

import re
from collections.abc import Sequence

import numpy as np

from r1s_jax.protocol.solution import Solution
from r1s_jax.rewards.rules import Reward
from r1s_jax.rollout.engine import Rolled
from r1s_jax.rollout.trajectory import CUT_OFF

_CORRECT = 0.8  # F1 of an answer from which on it counts as right
_WORD = re.compile(r"\w+")


def behaviour_metrics(rolled: Rolled, rewards: Sequence[Reward]) -> dict[str, float]:
    """Shares and means over the trajectories of a rollout batch.

    `answered`, `truncated`, `unanswered` (ended by themselves without an answer): shares of them.
    `repeated_query_share`: of the searches, those whose query the trajectory had searched before.
    `thought_words`: words of reasoning a turn, queries and answers apart. `correct_logprob`: mean
    log-probability of the tokens of right answers, under the policy that drew them; not there
    where no answer is right.
    """
    t = rolled.trajectory
    queries = [[s.query for s in searches if s.query] for searches in rolled.searches]
    asked = sum(map(len, queries))
    repeated = asked - sum(len(set(mine)) for mine in queries)
    right = np.array([r.parts.get("answer_f1", 0.0) >= _CORRECT for r in rewards])
    correct = t.loss_mask & right[:, None]
    logprobs = t.policy_logprobs[correct]
    return {
        "answered": float(np.mean([s.answer is not None for s in rolled.solutions])),
        "truncated": float(np.isin(t.finish, CUT_OFF).mean()),
        "unanswered": float(rolled.unanswered.mean()),
        "repeated_query_share": repeated / max(asked, 1),
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
