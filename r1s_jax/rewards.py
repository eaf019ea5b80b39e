"""Reward rules: pure functions of text (SQuAD-style answer scores, then the two training stages).

The rules follow R1-Searcher (arXiv 2503.05592), except that the format is judged only by what the
policy wrote: a retrieved passage that happens to quote a tag must not cost the policy anything.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from r1s_jax import protocol

_PUNCTUATION_TO_SPACE = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CJK = re.compile("[\u4e00-\u9fff]")
_CLOSED_ANSWERS = {"yes", "no", "noanswer"}  # half a "yes" is worth nothing
_BOOLEANS = {"True": "yes", "False": "no"}

SEARCH_BONUS = 0.5
FORMAT_PENALTY = -2.0


@dataclass(frozen=True)
class Solution:
    """What came after the prompt, in order: (text, whether the policy wrote it)."""

    spans: tuple[tuple[str, bool], ...]

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


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra space; exactly True/False is yes/no."""
    text = _BOOLEANS.get(text, text)
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION_TO_SPACE)).split())


def f1_score(prediction: str, gold: str | Sequence[str]) -> tuple[float, float, float]:
    """Token (F1, precision, recall) against the gold answer that fits best."""
    return max(_f1_against(normalize_answer(prediction), g) for g in _normalized(gold))


def exact_match(prediction: str, gold: str | Sequence[str]) -> bool:
    """Whether the prediction equals a gold answer, both normalised."""
    return normalize_answer(prediction) in _normalized(gold)


def cover_exact_match(prediction: str, gold: str | Sequence[str]) -> bool:
    """Whether every token of a gold answer occurs in the prediction, in any order.

    A gold answer that normalises to nothing ("The") is covered by an empty prediction only.
    """
    predicted = set(normalize_answer(prediction).split(" "))
    return any(predicted.issuperset(g.split(" ")) for g in _normalized(gold))


def _normalized(gold: str | Sequence[str]) -> list[str]:
    golds = [gold] if isinstance(gold, str) else gold
    if not golds:
        raise ValueError("an answer cannot be scored against an empty list of gold answers")
    return [normalize_answer(g) for g in golds]


def _f1_against(prediction: str, gold: str) -> tuple[float, float, float]:
    """(F1, precision, recall) of two normalised answers."""
    if prediction != gold and not _CLOSED_ANSWERS.isdisjoint((prediction, gold)):
        return 0.0, 0.0, 0.0
    predicted, wanted = Counter(prediction.split()), Counter(gold.split())
    common = (predicted & wanted).total()
    if common == 0:
        return 0.0, 0.0, 0.0
    precision, recall = common / predicted.total(), common / wanted.total()
    return 2 * precision * recall / (precision + recall), precision, recall


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
        and not _CJK.search(written)
    )


def _parts(solution: Solution, golds: str | Sequence[str]) -> dict[str, float]:
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
    parts = _parts(solution, golds)
    return Reward(SEARCH_BONUS * parts["format"] * parts["searched"], parts | {"penalty": 0.0})


def stage2(solution: Solution, golds: str | Sequence[str]) -> Reward:
    """Teaches to answer: the answer's F1, less a penalty when the format fails."""
    parts = _parts(solution, golds)
    penalty = 0.0 if parts["format"] else FORMAT_PENALTY
    return Reward(parts["answer_f1"] + penalty, parts | {"penalty": penalty})


RewardRule = Callable[[Solution, str | Sequence[str]], Reward]
REWARDS: dict[str, RewardRule] = {"stage1": stage1, "stage2": stage2}
