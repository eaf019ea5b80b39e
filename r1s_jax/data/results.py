"""Files of evaluated questions: their rows, the scores of a row, and the header beside the file."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from r1s_jax.data.rows import gold_answers, placed_rows
from r1s_jax.io.errors import shorten
from r1s_jax.io.journal import DataError
from r1s_jax.io.json import read_object
from r1s_jax.io.schema import check
from r1s_jax.io.seals import sealed
from r1s_jax.protocol import r1_searcher as protocol
from r1s_jax.retrieval.api import split_line
from r1s_jax.rewards.answer_scores import (
    normalize_answer,
    score_answer,
    squad_exact_match,
    squad_f1_score,
    sub_exact_match,
)
from r1s_jax.system.files import file_digest, write_json

# Keys of a verdict: ours first, then that of R1-Searcher's published traces.
VERDICTS = ("judge", "gpt4o_output")
_BRACKETS = re.compile(r"\s*\([^()]*\)\s*$")  # at the end of a title


class ForkAnswer(TypedDict):
    """How a question is answered when one search goes otherwise; the keys are those of a row."""

    search: int  # which of the trajectory's searches, from 1
    pred_ans: str
    stop_reason_final: str
    gen_text_store: str
    with_search: NotRequired[bool]  # the search was made, and only the rest drawn again


class ResultRow(TypedDict):
    """A row of a file of answers of `r1s eval run`: the published schema and more keys."""

    id: int | str  # a text if the question's own id is a text
    question: str
    answer: str | list[str]  # the right one, or several
    pred_ans: str
    stop_reason_final: str
    gen_text_store: str  # all text after the prompt
    searches: int
    prompt_tokens: int
    sampled_tokens: int
    seconds: float
    search_outcomes: list[str]  # found, empty, timeout, error, bad_query, long_query
    sample: NotRequired[int]  # which of several answers to one question, from 0
    supporting_recall: NotRequired[float]  # see supporting_recall
    hops: NotRequired[int]  # facts that the question needs, where that is known; with forks
    forks: NotRequired[list[ForkAnswer]]


FORMAT = 2  # version of the headers


class _Run(TypedDict):
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


class MadeBy(TypedDict, total=False):
    """How answers were made, and a digest of them, for `r1s audit`."""

    changes: list[str]  # of the preset
    facts: dict[str, Any]  # see system/facts.py
    answers: str  # a digest of the file


class _Header(TypedDict, total=False):
    """The keys of a header that are read again; a header may have more."""

    format: int
    run: _Run
    source: _Source
    dtype: str
    dialect: dict[str, Any]
    model: _Model
    questions: _Questions
    searches: dict[str, int]
    prefill_tokens: int
    judge: dict[str, Any]
    made_by: MadeBy
    seal: str


def header_path(results: Path) -> Path:
    """The path of a result file's header, which names the run, the corpus and the judge."""
    return results.with_name(results.name + ".header.json")


def read_header(results: Path) -> dict[str, Any] | None:
    """The header of a result file; None if it has none (files of other programs).

    Raises DataError for a damaged header, or one of another version.
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


def write_header(results: Path, header: Mapping[str, Any]) -> None:
    """Writes a result file's header, sealed and with a digest of the file as it is now."""
    made_by = {**header.get("made_by", {}), "answers": file_digest(results)}
    write_json(header_path(results), sealed({**header, "made_by": made_by}))


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """Result rows in the published schema, each with its `scores` (see score_row) added.

    A row holds `question`, `answer` (a text or a list), `pred_ans`, and optionally
    `stop_reason_final`, `gen_text_store`, `searches`, `sample` and a judge's verdict. Raises
    DataError, naming the line, for a row that lacks a key or repeats an id (and sample), and for a
    file without rows.
    """
    results, places = [], {}
    for where, row in placed_rows(path):
        try:
            results.append(row | {"scores": score_row(row)})
            sample = sample_of(row)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
        has_id = isinstance(row.get("id"), int | str)
        key = (row["id"], row["question"], sample) if has_id else where
        if key in places:
            which = f", sample {sample}" if "sample" in row else ""
            raise DataError(
                f"{where}: id {row['id']!r}{which} again, as in {places[key]}: each question "
                "counts once; remove one of the two"
            )
        places[key] = where.rpartition(", ")[2]
    if not results:
        raise DataError(f"{path}: no results in this file")
    return results


def sample_of(row: Mapping[str, Any]) -> int:
    """The number of a row among the answers to its question, from 0.

    Raises ValueError unless it is a whole number of at least 0.
    """
    sample = row.get("sample", 0)
    if not isinstance(sample, int) or isinstance(sample, bool) or sample < 0:
        raise ValueError("`sample` must be a whole number of at least 0")
    return sample


def supporting_recall(titles: Iterable[str], lines: Iterable[str]) -> float:
    """Share of `titles` that are titles of passage `lines`; both are normalised like answers.

    Raises ValueError if there are no titles.
    """
    supporting = {page_key(title) for title in titles}
    if not supporting:
        raise ValueError("no titles to look for")
    return len(supporting & {page_key(split_line(line)[0]) for line in lines}) / len(supporting)


def page_key(title: str) -> str:
    """What titles of one page have in common: case, punctuation and articles do not count."""
    return normalize_answer(title) or " ".join(title.lower().split())  # "The The" is a band


def without_brackets(title: str) -> str:
    """`Mercury (planet)` as `Mercury`."""
    return _BRACKETS.sub("", title)


def score_row(row: Mapping[str, Any]) -> dict[str, float]:
    """The scores of a row, in [0, 1], and its number of `searches`.

    `em`, `cem`, `f1`, `precision`, `recall` with R1-Searcher's normaliser; `em_squad`, `f1_squad`
    and `sub_em` with SQuAD's; `acc_l`, `supporting_recall` and `searches` if the row has the keys
    for them. Raises ValueError for a faulty row.
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
        recall = row["supporting_recall"]
        if isinstance(recall, bool) or not isinstance(recall, int | float) or not 0 <= recall <= 1:
            raise ValueError("`supporting_recall` must be a number from 0 to 1")
        scores["supporting_recall"] = float(recall)
    verdict = next((str(row[name]) for name in VERDICTS if name in row), "")
    if verdict in ("True", "False"):
        scores["acc_l"] = float(verdict == "True")
    if "searches" in row:
        scores["searches"] = float(row["searches"])
    elif isinstance(row.get("gen_text_store"), str):
        scores["searches"] = float(protocol.count_searches(row["gen_text_store"]))
    return scores
