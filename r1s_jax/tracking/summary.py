"""The end of a run: its summary, its learning curve, and one trajectory to look at."""

from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from etils import epath
from rich.table import Table

from r1s_jax.data.traces import Trace
from r1s_jax.eval.explain import CAUSES
from r1s_jax.eval.held_out import Evaluation
from r1s_jax.eval.score import interval
from r1s_jax.io.journal import rows_so_far
from r1s_jax.protocol.dialect import Dialect
from r1s_jax.rewards.answer_scores import score_answer
from r1s_jax.system.console import console
from r1s_jax.system.files import write_json, write_rows
from r1s_jax.tracking.journal import learning_rows
from r1s_jax.tracking.progress import Progress
from r1s_jax.tracking.trace_view import as_text, legend


class _Evaluated(TypedDict):
    """A row of `evaluation_before.jsonl` and `evaluation_after.jsonl`."""

    id: int | str
    question: str
    answers: list[str]
    f1: float
    searches: int
    spans: list[tuple[str, bool]]


def note_evaluation(run_dir: Path, when: str, evaluation: Evaluation) -> dict[str, float]:
    """Writes `evaluation_before.jsonl` or `evaluation_after.jsonl`, a row a held-out question.

    Returns the mean scores.
    """
    rolled = evaluation.rolled
    rows = (
        {
            "id": question.id,
            "question": question.question,
            "answers": list(question.answers),
            "f1": score_answer(solution.answer, question.answers).f1,
            "searches": int(searches),
            "spans": solution.spans,
        }
        for question, solution, searches in zip(
            rolled.questions, rolled.solutions, rolled.trajectory.searches, strict=True
        )
    )
    write_rows(run_dir / f"evaluation_{when}.jsonl", rows)
    return evaluation.scores()


def summarize(
    run_dir: Path, progress: Progress, after: Evaluation | None, best: epath.Path | None
) -> dict[str, Any]:
    """Writes `summary.json` and `learning_curve.png`, prints both, and returns the summary."""
    rows = learning_rows(run_dir)
    tokens = sum(row["sampled_tokens"] for row in rows)
    summary: dict[str, Any] = {
        "steps": len(rows),
        "searches": sum(row["searches"] for row in rows),
        "mean_reward": float(np.mean([row["reward"] for row in rows])) if rows else None,
        "sampled_tokens_per_s": tokens / max(sum(row["seconds_rollout"] for row in rows), 1e-9),
        "seconds": progress.seconds,
        "run_dir": str(run_dir),
        "best_checkpoint": str(best) if best else None,
    }
    if after and progress.before:
        for name, value in after.scores().items():
            if name in progress.before:  # not where an older version evaluated
                summary |= {f"{name}_before": progress.before[name], f"{name}_after": value}
        by_hops = {"f1_one_hop_after": after.f1_one_hop, "f1_two_hop_after": after.f1_two_hop}
        summary |= {name: f1 for name, f1 in by_hops.items() if f1 is not None}
        note_evaluation(run_dir, "after", after)
        before, now = (_evaluated(run_dir, when) for when in ("before", "after"))
        summary |= _gain(before, now)
        _show_evaluation(summary, after)
        _show_trajectories(before, now, after.rolled.solutions[0].dialect)
    if rows:
        plot_learning_curve(rows, run_dir / "learning_curve.png")
        console.print(f"Learning curve: {run_dir / 'learning_curve.png'}")
    write_json(run_dir / "summary.json", summary)
    return summary


def _running_mean(values: list[float], window: int) -> list[float]:
    """Mean of each value and those within half a window of it."""
    reach = window // 2
    return [float(np.mean(values[max(0, i - reach) : i + reach + 1])) for i in range(len(values))]


def plot_learning_curve(rows: list[dict[str, Any]], path: Path) -> None:
    """Reward, answer F1 and searches by step, with a mark where stage 2 begins.

    From 20 steps on, a line shows the running mean over a tenth of the steps, because values vary
    with the questions of a rollout.
    """
    steps = [row["step"] for row in rows]
    from matplotlib.figure import Figure  # slow to import, and needed once

    figure = Figure(figsize=(12, 3.5), layout="constrained")
    panels = figure.subplots(1, 3)
    series = {"reward": "reward", "answer F1": "answer_f1", "searches": "searches_per_question"}
    for panel, (title, key) in zip(panels, series.items(), strict=True):
        values = [row[key] for row in rows]
        window = len(rows) // 10
        panel.plot(steps, values, ".", color="C0", alpha=0.4 if window > 1 else 1)
        panel.plot(steps, _running_mean(values, window), color="C0")
        panel.set(title=f"{title} (mean of a rollout)", xlabel="step")
        panel.grid(alpha=0.3)
        if second := [row["step"] for row in rows if row["stage"] == "stage2"]:
            panel.axvline(second[0] - 0.5, linestyle="--", color="gray", label="stage 2 begins")
            panel.legend(loc="best")
    figure.savefig(path, dpi=120)


def _show_evaluation(summary: dict[str, Any], after: Evaluation) -> None:
    table = Table(title=f"{len(after.rolled.questions)} held-out questions, greedy")
    for heading in ("", "before RL", "after RL"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, key in (
        ("answer F1", "f1"),
        ("cover-EM", "cover_em"),
        ("searches a question", "searches"),
        ("searched where it must", "searched_needed"),
        ("searched where it need not", "searched_memorised"),
        *((f"lost: {name.replace('_', ' ')}", f"lost_{name}") for name in CAUSES),
    ):
        if f"{key}_after" in summary:
            if name.startswith("lost") and not summary[f"{key}_before"] + summary[f"{key}_after"]:
                continue
            values = (summary[f"{key}_{when}"] for when in ("before", "after"))
            table.add_row(name, *(f"{value:.3f}" for value in values))
    for name in ("one_hop", "two_hop"):
        if (f1 := summary.get(f"f1_{name}_after")) is not None:
            table.add_row(f"F1, {name.replace('_', '-')}", "", f"{f1:.3f}")
    if "f1_gain_low" in summary:
        low, high = summary["f1_gain_low"], summary["f1_gain_high"]
        table.add_row("F1 gained (95 %)", "", f"{low:+.3f} to {high:+.3f}")
    console.print(table)


def _evaluated(run_dir: Path, when: str) -> list[dict[str, Any]]:
    """The rows of an evaluation, one a question; [] where there is no file."""
    return rows_so_far(run_dir / f"evaluation_{when}.jsonl", _Evaluated)


def _gain(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, float]:
    """The gain in F1, with a 95 % interval by paired bootstrap over the questions."""
    if [row["id"] for row in before] != [row["id"] for row in after]:
        return {}
    gains = np.array([b["f1"] - a["f1"] for a, b in zip(before, after, strict=True)])
    low, high = interval(gains)
    return {"f1_gain": float(gains.mean()), "f1_gain_low": low, "f1_gain_high": high}


def _show_trajectories(
    before: list[dict[str, Any]], after: list[dict[str, Any]], dialect: Dialect
) -> None:
    """Prints the two questions that gained most; if none did, the one with most searches."""
    old = {row["id"]: row for row in before}
    gained = [row for row in after if row["id"] in old and row["f1"] > old[row["id"]]["f1"]]
    gained.sort(key=lambda row: old[row["id"]]["f1"] - row["f1"])
    chosen = gained[:2] or [max(after, key=lambda row: row["searches"])]
    for row in chosen:
        for when, shown in (("before RL", old.get(row["id"])), ("after RL", row)):
            if shown:
                console.rule(f"One trajectory, {when}")
                spans = [(text, by_policy) for text, by_policy in shown["spans"]]
                trace = Trace(row["question"], tuple(row["answers"]), spans, dialect=dialect)
                console.print(as_text(trace))
    console.rule()
    console.print(legend())
