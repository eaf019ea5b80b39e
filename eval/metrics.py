"""Answer metrics over a set of evaluated questions."""

from collections.abc import Iterable, Mapping
from typing import Any

from r1s_jax import answers


def score_answers(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Mean exact match, cover-EM and F1 in percent: {"em", "cem", "f1"}.

    Each row holds `answer` (a string, or a list of equally good ones) and `pred_ans`.
    Raises ValueError when there are no rows, for their mean would mean nothing.
    """
    scores = [
        (
            answers.exact_match(row["pred_ans"], row["answer"]),
            answers.cover_exact_match(row["pred_ans"], row["answer"]),
            answers.f1_score(row["pred_ans"], row["answer"])[0],
        )
        for row in rows
    ]
    if not scores:
        raise ValueError("no rows to score")
    means = (100.0 * sum(column) / len(scores) for column in zip(*scores, strict=True))
    return dict(zip(("em", "cem", "f1"), means, strict=True))
