"""`r1s corpus`: makes the published corpora from their dumps."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from r1s_jax.retrieval.kilt import Form
    from r1s_jax.retrieval.lines import Source

app = typer.Typer(no_args_is_help=True, help="Make passages from dumps of Wikipedia.")

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
