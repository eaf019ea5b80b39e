"""Compares settings, each over several seeds: a table and curves."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import msgspec
import numpy as np
from rich.table import Table
from scipy.special import stdtr, stdtrit

from r1s_jax.io.journal import rows_so_far
from r1s_jax.tracking.journal import read_json

GOOD = 0.9  # a run is timed until its rollouts' F1, a mean over _WINDOW, reaches this
_WINDOW = 4  # steps
# Fields of a summary and their columns in a table; the last two exist where questions are of both
# kinds (see eval/held_out.search_by_need).
_SEARCHES = {
    "searches_after": "searches",
    "searched_needed_after": "searched where it must",
    "searched_memorised_after": "and where not",
}


class _Signal(TypedDict):
    signal: str


class _Step(TypedDict):
    """The fields of a row of metrics that are read here."""

    step: int
    answer_f1: float
    answered: float
    seconds_rollout: float
    seconds_update: float
    health: list[_Signal]


class _Summary(msgspec.Struct):
    f1_before: float | None = None
    f1_after: float | None = None
    searches_after: float | None = None
    searched_needed_after: float | None = None
    searched_memorised_after: float | None = None
    stopped_unhealthy: str | None = None


class Arm(NamedTuple):
    """One setting: a name, and its changes of the recipe."""

    name: str
    overrides: tuple[str, ...]


Run = dict[str, Any]  # the results of a run, as `run_result` returns them


def run_result(folder: Path) -> dict[str, Any]:
    """The results of one run; `stopped` says why it ended early.

    `steps_to_good` and `seconds_to_good` count reinforcement learning until the F1 of rollouts
    reaches GOOD; None if it never does. `collapsed`: the F1 of the last rollouts is below half of
    the best (means over _WINDOW steps). `answered`: the share of the last trajectories that have an
    answer. `signals` has the first step of each health signal that fired.
    """
    summary = read_json(folder / "summary.json", _Summary)
    rows = rows_so_far(folder / "metrics.jsonl", _Step)
    f1 = np.array([row["answer_f1"] for row in rows])
    means = np.convolve(f1, np.ones(_WINDOW) / _WINDOW, "valid") if len(f1) >= _WINDOW else f1[:0]
    reached = np.flatnonzero(means >= GOOD)
    steps = int(reached[0]) + _WINDOW if len(reached) else None
    spent = np.cumsum([row["seconds_rollout"] + row["seconds_update"] for row in rows])
    signals: dict[str, int] = {}
    for row in rows:
        for fired in row["health"]:
            signals.setdefault(fired["signal"], row["step"])
    return {
        "f1_before": summary.get("f1_before"),
        "f1_after": summary.get("f1_after"),
        **{name: summary.get(name) for name in _SEARCHES},
        "steps_to_good": steps,
        "seconds_to_good": float(spent[steps - 1]) if steps else None,
        "collapsed": bool(len(means)) and bool(means[-1] < means.max() / 2),
        "answered": float(np.mean([row["answered"] for row in rows[-_WINDOW:]])) if rows else None,
        "signals": signals,
        "stopped": summary.get("stopped_unhealthy"),
    }


def table_of(results: Mapping[str, Sequence[Run]]) -> list[dict[str, Any]]:
    """A row an arm: means over its seeds, with 95 % intervals (Student's t).

    `gain` is the mean difference in F1 to the first arm on the same seeds, `p` the probability of a
    larger one by chance (paired t-test, two-sided), `p_holm` the same corrected for all arms.
    """
    rows, (first, *_) = [], results.values()
    for name, runs in results.items():
        signals = sorted({signal for run in runs for signal in run["signals"]})
        rows.append(
            {
                "arm": name,
                "seeds": len(runs),
                **{key: _mean([run[key] for run in runs]) for key in ("f1_before", "f1_after")},
                "f1_after_interval": _interval([run["f1_after"] for run in runs]),
                **_gain(runs, first),
                **{name: _mean([run[name] for run in runs]) for name in _SEARCHES},
                "reached_good": sum(run["steps_to_good"] is not None for run in runs),
                "steps_to_good": _mean([run["steps_to_good"] for run in runs]),
                "seconds_to_good": _mean([run["seconds_to_good"] for run in runs]),
                "collapsed": sum(run["collapsed"] for run in runs),
                "answered": _mean([run["answered"] for run in runs]),
                "stopped": sum(run["stopped"] is not None for run in runs),
                "signals": {s: sum(s in run["signals"] for run in runs) for s in signals},
            }
        )
    corrected = holm([row["p"] for row in rows])
    return [row | {"p_holm": p} for row, p in zip(rows, corrected, strict=True)]


def _gain(runs: Sequence[Run], first: Sequence[Run]) -> dict[str, float | None]:
    """`gain` and `p` of an arm; None for the first arm itself and where fewer than two seeds can be
    compared."""
    pairs = [(run["f1_after"], base["f1_after"]) for run, base in zip(runs, first, strict=False)]
    gains = np.array([a - b for a, b in pairs if a is not None and b is not None])
    if runs is first or len(gains) < 2:
        return {"gain": None, "p": None}
    mean, error = float(gains.mean()), float(gains.std(ddof=1)) / len(gains) ** 0.5
    if not error:
        return {"gain": mean, "p": float(mean == 0)}
    return {"gain": mean, "p": 2 * float(stdtr(len(gains) - 1, -abs(mean) / error))}


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Values of p corrected for their number (Holm, 1979); None stays None."""
    known = sorted((value, i) for i, value in enumerate(p) if value is not None)
    corrected, highest = list(p), 0.0
    for rank, (value, i) in enumerate(known):
        highest = max(highest, min(1.0, value * (len(known) - rank)))
        corrected[i] = highest
    return corrected


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown."""
    lines = [list(cells) for cells in _cells(rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def as_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The table for a terminal."""
    headings, *lines = _cells(rows)
    table = Table(*headings)
    for line in lines:
        table.add_row(*line)
    return table


def _cells(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """The headings, then a line an arm; a column of searches is left out if no arm fills it."""
    searches = {k: v for k, v in _SEARCHES.items() if any(row[k] is not None for row in rows)}
    heads = ("arm", "F1 before", "F1 after (95 %)", "gain (p, Holm)", f"steps to {GOOD}", "s")
    heads += tuple(searches.values())
    yield (*heads, "signals")
    for row in rows:
        low, high = row["f1_after_interval"] or (None, None)
        f1 = _number(row["f1_after"]) + (f" ({low:.2f} to {high:.2f})" if low is not None else "")
        if row["collapsed"]:
            f1 += f", {row['collapsed']} collapsed"
        if row["stopped"]:  # a stopped run has no F1
            f1 += f", {row['stopped']} stopped"
        gain = "-"
        if row["gain"] is not None:
            gain = f"{row['gain']:+.2f} ({row['p_holm']:.2g})"
        reached = f"{_number(row['steps_to_good'], 0)} ({row['reached_good']}/{row['seeds']})"
        yield (
            row["arm"],
            _number(row["f1_before"]),
            f1,
            gain,
            reached,
            _number(row["seconds_to_good"], 0),
            *(_number(row[name]) for name in searches),
            ", ".join(f"{name} {count}x" for name, count in row["signals"].items()) or "-",
        )


def _number(value: float | None, places: int = 2) -> str:
    return "-" if value is None else f"{value:.{places}f}"


def plot_arms(folders: Mapping[str, Sequence[Path]], out: Path) -> None:
    """F1 of rollouts by step: the mean of an arm's seeds, and a band from minimum to maximum."""
    from matplotlib.figure import Figure  # slow to import, and needed once

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for name, runs in folders.items():
        files = [run / "metrics.jsonl" for run in runs]
        curves = [[row["answer_f1"] for row in rows_so_far(file, _Step)] for file in files]
        longest = max(map(len, curves), default=0)
        if not longest:
            continue
        padded = np.full((len(curves), longest), np.nan)
        for i, curve in enumerate(curves):
            padded[i, : len(curve)] = curve
        steps = np.arange(1, longest + 1)
        (line,) = axes.plot(steps, np.nanmean(padded, axis=0), label=name)
        low, high = np.nanmin(padded, axis=0), np.nanmax(padded, axis=0)
        axes.fill_between(steps, low, high, alpha=0.15, color=line.get_color())
    axes.set(xlabel="step", ylabel="answer F1 (mean of a rollout)", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    figure.savefig(out, dpi=120)


def _not_none(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = _not_none(values)
    return float(np.mean(numbers)) if numbers else None


def _interval(values: Sequence[float | None]) -> tuple[float, float] | None:
    """The 95 % interval of a mean over seeds, cut to [0, 1]; None for fewer than two seeds."""
    numbers = _not_none(values)
    if len(numbers) < 2:
        return None
    t = float(stdtrit(len(numbers) - 1, 0.975))  # Student's
    half = t * float(np.std(numbers, ddof=1)) / len(numbers) ** 0.5
    mean = float(np.mean(numbers))
    return max(0.0, mean - half), min(1.0, mean + half)
