"""Rewards by name: our rules, a function of the user's own, or a server."""

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from r1s_jax.io.errors import UserError
from r1s_jax.protocol.solution import Solution
from r1s_jax.rewards import released, released_search_r1, rules
from r1s_jax.rewards.composed import TERMS, composed, is_composed
from r1s_jax.rewards.http import HttpReward
from r1s_jax.rewards.rules import Reward, RewardRule, as_reward, reward_parts


class RewardError(UserError, ValueError):
    """A reward that does not exist, cannot be loaded, or returns anything but a number."""


RULES: dict[str, RewardRule] = {
    "stage1": rules.stage1,
    "stage2": rules.stage2,
    "exact_match": rules.exact_match_only,
    "cover_exact_match": rules.cover_exact_match_only,
    "em": rules.exact_match_only,
    "cover_em": rules.cover_exact_match_only,
    "f1": rules.f1_only,
    "qwen_zero": released.qwen_zero,
    "llama_stage1": released.llama_stage1,
    "llama_stage2": released.llama_stage2,
    "search_r1_em": released_search_r1.search_r1_em,
    "search_r1_subem": released_search_r1.search_r1_subem,
    "search_r1_format": released_search_r1.search_r1_format,
    "search_r1_format_retrieval": released_search_r1.search_r1_format_retrieval,
}

# Rewards that do not depend on whether the answer is right.
FORMAT_REWARDS = ("stage1",)

# (rendered prompts, solutions, right answers of each) -> rewards
BatchReward = Callable[[Sequence[str], Sequence[Solution], Sequence[Sequence[str]]], list[Reward]]


def batch_reward(name: str) -> BatchReward:
    """The reward of a whole batch; `name` is that of a rule (see reward_rule) or a server's URL."""
    if name.startswith(("http://", "https://")):
        return HttpReward(name)
    rule = reward_rule(name)
    return lambda prompts, solutions, golds: [
        rule(solution, gold) for solution, gold in zip(solutions, golds, strict=True)
    ]


def reward_rule(name: str) -> RewardRule:
    """The rule `name`: one of RULES, a user's function as `module:function`, or a sum of rules.

    A user's function takes (solution, golds) and returns a Reward or a number; the usual parts
    (format, searched, answer_f1, ...) are added to its own. Raises RewardError for any other name;
    the returned rule raises it if the reward fails or is not a finite number.
    """
    if name.startswith(("http://", "https://")):
        raise RewardError(f"{name}: a reward server is for recipes (stage2.reward={name})")
    rule = composed(name, _rule, RewardError) if is_composed(name) else _rule(name)

    def checked(solution: Solution, golds: str | Sequence[str]) -> Reward:
        try:
            reward = as_reward(rule(solution, golds))
            parts = {part: float(value) for part, value in reward.parts.items()}
            turns = tuple(float(value) for value in reward.turns)
            parts = reward_parts(solution, golds) | parts
            reward = replace(reward, value=float(reward.value), parts=parts, turns=turns)
        except Exception as error:
            raise RewardError(
                f"reward {name!r} failed on {solution.text[:80]!r}: {type(error).__name__}: {error}"
            ) from error
        wrong = [x for x in (reward.value, *reward.turns) if not math.isfinite(x)]
        if wrong:
            raise RewardError(f"reward {name!r} gave {wrong[0]} for {solution.text[:80]!r}")
        if reward.turns and len(reward.turns) != solution.turns_answered:
            raise RewardError(
                f"reward {name!r} gave {len(reward.turns)} turn rewards for "
                f"{solution.turns_answered} answered turns: {solution.text[:80]!r}"
            )
        return reward

    return checked


def _rule(name: str) -> RewardRule:
    return RULES.get(name) or _load(name)


def _load(name: str) -> RewardRule:
    """A user's function."""
    module, colon, function = name.partition(":")
    if not colon:
        names = ", ".join((*RULES, *TERMS))
        raise RewardError(f"no reward {name!r}: take one of {names}, a sum, or module:function")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a user's module lies in the working directory
    try:
        return getattr(importlib.import_module(module), function)
    except Exception as error:  # a user's module may raise anything
        raise RewardError(
            f"reward {name!r} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
