"""Answer scores in the manner of SQuAD, with the normaliser of R1-Searcher (arXiv 2503.05592).

The functions with `squad` in their names use SQuAD's own normaliser, as the scorers of HotpotQA,
2Wiki, MuSiQue and Search-R1 (arXiv 2503.09516) do. It removes punctuation, which R1-Searcher's
replaces by a space, so the two differ on "J.R.R. Tolkien" and "Jean-Luc".
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

_PUNCTUATION_TO_SPACE = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CLOSED_ANSWERS = {"yes", "no", "noanswer"}  # they score 0 against any other text
_BOOLEANS = {"True": "yes", "False": "no"}


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra space; True and False become yes, no."""
    text = _BOOLEANS.get(text, text)
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION_TO_SPACE)).split())


def squad_normalize_answer(text: str) -> str:
    """Lower case, punctuation removed, without articles and extra space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


class AnswerScore(NamedTuple):
    """The scores of an answer; the numbers lie in [0, 1]."""

    exact_match: bool
    cover_exact_match: bool
    f1: float
    precision: float
    recall: float


def score_answer(answer: str | None, gold: str | Sequence[str]) -> AnswerScore:
    """All scores of an answer against one or several gold answers; None scores as an empty one."""
    answer = answer or ""
    exact, covered = exact_match(answer, gold), cover_exact_match(answer, gold)
    return AnswerScore(exact, covered, *f1_score(answer, gold))


def f1_score(prediction: str, gold: str | Sequence[str]) -> tuple[float, float, float]:
    """Token (F1, precision, recall) against the gold answer that fits best."""
    return max(_f1_against(*pair) for pair in _comparable(prediction, gold))


def exact_match(prediction: str, gold: str | Sequence[str]) -> bool:
    """Whether the prediction equals a gold answer, both normalised."""
    return any(predicted == reference for predicted, reference in _comparable(prediction, gold))


def cover_exact_match(prediction: str, gold: str | Sequence[str]) -> bool:
    """Whether every token of a gold answer occurs in the prediction, in any order."""
    pairs = _comparable(prediction, gold)
    return any(
        set(predicted.split(" ")).issuperset(reference.split(" ")) for predicted, reference in pairs
    )


def squad_exact_match(prediction: str, gold: str | Sequence[str]) -> bool:
    """Whether the prediction equals a gold answer, both normalised as SQuAD does it."""
    pairs = _comparable(prediction, gold, squad_normalize_answer)
    return any(predicted == reference for predicted, reference in pairs)


def squad_f1_score(prediction: str, gold: str | Sequence[str]) -> float:
    """Token F1 against the gold answer that fits best, both normalised as SQuAD does it."""
    pairs = _comparable(prediction, gold, squad_normalize_answer)
    return max(_f1_against(*pair)[0] for pair in pairs)


def sub_exact_match(prediction: str, gold: str | Sequence[str]) -> bool:
    """Whether a gold answer is a substring of the prediction, as Search-R1 scores it.

    Both are normalised as SQuAD does it. A gold answer that normalises to nothing would be a
    substring of everything, so it must equal the whole prediction.
    """
    return any(
        reference in predicted if squad_normalize_answer(reference) else reference == predicted
        for predicted, reference in _comparable(prediction, gold, squad_normalize_answer)
    )


def released_f1(prediction: str, gold: str | Sequence[str]) -> float:
    """F1 exactly as in the released scorer: a gold answer of nothing but articles scores 0."""
    predicted = normalize_answer(prediction)
    return max(_f1_against(predicted, normalize_answer(g))[0] for g in _as_list(gold))


def released_cover_exact_match(prediction: str, gold: str | Sequence[str]) -> bool:
    """cover-EM exactly as in the released scorer: no words cover a gold answer of only articles."""
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

    If a gold answer normalises to nothing ("A", "The The", "!!!"), both lose only case and extra
    space, so that an empty prediction does not match it.
    """
    for reference in _as_list(gold):
        normalized = normalize(reference)
        if normalized:
            yield normalize(prediction), normalized
        else:
            yield " ".join(prediction.lower().split()), " ".join(reference.lower().split())


def _f1_against(prediction: str, gold: str) -> tuple[float, float, float]:
    """(F1, precision, recall) of two normalised answers."""
    if prediction != gold and not _CLOSED_ANSWERS.isdisjoint((prediction, gold)):
        return 0.0, 0.0, 0.0
    predicted, reference = Counter(prediction.split()), Counter(gold.split())
    common = (predicted & reference).total()
    if common == 0:
        return 0.0, 0.0, 0.0
    precision, recall = common / predicted.total(), common / reference.total()
    return 2 * precision * recall / (precision + recall), precision, recall
