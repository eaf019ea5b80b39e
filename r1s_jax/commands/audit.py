"""`r1s audit` and `r1s replay`: check what somebody else made, and ask what would have happened."""

import json
from pathlib import Path
from typing import Annotated

import typer

from r1s_jax.commands.options import AsJson

RunDir = Annotated[Path, typer.Argument(help="A run's directory.")]


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
    from r1s_jax.audit.execute import Asked
    from r1s_jax.audit.report import as_text, audit_path
    from r1s_jax.system.console import console

    if as_json:
        console.quiet = True
    with console.status("") as status:
        asked = Asked(steps, everything, index, distance, seed)
        report = audit_path(path, asked, status.update)
    console.quiet = False
    typer.echo(json.dumps(report) if as_json else as_text(report))
    if not report["equal"]:
        raise typer.Exit(1)


def replay(
    run: RunDir,
    step: Annotated[int, typer.Option(min=1, help="The step that sampled it.")],
    question: Annotated[
        str, typer.Option(help="Its number in traces.jsonl, or a part of it. [default: the first]")
    ] = "",
    sample: Annotated[int, typer.Option(min=0, help="Which of the question's samples.")] = 0,
    documents: Annotated[
        str, typer.Option(metavar="PASSAGES", help="Every search finds these passages.")
    ] = "",
    index: Annotated[str, typer.Option(help="Search this index instead.")] = "",
    without_search: Annotated[
        bool, typer.Option("--without-search", help="Every search finds nothing.")
    ] = False,
    prompt: Annotated[str, typer.Option(metavar="FILE", help="Another prompt.")] = "",
    checkpoint: Annotated[
        str, typer.Option(metavar="NUMBER", help="Parameters of this checkpoint of the run.")
    ] = "",
    temperature: Annotated[float | None, typer.Option(min=0, help="Another temperature.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page instead of printing.")] = None,
    as_json: AsJson = False,
) -> None:
    """Sample a trajectory of a run again, and as it would have been with one thing changed.

    Both have the same random draws. They are shown side by side, with their rewards and the place
    where they part. Nothing of the run is written.
    """
    from r1s_jax.audit.replay import Change
    from r1s_jax.audit.replay import replay as again
    from r1s_jax.system.console import console
    from r1s_jax.tracking.pair_view import show_pair

    change = Change(documents, index, without_search, prompt, checkpoint, temperature)
    if as_json:
        console.quiet = True
    with console.status("") as status:
        found = again(run, step, question, sample, change, status.update)
    console.quiet = False
    if as_json:
        typer.echo(json.dumps(found.as_dict(), ensure_ascii=False))
        return
    told = [found.then] + ([found.now] if found.now else [])
    heads = ["as it was", f"with --{found.change}"]
    show_pair(
        [(head, one.trace, one.parts) for head, one in zip(heads, told, strict=False)],
        len(found.same),
        found.notes,
        html,
    )
    if html:
        typer.echo(str(html))
