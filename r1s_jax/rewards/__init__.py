"""Rewards of solutions. This is the public interface: a reward of your own imports from here."""

from r1s_jax.protocol import r1_searcher as protocol
from r1s_jax.protocol.solution import Solution
from r1s_jax.rewards.answer_scores import cover_exact_match, exact_match, f1_score
from r1s_jax.rewards.registry import FORMAT_REWARDS, BatchReward, batch_reward, reward_rule
from r1s_jax.rewards.rules import (
    FORMAT_PENALTY,
    SEARCH_BONUS,
    Reward,
    RewardRule,
    cover_exact_match_only,
    exact_match_only,
    f1_only,
    format_holds,
    has_cjk,
    reward_parts,
    searches_answered,
    stage1,
    stage2,
)

__all__ = [
    "FORMAT_PENALTY",
    "FORMAT_REWARDS",
    "SEARCH_BONUS",
    "BatchReward",
    "Reward",
    "RewardRule",
    "Solution",
    "batch_reward",
    "cover_exact_match",
    "cover_exact_match_only",
    "exact_match",
    "exact_match_only",
    "f1_only",
    "f1_score",
    "format_holds",
    "has_cjk",
    "protocol",
    "reward_parts",
    "reward_rule",
    "searches_answered",
    "stage1",
    "stage2",
]
