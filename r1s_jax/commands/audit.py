"""`r1s audit` and `r1s replay`: check what somebody else made, and ask what would have happened."""

import json
from pathlib import Path
from typing import Annotated

import typer

from r1s_jax.commands.options import AsJson


def audit(
    path: Annotated[
        Path, typer.Argument(help="A run's directory, a file of answers, or an exported model.")
    ],
    steps: Annotated[
        int, typer.Option(min=0, help="Execute so many steps (of answers: rows) again; 0: none.")
    ] = 2,
    everything: Annotated[
        bool, typer.Option("--all", help="Train the whole run again (answers: all rows).")
    ] = False,
    index: Annotated[str, typer.Option(help="The index, if it is no longer where it was.")] = "",
    distance: Annotated[
        bool,
        typer.Option("--distance", help="Execute on another machine too: how far apart is it?"),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Draws the steps to execute.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Check that a result is what was computed: files against digests, then steps executed again.

    Names every file that changed, and for a step that comes out differently the first thing that
    differs and what that means. Nothing is written. Exit status 1 when something differs.
    """
    from r1s_jax.audit import run as runs
    from r1s_jax.system.console import console

    if as_json:
        console.quiet = True
    with console.status("") as status:
        report = runs.audit_run(
            path,
            steps,
            everything=everything,
            index=index,
            distance=distance,
            seed=seed,
            progress=status.update,
        )
    console.quiet = False
    typer.echo(json.dumps(report) if as_json else runs.as_text(report))
    if not report["equal"]:
        raise typer.Exit(1)
