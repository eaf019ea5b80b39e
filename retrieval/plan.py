"""What each kind of index will take, told before anything is built.

Bytes are those of the searcher. Passages are read from a memory map: they need disk, not memory.
The rates are counted from the formats and were checked by building (docs/indexes.md).
"""

import math
from typing import Any, NamedTuple

from r1s_jax.retrieval.scann import scann_parameters

# An average passage of 100 words of Wikipedia, in UTF-8, with its id and its offset.
PASSAGE_BYTES = 550
_POSTINGS = 58  # different words of such a passage
_SCANN_FIXED = 12e6
_PEAK_OF_DISK = 1.3
# Measured on two cores of an AMD EPYC (docs/indexes.md): seconds of ScaNN for each number of the
# vectors, and passages of 100 words a second by an encoder of so many weights in its layers.
_SCANN_SECONDS = 93 / (1e6 * 384)
_PASSAGES_A_SECOND, _OF_WEIGHTS = 44.6, 10.6e6
_KINDS = ("scann", "exact", "bm25", "hybrid", "milvus")


class Cost(NamedTuple):
    """Bytes that an index takes."""

    memory: float  # resident while searching
    disk: float  # with the passages and, where vectors are scored again, all it scores with
    build_peak: float  # of memory, while it is built from vectors on disk

    def json(self) -> dict[str, int]:
        return {name: round(value) for name, value in self._asdict().items()}


def plan(passages: int, dims: int, passage_bytes: float = PASSAGE_BYTES) -> dict[str, Any]:
    """The cost of each kind, with ScaNN's parameters and what is known of its recall."""
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

    Without a rate it is that of two cores for an encoder of `weights` (in its layers); without
    both, `encode` is None.
    """
    if rate is None and weights:
        rate = _PASSAGES_A_SECOND * _OF_WEIGHTS / weights
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
        case "milvus":  # all but the rows in flight are with the cluster
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
        kept = dims if parameters["vectors"] == "int8" else 4 * dims
        leaves = parameters.get("leaves", 0)
        # Two dims are one code of four bits; on disk it takes a byte. A leaf is named by 4 bytes.
        memory = rows * (kept + dims / 4 + 4 * bool(leaves)) + 8 * leaves * dims
        disk = rows * (kept + dims / 2 + 4 * bool(leaves)) + 8 * leaves * dims
        peak = 3.25 * 4 * dims * rows  # the rows themselves, and ScaNN's copies and residuals
    return Cost(memory * shards + _SCANN_FIXED * shards, disk * shards, peak + _SCANN_FIXED)


def _bm25(passages: int) -> Cost:
    postings = 8.0 * _POSTINGS * passages  # a float32 score and an int32 passage each
    words = 52e3 * (passages / 7000) ** 0.55  # the vocabulary of that many (Heaps' law)
    return Cost(postings + 200 * words, postings + 20 * words, 50.0 * _POSTINGS * passages)


def expected_recall(parameters: dict[str, Any]) -> str:
    """Recall@5 of ScaNN as found by trial; `r1s index info` tells what was measured."""
    if parameters["scoring"] == "brute_force":
        return "1 (every vector is compared)"
    if "leaves" not in parameters:
        return "about 0.99 (hashing of every vector, the best scored again in float32)"
    share = parameters["leaves_searched"] / parameters["leaves"]
    low = 0.95 if share >= 0.09 else 0.90 if share >= 0.04 else 0.8
    return f"about {low} to 0.98 (a tree of which {share:.0%} is read, {parameters['vectors']})"


def shards_within(passages: int, dims: int) -> int | None:
    """In how many parts ScaNN must be built for its peak to stay below 1.3 times what it writes.

    None where that follows from the size, as `scann_parameters` derives it.
    """
    parameters = scann_parameters(passages)
    if parameters["scoring"] == "brute_force":
        return None
    one = _scann(passages, dims, parameters | {"shards": 1})
    needed = math.ceil((one.build_peak - _SCANN_FIXED) / (_PEAK_OF_DISK * one.disk))
    return needed if needed > parameters["shards"] else None
