"""Answer scores in the manner of SQuAD, as R1-Searcher (arXiv 2503.05592) normalises them.

Beside them, under names with `squad`, the same with SQuAD's own normaliser, which the scorers of
HotpotQA, 2Wiki and MuSiQue and Search-R1 (arXiv 2503.09516) take over: it removes punctuation where
R1-Searcher's puts a space, so the two differ on "J.R.R. Tolkien" and "Jean-Luc".
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

_PUNCTUATION_TO_SPACE = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CLOSED_ANSWERS = {"yes", "no", "noanswer"}  # half a "yes" is worth nothing
_BOOLEANS = {"True": "yes", "False": "no"}


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra space; exactly True/False is yes/no."""
    text = _BOOLEANS.get(text, text)
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION_TO_SPACE)).split())


def squad_normalize_answer(text: str) -> str:
    """Lower case, punctuation removed, without articles and extra space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


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
    return max(_f1_against(*pair) for pair in _comparable(prediction, gold))


def exact_match(prediction: str, gold: str | Sequence[str]) -> bool:
    """Whether the prediction equals a gold answer, both normalised."""
    return any(predicted == wanted for predicted, wanted in _comparable(prediction, gold))


def cover_exact_match(prediction: str, gold: str | Sequence[str]) -> bool:
    """Whether every token of a gold answer occurs in the prediction, in any order."""
    pairs = _comparable(prediction, gold)
    return any(
        set(predicted.split(" ")).issuperset(wanted.split(" ")) for predicted, wanted in pairs
    )


def squad_exact_match(prediction: str, gold: str | Sequence[str]) -> bool:
    """Whether the prediction equals a gold answer, both normalised as SQuAD does it."""
    pairs = _comparable(prediction, gold, squad_normalize_answer)
    return any(predicted == wanted for predicted, wanted in pairs)


def squad_f1_score(prediction: str, gold: str | Sequence[str]) -> float:
    """Token F1 against the gold answer that fits best, both normalised as SQuAD does it."""
    pairs = _comparable(prediction, gold, squad_normalize_answer)
    return max(_f1_against(*pair)[0] for pair in pairs)


def sub_exact_match(prediction: str, gold: str | Sequence[str]) -> bool:
    """Whether a gold answer is a part of the prediction, letter by letter, as Search-R1 scores it.

    Both are normalised as SQuAD does it. A gold answer that this leaves nothing of would be a part
    of everything: it must be the whole prediction.
    """
    return any(
        wanted in predicted if squad_normalize_answer(wanted) else wanted == predicted
        for predicted, wanted in _comparable(prediction, gold, squad_normalize_answer)
    )


def released_f1(prediction: str, gold: str | Sequence[str]) -> float:
    """F1 to the letter of the released scorer: a gold answer of nothing but articles scores 0."""
    predicted = normalize_answer(prediction)
    return max(_f1_against(predicted, normalize_answer(g))[0] for g in _as_list(gold))


def released_cover_exact_match(prediction: str, gold: str | Sequence[str]) -> bool:
    """cover-EM to the letter of the released scorer: silence covers a gold answer of articles."""
    predicted = set(normalize_answer(prediction).split(" "))
    return any(predicted.issuperset(normalize_answer(g).split(" ")) for g in _as_list(gold))


def _as_list(gold: str | Sequence[str]) -> Sequence[str]:
    golds = [gold] if isinstance(gold, str) else gold
    if not golds:
        raise ValueError("an answer cannot be scored against an empty list of gold answers")
    return golds


def _comparable(
    prediction: str,
    gold: str | Sequence[str],
    normalize: Callable[[str], str] = normalize_answer,
) -> Iterator[tuple[str, str]]:
    """(prediction, gold answer), both normalised.

    Of a gold answer that normalising leaves nothing of ("A", "The The", "!!!"), both only without
    case and extra space: silence must not pass for it.
    """
    for wanted in _as_list(gold):
        normalized = normalize(wanted)
        if normalized:
            yield normalize(prediction), normalized
        else:
            yield " ".join(prediction.lower().split()), " ".join(wanted.lower().split())


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
