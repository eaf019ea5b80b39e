"""`r1s index`: encodes passages, builds, searches and describes indexes."""

import json
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from r1s_jax.commands.options import AsJson, CorsOption
from r1s_jax.io.errors import ConfigError
from r1s_jax.io.json import decode
from r1s_jax.system.console import json_line

app = typer.Typer(no_args_is_help=True, help="Build and search passage indexes.")


class Kind(str, Enum):  # noqa: UP042  (typer reads its values)
    """The kinds of index that can be built."""

    scann = "scann"
    exact = "exact"
    bm25 = "bm25"
    hybrid = "hybrid"
    milvus = "milvus"


Corpus = Annotated[
    list[str], typer.Argument(help=".tsv, .jsonl (.gz too), .parquet, datasets:ORG/NAME.")
]
Encoder = Annotated[str, typer.Option(help="`hash`, or a BERT-family encoder.")]
QueryInstruction = Annotated[
    str | None, typer.Option(help="Prefix of each query. [default: from the model's files]")
]
PassageInstruction = Annotated[
    str | None, typer.Option(help="Prefix of each passage. [default: from the model's files]")
]


@app.command("build")
def build(
    corpus: Corpus,
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    encoder: Encoder = "hash",
    kind: Annotated[Kind, typer.Option(help="hybrid is scann and bm25.")] = Kind.scann,
    vectors: Annotated[
        Path | None,
        typer.Option(help="Directory of `r1s index encode`; else passages are encoded."),
    ] = None,
    leaves: Annotated[
        int | None, typer.Option(min=1, help="ScaNN: leaves of a shard's tree.")
    ] = None,
    leaves_searched: Annotated[
        int | None, typer.Option(min=1, help="ScaNN: leaves searched.")
    ] = None,
    reorder: Annotated[
        int | None, typer.Option(min=1, help="ScaNN: candidates scored again.")
    ] = None,
    shards: Annotated[
        int | None, typer.Option(min=1, help="ScaNN: parts, built one by one.")
    ] = None,
    milvus_url: Annotated[
        str, typer.Option(help="URL of a Milvus cluster; else a file in OUT.")
    ] = "",
    query_instruction: QueryInstruction = None,
    passage_instruction: PassageInstruction = None,
) -> None:
    """Encode passages and save a searchable index; a stopped build resumes."""
    from r1s_jax.retrieval.build import Options
    from r1s_jax.retrieval.references import load_encoder, write_corpus_index

    write_corpus_index(
        corpus,
        load_encoder(encoder, _instructions(query_instruction, passage_instruction)),
        out,
        kind=kind.value,
        options=Options(leaves, leaves_searched, reorder, shards, milvus_url),
        vectors=vectors,
    )
    typer.echo(str(out))


class ImportKind(str, Enum):  # noqa: UP042
    """The kinds of index that stored vectors can become."""

    scann = "scann"
    exact = "exact"


@app.command("import")
def import_(
    file: Annotated[
        str, typer.Argument(help="FAISS flat index (IxFI, IxF2), or .npy of float32 or float16.")
    ],
    passages: Annotated[
        list[str], typer.Option(help="Their passages, in the same order. Repeatable.")
    ],
    encoder: Annotated[str, typer.Option(help="The encoder that made the vectors.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    kind: ImportKind = ImportKind.scann,
    check: Annotated[
        bool, typer.Option(help="Encode a few passages and compare them with their vectors.")
    ] = True,
    query_instruction: QueryInstruction = None,
    passage_instruction: PassageInstruction = None,
) -> None:
    """Make an index from existing vectors, without encoding the passages again.

    The last line printed is JSON about the index: recall@10, bytes per vector, seconds.
    """
    from r1s_jax.retrieval.references import import_corpus_index, load_encoder

    opened = load_encoder(encoder, _instructions(query_instruction, passage_instruction))
    result = import_corpus_index(file, passages, opened, out, kind=kind.value, check=check)
    typer.echo(json.dumps(result))


@app.command("encode")
def encode(
    corpus: Corpus,
    out: Annotated[Path, typer.Option(help="Directory for all shards.")],
    encoder: Encoder = "hash",
    shard: Annotated[str, typer.Option(help="I/N: the I-th of N parts, counted from 1.")] = "1/1",
    query_instruction: QueryInstruction = None,
    passage_instruction: PassageInstruction = None,
) -> None:
    """Only encode passages; each host encodes its shard, and resumes it when called again."""
    from r1s_jax.retrieval.references import encode_corpus, load_encoder

    opened = load_encoder(encoder, _instructions(query_instruction, passage_instruction))
    typer.echo(str(encode_corpus(corpus, opened, out, shard)))


@app.command("search")
def search(
    index: Annotated[Path, typer.Argument(help="Directory of a built index.")],
    queries: Annotated[
        list[str] | None, typer.Argument(help="Queries; none: one per line of standard input.")
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="Passages per query.")] = 5,
) -> None:
    """Search an index: one JSON object per query, `{"query", "results": [...]}`."""
    import jax

    from r1s_jax.retrieval.references import open_saved_index

    devices = None if jax.default_backend() == "cpu" else jax.local_devices()
    opened = open_saved_index(index, devices)
    for query in queries or _stdin_queries():
        hits = opened.search([query], k)[0]
        results = [
            {"id": h.id, "score": h.score, "title": h.title, "text": h.text, "line": h.line}
            for h in hits
        ]
        typer.echo(json_line({"query": query, "results": results}))


def _stdin_queries() -> Iterator[str]:
    """The lines of stdin as UTF-8, whatever the encoding of the terminal; blank ones skipped."""
    for number, line in enumerate(sys.stdin.buffer, start=1):
        if query := decode(line, f"stdin, line {number}").strip():
            yield query


@app.command("info")
def info(
    index: Annotated[Path, typer.Argument(help="Directory of a built index.")],
    as_json: AsJson = False,
    whole: Annotated[
        bool, typer.Option("--check", help="Read the whole index to find damage.")
    ] = False,
) -> None:
    """Describe an index: kind, parameters, size, and the recall measured when it was built."""
    from r1s_jax.retrieval.info import index_info

    description = index_info(index, whole=whole)
    if as_json:
        typer.echo(json.dumps(description))
        return
    for name, value in description.items():
        typer.echo(f"{name:20} {_readable(name, value)}")


@app.command("plan")
def plan(
    preset: Annotated[
        str | None, typer.Argument(help="A published corpus by name; no arguments: list them.")
    ] = None,
    passages: Annotated[
        float | None, typer.Option(min=1, max=1e12, help="Number of passages, such as 36e6.")
    ] = None,
    dims: Annotated[
        int | None, typer.Option(min=1, help="Dimensions of the encoder's vectors.")
    ] = None,
    passage_bytes: Annotated[
        float | None,
        typer.Option(min=1, help="Size of an average passage; else that of 100 words."),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=1e-3, help="Passages encoded per second: python -m benchmarks encode."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict memory, disk, time and the peak of the build; downloads nothing."""
    from r1s_jax.retrieval.plan import PASSAGE_BYTES, durations
    from r1s_jax.retrieval.plan import plan as predict
    from r1s_jax.retrieval.presets import PRESETS

    if preset is None and passages is None and dims is None:
        _print_presets(as_json)
        return
    corpus = PRESETS.get(preset or "")
    if preset and not corpus:
        raise ConfigError(f"no corpus is known as {preset!r}; there are {', '.join(PRESETS)}")
    passages, dims = passages or (corpus and corpus.count), dims or (corpus and corpus.dims)
    if not passages or not dims or passages < 1:
        raise ConfigError("name a corpus, or give --passages and --dims of at least 1")
    costs = predict(int(passages), dims, passage_bytes or PASSAGE_BYTES)
    costs["seconds"] = durations(int(passages), dims, corpus and corpus.weights, rate)
    if corpus:
        costs["preset"] = {"name": preset} | corpus.json()
    if as_json:
        typer.echo(json.dumps(costs))
        return
    if corpus:
        _print_preset(costs["preset"])
    _print_plan(costs, by_cpu=rate is None)


def _print_presets(as_json: bool) -> None:
    from r1s_jax.retrieval.presets import PRESETS

    if as_json:
        typer.echo(json.dumps({name: preset.json() for name, preset in PRESETS.items()}))
        return
    for name, preset in PRESETS.items():
        count = f"{'' if preset.exact else 'about '}{preset.count:,}"
        typer.echo(f"{name:20}{count:>18} passages, {preset.encoder} ({preset.dims} dims)")
        typer.echo(f"{'':20}{preset.about}")
    typer.echo("\nMemory, disk, time and commands of one: r1s index plan NAME")


def _print_preset(preset: dict[str, Any]) -> None:
    typer.echo(f"{preset['name']}: {preset['about']}\nfrom {preset['source']}")
    typer.echo(f"Encoder: {preset['encoder']}; it reads {preset['query_prefix']!r} before queries")
    typer.echo(f"and {preset['passage_prefix']!r} before passages")
    if vectors := preset["vectors"]:
        typer.echo(f"Encoded already: {vectors} ({preset['vectors_bytes'] / 1e9:,.1f} GB)")
    typer.echo("\n".join(["", *(f"  {command}" for command in preset["commands"]), ""]))


def _print_plan(costs: dict[str, Any], by_cpu: bool) -> None:
    typer.echo(f"{costs['passages']:,} passages of {costs['dims']} dims")
    typer.echo(f"ScaNN: {_readable('parameters', costs['scann']['parameters'])}")
    typer.echo(f"ScaNN's recall@5: {costs['scann']['recall']}\n")
    typer.echo(f"{'GB':8}{'memory':>10}{'disk':>10}{'build peak':>12}")
    for kind, cost in costs["kinds"].items():
        memory, disk, peak = (cost[name] / 1e9 for name in ("memory", "disk", "build_peak"))
        typer.echo(f"{kind:8}{memory:>10,.2f}{disk:>10,.2f}{peak:>12,.2f}")
    text, encoded = costs["passage_text"] / 1e9, costs["encoded_vectors"] / 1e9
    typer.echo(
        f"\nDisk includes the passages' text ({text:,.2f} GB, memory-mapped). Encoding leaves "
        f"{encoded:,.2f} GB of vectors, which can be deleted once the index is built. A Milvus "
        "cluster's own memory and disk are not counted."
    )
    encode, build = (costs["seconds"][name] for name in ("encode", "build_scann"))
    where = "on 2 CPU cores (an accelerator: --rate)" if by_cpu else "at that rate"
    first = f"Encoding takes about {encode / 3600:,.1f} hours {where}; " if encode else ""
    typer.echo(f"{first}ScaNN is built in about {build / 3600:,.1f} hours on 2 CPU cores.")


@app.command("serve")
def serve(
    index: Annotated[Path, typer.Argument(help="Directory of a built index.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all.")] = "127.0.0.1",
    cors: CorsOption = None,
) -> None:
    """Serve an index over HTTP: R1-Searcher's `/queries`, Search-R1's `/retrieve`.

    Prints the address once it listens. SIGTERM and Ctrl-C finish the requests in flight.
    """
    from r1s_jax.retrieval.references import open_saved_index

    try:
        from r1s_jax.io.origins import callers
        from r1s_jax.retrieval import server
    except ImportError as error:
        raise ConfigError(
            "serving needs the extra `serve`: pip install 'r1s-jax[serve]'"
        ) from error
    allowed = callers(host, cors or ())
    with server.bind(host, port) as bound:
        server.serve(open_saved_index(index), bound, allowed=allowed, announce=typer.echo)


def _instructions(query: str | None, passage: str | None) -> dict[str, str]:
    texts = {"query": query, "passage": passage}
    return {kind: text for kind, text in texts.items() if text is not None}


def _readable(name: str, value: Any) -> str:
    if name.endswith("bytes") and value is not None:
        return f"{value / 1e6:,.1f} MB"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_readable(key, part)}" for key, part in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
