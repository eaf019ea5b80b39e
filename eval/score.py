"""Scores of evaluated questions, with intervals, and paired comparisons of two result files."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.table import Table

from r1s_jax.data.results import sample_of
from r1s_jax.data.rows import gold_answers
from r1s_jax.rewards.answer_scores import score_answer
from r1s_jax.rewards.rules import search_worth

PERCENT = ("em", "cem", "f1", "precision", "recall", "acc_l")
PERCENT += ("em_squad", "f1_squad", "sub_em", "supporting_recall")
# Each title names the normaliser of the answers, if the score has one.
_TITLES = {
    "em": "EM (R1-Searcher) %",
    "cem": "cover-EM (R1-Searcher) %",
    "f1": "F1 (R1-Searcher) %",
    "em_squad": "EM (SQuAD) %",
    "f1_squad": "F1 (SQuAD) %",
    "sub_em": "sub-EM (SQuAD) %",
    "acc_l": "judged right %",
    "supporting_recall": "supporting pages found %",
    "searches": "searches",
}
# Shown only if they differ from the score with R1-Searcher's normaliser.
_OTHERWISE = {"em_squad": "em", "f1_squad": "f1"}
_COMPARED = ("em", "cem", "f1", "acc_l")
_PASSED = ("em", "cem")  # scores of 0 or 1, so that pass@k is their maximum
_RESAMPLES = 2000

Group = Sequence[Mapping[str, Any]]  # the answers to one question


def summarize(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over a file's results.

    Returns `n`; every score of PERCENT in percent to one decimal as published (None without a
    verdict, or without known supporting pages); `judged`, the number of rows behind `acc_l`;
    `searches` per question; `finish`, the count of each stop reason; `interval`, 95 % bootstrap
    intervals over questions in the units of the means; `exact`, the means in full precision; and
    with several answers per question the keys of `_several`.
    """
    groups = list(_groups(results).values())
    columns = {name: _columns(groups, name) for name in (*PERCENT, "searches")}
    columns = {name: sums for name, sums in columns.items() if len(sums)}
    exact = {
        name: _mean(columns[name]) if name in columns else None for name in (*PERCENT, "searches")
    }
    rounded = {name: None if v is None else round(v, 1) for name, v in exact.items()}
    if exact["searches"] is not None:
        rounded["searches"] = round(exact["searches"], 2)
    return {
        "n": len(results),
        **rounded,
        "judged": sum("acc_l" in r["scores"] for r in results),
        "finish": dict(Counter(str(r.get("stop_reason_final", "unknown")) for r in results)),
        "interval": {name: _interval(sums) for name, sums in columns.items()},
        "exact": exact,
        **_several(groups),
        **_search_worth(results),
    }


def _search_worth(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What searches were worth: the F1 of answers with a search minus that of its forks, which went
    on without its documents (see rollout/forks.py); {} without forks.

    `search_worth` has, of `all` searches and by number of the `search` and by `hops` of the
    question, how many there are (`n`), their `mean` in percent, and its 95 % bootstrap `interval`
    over answers.
    """
    kinds: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for row in results:
        own: dict[tuple[str, str], list[float]] = {}
        forks: dict[int, list[tuple[float, bool]]] = {}
        for fork in row.get("forks", ()):
            f1 = score_answer(fork["pred_ans"], gold_answers(row)).f1
            forks.setdefault(fork["search"], []).append((f1, fork.get("with_search", False)))
        for search, f1s in forks.items():
            keys = [("all", ""), ("search", str(search))]
            keys += [("hops", str(row["hops"]))] if row.get("hops") else []
            for key in keys:
                own.setdefault(key, []).append(100 * search_worth(row["scores"]["f1"], f1s))
        for key, gaps in own.items():
            kinds.setdefault(key, []).append((sum(gaps), len(gaps)))
    worth: dict[str, Any] = {}
    for (kind, name), sums in sorted(kinds.items()):
        array = np.array(sums)
        entry = {"n": int(array[:, 1].sum()), "mean": round(_mean(array), 1)}
        entry |= {"interval": _interval(array)}
        worth |= {kind: entry} if not name else {kind: worth.get(kind, {}) | {name: entry}}
    return {"search_worth": worth} if worth else {}


def _several(groups: Sequence[Group]) -> dict[str, Any]:
    """Scores of k answers per question, over the `questions` that have all k; {} if k is 1.

    `samples` is k; `avg@k` the mean over questions of the mean over their answers; `pass@k` the
    share of questions with at least one right answer. In percent, each with its 95 % bootstrap
    `interval` over questions.
    """
    k = max(map(len, groups), default=1)
    if k == 1:
        return {}
    complete = [group for group in groups if len(group) == k]

    def score(name: str, aggregate: Any) -> dict[str, Any]:
        scores = [100 * aggregate([r["scores"][name] for r in group]) for group in complete]
        sums = np.array([(value, 1) for value in scores])
        return {"mean": round(_mean(sums), 1), "interval": _interval(sums)}

    return {
        "samples": k,
        "questions": len(complete),
        "avg@k": {name: score(name, lambda row: sum(row) / k) for name in ("em", "cem", "f1")},
        "pass@k": {name: score(name, max) for name in _PASSED},
    }


def compare(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Second minus first over the questions that both answer; None when they share none.

    Several answers to a question count by their mean. Returns `n`, and for each score its mean
    `difference`, the 95 % bootstrap `interval` of it, and the number of questions on which the
    second is `better` and `worse`.
    """
    by_id = all("id" in row for row in (*first, *second))
    groups = _groups(first, by_id)
    pairs = [(groups[key], group) for key, group in _groups(second, by_id).items() if key in groups]
    if not pairs:
        return None
    result: dict[str, Any] = {"n": len(pairs)}
    for name in _COMPARED:
        means = [[_group_mean(group, name) for group in pair] for pair in pairs]
        complete = [pair for pair in means if None not in pair]
        if complete:
            gain = np.diff(np.array(complete))[:, 0]
            result[name] = {
                "difference": round(float(gain.mean()) * 100, 2),
                "interval": _interval(np.stack([gain * 100, np.ones(len(gain))], 1)),
                "better": int((gain > 0).sum()),
                "worse": int((gain < 0).sum()),
            }
    return result


def _groups(
    results: Sequence[Mapping[str, Any]], by_id: bool | None = None
) -> dict[tuple, list[Mapping[str, Any]]]:
    """The answers to each question, by (text, id, occurrence); samples of a question are together.

    The id is used if `by_id` (None: if all rows have one). The occurrence separates questions that
    stand in a file several times, with different right answers.
    """
    if by_id is None:
        by_id = all("id" in row for row in results)
    seen: Counter[tuple] = Counter()
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in results:
        name = (row["question"], str(row["id"]) if by_id else "")
        sample = (*name, sample_of(row))
        groups.setdefault((*name, seen[sample]), []).append(row)
        seen[sample] += 1
    return groups


def print_tables(summaries: Sequence[dict[str, Any]], gains: Sequence[dict[str, Any]]) -> None:
    """Prints summaries and comparisons."""
    table = Table("mean (95 %)", *(Path(s["file"]).name for s in summaries))
    for name, title in _TITLES.items():
        if _is_shown(name, summaries):
            table.add_row(title, *(_with_interval(s, name) for s in summaries))
    for kind, names in (("avg@k", ("em", "cem", "f1")), ("pass@k", _PASSED)):
        for name in names if any(kind in s for s in summaries) else ():
            cells = (_sampled(s, kind, name) for s in summaries)
            table.add_row(f"{_TITLES[name].removesuffix(' %')} {kind} %", *cells)
    for label, pick in _worth_rows(summaries):
        table.add_row(label, *(pick(s) for s in summaries))
    table.add_row("questions", *(_questions(s) for s in summaries))
    finish = [", ".join(f"{reason} {n}" for reason, n in s["finish"].items()) for s in summaries]
    table.add_row("finish", *finish)
    Console().print(table)
    for gain in gains:
        first, second = Path(gain["first"]).name, Path(gain["second"]).name
        table = Table("score", "difference", "95 %", "better", "worse")
        table.title = f"{second} minus {first}, {gain['n']} questions"
        for name in _COMPARED:
            if g := gain.get(name):
                low, high = g["interval"]
                numbers = (f"{g['difference']:+.1f}", f"{low:+.1f} to {high:+.1f}")
                table.add_row(_TITLES[name], *numbers, str(g["better"]), str(g["worse"]))
        Console().print(table)


def _worth_rows(
    summaries: Sequence[dict[str, Any]],
) -> Iterator[tuple[str, Callable[[dict[str, Any]], str]]]:
    """The labels of the rows of what searches were worth, each with the function of its cells."""
    worths = [s.get("search_worth", {}) for s in summaries]
    places = [("all", "", "a search was worth, F1 %")] if any(worths) else []
    for kind, label in (("search", "search {}"), ("hops", "questions of {} hops")):
        names = sorted({name for worth in worths for name in worth.get(kind, {})})
        places += [(kind, name, f"  {label.format(name)}") for name in names]
    for kind, name, label in places:

        def cell(summary: dict[str, Any], kind: str = kind, name: str = name) -> str:
            entry = summary.get("search_worth", {}).get(kind, {})
            entry = entry.get(name, {}) if name else entry
            if not entry:
                return "-"
            low, high = entry["interval"]
            return f"{entry['mean']} ({low:.1f} to {high:.1f}), {entry['n']} searches"

        yield label, cell


def _with_interval(summary: dict[str, Any], name: str) -> str:
    if summary[name] is None:
        return "-"
    low, high = summary["interval"][name]
    return f"{summary[name]} ({low:.1f} to {high:.1f})"


def _is_shown(name: str, summaries: Sequence[dict[str, Any]]) -> bool:
    """Whether the row of a score adds information to the table."""
    if name in _OTHERWISE:
        return any(s["exact"][name] != s["exact"][_OTHERWISE[name]] for s in summaries)
    return name != "supporting_recall" or any(s[name] is not None for s in summaries)


def _sampled(summary: dict[str, Any], kind: str, name: str) -> str:
    if kind not in summary:
        return "-"
    score = summary[kind][name]
    low, high = score["interval"]
    return f"{score['mean']} ({low:.1f} to {high:.1f})"


def _questions(summary: dict[str, Any]) -> str:
    if "samples" not in summary:
        return str(summary["n"])
    return f"{summary['questions']}, {summary['samples']} samples each"


def _unit(name: str) -> float:
    return 100.0 if name in PERCENT else 1.0


def _columns(groups: Iterable[Group], name: str) -> np.ndarray:
    """Float64[questions, 2]: the sum of a score over a question's answers, and how many have it."""
    scores = [[r["scores"][name] for r in group if name in r["scores"]] for group in groups]
    return np.array([(sum(group) * _unit(name), len(group)) for group in scores if group])


def _group_mean(group: Group, name: str) -> float | None:
    scores = [r["scores"][name] for r in group if name in r["scores"]]
    return sum(scores) / len(scores) if scores else None


def _mean(sums: np.ndarray) -> float:
    """The mean over all answers; `sums` as in _columns."""
    return float(sums[:, 0].sum() / sums[:, 1].sum())


def _interval(sums: np.ndarray) -> list[float]:
    return [round(bound, 2) for bound in _bounds(sums)]


def interval(values: Float[np.ndarray, " N"]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of N questions' values."""
    return _bounds(np.stack([values, np.ones(len(values))], axis=1))


def _bounds(sums: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over questions; `sums` as in _columns.

    A resample is a multinomial draw of the counts of the distinct rows. This equals drawing rows
    one by one, and is as quick for many rows as for few.
    """
    distinct, counts = np.unique(sums, axis=0, return_counts=True)
    draws = np.random.default_rng(0).multinomial(len(sums), counts / len(sums), size=_RESAMPLES)
    totals = draws @ distinct
    low, high = np.percentile(totals[:, 0] / totals[:, 1], [2.5, 97.5])
    return float(low), float(high)
