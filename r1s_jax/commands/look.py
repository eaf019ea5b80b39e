"""`r1s traces`, `r1s report` and `r1s reward`: trajectories, reports and rewards."""

from pathlib import Path
from typing import Annotated

import typer

from r1s_jax.system.console import json_line


def traces(
    source: Annotated[Path, typer.Argument(help="A run's directory, traces.jsonl, or answers.")],
    min_reward: Annotated[float | None, typer.Option(help="Smallest reward (answers: F1).")] = None,
    max_reward: Annotated[float | None, typer.Option(help="Largest reward.")] = None,
    searches: Annotated[int | None, typer.Option(help="Exact number of searches.")] = None,
    finish: Annotated[str, typer.Option(help="finished, search_limit, length, ...")] = "",
    step: Annotated[int | None, typer.Option(help="Training step.")] = None,
    contains: Annotated[str, typer.Option(help="Text that occurs in it.")] = "",
    cause: Annotated[str, typer.Option(help="As `r1s eval explain` names it.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="Most trajectories to show; 0: all.")] = 10,
    html: Annotated[Path | None, typer.Option(help="Write a page instead of printing.")] = None,
) -> None:
    """Read trajectories in colour: thoughts, searches, documents and answers."""
    from r1s_jax.data.traces import Wanted, read_traces
    from r1s_jax.tracking.trace_view import show

    filters = Wanted(min_reward, max_reward, searches, finish, step, contains, cause)
    matches = [trace for trace in read_traces(source) if filters.fits(trace)]
    show(matches[: limit or None], len(matches), html)
    if html:
        typer.echo(str(html))


def report(
    runs: Annotated[list[Path], typer.Argument(help="Directories of runs, finished or not.")],
    out: Annotated[Path, typer.Option(help="Page to write.")] = Path("report.html"),
) -> None:
    """Compare runs on one page: results, configs, health, curves, trajectories.

    The page is one file that needs no network.
    """
    from r1s_jax.tracking.report import write_report

    write_report(runs, out)
    typer.echo(str(out))


def reward(
    file: Annotated[Path, typer.Argument(help="JSON lines {question, answer, solution}; .gz too.")],
    variant: Annotated[
        str,
        typer.Option(
            help="stage1, stage2, em, cover_em, f1; released: qwen_zero, llama_stage1, "
            "llama_stage2, search_r1_em, search_r1_subem, search_r1_format, "
            "search_r1_format_retrieval; module:function of your own; or a weighted sum of these "
            "and of terms: f1 + 0.2*retrieved_gold."
        ),
    ],
    dialect: Annotated[
        str, typer.Option(help="Dialect of the solutions: r1_searcher, search_r1 or tool_call.")
    ] = "r1_searcher",
) -> None:
    """Reward solutions: print each row of FILE with `reward` and its `parts`."""
    from r1s_jax.eval.rewards import reward_file

    for row in reward_file(file, variant, dialect):
        typer.echo(json_line(row))
