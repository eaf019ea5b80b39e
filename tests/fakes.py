"""Retrievers for tests: one that always returns hits, and one for each kind of failure."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from r1s_jax.retrieval.api import Hit


@dataclass(frozen=True)
class FakeHit:
    line: Any


class EchoRetriever:
    """Returns passages that repeat the query; calls `delay` before each search."""

    def __init__(self, delay: Callable[[], None] | None = None):
        self.delay = delay
        self.queries: list[str] = []

    def search(self, queries: Sequence[str], k: int) -> list[list[FakeHit]]:
        self.queries += queries
        if self.delay:
            self.delay()
        return [[FakeHit(line) for line in echo_lines(query, k)] for query in queries]


def echo_lines(query: str, k: int) -> list[str]:
    """The lines that EchoRetriever returns."""
    return [f"{query} {i}" for i in range(1, k + 1)]


class WebRetriever(EchoRetriever):
    """Returns web pages with titles, texts and addresses."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        super().search(queries, k)
        return [
            [Hit(f"https://pages/{q}/{i}", 0.5, f"{q}   the {i}") for i in range(1, k + 1)]
            for q in queries
        ]


class FlakyRetriever(EchoRetriever):
    """Raises `failures` times, then works."""

    def __init__(self, failures: int):
        super().__init__()
        self.failures = failures

    def search(self, queries: Sequence[str], k: int) -> list[list[FakeHit]]:
        if self.failures > 0:
            self.failures -= 1
            raise ConnectionError("no route to the index")
        return super().search(queries, k)


class RaisingRetriever(FlakyRetriever):
    """Raises at every search."""

    def __init__(self):
        super().__init__(failures=10**9)


class GarbageRetriever:
    """Returns the same object for every query."""

    def __init__(self, result: Any):
        self.result = result

    def search(self, queries: Sequence[str], k: int) -> Any:
        return self.result


class EmptyRetriever:
    """Returns no hits."""

    def search(self, queries: Sequence[str], k: int) -> list[list[FakeHit]]:
        return [[] for _ in queries]


class GatedRetriever(EchoRetriever):
    """Hangs until its `gate` is set."""

    def __init__(self):
        self.gate, self.answered = threading.Event(), threading.Event()
        super().__init__(delay=self.gate.wait)

    def search(self, queries: Sequence[str], k: int) -> list[list[FakeHit]]:
        hits = super().search(queries, k)
        self.answered.set()
        return hits
