"""The protocols of all kinds of index, and exact search, against which others are measured."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Integer

from r1s_jax.retrieval.encoder import Progress

IndexKind = Literal["scann", "exact", "bm25", "hybrid", "milvus"]
Found = tuple[Integer[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]
# Opens a progress bar with a title and returns the function that moves it.
Stage = Callable[[str], AbstractContextManager[Progress]]

_BLOCK_BYTES = 1 << 28


class NotInstalled(ImportError, ValueError):
    """The library of a kind of index is not installed."""


class Vectors(Protocol):
    """Passage vectors by position: an array, a memory map or `vectors.VectorShards`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


class Searcher(Protocol):
    """Ranks passages, named by their positions; threads may share it."""

    kind: IndexKind

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters that the index was built with, JSON-serialisable."""
        ...

    def __len__(self) -> int: ...

    def search(self, queries: Any, k: int) -> Found:
        """Positions and scores, best first; a NaN score marks no hit. `k` is at most the length.

        `queries` are unit vectors float32[queries, dims], or texts where the kind reads texts.
        """
        ...

    def save(self, directory: Path) -> None: ...


class Ranker(Protocol):
    """Ranks passages for texts, with an encoder if its searcher reads vectors: `index.Index`."""

    searcher: Searcher

    def rank(self, queries: Sequence[str], k: int) -> Found: ...


def top_k(
    ids: Integer[np.ndarray, "queries n"], scores: Float[np.ndarray, "queries n"], k: int
) -> Found:
    """The k best of each row, best first; equal scores in order of position, NaN last."""
    ranked = np.where(np.isnan(scores), -np.inf, scores)
    if k < scores.shape[1]:
        best = np.argpartition(-ranked, k - 1, axis=1)[:, :k]
        ids, scores, ranked = (np.take_along_axis(x, best, 1) for x in (ids, scores, ranked))
    order = np.lexsort((ids, -ranked), axis=1)
    return np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)


def blocks(
    vectors: Vectors, most: int = _BLOCK_BYTES
) -> Iterator[tuple[int, Float[np.ndarray, "rows dims"]]]:
    """Yields (first position, float32 rows), at most `most` bytes of rows at a time."""
    rows = max(1, most // (4 * vectors.shape[1]))
    for start in range(0, len(vectors), rows):
        yield start, np.asarray(vectors[start : start + rows], np.float32)


class ExactSearcher:
    """Computes every dot product by BLAS; hits of equal score are in the corpus' order."""

    kind: IndexKind = "exact"

    def __init__(self, vectors: Vectors, block_bytes: int = _BLOCK_BYTES):
        """`block_bytes` of vectors are read and scored at a time."""
        self._vectors, self._block_bytes = vectors, block_bytes
        self.parameters: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._vectors)

    def search(self, queries: Float[np.ndarray, "queries dims"], k: int) -> Found:
        merged: Found | None = None
        for start, rows in blocks(self._vectors, self._block_bytes):
            ids = np.arange(start, start + len(rows))[None].repeat(len(queries), 0)
            best = top_k(ids, queries @ rows.T, k)
            merged = top_k(*map(np.hstack, zip(merged, best, strict=True)), k) if merged else best
        assert merged is not None  # there is at least one vector
        return merged

    def save(self, directory: Path) -> None:
        write_vectors(directory, self._vectors)

    @classmethod
    def open(cls, directory: Path, parameters: dict[str, Any]) -> "ExactSearcher":
        return cls(np.load(directory / "vectors.npy", mmap_mode="r"))


def write_vectors(
    directory: Path,
    vectors: Vectors,
    progress: Progress | None = None,
    block_bytes: int = _BLOCK_BYTES,
) -> None:
    """Writes the files of an exact index, a block at a time."""
    path, shape = directory / "vectors.npy", (len(vectors), vectors.shape[1])
    out = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    for start, rows in blocks(vectors, block_bytes):
        out[start : start + len(rows)] = rows
        if progress:
            progress(start + len(rows), len(vectors))
    out.flush()


class MeshSearcher(ExactSearcher):
    """Exact search on accelerators: each device holds and ranks its share of the vectors.

    Not for a retriever inside a training run, which occupies the devices itself.
    """

    _ROWS = 64  # queries per call: one compiled shape for each k

    def __init__(self, vectors: Vectors, devices: Sequence[Any]):
        super().__init__(vectors)
        self._mesh = jax.make_mesh((len(devices),), ("x",), (AxisType.Auto,), devices=devices)
        self._share = -(-len(vectors) // len(devices))

        def rows_of(index: Any) -> np.ndarray:
            rows = np.zeros((self._share, vectors.shape[1]), np.float32)
            own = np.asarray(vectors[index[0]], np.float32)
            rows[: len(own)] = own
            return rows

        self._on_devices = jax.make_array_from_callback(
            (self._share * len(devices), vectors.shape[1]),
            NamedSharding(self._mesh, P("x")),
            rows_of,
        )

    def search(self, queries: Float[np.ndarray, "queries dims"], k: int) -> Found:
        parts = [queries[i : i + self._ROWS] for i in range(0, len(queries), self._ROWS)]
        ranked = [self._search(part, k) for part in parts]
        ids, scores = (np.concatenate(x) for x in zip(*ranked, strict=True))
        return ids.astype(np.int64), scores

    def _search(self, queries: Float[np.ndarray, "queries dims"], k: int) -> Found:
        padded = np.zeros((self._ROWS, queries.shape[1]), np.float32)
        padded[: len(queries)] = queries
        ids, scores = _rank(padded, self._on_devices, self._mesh, k, len(self))
        return np.asarray(ids)[: len(queries)], np.asarray(scores)[: len(queries)]


@jax.jit(static_argnames=("mesh", "k", "length"))
def _rank(queries: jax.Array, vectors: jax.Array, mesh: jax.sharding.Mesh, k: int, length: int):
    """Ids and scores [queries, k] of the best among the first `length` vectors."""

    def share(queries: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Accelerators multiply float32 at lower precision by default; exact search must not.
        scores = jnp.matmul(queries, rows.T, precision="highest")
        ids = jax.lax.axis_index("x") * len(rows) + jnp.arange(len(rows))
        scores = jnp.where(ids < length, scores, -jnp.inf)
        scores, best = jax.lax.top_k(scores, min(k, len(rows)))
        every = jax.lax.all_gather((ids[best], scores), "x", axis=1, tiled=True)
        scores, best = jax.lax.top_k(every[1], k)
        return jnp.take_along_axis(every[0], best, 1), scores

    ranked = jax.shard_map(
        share, mesh=mesh, in_specs=(P(), P("x")), out_specs=(P(), P()), check_vma=False
    )
    return ranked(queries, vectors)


def oracle(vectors: Vectors) -> ExactSearcher:
    """Exact search on the accelerators, or by BLAS where there are none."""
    if jax.default_backend() == "cpu":
        return ExactSearcher(vectors)
    return MeshSearcher(vectors, jax.local_devices())


def recall(ids: np.ndarray, exact: np.ndarray) -> float:
    """The mean share of the `exact` ids [queries, k] that are among the `ids` of the same query."""
    rows = zip(ids, exact, strict=True)
    return float(np.mean([np.isin(best, retrieved).mean() for retrieved, best in rows]))
