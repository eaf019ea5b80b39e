"""Counts of the behaviour of a policy on trajectories written by hand."""

import numpy as np
import pytest

from r1s_jax.data.questions import Question
from r1s_jax.protocol.r1_searcher import R1Searcher
from r1s_jax.protocol.solution import Solution
from r1s_jax.rewards.registry import reward_rule
from r1s_jax.rollout.broker import Search
from r1s_jax.rollout.engine import Rolled
from r1s_jax.rollout.trajectory import Finish, Trajectory
from r1s_jax.tracking.behaviour import behaviour_metrics

R1 = R1Searcher()
ASKS = " I look it up <|begin_of_query|> a b <|end_of_query|>"
TEXTS = [
    ((ASKS, True), (R1.reply([["t   x"]]), False), (" so </think> <answer> yes </answer>", True)),
    (
        (ASKS, True),
        (R1.reply([[]]), False),
        (ASKS, True),
        (R1.reply([[]]), False),
        (" no </think> <answer> no </answer>", True),
    ),
    ((" one two three", True),),
    ((" end", True),),
]
FINISHES = [Finish.FINISHED, Finish.FINISHED, Finish.LENGTH, Finish.FINISHED]
SEARCHES = [["a b"], ["a b", "a b"], [], []]


def rolled(right: bool) -> Rolled:
    n, width = len(TEXTS), 4
    logprobs = np.arange(n * width, dtype=np.float32).reshape(n, width) * -0.1
    zeros = np.zeros(n, np.int32)
    trajectory = Trajectory(
        tokens=np.zeros((n, width), np.int32),
        loss_mask=np.tile([False, True, True, False], (n, 1)),
        sample_logprobs=logprobs,
        policy_logprobs=logprobs,
        kept=np.zeros((n, width, 0), np.int32),
        log_kept=np.zeros((n, width), np.float32),
        lengths=zeros + width,
        prompt_lengths=zeros,
        groups=zeros,
        searches=np.array([1, 2, 0, 0]),
        finish=np.array(FINISHES),
        forked=zeros,
    )
    golds = ("yes",) if right else ("other",)
    return Rolled(
        questions=tuple(Question(i, "?", golds) for i in range(n)),
        trajectory=trajectory,
        solutions=tuple(
            Solution(spans, R1, finish == Finish.FINISHED)
            for spans, finish in zip(TEXTS, FINISHES, strict=True)
        ),
        searches=tuple(tuple(Search(0, q, "found") for q in queries) for queries in SEARCHES),
        outcomes={},
        seconds=1.0,
        counters={},
    )


@pytest.mark.parametrize("right", [True, False])
def test_behaviour_is_counted(right):
    batch = rolled(right)
    rule = reward_rule("stage2")
    rewards = [rule(s, q.answers) for s, q in zip(batch.solutions, batch.questions, strict=True)]
    got = behaviour_metrics(batch, rewards)
    assert got["answered"] == 0.5 and got["truncated"] == 0.25 and got["unanswered"] == 0.25
    assert got["repeated_query_share"] == pytest.approx(1 / 3)
    # I look it up / so: 5 words in two turns; 4 + 4 + 1 in three; 3; 1.
    assert got["thought_words"] == pytest.approx((5 / 2 + 9 / 3 + 3 + 1) / 4)
    if right:
        assert got["correct_logprob"] == pytest.approx(-0.15)
    else:
        assert "correct_logprob" not in got
