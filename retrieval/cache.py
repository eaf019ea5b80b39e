"""What was found before, kept by what it takes in memory: one document may be a whole library."""

import sys
import threading

from cachetools import LRUCache

from r1s_jax.retrieval.api import Hit

_OF_A_HIT = 200  # bytes of its tuple, its numbers and its place in a list
_OF_AN_ENTRY = 300


class HitCache:
    """The hits of the latest queries, in so many bytes; any number of threads may use it."""

    def __init__(self, most_bytes: int):
        self._most = most_bytes
        self._rows: LRUCache[tuple[str, int], list[Hit]] = LRUCache(most_bytes, _size)
        self._lock = threading.Lock()

    def get(self, query: str, k: int) -> list[Hit] | None:
        """What was found, or None where that is not known any more."""
        with self._lock:
            return self._rows.get((query, k))

    def put(self, query: str, k: int, hits: list[Hit]) -> None:
        """Keeps hits, unless they alone take more than there is room for."""
        if _size(hits) <= self._most:
            with self._lock:
                self._rows[query, k] = hits


def _size(hits: list[Hit]) -> int:
    texts = sum(sys.getsizeof(hit.line) + sys.getsizeof(hit.id) for hit in hits)
    return _OF_AN_ENTRY + _OF_A_HIT * len(hits) + texts
