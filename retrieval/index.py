"""An index: an encoder, a searcher over its passage vectors, and the passages, as one thing.

    index = build_index(read_passages("corpus.tsv.gz"), encoder)
    save_index(index, "indexes/corpus")
    open_index("indexes/corpus", encoder).search(["who wrote Dune"], k=5)

A saved index is a folder that may be moved:

    index.json       what it was built from (`_describe`)
    passages.tsv     with offsets.npy: see `corpus.PassageStore`
    scann/           ScaNN's own files, or
    vectors.npy      float32[N, dims] of an exact index
"""

import hashlib
import json
import math
import os
import shutil
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Int

from r1s_jax.retrieval.corpus import (
    PASSAGES_FILE,
    CorpusError,
    Passage,
    PassageStore,
    split_line,
)
from r1s_jax.retrieval.encoder import Encoder, Progress

IndexKind = Literal["scann", "exact"]

_FORMAT = 1
_INFO_FILE = "index.json"
_ENCODE_CHUNK = 4096
# Below the first size ScaNN compares with every vector, exactly; above the second it needs a tree.
_BRUTE_FORCE_BELOW = 5_000
_TREE_ABOVE = 100_000
_REORDER = 100


class IndexFormatError(ValueError):
    """A folder that is not a whole index, or one that does not fit the encoder."""


class Hit(NamedTuple):
    """A passage found, with its score: the cosine of its vector and the query's."""

    id: str
    score: float
    line: str

    @property
    def title(self) -> str:
        return split_line(self.line)[0]

    @property
    def text(self) -> str:
        return split_line(self.line)[1]


class Searcher(Protocol):
    """Finds the vectors with the largest dot products; safe to share by threads."""

    kind: IndexKind
    parameters: dict[str, Any]

    def __len__(self) -> int: ...

    def search(
        self, queries: Float[np.ndarray, "queries dims"], k: int
    ) -> tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]:
        """Positions and scores, best first, for k up to the length; a NaN score is no hit."""
        ...

    def save(self, directory: Path) -> None: ...


class ExactSearcher:
    """Every dot product, by BLAS; hits of equal score stand in the corpus' order."""

    kind: IndexKind = "exact"

    def __init__(self, vectors: Float[np.ndarray, "passages dims"]):
        self._vectors = vectors
        self.parameters: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._vectors)

    def search(
        self, queries: Float[np.ndarray, "queries dims"], k: int
    ) -> tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]:
        scores = queries @ self._vectors.T
        ids = np.arange(len(self))[None].repeat(len(queries), 0)
        if k < len(self):
            ids = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        scores = np.take_along_axis(scores, ids, 1)
        order = np.lexsort((ids, -scores), axis=1)
        return np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)

    def save(self, directory: Path) -> None:
        np.save(directory / "vectors.npy", self._vectors)

    @classmethod
    def open(cls, directory: Path, parameters: dict[str, Any]) -> "ExactSearcher":
        return cls(np.load(directory / "vectors.npy", mmap_mode="r"))


class ScannSearcher:
    """ScaNN (Guo et al., 2020). Building is not deterministic beyond the brute-force sizes."""

    kind: IndexKind = "scann"

    def __init__(self, searcher: Any, parameters: dict[str, Any]):
        self._searcher = searcher
        self.parameters = parameters

    @classmethod
    def build(cls, vectors: Float[np.ndarray, "passages dims"]) -> "ScannSearcher":
        parameters = scann_parameters(len(vectors))
        builder = _scann().builder(vectors, 10, "dot_product")
        if parameters["scoring"] == "brute_force":
            return cls(builder.score_brute_force().build(), parameters)
        if "leaves" in parameters:
            builder = builder.tree(
                parameters["leaves"],
                parameters["leaves_searched"],
                training_sample_size=min(len(vectors), 250_000),
            )
        builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2)
        return cls(builder.reorder(parameters["reorder"]).build(), parameters)

    def __len__(self) -> int:
        return self._searcher.size()

    def search(
        self, queries: Float[np.ndarray, "queries dims"], k: int
    ) -> tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]:
        # A reorder that is narrower than k would leave the rest of the row unranked.
        reorder = max(k, self.parameters["reorder"]) if "reorder" in self.parameters else None
        return self._searcher.search_batched(
            queries, final_num_neighbors=k, pre_reorder_num_neighbors=reorder
        )

    def save(self, directory: Path) -> None:
        folder = (directory / "scann").resolve()
        folder.mkdir()
        self._searcher.serialize(str(folder), relative_path=True)

    @classmethod
    def open(cls, directory: Path, parameters: dict[str, Any]) -> "ScannSearcher":
        searcher = _scann().load_searcher(
            str((directory / "scann").resolve()),
            assets_backcompat_shim=False,  # it would write into the index
        )
        return cls(searcher, parameters)


def scann_parameters(passages: int) -> dict[str, Any]:
    """How ScaNN is set up for a number of passages."""
    if passages < _BRUTE_FORCE_BELOW:
        return {"scoring": "brute_force"}
    hashing = {"scoring": "anisotropic_hashing", "reorder": _REORDER}
    if passages <= _TREE_ABOVE:
        return hashing
    leaves = math.isqrt(passages)
    return hashing | {"leaves": leaves, "leaves_searched": leaves // 10}


_import_lock = threading.Lock()


def _scann() -> ModuleType:
    """ScaNN's NumPy interface. It would also load TensorFlow, at a cost, if it could find it."""
    with _import_lock:
        hidden = sys.modules.get("tensorflow")
        sys.modules["tensorflow"] = None
        try:
            from scann import scann_ops_pybind
        except ImportError as error:
            raise ImportError(
                'ScaNN is not installed (it exists for Linux only): build with kind="exact"'
            ) from error
        finally:
            del sys.modules["tensorflow"]
            if hidden is not None:
                sys.modules["tensorflow"] = hidden
        return scann_ops_pybind


class Index:
    """Searches passages by meaning; any number of threads may search at once."""

    def __init__(
        self, encoder: Encoder, searcher: Searcher, passages: Sequence[Passage] | PassageStore
    ):
        self.encoder, self.searcher, self.passages = encoder, searcher, passages

    def __len__(self) -> int:
        return len(self.passages)

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """The k best passages of each query, best first; fewer where there are no more."""
        if not queries or k < 1:
            return [[] for _ in queries]
        vectors = self.encoder.encode(queries, kind="query")
        ids, scores = self.searcher.search(vectors, min(k, len(self)))
        return [
            [self._hit(i, score) for i, score in zip(*row, strict=True) if not np.isnan(score)]
            for row in zip(ids, scores, strict=True)
        ]

    def _hit(self, i: int, score: float) -> Hit:
        id, line = self.passages[int(i)]
        return Hit(id, float(score), line)


def build_index(
    passages: Iterable[Passage],
    encoder: Encoder,
    *,
    kind: IndexKind = "scann",
    progress: Progress | None = None,
) -> Index:
    """Encodes passages and indexes their vectors, in memory.

    Raises:
        CorpusError: there are no passages.
        ImportError: `kind="scann"` where ScaNN is not installed.
    """
    if kind == "scann":
        _scann()  # fail before the encoding rather than after it
    passages = list(passages)
    if not passages:
        raise CorpusError("the corpus", "no passages")
    vectors = _encode(passages, encoder, progress)
    searcher = ScannSearcher.build(vectors) if kind == "scann" else ExactSearcher(vectors)
    return Index(encoder, searcher, passages)


def _encode(
    passages: Sequence[Passage], encoder: Encoder, progress: Progress | None
) -> Float[np.ndarray, "passages dims"]:
    vectors = np.empty((len(passages), encoder.dims), np.float32)

    def report(done: int, _: int) -> None:
        if progress:
            progress(start + done, len(passages))

    for start in range(0, len(passages), _ENCODE_CHUNK):
        lines = [passage.line for passage in passages[start : start + _ENCODE_CHUNK]]
        vectors[start : start + len(lines)] = encoder.encode(lines, kind="passage", progress=report)
    return vectors


def save_index(index: Index, directory: str | Path) -> None:
    """Writes an index to a new folder, which appears whole or not at all.

    Raises FileExistsError where the folder is there and not empty.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not empty")
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        PassageStore.write(partial, index.passages)
        index.searcher.save(partial)
        info = json.dumps(_describe(index, partial), indent=2)
        (partial / _INFO_FILE).write_text(info + "\n", "utf-8")
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _describe(index: Index, directory: Path) -> dict[str, Any]:
    """The contents of `index.json`, once all else is written."""
    with (directory / PASSAGES_FILE).open("rb") as file:
        corpus = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "format": _FORMAT,
        "kind": index.searcher.kind,
        "passages": len(index),
        "dims": index.encoder.dims,
        "parameters": index.searcher.parameters,
        "encoder": {
            "fingerprint": index.encoder.fingerprint,
            "reference": index.encoder.reference,
        },
        "corpus": corpus,
        "files": _file_sizes(directory),
    }


def _file_sizes(directory: Path) -> dict[str, int]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}


def open_index(directory: str | Path, encoder: Encoder) -> Index:
    """Opens a saved index with the encoder that it was built with.

    Raises:
        IndexFormatError: no index, an incomplete or damaged one, or one of another encoder.
        ImportError: an index of ScaNN's where ScaNN is not installed.
    """
    directory = Path(directory)
    info = read_info(directory)
    built_by = info["encoder"]
    if built_by["fingerprint"] != encoder.fingerprint:
        raise IndexFormatError(
            f"{directory} was built by encoder {built_by['fingerprint']} "
            f"({built_by['reference']}), not by {encoder.fingerprint} ({encoder.reference})"
        )
    sizes = _file_sizes(directory)
    if broken := [name for name, size in info["files"].items() if sizes.get(name) != size]:
        raise IndexFormatError(f"{directory} is incomplete: {', '.join(broken)} missing or cut")
    searcher_class = ScannSearcher if info["kind"] == "scann" else ExactSearcher
    try:
        searcher = searcher_class.open(directory, info["parameters"])
        return Index(encoder, searcher, PassageStore(directory))
    except (OSError, ValueError, RuntimeError) as error:
        raise IndexFormatError(f"{directory} is damaged: {error}") from error


def read_info(directory: str | Path) -> dict[str, Any]:
    """What `index.json` says; raises IndexFormatError where it is missing or not understood."""
    path = Path(directory) / _INFO_FILE
    try:
        info = json.loads(path.read_text("utf-8"))
        version = info["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IndexFormatError(f"{directory} is not an index: {error!r}") from error
    if version != _FORMAT:
        raise IndexFormatError(f"{directory} has format {version!r}; this code reads {_FORMAT}")
    return info
