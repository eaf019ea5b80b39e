"""A search engine that misses pages, for worlds in which finding is hard."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from r1s_jax.retrieval.api import Hit, Passage
from r1s_jax.retrieval.corpus import PassageStore
from r1s_jax.retrieval.index import Index


@dataclass(frozen=True)
class Forgetful:
    """Misses pages that a query names, for the share `1 - recall` of queries.

    A hash of the query and the title decides, so that every policy that asks the same finds the
    same, and other words may find what these did not.
    """

    index: Index
    recall: float

    @property
    def passages(self) -> Sequence[Passage] | PassageStore:
        """The passages that it searches."""
        return self.index.passages

    def search(self, queries: Sequence[str], k: int) -> Sequence[Sequence[Hit]]:
        """The `k` best passages of each query that are not missed, best first."""
        found = self.index.search(queries, k + 1)
        return [
            [hit for hit in hits if not self._misses(query, hit)][:k]
            for query, hits in zip(queries, found, strict=True)
        ]

    def _misses(self, query: str, hit: Hit) -> bool:
        if f" {hit.title} " not in f" {query} ":
            return False
        digest = hashlib.sha256(f"{query}\n{hit.title}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64 >= self.recall
