"""Predicts the memory, disk and time of each kind of index before it is built.

Passages are read from a memory map: they need disk, not memory. Sizes follow from the file formats
and were checked against built indexes (docs/indexes.md).
"""

import math
from typing import Any, NamedTuple

from r1s_jax.retrieval.scann import scann_parameters

# Of an average Wikipedia passage of 100 words in UTF-8, with its id and its offset.
PASSAGE_BYTES = 550
_POSTINGS = 58  # distinct words in such a passage
_SCANN_FIXED = 12e6
_PEAK_OF_DISK = 1.3
# Measured on two cores of an AMD EPYC (docs/indexes.md): ScaNN's build seconds per component of a
# vector, and passages of 100 words a second by an encoder with `_RATED_WEIGHTS` layer weights.
_SCANN_SECONDS = 93 / (1e6 * 384)
_PASSAGES_A_SECOND, _RATED_WEIGHTS = 44.6, 10.6e6
_KINDS = ("scann", "exact", "bm25", "hybrid", "milvus")


class Cost(NamedTuple):
    """Bytes of an index."""

    memory: float  # resident while searching
    disk: float  # `cost` leaves out the passages, `plan` includes them
    build_peak: float  # peak memory of a build from vectors on disk

    def json(self) -> dict[str, int]:
        return {name: round(value) for name, value in self._asdict().items()}


def plan(passages: int, dims: int, passage_bytes: float = PASSAGE_BYTES) -> dict[str, Any]:
    """The cost of each kind of index, and ScaNN's parameters and expected recall."""
    parameters = scann_parameters(passages)
    costs = {kind: cost(kind, passages, dims, parameters) for kind in _KINDS}
    text = passages * passage_bytes
    return {
        "passages": passages,
        "dims": dims,
        "passage_text": round(text),
        "encoded_vectors": 2 * passages * dims,
        "scann": {"parameters": parameters, "recall": expected_recall(parameters)},
        "kinds": {kind: c._replace(disk=c.disk + text).json() for kind, c in costs.items()},
    }


def durations(
    passages: int, dims: int, weights: float | None = None, rate: float | None = None
) -> dict[str, int | None]:
    """Seconds: `encode` at `rate` passages a second, and `build_scann` on two cores.

    The default rate is that of two cores and an encoder with `weights` weights in its layers.
    Without `rate` and `weights`, `encode` is None.
    """
    if rate is None and weights:
        rate = _PASSAGES_A_SECOND * _RATED_WEIGHTS / weights
    return {
        "encode": round(passages / rate) if rate else None,
        "build_scann": round(_SCANN_SECONDS * passages * dims),
    }


def cost(kind: str, passages: int, dims: int, parameters: dict[str, Any]) -> Cost:
    """The cost of one kind without its passages; `parameters` are ScaNN's."""
    match kind:
        case "scann":
            return _scann(passages, dims, parameters)
        case "exact":
            return Cost(4.0 * passages * dims, 4.0 * passages * dims, 2.0**28)
        case "bm25":
            return _bm25(passages)
        case "milvus":  # the cluster holds all but the rows in flight
            return Cost(0.0, 0.0, 16e6)
    dense, words = _scann(passages, dims, parameters), _bm25(passages)
    peak = max(dense.build_peak, words.build_peak)  # one after the other
    return Cost(dense.memory + words.memory, dense.disk + words.disk, peak)


def _scann(passages: int, dims: int, parameters: dict[str, Any]) -> Cost:
    shards = parameters.get("shards", 1)
    rows = passages / shards
    if parameters["scoring"] == "brute_force":
        memory = disk = 4.0 * dims * rows
        peak = 2 * memory
    else:
        vector_bytes = dims if parameters["vectors"] == "int8" else 4 * dims
        leaves = parameters.get("leaves", 0)
        # Two dims share a 4-bit code, which takes a byte on disk. A leaf id takes 4 bytes.
        memory = rows * (vector_bytes + dims / 4 + 4 * bool(leaves)) + 8 * leaves * dims
        disk = rows * (vector_bytes + dims / 2 + 4 * bool(leaves)) + 8 * leaves * dims
        peak = 3.25 * 4 * dims * rows  # the rows themselves, and ScaNN's copies and residuals
    return Cost(memory * shards + _SCANN_FIXED * shards, disk * shards, peak + _SCANN_FIXED)


def _bm25(passages: int) -> Cost:
    postings = 8.0 * _POSTINGS * passages  # a float32 score and an int32 passage each
    words = 52e3 * (passages / 7000) ** 0.55  # vocabulary size (Heaps' law)
    return Cost(postings + 200 * words, postings + 20 * words, 50.0 * _POSTINGS * passages)


def expected_recall(parameters: dict[str, Any]) -> str:
    """ScaNN's recall@5 in trials; `r1s index info` shows the measured recall of an index."""
    if parameters["scoring"] == "brute_force":
        return "1 (every vector is compared)"
    if "leaves" not in parameters:
        return "about 0.99 (hashing of every vector, the best scored again in float32)"
    share = parameters["leaves_searched"] / parameters["leaves"]
    low = 0.95 if share >= 0.09 else 0.90 if share >= 0.04 else 0.8
    return f"about {low} to 0.98 (a tree of which {share:.0%} is read, {parameters['vectors']})"


def shards_within(passages: int, dims: int) -> int | None:
    """The shards that keep ScaNN's peak memory below 1.3 times the bytes it writes.

    None where the default of `scann_parameters` has enough shards.
    """
    parameters = scann_parameters(passages)
    if parameters["scoring"] == "brute_force":
        return None
    single = _scann(passages, dims, parameters | {"shards": 1})
    needed = math.ceil((single.build_peak - _SCANN_FIXED) / (_PEAK_OF_DISK * single.disk))
    return needed if needed > parameters["shards"] else None
