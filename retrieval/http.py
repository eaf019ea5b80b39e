"""A search engine behind HTTP, in either of the contracts that are common."""

import threading
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import urllib3
from cachetools import LRUCache

from r1s_jax.border.errors import ConfigError, UserError
from r1s_jax.retrieval.api import Hit, join_line

RETRY_STATUS = (429, 500, 502, 503, 504)


class RemoteError(UserError, RuntimeError):
    """A search engine that cannot be reached, fails, or does not answer what was asked."""


class HttpRetriever:
    """Searches by `POST {url}`; any number of threads may search at once.

    A URL that ends in `/queries` is asked as R1-Searcher asks, `{"queries", "k"}` answered by
    `{"answers": [[line, ...], ...]}`; one that ends in `/retrieve` as Search-R1 does, `{"queries",
    "topk", "return_scores"}` answered by `{"result": [[{"document": {"contents"}, "score"}]]}`.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 30.0,
        retries: int = 4,
        connections: int = 32,
        cached_queries: int = 100_000,
    ):
        """`retries` are of lost connections, 429 and 5xx, with pauses that double from 0.25 s.

        Raises ValueError for a URL of neither contract.
        """
        contract = urlsplit(url).path.rstrip("/").rpartition("/")[2]
        if contract not in ("queries", "retrieve"):
            raise ConfigError(
                f"{url}: a retriever's URL ends in /queries (R1-Searcher) or /retrieve (Search-R1)"
            )
        self.url, self._contract = url, contract
        self._pool = urllib3.PoolManager(
            maxsize=connections,
            timeout=urllib3.Timeout(total=timeout_s),
            retries=urllib3.Retry(
                retries,
                backoff_factor=0.25,
                status_forcelist=RETRY_STATUS,
                allowed_methods=None,  # a search changes nothing, so POST may be sent again
                redirect=0,
            ),
        )
        self._cache: LRUCache[tuple[str, int], list[Hit]] = LRUCache(cached_queries)
        self._lock = threading.Lock()

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """The k best passages of each query, best first.

        `/queries` tells no scores: they are NaN. Raises RemoteError when there is no answer.
        """
        with self._lock:
            found = {q: self._cache[q, k] for q in queries if (q, k) in self._cache}
        if missing := [query for query in dict.fromkeys(queries) if query not in found]:
            fetched = dict(zip(missing, self._fetch(missing, k), strict=True))
            found |= fetched
            with self._lock:
                self._cache.update({(query, k): hits for query, hits in fetched.items()})
        return [found[query] for query in queries]

    def _fetch(self, queries: list[str], k: int) -> list[list[Hit]]:
        if self._contract == "queries":
            body = {"queries": queries, "k": k}
        else:
            body = {"queries": queries, "topk": k, "return_scores": True}
        try:
            response = self._pool.request("POST", self.url, json=body)
        except urllib3.exceptions.HTTPError as error:
            raise RemoteError(f"{self.url}: {error}") from error
        if response.status != 200:
            raise RemoteError(f"{self.url}: status {response.status}: {response.data[:200]!r}")
        try:
            reply = response.json()
            if self._contract == "queries":
                rows = [[_of_line(line) for line in row] for row in reply["answers"]]
            else:
                rows = [[_of_document(hit) for hit in row] for row in reply["result"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RemoteError(
                f"{self.url}: not a reply of the contract /{self._contract} "
                f"({error!r}): {response.data[:200]!r}"
            ) from error
        if len(rows) != len(queries):
            raise RemoteError(f"{self.url}: {len(rows)} answers to {len(queries)} queries")
        return [row[:k] for row in rows]


def _of_line(line: Any) -> Hit:
    """`{id}\\t{passage}` or the passage alone."""
    if not isinstance(line, str):
        raise TypeError(f"a document must be a text, not {line!r}")
    id, tab, rest = line.partition("\t")
    return Hit(id, float("nan"), rest) if tab and id.isdigit() else Hit("", float("nan"), line)


def _of_document(hit: Any) -> Hit:
    """Search-R1's `"Title"\\ntext`; without scores the server returns bare documents."""
    document = hit.get("document", hit)
    title, newline, text = document["contents"].partition("\n")
    line = join_line(title.strip('"'), text) if newline else document["contents"]
    return Hit(str(document.get("id", "")), float(hit.get("score", "nan")), line)
