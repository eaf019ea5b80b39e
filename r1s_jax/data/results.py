"""Files of evaluated questions: their rows, what each row scores, and the header beside them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from r1s_jax.border.json import read_object
from r1s_jax.data.rows import DataError, gold_answers, read_rows
from r1s_jax.protocol import r1_searcher as protocol
from r1s_jax.rewards.answer_scores import score_answer

# Of a verdict's names, ours comes first; the other is that of R1-Searcher's published traces.
VERDICTS = ("judge", "gpt4o_output")


class ResultRow(TypedDict):
    """A row of a file of answers as `r1s eval run` writes it, in the published schema and more."""

    id: int
    question: str
    answer: str | list[str]  # the right one, or several
    pred_ans: str
    stop_reason_final: str
    gen_text_store: str  # all that came after the prompt
    searches: int
    prompt_tokens: int
    sampled_tokens: int
    seconds: float
    search_outcomes: NotRequired[list[str]]  # found, empty, timeout, error, bad_query, long_query


def header_path(results: Path) -> Path:
    """Where a result file's header is: what was run, on which corpus, and who judged."""
    return results.with_name(results.name + ".header.json")


def read_header(results: Path) -> dict[str, Any] | None:
    """The header of a result file, None where it has none (files of others).

    Raises DataError for one that is damaged.
    """
    path = header_path(results)
    return read_object(path, DataError) if path.exists() else None


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """Result rows in the published schema, each with its scores between 0 and 1 added.

    A row holds `question`, `answer` (a text or a list), `pred_ans`, and perhaps
    `stop_reason_final`, `gen_text_store`, `searches` and a judge's verdict. Raises DataError
    naming the line of a row without what it needs or with another's id, or a file without rows.
    """
    results, lines = [], {}
    for number, row in read_rows(path):
        try:
            results.append(row | {"scores": score_row(row)})
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        place = (row["id"], row["question"]) if isinstance(row.get("id"), int | str) else number
        if place in lines:
            raise DataError(
                f"{path}, line {number}: id {row['id']!r} again, as in line {lines[place]}: each "
                "question counts once; remove one of the two"
            )
        lines[place] = number
    if not results:
        raise DataError(f"{path}: no results in this file")
    return results


def score_row(row: Mapping[str, Any]) -> dict[str, float]:
    """`em`, `cem`, `f1`, `precision`, `recall`, and `acc_l` and `searches` where they are known."""
    golds, predicted = gold_answers(row), row.get("pred_ans")
    if not isinstance(predicted, str):
        raise ValueError("`pred_ans` must be a text")
    if not isinstance(row.get("question"), str):
        raise ValueError("`question` must be a text")
    searches = row.get("searches", 0)
    if not isinstance(searches, int | float) or not 0 <= searches < math.inf:
        raise ValueError("`searches` must be a number of at least 0")
    score = score_answer(predicted, golds)
    scores = {
        "em": float(score.exact_match),
        "cem": float(score.cover_exact_match),
        "f1": score.f1,
        "precision": score.precision,
        "recall": score.recall,
    }
    verdict = next((str(row[name]) for name in VERDICTS if name in row), "")
    if verdict in ("True", "False"):
        scores["acc_l"] = float(verdict == "True")
    if "searches" in row:
        scores["searches"] = float(row["searches"])
    elif isinstance(row.get("gen_text_store"), str):
        scores["searches"] = float(protocol.count_searches(row["gen_text_store"]))
    return scores
