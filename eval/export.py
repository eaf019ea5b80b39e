"""Answers in the files that the official scorers of benchmarks read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r1s_jax.data.results import read_results
from r1s_jax.data.rows import gold_answers
from r1s_jax.io.errors import ConfigError
from r1s_jax.io.journal import DataError
from r1s_jax.system.files import write_json, write_rows

FORMATS = ("hotpotqa", "2wiki", "musique", "search_r1")


def export(file: Path, form: str, out: Path) -> int:
    """Writes the answers of a file of results for a scorer; returns how many.

    `hotpotqa`: one object of `answer` and `sp`, each by the question's id (hotpot_evaluate_v1.py);
    `2wiki`: the same with `evidence`; `musique`: JSON lines of `id` and the predictions;
    `search_r1`: JSON lines of `id`, `question`, `golden_answers`, `prediction`. Supporting facts
    stay empty: a policy names no sentences.

    Raises ConfigError for an unknown form; DataError for results that read_results refuses, for
    rows without an id, for several answers to one id, and if `out` exists.
    """
    if form not in FORMATS:
        raise ConfigError(f"format {form!r}: take {', '.join(FORMATS)}")
    rows = read_results(file)
    ids = _ids(file, rows)
    if out.exists():
        raise DataError(f"{out} is there already: name another file, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    if form in ("hotpotqa", "2wiki"):
        kinds = ("sp", "evidence") if form == "2wiki" else ("sp",)
        answers = {id: row["pred_ans"] for id, row in zip(ids, rows, strict=True)}
        write_json(out, {"answer": answers} | {kind: {id: [] for id in ids} for kind in kinds})
    else:
        lines = _musique if form == "musique" else _search_r1
        write_rows(out, (lines(id, row) for id, row in zip(ids, rows, strict=True)))
    return len(rows)


def _musique(id: str, row: dict[str, Any]) -> dict[str, Any]:
    predicted = {"predicted_support_idxs": [], "predicted_answerable": True}
    return {"id": id, "predicted_answer": row["pred_ans"]} | predicted


def _search_r1(id: str, row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": id,
        "question": row["question"],
        "golden_answers": list(gold_answers(row)),
        "prediction": row["pred_ans"],
    }


def _ids(file: Path, rows: Sequence[dict[str, Any]]) -> list[str]:
    """The ids of the rows as texts; raises DataError for a missing or repeated id."""
    ids: dict[str, None] = {}
    for number, row in enumerate(rows, start=1):
        id = row.get("id")
        if not isinstance(id, int | str) or isinstance(id, bool):
            raise DataError(f"{file}, row {number}: no `id`, by which a scorer finds the question")
        if str(id) in ids:
            raise DataError(
                f"{file}, row {number}: another answer to id {id!r}; a scorer takes one: export "
                "a file of one sample a question"
            )
        ids[str(id)] = None
    return list(ids)
