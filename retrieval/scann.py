"""ScaNN indexes (Guo et al., 2020), with parameters that follow from the number of passages.

    passages     search                                                    stored vectors
    < 5,000      every dot product                                         float32
    to 100,000   anisotropic hashing, the best 100 scored again            float32
    above        the same, in a tenth of the sqrt(n) leaves of a tree      int8
    > 5 million  several such indexes, searched at once and merged         int8

Building is deterministic only below 5,000 passages.
"""

import gc
import math
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float

from r1s_jax.io.errors import ConfigError
from r1s_jax.retrieval.encoder import Progress
from r1s_jax.retrieval.searchers import Found, IndexKind, NotInstalled, Vectors, top_k

_BRUTE_FORCE_BELOW = 5_000
_TREE_ABOVE = 100_000
_SHARD_ABOVE, _SHARD = 5_000_000, 4_500_000
_REORDER = 100
# Fewer queries than this are not worth waking other threads for.
_PARALLEL_ROWS = 16
_TRAINING_SAMPLE = 250_000


class ScannSearcher:
    """One or several ScaNN indexes over consecutive ranges of the vectors."""

    kind: IndexKind = "scann"

    def __init__(self, shards: list[Any], parameters: dict[str, Any]):
        self._shards, self.parameters = shards, parameters
        self._starts = np.cumsum([0, *(shard.size() for shard in shards)])
        self._threads = ThreadPoolExecutor(len(shards)) if len(shards) > 1 else None

    @classmethod
    def build(cls, vectors: Vectors) -> "ScannSearcher":
        """Builds in memory, with the parameters that follow from the size."""
        parameters = scann_parameters(len(vectors))
        return cls(list(_build_shards(vectors, parameters)), parameters)

    @staticmethod
    def write(
        directory: Path,
        vectors: Vectors,
        parameters: dict[str, Any],
        progress: Progress | None = None,
    ) -> None:
        """Builds and writes shard by shard, so that no more than one is in memory."""
        for i, shard in enumerate(_build_shards(vectors, parameters)):
            _save_shard(directory, i, shard)
            del shard
            gc.collect()
            if progress:
                progress(i + 1, parameters.get("shards", 1))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def search(self, queries: Float[np.ndarray, "queries dims"], k: int) -> Found:
        if not self._threads:
            return self._search_shard(0, queries, k)
        parts = self._threads.map(
            lambda i: self._search_shard(i, queries, k), range(len(self._shards))
        )
        ids, scores = map(np.hstack, zip(*parts, strict=True))
        return top_k(ids, scores, k)

    def _search_shard(self, i: int, queries: Float[np.ndarray, "queries dims"], k: int) -> Found:
        k = min(k, self._shards[i].size())
        ids, scores = self._read_leaves(i, queries, k, None)
        # The leaves read may hold fewer than k passages: incomplete rows read more leaves.
        leaves, most = self.parameters.get("leaves_searched", 0), self.parameters.get("leaves", 0)
        while leaves < most and (short := np.isnan(scores).any(axis=1)).any():
            leaves = min(4 * leaves, most)
            ids[short], scores[short] = self._read_leaves(i, queries[short], k, leaves)
        return ids.astype(np.int64) + self._starts[i], scores

    def _read_leaves(
        self, i: int, queries: Float[np.ndarray, "queries dims"], k: int, leaves: int | None
    ) -> Found:
        options: dict[str, Any] = {"final_num_neighbors": k, "leaves_to_search": leaves}
        if "reorder" in self.parameters:
            # A reorder that is narrower than k would leave the rest of the row unranked.
            options["pre_reorder_num_neighbors"] = max(k, self.parameters["reorder"])
        if len(queries) < _PARALLEL_ROWS or self._threads:
            return self._shards[i].search_batched(queries, **options)
        rows = max(8, -(-len(queries) // (os.cpu_count() or 1)))
        return self._shards[i].search_batched_parallel(queries, batch_size=rows, **options)

    def save(self, directory: Path) -> None:
        for i, shard in enumerate(self._shards):
            _save_shard(directory, i, shard)

    @classmethod
    def open(cls, directory: Path, parameters: dict[str, Any]) -> "ScannSearcher":
        load = scann().load_searcher
        folders = [directory / "scann" / str(i) for i in range(parameters.get("shards", 1))]
        # The shim would write files into the index.
        shards = [load(str(folder.resolve()), assets_backcompat_shim=False) for folder in folders]
        return cls(shards, parameters)


def _build_shards(vectors: Vectors, parameters: dict[str, Any]) -> Iterator[Any]:
    library = scann()
    shards, n = parameters.get("shards", 1), len(vectors)
    for i in range(shards):
        rows = np.asarray(vectors[n * i // shards : n * (i + 1) // shards], np.float32)
        builder = library.builder(np.ascontiguousarray(rows), 10, "dot_product")
        if parameters["scoring"] == "brute_force":
            yield builder.score_brute_force().build()
            continue
        if "leaves" in parameters:
            sample = min(len(rows), _TRAINING_SAMPLE)
            leaves, searched = parameters["leaves"], parameters["leaves_searched"]
            builder = builder.tree(leaves, searched, training_sample_size=sample)
        builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2)
        int8 = parameters["vectors"] == "int8"
        yield builder.reorder(parameters["reorder"], quantize=int8).build()


def _save_shard(directory: Path, i: int, shard: Any) -> None:
    folder = (directory / "scann" / str(i)).resolve()
    folder.mkdir(parents=True)
    shard.serialize(str(folder), relative_path=True)


def scann_parameters(
    passages: int,
    *,
    leaves: int | None = None,
    leaves_searched: int | None = None,
    reorder: int | None = None,
    shards: int | None = None,
) -> dict[str, Any]:
    """ScaNN's parameters for a number of passages; `leaves` is the number in one shard.

    Raises ValueError for numbers that do not fit each other or the passages.
    """
    options = {"leaves": leaves, "leaves_searched": leaves_searched, "reorder": reorder}
    for name, number in (options | {"shards": shards}).items():
        if number is not None and not 1 <= number <= passages:
            raise ConfigError(f"{name}={number} must be from 1 to the {passages:,} passages")
    if passages < _BRUTE_FORCE_BELOW and not any(options.values()) and not shards:
        return {"scoring": "brute_force", "vectors": "float32"}
    shards = shards or (1 if passages <= _SHARD_ABOVE else -(-passages // _SHARD))
    big = passages > _TREE_ABOVE
    parameters: dict[str, Any] = {
        "scoring": "anisotropic_hashing",
        "reorder": reorder or _REORDER,
        "vectors": "int8" if big else "float32",
        "shards": shards,
    }
    if big or leaves or leaves_searched:
        rows = passages // shards
        leaves = leaves or max(math.isqrt(rows), leaves_searched or 1)
        searched = leaves_searched or max(1, leaves // 10)
        if not searched <= leaves <= rows:
            raise ConfigError(
                f"leaves_searched={searched} must be at most leaves={leaves}, and leaves at "
                f"most the {rows:,} passages of a shard"
            )
        parameters |= {"leaves": leaves, "leaves_searched": searched}
    return parameters


def stored_vectors(directory: Path, parameters: dict[str, Any]) -> Float[np.ndarray, "n dims"]:
    """The vectors that a saved index scores with: those it was built from, or rounded to int8."""
    parts = []
    for i in range(parameters.get("shards", 1)):
        folder = directory / "scann" / str(i)
        if parameters["vectors"] == "int8":
            scale = np.load(folder / "int8_multipliers.npy")
            parts.append(np.load(folder / "int8_dataset.npy") / scale)
        else:
            parts.append(np.load(folder / "dataset.npy"))
    return np.concatenate(parts).astype(np.float32)


_import_lock = threading.Lock()


def scann() -> ModuleType:
    """ScaNN's NumPy interface; hides TensorFlow, which the import would load needlessly."""
    with _import_lock:
        hidden = sys.modules.get("tensorflow")
        sys.modules["tensorflow"] = None  # pyright: ignore[reportArgumentType]  # None is allowed
        try:
            from scann import scann_ops_pybind
        except ImportError as error:
            raise NotInstalled(
                'ScaNN is not installed (it exists for Linux only): build with kind="exact"'
            ) from error
        finally:
            del sys.modules["tensorflow"]
            if hidden is not None:
                sys.modules["tensorflow"] = hidden
        return scann_ops_pybind
