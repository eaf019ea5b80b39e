"""The rewards of Search-R1's released code (commit a14dc3a), reproduced exactly.

That code scores the prompt together with the response, and the prompt holds two pairs of answer
tags and one pair of information tags; so a response without an answer is scored as the prompt's
example answer. Use these to repeat a published run; `em`, `f1` and `cover_em` are ours.
"""

import re
from collections.abc import Sequence

from r1s_jax.protocol.solution import Solution
from r1s_jax.rewards.answer_scores import squad_normalize_answer
from r1s_jax.rewards.rules import Reward

STRUCTURE, FINAL, RETRIEVAL = 0.2, 0.1, 0.1
# The texts between the tags of the prompt.
_PROMPT_ANSWER, _PROMPT_INFORMATION = "Beijing", " and "
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_INFORMATION = re.compile(r"<information>(.*?)</information>", re.DOTALL)
_TAGS = ("think", "search", "information", "answer")
_PARTS = re.compile(rf"(</?(?:{'|'.join(_TAGS)})>)")
# state -> tag -> next state; only the states of _INSIDE allow text other than white space.
_NEXT = {
    "start": {"<think>": "in_think"},
    "in_think": {"</think>": "thought"},
    "thought": {"<search>": "in_search", "<answer>": "in_answer"},
    "in_search": {"</search>": "searched"},
    "searched": {"<information>": "in_information"},
    "in_information": {"</information>": "start"},
    "in_answer": {"</answer>": "end"},
    "end": {},
}
_INSIDE = ("in_think", "in_search", "in_information", "in_answer")


def follows_structure(text: str) -> bool:
    """Whether a response is thoughts, searches with information, and an answer, in order."""
    if any(text.count(f"<{tag}>") != text.count(f"</{tag}>") for tag in _TAGS):
        return False
    state = "start"
    for part in _PARTS.split(text):
        if _PARTS.fullmatch(part):
            if part not in _NEXT[state]:
                return False
            state = _NEXT[state][part]
        elif part.strip() and state not in _INSIDE:
            return False
    return state == "end"


def search_r1_em(solution: Solution, golds: str | Sequence[str]) -> Reward:
    """1 where the answer equals a gold one, both normalised as SQuAD does."""
    return _reward(float(_exact(_answer(solution), golds)), solution, golds)


def search_r1_subem(solution: Solution, golds: str | Sequence[str]) -> Reward:
    """1 where a gold answer is part of the answer, both normalised as SQuAD does."""
    return _reward(float(_covers(_answer(solution), golds)), solution, golds)


def search_r1_format(solution: Solution, golds: str | Sequence[str]) -> Reward:
    """1 for an exact match (0.8 without the structure), else 0.2 (0.1 without the structure)."""
    return _with_format(solution, golds, retrieval=0.0)


def search_r1_format_retrieval(solution: Solution, golds: str | Sequence[str]) -> Reward:
    """As search_r1_format; without a match, a retrieved gold answer adds 0.1.

    It adds nothing without the structure.
    """
    return _with_format(solution, golds, retrieval=RETRIEVAL)


def _with_format(solution: Solution, golds: str | Sequence[str], retrieval: float) -> Reward:
    exact, valid = _exact(_answer(solution), golds), follows_structure(solution.text)
    if exact:
        return _reward(1.0 if valid else 1.0 - STRUCTURE, solution, golds)
    documents = [*_INFORMATION.findall(solution.text), _PROMPT_INFORMATION]
    retrieved = valid and any(_covers(text, golds) for text in documents)
    value = STRUCTURE + (retrieval if retrieved else 0.0) if valid else FINAL
    return _reward(value, solution, golds)


def _answer(solution: Solution) -> str:
    answers = _ANSWER.findall(solution.text)
    return answers[-1].strip() if answers else _PROMPT_ANSWER


def _exact(answer: str, golds: str | Sequence[str]) -> bool:
    return squad_normalize_answer(answer) in map(squad_normalize_answer, _as_list(golds))


def _covers(text: str, golds: str | Sequence[str]) -> bool:
    return any(
        squad_normalize_answer(gold) in squad_normalize_answer(text) for gold in _as_list(golds)
    )


def _as_list(golds: str | Sequence[str]) -> Sequence[str]:
    return [golds] if isinstance(golds, str) else golds


def _reward(value: float, solution: Solution, golds: str | Sequence[str]) -> Reward:
    text = solution.text
    parts = {
        "format": float(follows_structure(text)),
        "searched": float("<information>" in text),
        "exact_match": float(_exact(_answer(solution), golds)),
    }
    return Reward(value, parts)
