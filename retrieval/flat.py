"""Vectors stored by other tools, read by slices: FAISS flat indexes, .npy files, raw float32.

A flat index, as `faiss.write_index` writes it (little-endian):

    4 bytes    "IxFI" (inner product), "IxF2" (L2) or "IxFl" (given by the metric)
    int32      dims
    int64      vectors
    2 x int64  not used
    1 byte     whether it was trained
    int32      metric: 0 inner product, 1 L2; other metrics append one float32
    uint64     number of float32 values: vectors * dims
    float32    the vectors, row-major

A .memmap, as FlashRAG writes it, has no header but only the float32 vectors.
"""

import math
import os
import struct
from pathlib import Path

import numpy as np
from jaxtyping import Float

from r1s_jax.io.errors import reading, shorten
from r1s_jax.retrieval.vectors import VectorError

_HEADER = struct.Struct("<4siqqqBiQ")
_NPY = b"\x93NUMPY"
_FLAT = {b"IxFI": "inner product", b"IxF2": "L2", b"IxFl": "the metric's"}
_METRICS = {0: "inner product", 1: "L2"}
# Unsupported kinds of FAISS index, by a prefix of their four-letter code.
_OTHER_KINDS = {
    b"IH": "HNSW",
    b"Iw": "IVF",
    b"Iv": "IVF",
    b"IxS": "scalar-quantised",
    b"IxP": "PQ or pre-transformed",
    b"IxM": "ID-mapped",
    b"IxR": "refined",
    b"IxH": "LSH",
    b"INS": "NSG",
    b"IB": "binary",
}
_MOST_DIMS, _MOST_ROWS = 2**20, 2**48
_COPY_ROWS = 4096
_NORM_SAMPLE = 1000
_NORM_TOLERANCE = 1e-2


class FlatVectors:
    """The vectors of one file by position; each slice is read from disk, not memory-mapped."""

    def __init__(self, path: str | Path, dims: int | None = None):
        """Reads the header and checks the file's size against it; only a .memmap needs `dims`.

        Raises:
            VectorError: the file is neither a FAISS flat index nor a .npy of float32 or float16
                [N, dims]; it is cut or too long; its metric is neither inner product nor L2.
            OSError: no such file.
        """
        self.path = Path(path)
        if self.path.is_dir():
            raise VectorError(
                f"{self.path} is a folder: name one file of vectors. Join the parts of one first "
                "(.npy: numpy.concatenate; shards .pt: load, concatenate, numpy.save)"
            )
        with self.path.open("rb") as file:
            head = file.read(_HEADER.size)
        if head[:6] == _NPY:
            opened = self._open_npy()
        elif dims and self.path.suffix == ".memmap" and head[:4] not in _FLAT:
            opened = self._open_bare(dims)
        else:
            opened = self._open_faiss(head)
        self.shape, self._dtype, self._offset = opened

    def _open_bare(self, dims: int) -> tuple[tuple[int, int], np.dtype, int]:
        size = self.path.stat().st_size
        if not size or size % (4 * dims):
            raise VectorError(
                f"{self.path}: {size:,} bytes are not whole rows of {dims} float32, the encoder's "
                "dims: the file is cut, made by another encoder, or of another dtype"
            )
        self.form = "bare float32"
        return (size // (4 * dims), dims), np.dtype("<f4"), 0

    def _open_faiss(self, head: bytes) -> tuple[tuple[int, int], np.dtype, int]:
        self._check_kind(head[:4])
        if len(head) < _HEADER.size:
            raise VectorError(f"{self.path} is cut inside its header ({len(head)} bytes)")
        kind, dims, count, _, _, _, metric, floats = _HEADER.unpack(head)
        if metric not in _METRICS or _FLAT[kind] not in (_METRICS[metric], "the metric's"):
            raise VectorError(
                f"{self.path} ranks by FAISS' metric {metric}; only inner product (0), and L2 (1) "
                "over vectors of length 1, can be imported"
            )
        if not (0 < dims <= _MOST_DIMS and 0 < count <= _MOST_ROWS and floats == count * dims):
            raise VectorError(
                f"{self.path}: its header is damaged or it is empty: {count} vectors of {dims} "
                f"dims, {floats} float32 values"
            )
        self.form = f"FAISS flat, {_METRICS[metric]}"
        self._check_size(_HEADER.size + 4 * floats)
        return (count, dims), np.dtype("<f4"), _HEADER.size

    def _check_kind(self, kind: bytes) -> None:
        if kind in _FLAT:
            return
        name = next((n for prefix, n in _OTHER_KINDS.items() if kind.startswith(prefix)), None)
        if kind == b"PK\x03\x04":
            raise VectorError(
                f"{self.path} is a PyTorch file or another archive: save its vectors with "
                "numpy.save, as float32 or float16 [passages, dims], and import the .npy"
            )
        if name is None:
            raise VectorError(
                f"{self.path} is neither a FAISS flat index (IxFI, IxF2) nor a .npy: it begins "
                f"with {shorten(repr(kind), 40)}"
            )
        raise VectorError(
            f"{self.path} is a FAISS index of another kind ({name}, {kind.decode()}), not a flat "
            "one. Import the flat index that it was made from, or save "
            "`index.reconstruct_n(0, index.ntotal)` as .npy where FAISS can do that, or encode the "
            "passages: r1s index build"
        )

    def _open_npy(self) -> tuple[tuple[int, int], np.dtype, int]:
        with reading(self.path, VectorError):
            rows = np.load(self.path, mmap_mode="r", allow_pickle=False)
        matrix = rows.ndim == 2 and rows.dtype in (np.float32, np.float16)
        if not matrix or not rows.flags.c_contiguous or not 0 < rows.size <= _MOST_ROWS:
            raise VectorError(
                f"{self.path} holds {rows.dtype} of shape {rows.shape}; expected float32 or "
                "float16, [passages, dims], row-major"
            )
        self.form = f"npy, {rows.dtype}"
        self._check_size(rows.offset + rows.nbytes)
        return rows.shape, np.dtype(rows.dtype), rows.offset

    def _check_size(self, expected: int) -> None:
        if (size := self.path.stat().st_size) != expected:
            fault = "is cut" if size < expected else "has bytes behind its vectors"
            raise VectorError(
                f"{self.path} {fault}: {size:,} bytes, but its header means {expected:,}. "
                "Download it again (join parts in order: cat part_* > whole)"
            )

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Float[np.ndarray, "rows dims"]:
        """Copies of consecutive rows, float32; raises VectorError for a row that is not finite."""
        start, stop, _ = rows.indices(len(self))
        out = np.empty((max(0, stop - start), self.shape[1]), np.float32)
        for at in range(start, stop, _COPY_ROWS):
            part = out[at - start : at - start + _COPY_ROWS]
            # No memory map: its pages would count as this process's memory.
            place = self._offset + at * self.shape[1] * self._dtype.itemsize
            values = np.fromfile(self.path, self._dtype, part.size, offset=place)
            part.flat = values  # pyright: ignore[reportAttributeAccessIssue]  # NumPy's stubs do not know
            finite = np.isfinite(part).all(axis=1)
            if not finite.all():
                raise VectorError(
                    f"{self.path}: vector {at + finite.argmin():,} holds NaN or infinity"
                )
        return out

    def spread(self, count: int) -> tuple[np.ndarray, Float[np.ndarray, "count dims"]]:
        """(positions, vectors) of up to `count` evenly spaced rows."""
        positions = np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).astype(np.int64))
        return positions, np.concatenate([self[int(i) : int(i) + 1] for i in positions])

    def check(self, dims: int) -> None:
        """Raises VectorError for other dims, or for an L2 index of vectors not of length 1.

        L2 distances of unit vectors rank as inner products do. A sample is measured.
        """
        if self.shape[1] != dims:
            raise VectorError(
                f"{self.path}: vectors of {self.shape[1]} dims, the encoder's have {dims}: "
                "another encoder made them"
            )
        positions, sample = self.spread(_NORM_SAMPLE)
        norms = np.linalg.norm(sample, axis=1)
        worst = int(np.abs(norms - 1).argmax())
        if self.form.endswith("L2") and not math.isclose(norms[worst], 1, abs_tol=_NORM_TOLERANCE):
            raise VectorError(
                f"{self.path} ranks by L2 distance, and vector {positions[worst]:,} has length "
                f"{norms[worst]:.3f}: L2 ranks as inner products do only for vectors of length 1. "
                "Scale them to length 1, or encode the passages: r1s index build"
            )


def stored_bytes(directory: Path, excluded: tuple[str, ...]) -> int:
    """Total bytes of the files in a folder, except those named in `excluded`."""
    files = (p for p in directory.rglob("*") if p.is_file() and p.name not in excluded)
    return sum(os.path.getsize(path) for path in files)
