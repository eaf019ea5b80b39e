"""The end of a run: its summary, its learning curve, and one trajectory to look at."""

from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from rich.table import Table

from r1s_jax.data.rows import rows_so_far
from r1s_jax.data.traces import Trace
from r1s_jax.eval.held_out import Evaluation
from r1s_jax.system.console import console
from r1s_jax.system.files import write_json
from r1s_jax.tracking.progress import Progress
from r1s_jax.tracking.trace_view import as_text, legend


def summarize(
    run_dir: Path, progress: Progress, after: Evaluation | None, best: epath.Path | None
) -> dict[str, Any]:
    """Writes `summary.json` and `learning_curve.png`, shows both to people, returns the summary."""
    rows = rows_so_far(run_dir / "metrics.jsonl")
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
    if after:
        summary |= {
            "f1_before": progress.before["f1"],
            "f1_after": after.f1,
            "cover_em_before": progress.before["cover_em"],
            "cover_em_after": after.cover_em,
            "searches_before": progress.before["searches"],
            "searches_after": after.searches,
        }
        by_hops = {"f1_one_hop_after": after.f1_one_hop, "f1_two_hop_after": after.f1_two_hop}
        summary |= {name: f1 for name, f1 in by_hops.items() if f1 is not None}
        _show_evaluation(summary, after)
    if rows:
        plot_learning_curve(rows, run_dir / "learning_curve.png")
        console.print(f"Learning curve: {run_dir / 'learning_curve.png'}")
    write_json(run_dir / "summary.json", summary)
    return summary


def plot_learning_curve(rows: list[dict[str, Any]], path: Path) -> None:
    """Reward, answer F1 and searches by step, with a mark where stage 2 begins."""
    steps = [row["step"] for row in rows]
    from matplotlib.figure import Figure  # slow to import, and needed once

    figure = Figure(figsize=(12, 3.5), layout="constrained")
    panels = figure.subplots(1, 3)
    series = {"reward": "reward", "answer F1": "answer_f1", "searches": "searches_per_question"}
    for panel, (title, key) in zip(panels, series.items(), strict=True):
        panel.plot(steps, [row[key] for row in rows], marker=".")
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
    ):
        table.add_row(name, *(f"{summary[f'{key}_{when}']:.3f}" for when in ("before", "after")))
    for name in ("one_hop", "two_hop"):
        if (f1 := summary.get(f"f1_{name}_after")) is not None:
            table.add_row(f"F1, {name.replace('_', '-')}", "", f"{f1:.3f}")
    console.print(table)
    longest = int(np.argmax(after.rolled.trajectory.searches))
    question, solution = after.rolled.questions[longest], after.rolled.solutions[longest]
    console.rule("One trajectory")
    console.print(legend())
    console.print(as_text(Trace(question.question, question.answers, solution.spans)))
    console.rule()
