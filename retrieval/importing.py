"""Builds an index of existing vectors; encodes a few passages only, to check the vectors."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from r1s_jax.io.errors import ConfigError
from r1s_jax.retrieval.api import Passage, split_line
from r1s_jax.retrieval.corpus import OFFSETS_FILE, PASSAGES_FILE, PassageStore
from r1s_jax.retrieval.encoder import Encoder, Progress
from r1s_jax.retrieval.flat import FlatVectors, stored_bytes
from r1s_jax.retrieval.index import check_free, describe, new_folder, open_searcher
from r1s_jax.retrieval.plan import shards_within
from r1s_jax.retrieval.scann import ScannSearcher, scann, scann_parameters
from r1s_jax.retrieval.searchers import ExactSearcher, Stage, recall, write_vectors
from r1s_jax.retrieval.vectors import VectorError

ImportKind = Literal["scann", "exact"]

_COMPARED, _LEAST_COSINE = 8, 0.98
_RECALL_QUERIES, _RECALL_K = 200, 10
_SMALLEST_BLOCK, _LARGEST_BLOCK = 1 << 16, 1 << 26
_REPORT_PASSAGES = 4096
# Forms, besides our own line, in which a passage may have been encoded.
_TEXTS: dict[str, Callable[[str, str], str]] = {
    "contents": lambda title, text: f'"{title}"\n{text}',  # Search-R1's rows
    "title text": lambda title, text: f"{title} {text}",
}


def import_index(
    directory: str | Path,
    vectors: FlatVectors,
    passages: Iterable[Passage],
    encoder: Encoder,
    stage: Stage,
    *,
    kind: ImportKind = "scann",
    check: bool = True,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Builds an index of stored vectors in a new folder, which appears whole or not at all.

    Reads the vectors a block at a time (ScaNN: a shard at a time), so that peak memory stays below
    twice the size of the files written.

    Args:
        passages: in the order of the vectors.
        encoder: made the vectors, and will encode the queries.
        stage: opens a progress bar for each part of the work.
        check: encode a few passages and compare them with their vectors.
        tell: is called with a line on that comparison.

    Returns:
        Of the index: `kind`, `passages`, `dims`, `recall` (against exact search, with a sample of
        the vectors as queries), `bytes_per_vector`, `compared`, `seconds`.

    Raises:
        VectorError: the vectors are not finite, are not as many as the passages, differ from the
            encoder's, or are ranked otherwise than by inner products.
        CorpusError, FileExistsError, NotInstalled: as `build.write_index`.
    """
    directory, began = Path(directory), time.monotonic()
    check_free(directory)
    if kind == "scann":
        scann()  # fail before the reading rather than after it
    vectors.check(encoder.dims)
    with new_folder(directory) as partial:
        with stage("Reading passages") as advance:
            store = PassageStore.write(partial, _same_number(passages, vectors, advance))
        compared = _compare(vectors, store, encoder) if check else None
        if tell and compared:
            tell(f"{compared['passages']} passages encoded again: cosine {compared['cosine']}")
        built = _build(partial, vectors, store, kind, stage)
        size = stored_bytes(partial, (PASSAGES_FILE, OFFSETS_FILE))
        built["seconds"] = round(time.monotonic() - began, 1)
        imported = {"file": vectors.path.name, "form": vectors.form, "compared": compared}
        describe(partial, encoder, len(store), **built, imported=imported)
    return {name: built[name] for name in ("kind", "recall", "seconds")} | {
        "passages": len(vectors),
        "dims": encoder.dims,
        "bytes_per_vector": round(size / len(vectors), 1),
        "compared": compared,
    }


def _build(
    directory: Path, vectors: FlatVectors, store: PassageStore, kind: ImportKind, stage: Stage
) -> dict[str, Any]:
    """Writes the searcher and measures its recall; returns their entries in `index.json`."""
    with stage(f"Building the {kind} index") as advance:
        parameters = _write(directory, vectors, kind, advance)
    built: dict[str, Any] = {"kind": kind, "parameters": parameters}
    with stage("Measuring recall") as advance:
        built["recall"] = _measure(directory, built, vectors, store)
        advance(1, 1)
    return built


def _same_number(
    passages: Iterable[Passage], vectors: FlatVectors, advance: Progress
) -> Iterator[Passage]:
    """Yields the passages; raises VectorError unless there are as many as vectors."""
    count, total = 0, len(vectors)
    passages = iter(passages)
    for passage in itertools.islice(passages, total):
        count += 1
        if count % _REPORT_PASSAGES == 0 or count == total:
            advance(count, total)
        yield passage
    more = next(passages, None) is not None
    if more or count < total:
        raise VectorError(
            f"{vectors.path} holds {total:,} vectors, but there are "
            f"{'more passages than that' if more else f'{count:,} passages'}: each vector needs "
            "its passage, in the same order"
        )


def _compare(vectors: FlatVectors, store: PassageStore, encoder: Encoder) -> dict[str, Any]:
    """Encodes a few passages and compares: {"passages", "cosine" (the least), "text"}.

    `text` names the form of the passages that fits best. Raises VectorError where none fits.
    """
    positions, stored = vectors.spread(_COMPARED)
    lines = [store[int(i)].line for i in positions]
    forms = {"line": lines} | {
        name: [join(*split_line(line)) if split_line(line)[0] else line for line in lines]
        for name, join in _TEXTS.items()
    }
    cosines_of = {name: _cosines(stored, encoder, texts) for name, texts in forms.items()}
    best = max(cosines_of, key=lambda name: cosines_of[name].min())
    cosines = cosines_of[best]
    if cosines.min() < _LEAST_COSINE:
        i = int(cosines.argmin())
        raise VectorError(
            f"{vectors.path}: vectors and passages do not belong together, or the encoder, its "
            f"prefix or its pooling differs: passage {positions[i]:,}, encoded again, has cosine "
            f"{cosines[i]:.3f} to its vector, below {_LEAST_COSINE}. --no-check skips this "
            "comparison"
        )
    return {"passages": len(lines), "cosine": round(float(cosines.min()), 4), "text": best}


def _cosines(
    stored: Float[np.ndarray, "n dims"], encoder: Encoder, texts: list[str]
) -> Float[np.ndarray, " n"]:
    lengths = np.maximum(np.linalg.norm(stored, axis=1), 1e-12)
    return (encoder.encode(texts, kind="passage") * stored).sum(axis=1) / lengths


def _block_bytes(vectors: FlatVectors) -> int:
    """Bytes of a block: a small share of all vectors, so that arrays computed from it are too."""
    return min(max(4 * len(vectors) * vectors.shape[1] // 64, _SMALLEST_BLOCK), _LARGEST_BLOCK)


def _write(
    directory: Path, vectors: FlatVectors, kind: ImportKind, advance: Progress
) -> dict[str, Any]:
    """Writes the searcher's files; returns its parameters."""
    if kind == "exact":
        write_vectors(directory, vectors, advance, _block_bytes(vectors))
        return {}
    if kind != "scann":
        raise ConfigError(f"stored vectors make an index of kind scann or exact, not {kind!r}")
    shards = shards_within(len(vectors), vectors.shape[1])
    parameters = scann_parameters(len(vectors), shards=shards)
    ScannSearcher.write(directory, vectors, parameters, advance)
    return parameters


def _measure(
    directory: Path, built: dict[str, Any], vectors: FlatVectors, store: PassageStore
) -> dict[str, Any]:
    """Recall against exact search over the file, with some of its vectors as queries."""
    _, queries = vectors.spread(_RECALL_QUERIES)
    k, block = min(_RECALL_K, len(vectors)), _block_bytes(vectors)
    if built["kind"] == "exact":
        searcher = ExactSearcher(np.load(directory / "vectors.npy", mmap_mode="r"), block)
    else:
        searcher = open_searcher(directory, built, None, store)
    ids, exact = searcher.search(queries, k)[0], ExactSearcher(vectors, block).search(queries, k)[0]
    return {"k": k, "queries": len(queries), "recall": round(recall(ids, exact), 4)}
