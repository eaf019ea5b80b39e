"""An index joins an encoder, a searcher over passage vectors, and the passages.

    index = build_index(read_passages("corpus.tsv.gz"), encoder)
    save_index(index, "indexes/corpus")
    open_index("indexes/corpus", encoder).search(["who wrote Dune"], k=5)

A saved index is a folder that may be moved:

    index.json       what it was built from (`describe`)
    passages.tsv     with offsets.npy: see `corpus.PassageStore`
    scann/0/, ...    ScaNN's own files, a folder for each shard, or
    vectors.npy      float32[N, dims] of an exact index, or
    bm25/            bm25s' own files, or
    milvus.db        Milvus Lite's own file (a cluster keeps its vectors itself), or
    parts/0/, ...    the same files for each part of a hybrid

`build.write_index` builds one on disk, for corpora that should not be held in memory.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec
import numpy as np
from jaxtyping import Float

from r1s_jax.io.errors import ConfigError, UserError, reading, shorten
from r1s_jax.io.json import read_object
from r1s_jax.io.schema import check
from r1s_jax.retrieval.api import Hit, Passage
from r1s_jax.retrieval.bm25 import Bm25Searcher
from r1s_jax.retrieval.corpus import PASSAGES_FILE, CorpusError, PassageStore
from r1s_jax.retrieval.encoder import Encoder, Progress
from r1s_jax.retrieval.hybrid import HybridSearcher
from r1s_jax.retrieval.milvus import MilvusSearcher
from r1s_jax.retrieval.scann import ScannSearcher, scann
from r1s_jax.retrieval.searchers import (
    ExactSearcher,
    Found,
    IndexKind,
    MeshSearcher,
    NotInstalled,
    Searcher,
)
from r1s_jax.system.files import whole_folder
from r1s_jax.system.locks import only_one

FORMAT = 2
_INFO_FILE = "index.json"
_ENCODE_CHUNK = 4096
_SAMPLE_BYTES = 1 << 26
_COMPARED = 1000

_OPENERS: dict[str, Callable[[Path, dict[str, Any]], Searcher]] = {
    "scann": ScannSearcher.open,
    "exact": ExactSearcher.open,
    "bm25": Bm25Searcher.open,
    "milvus": MilvusSearcher.open,
}


class IndexFormatError(UserError, ValueError):
    """A folder is not a complete index, or was built with another encoder."""


class Index:
    """Searches passages by meaning, words or both; any number of threads may search at once."""

    def __init__(
        self,
        encoder: Encoder | None,
        searcher: Searcher,
        passages: Sequence[Passage] | PassageStore,
    ):
        """`encoder` is None for a searcher that reads texts."""
        self.encoder, self.searcher, self.passages = encoder, searcher, passages

    def __len__(self) -> int:
        return len(self.passages)

    def rank(self, queries: Sequence[str], k: int) -> Found:
        """Positions and scores, best first; a NaN score marks no hit. `k` is at most the length."""
        inputs = self.encoder.encode(queries, kind="query") if self.encoder else queries
        return self.searcher.search(inputs, k)

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """The k best passages of each query, best first; fewer if the index has fewer."""
        if not queries or k < 1:
            return [[] for _ in queries]
        ids, scores = self.rank(queries, min(k, len(self)))
        return [
            [self._hit(i, score) for i, score in zip(*row, strict=True) if not np.isnan(score)]
            for row in zip(ids, scores, strict=True)
        ]

    def _hit(self, i: int, score: float) -> Hit:
        id, line = self.passages[int(i)]
        return Hit(id, float(score), line)


def fuse(first: Index, second: Index) -> Index:
    """A hybrid of two indexes over the same passages.

    Raises IndexFormatError where the passages differ (up to a thousand are compared).
    """
    same = len(first) == len(second) and all(
        tuple(first.passages[i]) == tuple(second.passages[i])
        for i in range(0, len(first), -(-len(first) // _COMPARED))
    )
    if not same:
        raise IndexFormatError("a hybrid needs two indexes over the same passages")
    return Index(None, HybridSearcher((first, second)), first.passages)


def build_index(
    passages: Iterable[Passage],
    encoder: Encoder,
    *,
    kind: IndexKind = "scann",
    progress: Progress | None = None,
) -> Index:
    """Encodes passages and indexes them, in memory; `encoder` is not used by `kind="bm25"`.

    Raises:
        CorpusError: there are no passages.
        NotInstalled: the library of that kind is not installed.
    """
    if kind == "scann":
        scann()  # fail before the encoding rather than after it
    passages = list(passages)
    if not passages:
        raise CorpusError("the corpus", "no passages")
    if kind == "hybrid":
        words = build_index(passages, encoder, kind="bm25")
        return fuse(build_index(passages, encoder, progress=progress), words)
    if kind == "bm25":
        return Index(None, Bm25Searcher.build(passage.line for passage in passages), passages)
    vectors = _encode(passages, encoder, progress)
    searchers = {"scann": ScannSearcher.build, "exact": ExactSearcher}
    if kind not in searchers:
        raise ValueError(f"kind {kind!r} is not built in memory; use build.write_index")
    return Index(encoder, searchers[kind](vectors), passages)


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

    Raises FileExistsError where the folder exists and is not empty, ValueError for a hybrid of
    several encoders (save its parts, and `fuse` them once opened).
    """
    encoder = encoder_of(index)
    with new_folder(directory) as partial:
        PassageStore.write(partial, index.passages)
        index.searcher.save(partial)
        searcher = index.searcher
        describe(partial, encoder, len(index), kind=searcher.kind, parameters=searcher.parameters)


def encoder_of(index: Index) -> Encoder | None:
    """The one encoder of an index or its parts; raises ConfigError where parts have several."""
    if not isinstance(index.searcher, HybridSearcher):
        return index.encoder
    parts = [part for part in index.searcher.parts if isinstance(part, Index)]
    encoders = {e.fingerprint: e for p in parts if (e := encoder_of(p))}
    if len(encoders) > 1:
        raise ConfigError(f"a saved hybrid has one encoder at most, not {', '.join(encoders)}")
    return next(iter(encoders.values()), None)


@contextmanager
def new_folder(directory: str | Path) -> Iterator[Path]:
    """A folder to fill: gets its name when the block succeeds, is removed when it fails.

    Raises FileExistsError where the name is taken by anything but an empty folder, InUse where
    another process writes there.
    """
    directory = Path(directory)
    with only_one(directory, "the index"):
        check_free(directory)
        with whole_folder(directory) as partial:
            yield partial


def check_free(directory: Path) -> None:
    """Raises FileExistsError unless an index can be written there."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not empty")


def describe(directory: Path, encoder: Encoder | None, passages: int, **built: Any) -> None:
    """Writes `index.json`, the last file; `built` has `kind`, `parameters` and more fields."""
    path = directory / PASSAGES_FILE
    with path.open("rb") as file:
        corpus = hashlib.file_digest(file, "sha256").hexdigest()
    info = {
        "format": FORMAT,
        "passages": passages,
        "dims": encoder and encoder.dims,
        "encoder": encoder and encoder_info(encoder),
        "corpus": corpus,
        "corpus_sample": _sample_digest(path),
        **built,
        "files": _file_sizes(directory),
        # Milvus goes on writing its files after the build, so digests would change.
        "digests": {} if built.get("kind") == "milvus" else _digests(directory),
    }
    (directory / _INFO_FILE).write_text(json.dumps(info, indent=2) + "\n", "utf-8")


def encoder_info(encoder: Encoder) -> dict[str, Any]:
    """The entry of an encoder in `index.json`, with which `references.index_encoder` reopens it."""
    instructions = getattr(encoder, "instructions", None)
    optional = {"instructions": instructions} if instructions else {}
    return {"fingerprint": encoder.fingerprint, "reference": encoder.reference} | optional


def _sample_digest(path: Path) -> str:
    """A digest of up to 64 MiB in evenly spread blocks, which is fast for files of any size."""
    size, block = path.stat().st_size, 1 << 16
    digest = hashlib.sha256(str(size).encode())
    step = max(block, size // (_SAMPLE_BYTES // block))
    with path.open("rb") as file:
        for start in range(0, size, step):
            file.seek(start)
            digest.update(file.read(block))
    return digest.hexdigest()


def _digests(directory: Path) -> dict[str, dict[str, str]]:
    """Two digests of each file: `sample`, checked at each opening, and `sha256` of all bytes."""
    digests = {}
    for name in _file_sizes(directory):
        with (directory / name).open("rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest()
        digests[name] = {"sample": _sample_digest(directory / name), "sha256": whole}
    return digests


def check_whole(directory: Path, info: dict[str, Any]) -> None:
    """Raises IndexFormatError where any byte of a file has changed since the build.

    Reads all bytes; `check_files`, which every opening calls, reads evenly spread blocks.
    """
    if not info["digests"]:
        raise IndexFormatError(
            f"{directory} has no digests: Milvus goes on writing its files, so their contents "
            "cannot be checked"
        )
    for name, digests in info["digests"].items():
        with (directory / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digests["sha256"]:
                raise IndexFormatError(f"{directory}: {name} is damaged: build the index again")


def _file_sizes(directory: Path) -> dict[str, int]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}


def open_index(
    directory: str | Path,
    encoder: Encoder | None,
    *,
    devices: Sequence[Any] | None = None,
) -> Index:
    """Opens a saved index with the encoder that it was built with (ignored if it has none).

    `devices` share the vectors of an exact index; without them the CPU searches it.

    Raises:
        IndexFormatError: no index, an incomplete or damaged index, or another encoder.
        NotInstalled: the library of that kind is not installed.
    """
    directory = Path(directory)
    info = read_info(directory)
    check_encoder(directory, info, encoder)
    check_files(directory, info)
    try:
        with reading(f"{directory} is damaged: it", IndexFormatError):
            passages = PassageStore(directory)
            searcher = open_searcher(directory, info, encoder, passages, devices)
            if len(passages) != info["passages"]:
                raise IndexFormatError(f"{len(passages)} passages, not {info['passages']}")
            reads_vectors = info["kind"] not in ("bm25", "hybrid")
            return Index(encoder if reads_vectors else None, searcher, passages)
    except NotInstalled:
        raise
    except (UserError, OSError) as error:
        message = str(error)
        if str(directory) not in message:
            message = f"{directory} is damaged: {message}"
        raise IndexFormatError(message) from error


def check_encoder(directory: Path, info: dict[str, Any], encoder: Encoder | None) -> None:
    """Raises IndexFormatError unless the index was built with this encoder, or with none."""
    built_by = info["encoder"]
    if built_by and (encoder is None or built_by["fingerprint"] != encoder.fingerprint):
        ours = f"{encoder.fingerprint} ({encoder.reference})" if encoder else "none"
        raise IndexFormatError(
            f"{directory} was built by encoder {built_by['fingerprint']} "
            f"({built_by['reference']}), not by {ours}"
        )


def check_files(directory: Path, info: dict[str, Any]) -> None:
    """Raises IndexFormatError where a file is missing, cut or, in its sample, changed."""
    sizes, grows = _file_sizes(directory), info["kind"] == "milvus"
    expected = info["files"].items()
    if broken := [n for n, size in expected if n not in sizes or (sizes[n] != size and not grows)]:
        raise IndexFormatError(f"{directory} is incomplete: {', '.join(broken)} missing or cut")
    if _sample_digest(directory / PASSAGES_FILE) != info["corpus_sample"]:
        raise IndexFormatError(
            f"{directory}: {PASSAGES_FILE} is not the corpus that the index was built from"
        )
    for name, digests in info["digests"].items():
        if _sample_digest(directory / name) != digests["sample"]:
            raise IndexFormatError(
                f"{directory}: {name} is not what was built: damaged, or of another index"
            )


def open_searcher(
    directory: Path,
    info: dict[str, Any],
    encoder: Encoder | None,
    passages: PassageStore,
    devices: Sequence[Any] | None = None,
) -> Searcher:
    """Opens the searcher of a folder whose files have been checked."""
    kind, parameters = info["kind"], info["parameters"]
    if kind == "hybrid":
        parts = [
            Index(
                None if part["kind"] == "bm25" else encoder,
                _OPENERS[part["kind"]](directory / "parts" / str(i), part),
                passages,
            )
            for i, part in enumerate(parameters["parts"])
        ]
        return HybridSearcher(parts)
    if kind == "exact" and devices:
        return MeshSearcher(np.load(directory / "vectors.npy", mmap_mode="r"), devices)
    return _OPENERS[kind](directory, parameters)


class _BuiltBy(TypedDict):
    """The encoder of an index."""

    fingerprint: str
    reference: str
    instructions: NotRequired[dict[str, str]]


class _FileDigests(TypedDict):
    sample: str
    sha256: str


class _Info(TypedDict):
    """The required contents of `index.json`; it may hold more."""

    format: int
    kind: Literal["scann", "exact", "bm25", "hybrid", "milvus"]
    passages: Annotated[int, msgspec.Meta(ge=1)]
    dims: Annotated[int, msgspec.Meta(ge=1, le=2**20)] | None
    encoder: _BuiltBy | None
    parameters: dict[str, Any]
    corpus: str
    corpus_sample: str
    files: dict[str, Annotated[int, msgspec.Meta(ge=0)]]
    digests: dict[str, _FileDigests]  # empty for Milvus, whose files go on changing


def read_info(directory: str | Path) -> dict[str, Any]:
    """The contents of `index.json`; raises IndexFormatError where it is missing or invalid."""
    path = Path(directory) / _INFO_FILE
    if not path.is_file():
        raise IndexFormatError(f"{directory} is not an index: it holds no {_INFO_FILE}")
    info = read_object(path, IndexFormatError)
    version = info.get("format")
    if version != FORMAT or "digests" not in info:
        raise IndexFormatError(
            f"{directory} was made by another version (format {shorten(repr(version), 40)}; this "
            f"one reads {FORMAT}, with digests of all files): build it again"
        )
    check(info, _Info, f"{directory} is not an index: {_INFO_FILE}", IndexFormatError)
    if outside := [name for name in info["files"] if ".." in Path(name).parts or name[:1] == "/"]:
        raise IndexFormatError(f"{path} names a file outside of its folder: {outside[0]!r}")
    return info
