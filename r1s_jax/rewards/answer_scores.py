"""Answer scores in the manner of SQuAD, as R1-Searcher (arXiv 2503.05592) normalises them."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

_PUNCTUATION_TO_SPACE = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CLOSED_ANSWERS = {"yes", "no", "noanswer"}  # half a "yes" is worth nothing
_BOOLEANS = {"True": "yes", "False": "no"}


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra space; exactly True/False is yes/no."""
    text = _BOOLEANS.get(text, text)
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION_TO_SPACE)).split())


class AnswerScore(NamedTuple):
    """How good an answer is; the numbers lie in [0, 1]."""

    exact_match: bool
    cover_exact_match: bool
    f1: float
    precision: float
    recall: float


def score_answer(answer: str | None, gold: str | Sequence[str]) -> AnswerScore:
    """All scores of an answer against the gold one, or several; None scores as an empty one."""
    answer = answer or ""
    exact, covered = exact_match(answer, gold), cover_exact_match(answer, gold)
    return AnswerScore(exact, covered, *f1_score(answer, gold))


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
