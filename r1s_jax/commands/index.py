"""`r1s index`: build and search passage indexes."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Build and search passage indexes.")


@app.command("build")
def build(
    corpus: Annotated[list[str], typer.Argument(help="Passages: .tsv or .jsonl, gzipped or not.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    encoder: Annotated[str, typer.Option(help="`hash`, or a BERT-family encoder.")] = "hash",
) -> None:
    """Encode passages and save a searchable index."""
    from r1s_jax.environment import build_corpus_index
    from r1s_jax.retrieval.index import save_index

    save_index(build_corpus_index(corpus, encoder), out)
    typer.echo(str(out))


@app.command("search")
def search(
    index: Annotated[Path, typer.Argument(help="Directory of a built index.")],
    queries: Annotated[
        list[str] | None, typer.Argument(help="Queries; none: one a line from standard input.")
    ] = None,
    k: Annotated[int, typer.Option(help="Passages a query.")] = 5,
) -> None:
    """Search an index: one JSON object a query, `{"query", "results": [...]}`."""
    from r1s_jax.environment import open_saved_index

    opened = open_saved_index(index)
    for query in queries or (line.strip() for line in sys.stdin if line.strip()):
        hits = opened.search([query], k)[0]
        results = [
            {"id": h.id, "score": h.score, "title": h.title, "text": h.text, "line": h.line}
            for h in hits
        ]
        typer.echo(json.dumps({"query": query, "results": results}, ensure_ascii=False))


@app.command("serve")
def serve(
    index: Annotated[Path, typer.Argument(help="Directory of a built index.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0: everywhere.")] = "127.0.0.1",
) -> None:
    """Serve an index over HTTP: R1-Searcher's `/queries`, Search-R1's `/retrieve`.

    Prints the address once it listens. SIGTERM and Ctrl-C finish what is in flight.
    """
    from r1s_jax.config import ConfigError
    from r1s_jax.environment import open_saved_index

    try:
        from r1s_jax.retrieval import server
    except ImportError as error:
        raise ConfigError(
            "serving needs the extra `serve`: pip install 'r1s-jax[serve]'"
        ) from error
    with server.bind(host, port) as bound:
        server.serve(open_saved_index(index), bound, announce=typer.echo)
