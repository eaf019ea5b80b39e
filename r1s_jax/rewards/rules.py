"""Reward rules: pure functions of text.

`stage1` and `stage2` follow R1-Searcher's paper (arXiv 2503.05592), except that the format is
judged only by what the policy wrote: a retrieved passage that happens to quote a tag must not cost
the policy anything. `released_rewards.py` holds the released servers' rules, to the letter.
"""

import importlib
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from r1s_jax.border.errors import UserError
from r1s_jax.protocol import r1_searcher as protocol
from r1s_jax.rewards.answer_scores import cover_exact_match, exact_match, f1_score

_CJK = re.compile("[\u4e00-\u9fff]")
# What the system answers a query with; inside, a passage may quote any tag but the closing one.
_BLOCK = re.compile(
    f"(?<={re.escape(protocol.END_QUERY)})"
    rf"\s*{re.escape(protocol.BEGIN_DOCUMENTS)}.*?{re.escape(protocol.END_DOCUMENTS)}(?:\n\n|$)",
    re.DOTALL,
)


class RewardError(UserError, ValueError):
    """A reward that does not exist, cannot be loaded, or gives something else than a number."""


SEARCH_BONUS = 0.5
FORMAT_PENALTY = -2.0


@dataclass(frozen=True)
class Solution:
    """What came after the prompt, in order: (text, whether the policy wrote it)."""

    spans: tuple[tuple[str, bool], ...]

    @staticmethod
    def of_text(text: str) -> "Solution":
        """Reads off a bare text who wrote what: a document block after a query is the system's."""
        spans, end = [], 0
        for block in _BLOCK.finditer(text):
            spans += [(text[end : block.start()], True), (block[0], False)]
            end = block.end()
        return Solution((*spans, (text[end:], True)))

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.spans)

    @property
    def written(self) -> str:
        return "".join(text for text, by_policy in self.spans if by_policy)


@dataclass(frozen=True)
class Reward:
    """`value` is what the policy is trained on; `parts` are for the logs and sum to nothing."""

    value: float
    parts: dict[str, float]


def searches_answered(solution: Solution) -> int:
    """Document blocks the system inserted in answer to the policy's own queries.

    A block counts once however many tags its passages quote, and a first search forced by the
    system, which brings its own query tags ahead of its documents, does not count.
    """
    answered = 0
    for by_policy, run in groupby(solution.spans, key=lambda span: span[1]):
        head, found, _ = "".join(text for text, _ in run).partition(protocol.BEGIN_DOCUMENTS)
        answered += not by_policy and bool(found) and protocol.BEGIN_QUERY not in head
    return answered


def format_holds(solution: Solution) -> bool:
    """Whether the policy thought once, answered once after it, and queried in whole pairs."""
    written, count = solution.written, solution.written.count
    reasoning, _, closing = written.partition(protocol.END_THINK)
    answer = protocol.extract_answer(closing)
    return (
        answer is not None
        and count(protocol.END_THINK) == 1
        and count(protocol.BEGIN_THINK) == 0  # the prompt ends with it
        and count(protocol.BEGIN_ANSWER) == count(protocol.END_ANSWER) == 1
        and protocol.BEGIN_ANSWER not in reasoning
        and count(protocol.BEGIN_QUERY) == count(protocol.END_QUERY) == searches_answered(solution)
        and count(protocol.BEGIN_DOCUMENTS) == count(protocol.END_DOCUMENTS) == 0
        and protocol.BEGIN_QUERY not in answer
        and protocol.END_QUERY not in answer
        and not has_cjk(written)
    )


def has_cjk(text: str) -> bool:
    """Whether a Chinese character (U+4E00 to U+9FFF) occurs."""
    return bool(_CJK.search(text))


def reward_parts(solution: Solution, golds: str | Sequence[str]) -> dict[str, float]:
    """What every stage reports, paid for or not. No answer scores as an empty one."""
    answer = protocol.extract_answer(solution.written) or ""
    return {
        "format": float(format_holds(solution)),
        "searched": float(searches_answered(solution) > 0),
        "answer_f1": f1_score(answer, golds)[0],
        "exact_match": float(exact_match(answer, golds)),
        "cover_exact_match": float(cover_exact_match(answer, golds)),
    }


def stage1(solution: Solution, golds: str | Sequence[str]) -> Reward:
    """Teaches to search: a bonus for a search in the right format, nothing for the answer."""
    parts = reward_parts(solution, golds)
    return Reward(SEARCH_BONUS * parts["format"] * parts["searched"], parts | {"penalty": 0.0})


def stage2(solution: Solution, golds: str | Sequence[str]) -> Reward:
    """Teaches to answer: the answer's F1, less a penalty when the format fails."""
    parts = reward_parts(solution, golds)
    penalty = 0.0 if parts["format"] else FORMAT_PENALTY
    return Reward(parts["answer_f1"] + penalty, parts | {"penalty": penalty})


def _answer_rule(value: str) -> "RewardRule":
    """A rule that pays for one of the parts and nothing else."""

    def rule(solution: Solution, golds: str | Sequence[str]) -> Reward:
        parts = reward_parts(solution, golds)
        return Reward(parts[value], parts)

    return rule


RewardRule = Callable[[Solution, str | Sequence[str]], Reward]
exact_match_only = _answer_rule("exact_match")
cover_exact_match_only = _answer_rule("cover_exact_match")
f1_only = _answer_rule("answer_f1")

_RULES = {
    "stage1": f"{__name__}:stage1",
    "stage2": f"{__name__}:stage2",
    "exact_match": f"{__name__}:exact_match_only",
    "cover_exact_match": f"{__name__}:cover_exact_match_only",
    "f1": f"{__name__}:f1_only",
    "qwen_zero": "r1s_jax.rewards.released:qwen_zero",
    "llama_stage1": "r1s_jax.rewards.released:llama_stage1",
    "llama_stage2": "r1s_jax.rewards.released:llama_stage2",
}


# Rewards that say nothing of whether the answer is right.
FORMAT_REWARDS = ("stage1",)

# (rendered prompts, solutions, right answers of each) -> rewards
BatchReward = Callable[[Sequence[str], Sequence[Solution], Sequence[Sequence[str]]], list[Reward]]


def batch_reward(name: str) -> BatchReward:
    """What rewards a whole batch: a rule of that name (see reward_rule), or a server's URL."""
    if name.startswith(("http://", "https://")):
        from r1s_jax.rewards.http import HttpReward

        return HttpReward(name)
    rule = reward_rule(name)
    return lambda prompts, solutions, golds: [
        rule(solution, gold) for solution, gold in zip(solutions, golds, strict=True)
    ]


def reward_rule(name: str) -> RewardRule:
    """The rule of that name, or a function of the user's own as `module:function`.

    A user's function takes (solution, golds) and returns a Reward or a number; the usual parts
    (format, searched, answer_f1, ...) stand beside its own. Raises ValueError
    for a name that is neither, and, when called, where the rule raises or gives no finite number.
    """
    if name.startswith(("http://", "https://")):
        raise RewardError(f"{name}: a reward server is for recipes (stage2.reward={name})")
    module, colon, function = _RULES.get(name, name).partition(":")
    if not colon:
        raise RewardError(
            f"no reward {name!r}: take one of {', '.join(_RULES)}, or module:function"
        )
    if name not in _RULES and "" not in sys.path:
        sys.path.insert(0, "")  # a user's module lies where the command was typed
    try:
        rule = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the user's module does while it is imported
        raise RewardError(
            f"reward {name!r} cannot be loaded: {type(error).__name__}: {error}"
        ) from error

    def checked(solution: Solution, golds: str | Sequence[str]) -> Reward:
        try:
            reward = rule(solution, golds)
            reward = reward if isinstance(reward, Reward) else Reward(float(reward), {})
            parts = {part: float(value) for part, value in reward.parts.items()}
            reward = Reward(float(reward.value), reward_parts(solution, golds) | parts)
        except Exception as error:
            raise RewardError(
                f"reward {name!r} failed on {solution.text[:80]!r}: {type(error).__name__}: {error}"
            ) from error
        if not math.isfinite(reward.value):
            raise RewardError(f"reward {name!r} gave {reward.value} for {solution.text[:80]!r}")
        return reward

    return checked
