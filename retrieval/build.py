"""Building an index on disk: passages, vectors and searcher never have to fit in memory at once.

A build that is stopped goes on with the vectors that it had encoded, kept beside the new folder.
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
_COUNTED = 4096


class Options(NamedTuple):
    """What a build may be told beyond the kind; None is derived from the size."""

    leaves: int | None = None
    leaves_searched: int | None = None
    reorder: int | None = None
    shards: int | None = None
    milvus_url: str = ""  # none: Milvus Lite's file inside the index


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
        tell: is given the derived parameters, the predicted memory and recall before the work.

    Raises:
        CorpusError: there are no passages.
        FileExistsError: the folder is there and not empty.
        NotInstalled: the library of that kind is not installed.
        VectorError: the vectors are not this encoder's of this corpus, or not whole.
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
        told: dict[str, Any] = {}
        if kind != "bm25":
            if (cut := _cut(store, encoder, stage)) is not None:
                told["cut"] = cut
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
        describe(partial, encoder if kind != "bm25" else None, len(store), **built, **told)
    shutil.rmtree(own, ignore_errors=True)


def _prediction(kind: IndexKind, passages: int, dims: int, parameters: dict[str, Any]) -> str:
    predicted = cost(kind, passages, dims, parameters)
    told = (
        f"{kind} index of {passages:,} passages: about {predicted.memory / 1e6:,.0f} MB of memory"
    )
    if kind not in ("scann", "hybrid"):
        return told
    settings = ", ".join(f"{name} {value}" for name, value in parameters.items())
    return f"{told}\nScaNN: {settings}\nIts recall@5: {expected_recall(parameters)}"


def _cut(store: PassageStore, encoder: Encoder, stage: Stage) -> dict[str, Any] | None:
    """How many passages the encoder reads in part only, and the longest; None without a limit."""
    if not isinstance(encoder, BertEncoder):
        return None
    found: list[tuple[int, int]] = []
    with stage("Looking for passages that are too long") as advance:
        for start in range(0, len(store), _COUNTED):
            rows = range(start, min(start + _COUNTED, len(store)))
            long = encoder.too_long([store[i].line for i in rows])
            found += [(tokens, start + row) for row, tokens in long]
            advance(rows.stop, len(store))
    tokens, at = max(found, default=(0, 0))
    longest = {"longest": store[at].id, "longest_tokens": tokens} if found else {}
    return {"passages": len(found), "limit_tokens": encoder.max_length} | longest


def _cut_text(cut: dict[str, Any], passages: int) -> str:
    return (
        f"{cut['passages']:,} of {passages:,} passages are longer than the encoder reads, "
        f"{cut['limit_tokens']} tokens; the longest, {cut['longest']!r}, has "
        f"{cut['longest_tokens']:,}. What stands behind is not found: split them, into 100 words "
        "each say, take an encoder that reads more, or search by words too: --kind hybrid"
    )


def _check_installed(kind: IndexKind) -> None:
    """Fails before the encoding rather than after it."""
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
    store: PassageStore, encoder: Encoder, given: Path | None, own: Path, stage: Stage
) -> VectorShards:
    """The vectors given, or those of the passages, encoded as far as they are not yet."""
    with stage("Reading passages") as advance:
        corpus = Corpus(lambda: store, advance)
    if given is None:
        with stage(f"Encoding {len(store):,} passages") as advance:
            try:
                encode_shard(corpus, encoder, own, progress=advance)
            except VectorError:  # left by a build of something else
                shutil.rmtree(own)
                encode_shard(corpus, encoder, own, progress=advance)
    vectors = VectorShards(given or own)
    vectors.check(corpus=corpus.fingerprint, encoder=encoder)
    return vectors


class _Build(NamedTuple):
    """What the files of one index are made of."""

    directory: Path
    store: PassageStore
    vectors: Vectors | None
    scann: dict[str, Any]
    milvus_url: str
    advance: Progress

    @property
    def dense(self) -> Vectors:
        """The vectors, of a kind that is made of them."""
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
            case "hybrid":  # one after the other, neither in memory beside the other
                return hybrid_parameters([self._part(0, "scann"), self._part(1, "bm25")])
        raise ConfigError(f"no kind of index {kind!r}")

    def _part(self, i: int, kind: IndexKind) -> dict[str, Any]:
        folder = self.directory / "parts" / str(i)
        folder.mkdir(parents=True)
        return {"kind": kind} | self._replace(directory=folder).write(kind)


def sample_queries(store: PassageStore, count: int = _RECALL_QUERIES) -> list[str]:
    """Queries that real ones resemble somewhat: a title and a few words of the text."""
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
    """Recall of the vectors' part of an index against exact search."""
    if isinstance(searcher, HybridSearcher):
        searcher = searcher.parts[0].searcher
    queries = encoder.encode(sample_queries(store), kind="query")
    k = min(_RECALL_K, len(store))
    found, wanted = searcher.search(queries, k)[0], oracle(vectors).search(queries, k)[0]
    return {"k": k, "queries": len(queries), "recall": round(recall(found, wanted), 4)}
