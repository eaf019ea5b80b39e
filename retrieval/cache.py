"""A cache of hits, limited by bytes and not by entries: a document may be of any length."""

import sys
import threading

from cachetools import LRUCache

from r1s_jax.retrieval.api import Hit

_HIT_BYTES = 200  # of its tuple, its numbers and its place in a list
_ENTRY_BYTES = 300


class HitCache:
    """The hits of the latest queries, up to a number of bytes; any thread may use it."""

    def __init__(self, most_bytes: int):
        self._most = most_bytes
        self._rows: LRUCache[tuple[str, int], list[Hit]] = LRUCache(most_bytes, _size)
        self._lock = threading.Lock()

    def get(self, query: str, k: int) -> list[Hit] | None:
        """The cached hits, or None."""
        with self._lock:
            return self._rows.get((query, k))

    def put(self, query: str, k: int, hits: list[Hit]) -> None:
        """Caches hits, unless they alone exceed the limit."""
        if _size(hits) <= self._most:
            with self._lock:
                self._rows[query, k] = hits


def _size(hits: list[Hit]) -> int:
    texts = sum(sys.getsizeof(hit.line) + sys.getsizeof(hit.id) for hit in hits)
    return _ENTRY_BYTES + _HIT_BYTES * len(hits) + texts
