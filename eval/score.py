"""Scores of evaluated questions, with intervals, and paired comparisons of two result files."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

from r1s_jax import answers, protocol
from r1s_jax.data import DataError, gold_answers, read_rows

# Of a verdict's names, ours comes first; the other is that of R1-Searcher's published traces.
_VERDICTS = ("judge", "gpt4o_output")
PERCENT = ("em", "cem", "f1", "precision", "recall", "acc_l")
_TITLES = {
    "em": "EM %",
    "cem": "cover-EM %",
    "f1": "F1 %",
    "acc_l": "judged right %",
    "searches": "searches",
}
_RESAMPLES = 2000


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """Result rows in the published schema, each with its scores between 0 and 1 added.

    A row holds `question`, `answer` (a text or a list), `pred_ans`, and perhaps
    `stop_reason_final`, `gen_text_store`, `searches` and a judge's verdict. Raises DataError
    naming the line of a row without what it needs, or a file without rows.
    """
    results = []
    for number, row in read_rows(path):
        if "header" in row:  # what a result file of ours says of itself
            continue
        try:
            results.append(row | {"scores": score_row(row)})
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
    if not results:
        raise DataError(f"{path}: no results in this file")
    return results


def score_row(row: Mapping[str, Any]) -> dict[str, float]:
    """`em`, `cem`, `f1`, `precision`, `recall`, and `acc_l` and `searches` where they are known."""
    golds, predicted = gold_answers(row), row.get("pred_ans")
    if not isinstance(predicted, str):
        raise ValueError("`pred_ans` must be a text")
    f1, precision, recall = answers.f1_score(predicted, golds)
    scores = {
        "em": float(answers.exact_match(predicted, golds)),
        "cem": float(answers.cover_exact_match(predicted, golds)),
        "f1": f1,
        "precision": precision,
        "recall": recall,
    }
    verdict = next((str(row[name]) for name in _VERDICTS if name in row), "")
    if verdict in ("True", "False"):
        scores["acc_l"] = float(verdict == "True")
    if "searches" in row:
        scores["searches"] = float(row["searches"])
    elif isinstance(row.get("gen_text_store"), str):
        scores["searches"] = float(row["gen_text_store"].count(protocol.BEGIN_DOCUMENTS))
    return scores


def summarize(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over a file's results.

    Returns `n`; `em`, `cem`, `f1`, `precision`, `recall` and `acc_l` in percent to one decimal as
    published (None without a verdict; `judged` says on how many rows `acc_l` stands); `searches` a
    question; `finish`, how often each stop reason occurred; `interval`, 95 % bootstrap intervals
    in the units of the means; `exact`, the means in full precision.
    """
    columns = {name: _column(results, name) for name in (*PERCENT, "searches")}
    exact = {
        name: float(values.mean()) * _unit(name) if len(values) else None
        for name, values in columns.items()
    }
    rounded = {name: None if v is None else round(v, 1) for name, v in exact.items()}
    if exact["searches"] is not None:
        rounded["searches"] = round(exact["searches"], 2)
    return {
        "n": len(results),
        **rounded,
        "judged": len(columns["acc_l"]),
        "finish": dict(Counter(str(r.get("stop_reason_final", "unknown")) for r in results)),
        "interval": {
            name: _interval(values * _unit(name)) for name, values in columns.items() if len(values)
        },
        "exact": exact,
    }


def compare(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Second minus first over the questions that both answer; None when they share none.

    Returns `n`, and for each score its mean difference, the 95 % bootstrap `interval` of it, and
    on how many questions the second is `better` and `worse`.
    """
    by_question = {r["question"]: r["scores"] for r in first}
    pairs = [
        (by_question[r["question"]], r["scores"]) for r in second if r["question"] in by_question
    ]
    if not pairs:
        return None
    result: dict[str, Any] = {"n": len(pairs)}
    for name in ("em", "cem", "f1", "acc_l"):
        both = [(a[name], b[name]) for a, b in pairs if name in a and name in b]
        if both:
            gain = np.diff(np.array(both))[:, 0]
            result[name] = {
                "difference": round(float(gain.mean()) * 100, 2),
                "interval": _interval(gain * 100),
                "better": int((gain > 0).sum()),
                "worse": int((gain < 0).sum()),
            }
    return result


def print_tables(summaries: Sequence[dict[str, Any]], gains: Sequence[dict[str, Any]]) -> None:
    """Summaries and comparisons for a reader."""
    table = Table("mean (95 %)", *(Path(s["file"]).name for s in summaries))
    for name, title in _TITLES.items():
        table.add_row(title, *(_with_interval(s, name) for s in summaries))
    table.add_row("questions", *(str(s["n"]) for s in summaries))
    finish = [", ".join(f"{reason} {n}" for reason, n in s["finish"].items()) for s in summaries]
    table.add_row("finish", *finish)
    Console().print(table)
    for gain in gains:
        first, second = Path(gain["first"]).name, Path(gain["second"]).name
        table = Table("score", "difference", "95 %", "better", "worse")
        table.title = f"{second} minus {first}, {gain['n']} questions"
        for name in ("em", "cem", "f1", "acc_l"):
            if g := gain.get(name):
                low, high = g["interval"]
                numbers = (f"{g['difference']:+.1f}", f"{low:+.1f} to {high:+.1f}")
                table.add_row(_TITLES[name], *numbers, str(g["better"]), str(g["worse"]))
        Console().print(table)


def _with_interval(summary: dict[str, Any], name: str) -> str:
    if summary[name] is None:
        return "-"
    low, high = summary["interval"][name]
    return f"{summary[name]} ({low:.1f} to {high:.1f})"


def _unit(name: str) -> float:
    return 100.0 if name in PERCENT else 1.0


def _column(results: Iterable[Mapping[str, Any]], name: str) -> np.ndarray:
    return np.array([r["scores"][name] for r in results if name in r["scores"]])


def _interval(values: np.ndarray) -> list[float]:
    """95 % percentile bootstrap interval of the mean; the mean itself where nothing varies."""
    if len(values) < 2 or np.ptp(values) == 0:
        return [round(float(values.mean()), 2)] * 2
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=_RESAMPLES, method="percentile", batch=100, rng=0
    ).confidence_interval
    return [round(float(found.low), 2), round(float(found.high), 2)]
