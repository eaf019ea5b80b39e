"""Readers of examples, and the possible outcomes of damage."""

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
    """Makes an example and reads it; `sealed` files must never be used when damaged."""

    make: Callable[[Path], None]
    call: Callable[[Path], Any]
    sealed: tuple[str, ...] = ()  # patterns of files with checksums
    weight: int = 10  # share of the inputs


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def digest(value: Any) -> str:
    """A digest that is equal for equal results."""
    import jax
    import numpy as np

    def flat(leaf: Any) -> bytes:
        return np.asarray(leaf).tobytes() if hasattr(leaf, "dtype") else repr(leaf).encode()

    leaves = jax.tree.leaves(value, is_leaf=lambda x: x is None)
    return hashlib.sha256(b"|".join(map(flat, leaves))).hexdigest()
