"""A dialect without an end: the policy of several benchmarks samples up to its limit."""

from collections.abc import Sequence
from typing import ClassVar

from r1s_jax.protocol.r1_searcher import R1Searcher
from r1s_jax.retrieval.api import Hit


class Endless(R1Searcher):
    """End tags that no policy writes: every answer reaches the length limit, without a search."""

    query_end: ClassVar = "<|no query ever|>"
    answer_end: ClassVar = "<|no answer ever|>"


class NothingToFind:
    """A search engine without documents, for policies that never search."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        return [[] for _ in queries]
