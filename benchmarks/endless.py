"""A policy that goes on to its limit and never searches: what several benches sample from."""

from collections.abc import Sequence
from typing import ClassVar

from r1s_jax.protocol.r1_searcher import R1Searcher
from r1s_jax.retrieval.api import Hit


class Endless(R1Searcher):
    """Tags that nobody writes: answers are as long as they may be."""

    query_end: ClassVar = "<|no query ever|>"
    answer_end: ClassVar = "<|no answer ever|>"


class NothingToFind:
    """A search engine that nobody asks."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        return [[] for _ in queries]
