"""What a reader of examples is, and what may come of a damaged one."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUTCOMES = ("clear", "unnamed", "long", "traceback", "hang", "crash", "same", "other", "used")
BAD = ("unnamed", "long", "traceback", "hang", "crash", "used")
MOST_CHARACTERS = 400


@dataclass(frozen=True)
class Reader:
    """How an example is made, what is called, and which of its files must never be used damaged."""

    make: Callable[[Path], None]
    call: Callable[[Path], Any]
    sealed: tuple[str, ...] = ()  # patterns of files whose numbers are under a checksum
    weight: int = 10  # its share of the inputs


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def digest(value: Any) -> str:
    """Of a result: equal for what is equal."""
    import jax
    import numpy as np

    def flat(leaf: Any) -> bytes:
        return np.asarray(leaf).tobytes() if hasattr(leaf, "dtype") else repr(leaf).encode()

    leaves = jax.tree.leaves(value, is_leaf=lambda x: x is None)
    return hashlib.sha256(b"|".join(map(flat, leaves))).hexdigest()
