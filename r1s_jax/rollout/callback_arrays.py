"""The array that the host callback returns to the loop; only this module knows its layout.

int32[1 + RESULTS, 4 + D] for replies of at most D tokens. Row 0 holds the number of results and
whether the rollout must stop; each further row is (slot, Status, searches made, length, tokens).
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Int

# Replies handed over in one exchange; further ones wait for the next.
RESULTS = 8
_HEAD = 4


class Status(IntEnum):
    """How the host answers a turn."""

    FOUND = 0
    EMPTY = 1  # nothing found; the reply says so
    ERROR = 2
    BAD_QUERY = 3
    INVALID = 4  # the turn holds no valid search; the reply says so
    TAKEN_BACK = 5  # the turn is taken back; the reply begins an answer in its place


class Result(NamedTuple):
    """The result of one slot's turn; the first `length` of the D `tokens` are the reply."""

    slot: Int[Array, ""]
    status: Int[Array, ""]
    searches: Int[Array, ""]
    length: Int[Array, ""]
    tokens: Int[Array, " D"]


def callback_shape(width: int) -> tuple[int, int]:
    """Shape of the array for replies of at most `width` tokens."""
    return 1 + RESULTS, _HEAD + width


def pack_results(
    results: Sequence[tuple[int, Status, int, list[int]]], stop: bool, width: int
) -> Int[np.ndarray, "R D"]:
    """On the host: packs at most RESULTS tuples (slot, status, searches, tokens)."""
    out = np.zeros(callback_shape(width), np.int32)
    out[0, :2] = len(results), stop
    for row, (slot, status, searches, tokens) in zip(out[1:], results, strict=False):
        row[:_HEAD] = slot, status, searches, len(tokens)
        row[_HEAD : _HEAD + len(tokens)] = tokens
    return out


def unpack_head(array: Int[Array, "R D"]) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """In the program: the number of results, and whether to stop (0: no)."""
    return array[0, 0], array[0, 1]


def unpack_result(array: Int[Array, "R D"], i: Int[Array, ""]) -> Result:
    """In the program: the i-th result."""
    row = array[i + 1]
    return Result(row[0], row[1], row[2], row[3], row[_HEAD:])
