"""The one array that the host hands to the running loop: its layout is known here alone.

int32[1 + RESULTS, 4 + D] for replies of at most D tokens. Row 0 holds how many results follow, and
whether the rollout must stop; each further row (slot, Status, searches made, length, tokens).
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Int

# Documents handed over in one exchange; what is ready beyond that waits for the next.
RESULTS = 8
_HEAD = 4


class Status(IntEnum):
    """What the host says of a query."""

    FOUND = 0
    EMPTY = 1  # searched, found nothing: the documents say so
    ERROR = 2
    BAD_QUERY = 3
    INVALID = 4  # no search could be made of the turn: the reply says so


class Result(NamedTuple):
    """What became of one slot's turn; `length` of the D `tokens` are the reply to it."""

    slot: Int[Array, ""]
    status: Int[Array, ""]
    searches: Int[Array, ""]
    length: Int[Array, ""]
    tokens: Int[Array, " D"]


def callback_shape(width: int) -> tuple[int, int]:
    """Of the array, for blocks of at most `width` tokens."""
    return 1 + RESULTS, _HEAD + width


def pack_results(
    results: Sequence[tuple[int, Status, int, list[int]]], stop: bool, width: int
) -> Int[np.ndarray, "R D"]:
    """On the host: at most RESULTS of (slot, status, searches, tokens) as the array."""
    out = np.zeros(callback_shape(width), np.int32)
    out[0, :2] = len(results), stop
    for row, (slot, status, searches, tokens) in zip(out[1:], results, strict=False):
        row[:_HEAD] = slot, status, searches, len(tokens)
        row[_HEAD : _HEAD + len(tokens)] = tokens
    return out


def unpack_head(array: Int[Array, "R D"]) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """In the program: how many results the array holds, and whether to stop (0: no)."""
    return array[0, 0], array[0, 1]


def unpack_result(array: Int[Array, "R D"], i: Int[Array, ""]) -> Result:
    """In the program: the i-th result."""
    row = array[i + 1]
    return Result(row[0], row[1], row[2], row[3], row[_HEAD:])
