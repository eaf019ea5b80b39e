"""An index made of vectors that exist: nothing is encoded but a few passages, to compare."""

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
_TOLD = 4096
# What the passages may have looked like to whoever encoded them, beside our own line.
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

    The vectors are read a block at a time (ScaNN: a shard), so that the peak of memory stays below
    twice the size of what is written.

    Args:
        passages: in the order of the vectors.
        encoder: the one that made the vectors; it reads the queries later.
        stage: opens a progress bar for each part of the work.
        check: a few passages are encoded and compared with their vectors.
        tell: is given a line on what was compared.

    Returns:
        What was built: `kind`, `passages`, `dims`, `recall` (found again of what flat search finds
        over a sample of the vectors themselves), `bytes_per_vector`, `compared`, `seconds`.

    Raises:
        VectorError: vectors that are not finite, not as many as the passages, not as the encoder
            makes them, or stored so that they rank otherwise.
        CorpusError, FileExistsError, NotInstalled: as `build.write_index`.
    """
    directory, began = Path(directory), time.monotonic()
    check_free(directory)
    if kind == "scann":
        scann()  # fail before the reading rather than after it
    vectors.check(encoder.dims)
    with new_folder(directory) as partial:
        with stage("Reading passages") as advance:
            store = PassageStore.write(partial, _as_many(passages, vectors, advance))
        compared = _compare(vectors, store, encoder) if check else None
        if tell and compared:
            tell(f"{compared['passages']} passages encoded anew: cosine {compared['cosine']}")
        built = _build(partial, vectors, store, kind, stage)
        size = stored_bytes(partial, (PASSAGES_FILE, OFFSETS_FILE))
        built["seconds"] = round(time.monotonic() - began, 1)
        imported = {"file": vectors.path.name, "form": vectors.form, "compared": compared}
        describe(partial, encoder, len(store), **built, imported=imported)
    told = {name: built[name] for name in ("kind", "recall", "seconds")}
    sizes = {"passages": len(vectors), "dims": encoder.dims}
    return told | sizes | {"bytes_per_vector": round(size / len(vectors), 1), "compared": compared}


def _build(
    directory: Path, vectors: FlatVectors, store: PassageStore, kind: ImportKind, stage: Stage
) -> dict[str, Any]:
    """Writes the searcher and measures it: what `index.json` tells of both."""
    with stage(f"Building the {kind} index") as advance:
        parameters = _write(directory, vectors, kind, advance)
    built: dict[str, Any] = {"kind": kind, "parameters": parameters}
    with stage("Measuring recall") as advance:
        built["recall"] = _measure(directory, built, vectors, store)
        advance(1, 1)
    return built


def _as_many(
    passages: Iterable[Passage], vectors: FlatVectors, advance: Progress
) -> Iterator[Passage]:
    """The passages, if there are as many as vectors; raises VectorError at the first too many."""
    read, total = 0, len(vectors)
    passages = iter(passages)
    for passage in itertools.islice(passages, total):
        read += 1
        if read % _TOLD == 0 or read == total:
            advance(read, total)
        yield passage
    more = next(passages, None) is not None
    if more or read < total:
        raise VectorError(
            f"{vectors.path} holds {total:,} vectors, but there are "
            f"{'more passages than that' if more else f'{read:,} passages'}: each vector needs "
            "its passage, in the same order"
        )


def _compare(vectors: FlatVectors, store: PassageStore, encoder: Encoder) -> dict[str, Any]:
    """Encodes a few passages and compares: {"passages", "cosine" (the least), "text"}.

    The title and the text may have been joined otherwise than in our line; the form that fits best
    counts. Raises VectorError where none does.
    """
    positions, stored = vectors.spread(_COMPARED)
    lines = [store[int(i)].line for i in positions]
    forms = {"line": lines} | {
        name: [join(*split_line(line)) if split_line(line)[0] else line for line in lines]
        for name, join in _TEXTS.items()
    }
    found = {name: _cosines(stored, encoder, texts) for name, texts in forms.items()}
    best = max(found, key=lambda name: found[name].min())
    cosines = found[best]
    if cosines.min() < _LEAST_COSINE:
        i = int(cosines.argmin())
        raise VectorError(
            f"{vectors.path}: vectors and passages do not belong together, or the encoder, its "
            f"prefix or pooling is another: passage {positions[i]:,} encoded anew has cosine "
            f"{cosines[i]:.3f} to its vector, least wanted {_LEAST_COSINE}. --no-check takes them "
            "all the same"
        )
    return {"passages": len(lines), "cosine": round(float(cosines.min()), 4), "text": best}


def _cosines(
    stored: Float[np.ndarray, "n dims"], encoder: Encoder, texts: list[str]
) -> Float[np.ndarray, " n"]:
    lengths = np.maximum(np.linalg.norm(stored, axis=1), 1e-12)
    return (encoder.encode(texts, kind="passage") * stored).sum(axis=1) / lengths


def _block_bytes(vectors: FlatVectors) -> int:
    """A small share of the whole, so that what is made of a block stays one too."""
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
    """Recall against flat search over the file itself, with some of its vectors as queries."""
    _, queries = vectors.spread(_RECALL_QUERIES)
    k, block = min(_RECALL_K, len(vectors)), _block_bytes(vectors)
    if built["kind"] == "exact":
        searcher = ExactSearcher(np.load(directory / "vectors.npy", mmap_mode="r"), block)
    else:
        searcher = open_searcher(directory, built, None, store)
    found, wanted = searcher.search(queries, k)[0], ExactSearcher(vectors, block).search(queries, k)
    return {"k": k, "queries": len(queries), "recall": round(recall(found, wanted[0]), 4)}
