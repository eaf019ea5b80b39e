"""Files of evaluated questions: their rows, what each row scores, and the header beside them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from r1s_jax.data.rows import gold_answers, placed_rows
from r1s_jax.io.errors import shorten
from r1s_jax.io.journal import DataError
from r1s_jax.io.json import read_object
from r1s_jax.io.schema import check
from r1s_jax.protocol import r1_searcher as protocol
from r1s_jax.retrieval.api import split_line
from r1s_jax.rewards.answer_scores import (
    normalize_answer,
    score_answer,
    squad_exact_match,
    squad_f1_score,
    sub_exact_match,
)

# Of a verdict's names, ours comes first; the other is that of R1-Searcher's published traces.
VERDICTS = ("judge", "gpt4o_output")


class ResultRow(TypedDict):
    """A row of a file of answers as `r1s eval run` writes it, in the published schema and more."""

    id: int | str  # a text where the question has one in its file
    question: str
    answer: str | list[str]  # the right one, or several
    pred_ans: str
    stop_reason_final: str
    gen_text_store: str  # all that came after the prompt
    searches: int
    prompt_tokens: int
    sampled_tokens: int
    seconds: float
    search_outcomes: list[str]  # found, empty, timeout, error, bad_query, long_query
    sample: NotRequired[int]  # which of several answers to one question, from 0
    supporting_recall: NotRequired[float]  # see supporting_recall


FORMAT = 2  # of headers


class _Asked(TypedDict):
    model: str
    mode: NotRequired[str]
    questions: NotRequired[str]


class _Source(TypedDict, total=False):
    corpus: str


class _Model(TypedDict):
    sha256: str
    checkpoint: NotRequired[int]


class _Questions(TypedDict):
    sha256: str
    count: int


class _Header(TypedDict, total=False):
    """Of a header, what is read again; there may be more."""

    format: int
    run: _Asked
    source: _Source
    dtype: str
    dialect: dict[str, Any]
    model: _Model
    questions: _Questions
    searches: dict[str, int]
    judge: dict[str, Any]


def header_path(results: Path) -> Path:
    """Where a result file's header is: what was run, on which corpus, and who judged."""
    return results.with_name(results.name + ".header.json")


def read_header(results: Path) -> dict[str, Any] | None:
    """The header of a result file, None where it has none (files of others).

    Raises DataError for one that is damaged, or that another version wrote.
    """
    path = header_path(results)
    if not path.exists():
        return None
    header = read_object(path, DataError)
    if (version := header.get("format")) != FORMAT:
        raise DataError(
            f"{path} was made by another version (format {shorten(repr(version), 40)}; this one "
            f"reads {FORMAT}): answer the questions anew"
        )
    check(header, _Header, path, DataError)
    return header


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """Result rows in the published schema, each with its scores between 0 and 1 added.

    A row holds `question`, `answer` (a text or a list), `pred_ans`, and perhaps
    `stop_reason_final`, `gen_text_store`, `searches`, `sample` and a judge's verdict. Raises
    DataError naming the line of a row without what it needs or with another's id (and sample), or a
    file without rows.
    """
    results, places = [], {}
    for where, row in placed_rows(path):
        try:
            results.append(row | {"scores": score_row(row)})
            sample = sample_of(row)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
        known = isinstance(row.get("id"), int | str)
        name = (row["id"], row["question"], sample) if known else where
        if name in places:
            of = f", sample {sample}" if "sample" in row else ""
            raise DataError(
                f"{where}: id {row['id']!r}{of} again, as in {places[name]}: each question counts "
                "once; remove one of the two"
            )
        places[name] = where.rpartition(", ")[2]
    if not results:
        raise DataError(f"{path}: no results in this file")
    return results


def sample_of(row: Mapping[str, Any]) -> int:
    """Which answer to its question a row is: 0 where there is one. ValueError for what is none."""
    sample = row.get("sample", 0)
    if not isinstance(sample, int) or isinstance(sample, bool) or sample < 0:
        raise ValueError("`sample` must be a whole number of at least 0")
    return sample


def supporting_recall(titles: Iterable[str], lines: Iterable[str]) -> float:
    """Share of the titles that passage lines found have; both are normalised as answers are.

    Raises ValueError where there are no titles.
    """
    wanted = {_title(title) for title in titles}
    if not wanted:
        raise ValueError("no titles to look for")
    return len(wanted & {_title(split_line(line)[0]) for line in lines}) / len(wanted)


def _title(title: str) -> str:
    return normalize_answer(title) or " ".join(title.lower().split())  # "The The" is a band


def score_row(row: Mapping[str, Any]) -> dict[str, float]:
    """What a row scores, in [0, 1], and its `searches`.

    `em`, `cem`, `f1`, `precision`, `recall` as R1-Searcher normalises answers; `em_squad`,
    `f1_squad` and `sub_em` as SQuAD does; `acc_l`, `supporting_recall` and `searches` where they
    are known. Raises ValueError that says what is wrong with the row.
    """
    golds, predicted = gold_answers(row), row.get("pred_ans")
    if not isinstance(predicted, str):
        raise ValueError("`pred_ans` must be a text")
    if not isinstance(row.get("question"), str):
        raise ValueError("`question` must be a text")
    searches = row.get("searches", 0)
    if not isinstance(searches, int | float) or not 0 <= searches < 2**53:
        raise ValueError("`searches` must be a number of at least 0")
    score = score_answer(predicted, golds)
    scores = {
        "em": float(score.exact_match),
        "cem": float(score.cover_exact_match),
        "f1": score.f1,
        "precision": score.precision,
        "recall": score.recall,
        "em_squad": float(squad_exact_match(predicted, golds)),
        "f1_squad": squad_f1_score(predicted, golds),
        "sub_em": float(sub_exact_match(predicted, golds)),
    }
    if "supporting_recall" in row:
        found = row["supporting_recall"]
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found <= 1:
            raise ValueError("`supporting_recall` must be a number from 0 to 1")
        scores["supporting_recall"] = float(found)
    verdict = next((str(row[name]) for name in VERDICTS if name in row), "")
    if verdict in ("True", "False"):
        scores["acc_l"] = float(verdict == "True")
    if "searches" in row:
        scores["searches"] = float(row["searches"])
    elif isinstance(row.get("gen_text_store"), str):
        scores["searches"] = float(protocol.count_searches(row["gen_text_store"]))
    return scores
