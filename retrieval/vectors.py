"""Passage vectors on disk, in shards: several hosts write at once, and stopped jobs resume.

    vectors-00002-of-00008.json    the shard's place, corpus and encoder (`_Description`)
    vectors-00002-of-00008.npy     float16[rows, dims], present once complete
    vectors-00002-of-00008.sha256  digest of the .npy, checked when it is opened
    vectors-00002-of-00008.part    the unfinished .npy: its final header, then the rows so far

float16 halves the disk space (74 instead of 147 GB for KILT at 1024 dims). Components of unit
vectors are at most 1, so it changes a dot product by some 1e-4 only.
"""

import hashlib
import io
import itertools
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
import numpy as np
from jaxtyping import Float

from r1s_jax.io.errors import UserError, reading, shorten
from r1s_jax.io.json import read_object
from r1s_jax.io.schema import check
from r1s_jax.retrieval.api import Passage
from r1s_jax.retrieval.corpus import CorpusError
from r1s_jax.retrieval.encoder import Encoder, Progress
from r1s_jax.system.files import write_json, write_text
from r1s_jax.system.locks import only_one

_FORMAT = 1
_CHUNK = 4096
_NAME = re.compile(r"vectors-(\d{5})-of-(\d{5})\.json")


class VectorError(UserError, ValueError):
    """Vectors that are missing, damaged, or of another encoder or corpus."""


class Corpus:
    """Passages that can be read repeatedly, with their number and fingerprint."""

    def __init__(self, read: Callable[[], Iterable[Passage]], progress: Progress | None = None):
        """Reads all passages once; raises CorpusError where there are none."""
        self.read, self.length, digest = read, 0, hashlib.sha256()
        for passage in read():
            digest.update(f"{passage.id}\t{passage.line}\n".encode())
            self.length += 1
            if progress and self.length % _CHUNK == 0:
                progress(self.length, self.length)
        if progress:
            progress(self.length, self.length)
        if not self.length:
            raise CorpusError("the corpus", "no passages")
        self.fingerprint = digest.hexdigest()  # equals `sha256sum passages.tsv` in an index


def encode_shard(
    corpus: Corpus,
    encoder: Encoder,
    directory: Path,
    *,
    shard: int = 0,
    shards: int = 1,
    progress: Progress | None = None,
) -> Path:
    """Encodes the passages of one shard, resuming a stopped try; returns the .npy file.

    Raises VectorError where the folder holds vectors of another corpus, encoder or number of
    shards, InUse where another process encodes the same shard.
    """
    if not 0 <= shard < shards:
        raise VectorError(f"shard {shard + 1} of {shards}: expected 1 to {shards}")
    directory.mkdir(parents=True, exist_ok=True)
    description = _describe(corpus, encoder, shard, shards)
    _check_fits(directory, description)
    path = directory / f"vectors-{shard:05}-of-{shards:05}.npy"
    with only_one(path, "this part of the vectors"):
        if not path.exists():
            write_json(path.with_suffix(".json"), description)
            _encode(corpus, encoder, path, description, progress)
    return path


Count = Annotated[int, msgspec.Meta(ge=0, le=2**48)]


class _Description(TypedDict):
    """The contents of `vectors-*.json`."""

    format: int
    shard: Annotated[int, msgspec.Meta(ge=0, lt=100_000)]
    shards: Annotated[int, msgspec.Meta(ge=1, lt=100_000)]
    start: Count
    rows: Count
    passages: Count
    dims: Annotated[int, msgspec.Meta(ge=1, le=2**20)]
    corpus: str
    encoder: str
    reference: str


def _encode(
    corpus: Corpus,
    encoder: Encoder,
    path: Path,
    description: _Description,
    progress: Progress | None,
) -> None:
    partial, start, rows = path.with_suffix(".part"), description["start"], description["rows"]
    header = _npy_header((rows, encoder.dims))
    with partial.open("r+b" if partial.exists() else "w+b") as file:
        done = _resume(file, header, 2 * encoder.dims)
        passages = itertools.islice(iter(corpus.read()), start + done, start + rows)
        while chunk := list(itertools.islice(passages, _CHUNK)):
            # The default argument binds this chunk's `done`: the callback outlives the iteration.
            def report(of_chunk: int, _: int, before: int = done) -> None:
                if progress:
                    progress(before + of_chunk, rows)

            lines = [passage.line for passage in chunk]
            vectors = encoder.encode(lines, kind="passage", progress=report)
            file.write(vectors.astype("<f2").tobytes())
            file.flush()
            os.fsync(file.fileno())  # else a crash may keep the file's length and lose its data
            done += len(chunk)
    with partial.open("rb") as file:
        write_text(_digest_file(path), [hashlib.file_digest(file, "sha256").hexdigest()])
    partial.rename(path)


def _digest_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _describe(corpus: Corpus, encoder: Encoder, shard: int, shards: int) -> _Description:
    start, end = (corpus.length * i // shards for i in (shard, shard + 1))
    return {
        "format": _FORMAT,
        "shard": shard,
        "shards": shards,
        "start": start,
        "rows": end - start,
        "passages": corpus.length,
        "dims": encoder.dims,
        "corpus": corpus.fingerprint,
        "encoder": encoder.fingerprint,
        "reference": encoder.reference,
    }


def _read_description(path: Path) -> _Description:
    description = read_object(path, VectorError)
    if (version := description.get("format")) != _FORMAT:
        raise VectorError(
            f"{path} was made by another version (format {shorten(repr(version), 40)}; this one "
            f"reads {_FORMAT}): encode the passages again"
        )
    return check(description, _Description, path, VectorError)


def _check_fits(directory: Path, ours: _Description) -> None:
    """Raises VectorError where the folder holds shards of another corpus, encoder or division."""
    for path in sorted(directory.iterdir()):
        if _NAME.fullmatch(path.name):
            theirs = _read_description(path)
            for key in ("shards", "passages", "dims", "corpus", "encoder"):
                if theirs[key] != ours[key]:
                    raise VectorError(
                        f"{path}: {key} is {theirs[key]!r}, not {ours[key]!r}: "
                        "name another folder, or remove this one"
                    )


def _npy_header(shape: tuple[int, int]) -> bytes:
    out = io.BytesIO()
    layout = {"descr": "<f2", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, layout)
    return out.getvalue()


def _resume(file: Any, header: bytes, row_bytes: int) -> int:
    """Cuts a partial file after its last complete row, or starts it; returns its number of rows."""
    whole = file.read(len(header)) == header
    size = file.seek(0, os.SEEK_END)
    done = (size - len(header)) // row_bytes if whole else 0
    file.seek(0)
    file.write(header)
    file.truncate(len(header) + done * row_bytes)
    file.seek(0, os.SEEK_END)
    return done


class VectorShards:
    """The shards of a folder as one array of float32 rows, read from memory maps."""

    def __init__(self, directory: str | Path):
        """Raises VectorError for a folder without shards, or with a missing or incomplete one."""
        self.directory = Path(directory)
        files = sorted(p for p in self.directory.glob("vectors-*.json") if _NAME.fullmatch(p.name))
        if not files:
            raise VectorError(f"{directory} holds no vectors: run `r1s index encode` first")
        infos = [_read_description(path) for path in files]
        self.info = infos[0]
        for info in infos:
            _check_fits(self.directory, info)
        count = self.info["shards"]
        paths = [self.directory / f"vectors-{i:05}-of-{count:05}.npy" for i in range(count)]
        if missing := [path.name for path in paths if not path.exists()]:
            raise VectorError(
                f"{directory}: {', '.join(missing)} missing or not finished: "
                "run `r1s index encode` for each with --shard"
            )
        self._paths, self._parts = paths, [_open_shard(path, self.info["dims"]) for path in paths]
        self._starts = np.cumsum([0, *map(len, self._parts)])
        self.shape = (int(self._starts[-1]), self.info["dims"])
        if len(self) != self.info["passages"]:
            raise VectorError(f"{directory}: {len(self)} rows, not {self.info['passages']}")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Float[np.ndarray, "rows dims"]:
        """Copies of consecutive rows; raises VectorError for a row that is not finite."""
        start, stop, _ = rows.indices(len(self))
        out = np.empty((max(0, stop - start), self.shape[1]), np.float32)
        for path, part, first in zip(self._paths, self._parts, self._starts[:-1], strict=True):
            low, high = max(start, first), min(stop, first + len(part))
            for at in range(low, high, _CHUNK):
                end = min(at + _CHUNK, high)
                out[at - start : end - start] = part[at - first : end - first]
                finite = np.isfinite(out[at - start : end - start]).all(axis=1)
                if not finite.all():
                    raise VectorError(f"{path}: row {at - first + finite.argmin()} is not finite")
        return out

    def check(self, *, corpus: str, encoder: Encoder) -> None:
        """Raises VectorError unless `encoder` made these from the corpus with this fingerprint."""
        for name, ours, theirs in (
            ("encoder", encoder.fingerprint, self.info["encoder"]),
            ("dims", encoder.dims, self.info["dims"]),
            ("corpus", corpus, self.info["corpus"]),
        ):
            if ours != theirs:
                raise VectorError(
                    f"{self.directory} holds vectors of another {name}: {theirs}, not {ours}"
                )


def _open_shard(path: Path, dims: int) -> np.ndarray:
    digest = _digest_file(path)
    if not digest.exists():
        raise VectorError(f"{digest} is missing: remove {path.name} and encode that part again")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digest.read_text("ascii", "replace"):
            raise VectorError(f"{path} is damaged: encode that part again")
    with reading(path, VectorError):
        part = np.load(path, mmap_mode="r")
    if part.ndim != 2 or part.shape[1] != dims or part.dtype != np.float16:
        raise VectorError(f"{path}: {part.dtype} of shape {part.shape}, not rows of {dims} float16")
    return part
