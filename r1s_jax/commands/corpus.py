"""`r1s corpus`: makes the published corpora from their dumps, and says what a corpus lacks."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from r1s_jax.commands.options import AsJson

if TYPE_CHECKING:
    from r1s_jax.retrieval.kilt import Form
    from r1s_jax.retrieval.lines import Source

app = typer.Typer(
    no_args_is_help=True, help="Make passages from dumps of Wikipedia; audit a corpus."
)

Out = Annotated[Path, typer.Argument(help="The .tsv file to write; it appears once complete.")]


@app.command("kilt")
def kilt(
    source: Annotated[
        str, typer.Argument(help="KILT knowledge source: a path or http(s) address; .gz too.")
    ],
    out: Out,
) -> None:
    """KILT pages as passages of 100 words, `{idx}<TAB>{title}   {text}`.

    Needs little memory. Malformed pages are skipped. The last line printed is a summary as JSON.
    """
    from r1s_jax.retrieval.kilt import KILT
    from r1s_jax.retrieval.lines import open_source

    _convert(open_source(source), out, KILT)


@app.command("abstracts")
def abstracts(
    source: Annotated[
        str, typer.Argument(help="HotpotQA's 2017 abstracts: a folder of wiki_*.bz2, or .tar.bz2.")
    ],
    out: Out,
) -> None:
    """HotpotQA's Wikipedia abstracts as passages, `{idx}<TAB>Title: {title} Text:  {text}`.

    Skips malformed pages as `r1s corpus kilt` does.
    """
    from r1s_jax.retrieval.kilt import ABSTRACTS
    from r1s_jax.retrieval.lines import open_archive

    _convert(open_archive(source), out, ABSTRACTS)


@app.command("audit")
def audit(
    questions: Annotated[
        list[str],
        typer.Argument(help="Files of questions, or benchmarks by name (r1s data benchmarks)."),
    ],
    index: Annotated[Path, typer.Option(help="Directory of a built index.")],
    out: Annotated[
        Path | None, typer.Option(help="File for the questions that cannot be answered.")
    ] = None,
    repair: Annotated[
        str, typer.Option(help="Another corpus of passages: how many questions would it repair?")
    ] = "",
    redirects: Annotated[
        Path | None, typer.Option(help="Rows {title, target}: other names of pages.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Can this corpus answer these questions? Look before you train or evaluate.

    For every question: are the pages by its supporting titles there, does any passage hold an
    answer, and at what rank (up to 100) does the question itself find them? Yes, no and numbers are
    left out where an answer is looked for. Without titles, only answers can be looked for.
    """
    from r1s_jax.eval.audit import as_table, audit_files
    from r1s_jax.retrieval.references import open_saved_index
    from r1s_jax.system.console import bars, console, warn

    with bars() as progress:
        opened = open_saved_index(index)
        result = audit_files(
            questions, opened, redirects=redirects, repair=repair, out=out, progress=progress
        )
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
        return
    for warning in result["warnings"]:
        warn(warning)
    console.print(as_table(result))
    if added := result.get("repair"):
        first = ", ".join(added["titles"][:5])
        console.print(
            f"{added['corpus']} would repair {added['repaired']} questions and leave "
            f"{added['still_lost']}; it brings {len(added['titles'])} pages: {first}"
        )
    if out:
        console.print(f"The questions that cannot be answered: {out}")


def _convert(source: "Source", out: Path, form: "Form") -> None:
    from r1s_jax.retrieval.kilt import convert
    from r1s_jax.system.console import console, progress_bar

    with progress_bar(f"{out.name} (bytes of the source)") as advance:
        summary = convert(source, out, form, progress=advance)
    console.print(f"{summary.passages:,} passages of {summary.pages:,} pages: {out}")
    if summary.skipped:
        console.print(f"{summary.skipped:,} pages were skipped; the first:", style="yellow")
        for reason in summary.reasons:
            console.print(f"  {reason}", markup=False, highlight=False)
    typer.echo(json.dumps({"out": str(out), **summary._asdict()}, ensure_ascii=False))
