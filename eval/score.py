"""Scores of evaluated questions, with intervals, and paired comparisons of two result files."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

PERCENT = ("em", "cem", "f1", "precision", "recall", "acc_l")
_TITLES = {
    "em": "EM %",
    "cem": "cover-EM %",
    "f1": "F1 %",
    "acc_l": "judged right %",
    "searches": "searches",
}
_RESAMPLES = 2000


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
    by_id = all("id" in row for row in (*first, *second))
    known = dict(zip(_places(first, by_id), first, strict=True))
    pairs = [
        (known[place]["scores"], r["scores"])
        for place, r in zip(_places(second, by_id), second, strict=True)
        if place in known
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


def _places(results: Sequence[Mapping[str, Any]], by_id: bool) -> list[tuple]:
    """What tells a row from the others of its file: its question, its id, which one of them it is.

    A question may stand in a file several times, with different answers or as several samples.
    """
    seen: Counter[tuple] = Counter()
    places = []
    for row in results:
        name = (row["question"], str(row["id"]) if by_id else "")
        places.append((*name, seen[name]))
        seen[name] += 1
    return places


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
    """95 % percentile bootstrap interval of the mean.

    A resample is a multinomial draw of how often each distinct value occurs, which is the same
    thing as drawing the rows one by one, and as quick for many rows as for few.
    """
    distinct, counts = np.unique(values, return_counts=True)
    draws = np.random.default_rng(0).multinomial(len(values), counts / len(values), size=_RESAMPLES)
    low, high = np.percentile(draws @ distinct / len(values), [2.5, 97.5])
    return [round(float(low), 2), round(float(high), 2)]
