"""Where the errors of answers come from: the corpus, the search engine, or the policy.

Every answer that is not right has one cause, so that the shares of the causes add up to the loss.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.table import Table

from r1s_jax.data.benchmarks import questions_file
from r1s_jax.data.question_forms import Question
from r1s_jax.data.questions import read_questions
from r1s_jax.data.results import page_key, read_header, read_results
from r1s_jax.data.rows import gold_answers
from r1s_jax.data.traces import dialect_of_file
from r1s_jax.eval.audit import Answers, Finding, Lines, Progress, audit, silent
from r1s_jax.eval.run import NO_ANSWER
from r1s_jax.eval.score import interval
from r1s_jax.io.errors import UserError
from r1s_jax.io.journal import DataError
from r1s_jax.protocol.dialect import Dialect, replies
from r1s_jax.protocol.solution import Solution
from r1s_jax.retrieval.api import split_line
from r1s_jax.retrieval.index import Index
from r1s_jax.rewards.answer_scores import normalize_answer
from r1s_jax.system.console import console
from r1s_jax.system.files import write_rows

DOCUMENTS = 5  # documents of a search, where no answer shows it
# In the order in which they are looked for: the first that holds is the cause.
CAUSES = {
    "page_absent": "the corpus lacks a page, or the answer",
    "no_answer": "no answer was given",
    "not_read": "the pages were found, and another answer given",
    "never_asked": "the question itself would have found the pages",
    "retriever_missed": "neither the queries nor the question itself find the pages",
    "cannot_tell": "no titles are known, and the answer is yes, no or a number",
}
SCORES = ("f1", "em", "cem")


def cause(finding: Finding, answer: str, found: Sequence[str], documents: int) -> str:
    """Why an answer is wrong, as a name of CAUSES.

    `found` are the documents that the searches brought, `documents` how many one search brings.
    """
    if finding.answerable is False:
        return "page_absent"
    if not answer.strip() or answer == NO_ANSWER:
        return "no_answer"
    in_view = was_found(finding.question, found, titled=bool(finding.pages))
    if in_view is None:
        return "cannot_tell"
    if in_view:
        return "not_read"
    rank = finding.page_rank if finding.pages else finding.answer_rank
    return "never_asked" if rank is not None and rank <= documents else "retriever_missed"


def was_found(question: Question, documents: Sequence[str], *, titled: bool) -> bool | None:
    """Whether documents hold all supporting pages or an answer; None: it cannot be told."""
    pages = {page_key(split_line(line)[0]) for line in documents}
    if titled and {page_key(title) for title in question.supporting} <= pages:
        return True
    answers = Answers([question])
    if answers.any:
        return any(answers.in_text(line) for line in documents)
    return False if titled else None


def budget(scores: Float[np.ndarray, " N"], causes: Sequence[str]) -> dict[str, dict[str, float]]:
    """The part of the loss, 1 - mean score, that each cause has, with its 95 % interval.

    `n` is the number of answers that lose something by it. The shares add up to the loss.
    """
    named, result = np.array(causes), {}
    for name in CAUSES:
        part = np.where(named == name, 1.0 - scores, 0.0)
        low, high = interval(part)
        n = int((part > 0).sum())
        result[name] = {"share": float(part.mean()), "low": low, "high": high, "n": n}
    return result


def explain_file(
    file: Path,
    index: Index,
    questions: str = "",
    out: Path | None = None,
    progress: Callable[[str], Progress] = silent,
) -> dict[str, Any]:
    """The causes of the errors in a file of answers (see data.results.read_results).

    The titles of supporting pages come from the file `questions`; by default, from that which the
    header of the answers names, if it is still there. Returns the number of answers, those with
    known titles, and the `budget` of each of SCORES. Writes the rows with their `cause` to `out`.

    Raises DataError for what `read_results` and `read_questions` refuse, for rows without
    `gen_text_store`, and if `out` exists.
    """
    if out and out.exists():
        raise DataError(f"{out} is there already: name another file, or remove it")
    rows, dialect = read_results(file), dialect_of_file(file)
    asked = [Question(i, row["question"], gold_answers(row)) for i, row in enumerate(rows)]
    known = {normalize_answer(q.question): q for q in _questions_of(file, questions)}
    asked = [
        replace(q, supporting=known[key].supporting)
        if (key := normalize_answer(q.question)) in known
        else q
        for q in asked
    ]
    findings = audit(asked, Lines(index.passages), index, progress=progress)
    found = [_documents(file, row, dialect) for row in rows]
    documents = max((len(reply) for replies in found for reply in replies), default=0) or DOCUMENTS
    causes = [
        cause(finding, row["pred_ans"], list(chain(*replies)), documents)
        for finding, row, replies in zip(findings, rows, found, strict=True)
    ]
    if out:
        kept = ({k: v for k, v in row.items() if k != "scores"} for row in rows)
        write_rows(out, (row | {"cause": c} for row, c in zip(kept, causes, strict=True)))
    return {
        "answers": len(rows),
        "with_titles": sum(bool(f.pages) for f in findings),
        "documents_per_search": documents,
        "loss": {
            score: {
                "total": float(1 - values.mean()),
                "causes": budget(values, causes),
            }
            for score in SCORES
            if len(values := np.array([row["scores"][score] for row in rows]))
        },
    }


def _questions_of(file: Path, questions: str) -> list[Question]:
    """The questions with their titles; [] if they are not to be had."""
    if questions:
        return read_questions(questions_file(questions))
    named = (read_header(file) or {}).get("run", {}).get("questions", "")
    if not named:
        return []
    try:
        return read_questions(questions_file(named))
    except UserError as error:
        console.print(f"{file}: no titles of supporting pages ({error}); name --questions")
        return []


def _documents(file: Path, row: Mapping[str, Any], dialect: Dialect) -> list[list[str]]:
    """The documents of each search of an answer."""
    if not isinstance(text := row.get("gen_text_store"), str):
        raise DataError(f"{file}: `gen_text_store` is missing: what was found stands there")
    solution = Solution.of_text(text, dialect)
    return [dialect.found(reply) for reply in replies(solution.spans)]


def as_table(result: Mapping[str, Any]) -> Table:
    """The budget of errors, for a terminal."""
    losses = result["loss"]
    names = {"f1": "F1", "em": "EM", "cem": "cover-EM"}
    table = Table("cause of a loss, % (95 %)", *(names[score] for score in losses), "what it means")
    for name, meaning in CAUSES.items():
        parts = [loss["causes"][name] for loss in losses.values()]
        cells = [
            f"{100 * p['share']:.1f} ({100 * p['low']:.1f} to {100 * p['high']:.1f})" for p in parts
        ]
        table.add_row(name, *cells, meaning)
    table.add_row("all", *(f"{100 * loss['total']:.1f}" for loss in losses.values()), "")
    return table
