"""Builds an index on disk, without holding passages, vectors and searcher in memory at once.

A stopped build resumes with the vectors that it encoded, which are kept beside the new folder.
"""

import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from r1s_jax.io.errors import ConfigError
from r1s_jax.retrieval.api import Passage, split_line
from r1s_jax.retrieval.bm25 import Bm25Searcher, bm25s
from r1s_jax.retrieval.corpus import PassageStore
from r1s_jax.retrieval.encoder import BertEncoder, Encoder, Progress
from r1s_jax.retrieval.hybrid import HybridSearcher, hybrid_parameters
from r1s_jax.retrieval.index import check_free, describe, new_folder, open_searcher
from r1s_jax.retrieval.milvus import MilvusSearcher, close_searcher, milvus_client
from r1s_jax.retrieval.plan import cost, expected_recall
from r1s_jax.retrieval.scann import ScannSearcher, scann, scann_parameters
from r1s_jax.retrieval.searchers import (
    IndexKind,
    Searcher,
    Stage,
    Vectors,
    oracle,
    recall,
    write_vectors,
)
from r1s_jax.retrieval.vectors import Corpus, VectorError, VectorShards, encode_shard

_RECALL_QUERIES, _RECALL_K = 200, 5
_QUERY_WORDS = 12
_TOKENIZE_CHUNK = 4096


class Options(NamedTuple):
    """Options of a build; None stands for a value derived from the number of passages."""

    leaves: int | None = None
    leaves_searched: int | None = None
    reorder: int | None = None
    shards: int | None = None
    milvus_url: str = ""  # empty: a Milvus Lite file inside the index


def write_index(
    directory: str | Path,
    passages: Iterable[Passage],
    encoder: Encoder,
    stage: Stage,
    *,
    kind: IndexKind = "scann",
    options: Options = Options(),  # noqa: B008  (immutable)
    vectors: str | Path | None = None,
    tell: Callable[[str], None] | None = None,
) -> None:
    """Builds an index in a new folder, which appears whole or not at all.

    Args:
        stage: opens a progress bar for each part of the work.
        vectors: a folder of `encode_shard`; without it the passages are encoded first.
        tell: is called with the parameters, predicted memory and recall before the work.

    Raises:
        CorpusError: there are no passages.
        FileExistsError: the folder exists and is not empty.
        NotInstalled: the library of that kind is not installed.
        VectorError: the vectors are of another encoder or corpus, or incomplete.
        ValueError: options that do not fit the passages.
    """
    directory, began = Path(directory), time.monotonic()
    check_free(directory)
    _check_installed(kind)
    own = directory.with_name(f".{directory.name}.vectors")
    with new_folder(directory) as partial:
        store = PassageStore.write(partial, passages)
        parameters = scann_parameters(len(store), **_scann_options(options))
        if tell:
            tell(_prediction(kind, len(store), encoder.dims, parameters))
        source: VectorShards | None = None
        truncation: dict[str, Any] = {}
        if kind != "bm25":
            if (cut := _cut(store, encoder, stage)) is not None:
                truncation["cut"] = cut
                if tell and cut["passages"]:
                    tell(_cut_text(cut, len(store)))
            source = _vectors(store, encoder, Path(vectors) if vectors else None, own, stage)
        with stage(f"Building the {kind} index") as advance:
            build = _Build(partial, store, source, parameters, options.milvus_url, advance)
            built: dict[str, Any] = {"kind": kind, "parameters": build.write(kind)}
        if source is not None:
            with stage("Measuring recall") as advance:
                searcher = open_searcher(partial, built, encoder, store)
                built["recall"] = _measure(searcher, source, store, encoder)
                close_searcher(searcher)
                advance(1, 1)
        built["seconds"] = round(time.monotonic() - began, 1)
        describe(partial, encoder if kind != "bm25" else None, len(store), **built, **truncation)
    shutil.rmtree(own, ignore_errors=True)


def _prediction(kind: IndexKind, passages: int, dims: int, parameters: dict[str, Any]) -> str:
    predicted = cost(kind, passages, dims, parameters)
    summary = (
        f"{kind} index of {passages:,} passages: about {predicted.memory / 1e6:,.0f} MB of memory"
    )
    if kind not in ("scann", "hybrid"):
        return summary
    settings = ", ".join(f"{name} {value}" for name, value in parameters.items())
    return f"{summary}\nScaNN: {settings}\nIts recall@5: {expected_recall(parameters)}"


def _cut(store: PassageStore, encoder: Encoder, stage: Stage) -> dict[str, Any] | None:
    """How many passages the encoder cuts, and the longest one; None without a limit."""
    if not isinstance(encoder, BertEncoder):
        return None
    too_long: list[tuple[int, int]] = []
    with stage("Looking for passages that are too long") as advance:
        for start in range(0, len(store), _TOKENIZE_CHUNK):
            rows = range(start, min(start + _TOKENIZE_CHUNK, len(store)))
            chunk = encoder.too_long([store[i].line for i in rows])
            too_long += [(tokens, start + row) for row, tokens in chunk]
            advance(rows.stop, len(store))
    tokens, at = max(too_long, default=(0, 0))
    longest = {"longest": store[at].id, "longest_tokens": tokens} if too_long else {}
    return {"passages": len(too_long), "limit_tokens": encoder.max_length} | longest


def _cut_text(cut: dict[str, Any], passages: int) -> str:
    return (
        f"{cut['passages']:,} of {passages:,} passages are longer than the encoder reads, "
        f"{cut['limit_tokens']} tokens; the longest, {cut['longest']!r}, has "
        f"{cut['longest_tokens']:,}. Searches miss the text beyond: split passages (into 100 words "
        "each, say), use an encoder that reads more, or search by words too: --kind hybrid"
    )


def _check_installed(kind: IndexKind) -> None:
    """Raises NotInstalled before the encoding rather than after it."""
    checks = {
        "scann": [scann],
        "bm25": [bm25s],
        "hybrid": [scann, bm25s],
        "milvus": [milvus_client],
    }
    for check in checks.get(kind, []):
        check()


def _scann_options(options: Options) -> dict[str, int | None]:
    return {name: getattr(options, name) for name in Options._fields if name != "milvus_url"}


def _vectors(
    store: PassageStore, encoder: Encoder, folder: Path | None, own: Path, stage: Stage
) -> VectorShards:
    """The vectors in `folder`; without one, encodes the passages to `own`, or resumes there."""
    with stage("Reading passages") as advance:
        corpus = Corpus(lambda: store, advance)
    if folder is None:
        with stage(f"Encoding {len(store):,} passages") as advance:
            try:
                encode_shard(corpus, encoder, own, progress=advance)
            except VectorError:  # `own` is of another build
                shutil.rmtree(own)
                encode_shard(corpus, encoder, own, progress=advance)
    vectors = VectorShards(folder or own)
    vectors.check(corpus=corpus.fingerprint, encoder=encoder)
    return vectors


class _Build(NamedTuple):
    """The inputs of an index's files."""

    directory: Path
    store: PassageStore
    vectors: Vectors | None
    scann: dict[str, Any]
    milvus_url: str
    advance: Progress

    @property
    def dense(self) -> Vectors:
        """The vectors; the kind must need them."""
        assert self.vectors is not None
        return self.vectors

    def write(self, kind: IndexKind) -> dict[str, Any]:
        """Writes the files of one kind; returns its parameters."""
        match kind:
            case "scann":
                ScannSearcher.write(self.directory, self.dense, self.scann, self.advance)
                return self.scann
            case "exact":
                write_vectors(self.directory, self.dense, self.advance)
                return {}
            case "bm25":
                lines = (passage.line for passage in self.store)
                searcher = Bm25Searcher.build(lines)
                searcher.save(self.directory)
                return searcher.parameters
            case "milvus":
                return MilvusSearcher.write(
                    self.directory, self.dense, self.milvus_url, self.advance
                )
            case "hybrid":  # one after the other: only one is in memory
                return hybrid_parameters([self._part(0, "scann"), self._part(1, "bm25")])
        raise ConfigError(f"no kind of index {kind!r}")

    def _part(self, i: int, kind: IndexKind) -> dict[str, Any]:
        folder = self.directory / "parts" / str(i)
        folder.mkdir(parents=True)
        return {"kind": kind} | self._replace(directory=folder).write(kind)


def sample_queries(store: PassageStore, count: int = _RECALL_QUERIES) -> list[str]:
    """Queries somewhat like real ones: a passage's title and a few words of its text."""
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.choice(len(store), min(count, len(store)), replace=False))
    queries = []
    for i in chosen:
        title, text = split_line(store[int(i)].line)
        words = text.split()
        start = int(rng.integers(max(1, len(words) - _QUERY_WORDS)))
        queries.append(" ".join([title, *words[start : start + _QUERY_WORDS]]).strip())
    return queries


def _measure(
    searcher: Searcher, vectors: Vectors, store: PassageStore, encoder: Encoder
) -> dict[str, Any]:
    """Recall of an index (a hybrid: of its vector part) against exact search."""
    if isinstance(searcher, HybridSearcher):
        searcher = searcher.parts[0].searcher
    queries = encoder.encode(sample_queries(store), kind="query")
    k = min(_RECALL_K, len(store))
    ids, exact = searcher.search(queries, k)[0], oracle(vectors).search(queries, k)[0]
    return {"k": k, "queries": len(queries), "recall": round(recall(ids, exact), 4)}
