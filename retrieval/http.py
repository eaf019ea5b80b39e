"""HTTP client of search engines that speak R1-Searcher's or Search-R1's contract."""

import math
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec

from r1s_jax.io.errors import ConfigError
from r1s_jax.io.http import Client, ServerError, without_credentials
from r1s_jax.io.json import parse_object
from r1s_jax.io.schema import check
from r1s_jax.io.text import is_whole_number
from r1s_jax.retrieval.api import Hit, contents_line, join_line
from r1s_jax.retrieval.cache import HitCache


class RemoteError(ServerError):
    """A search engine cannot be reached, fails, or sends a malformed reply."""


class _Lines(msgspec.Struct):
    """R1-Searcher's reply: the lines found for each query."""

    answers: list[list[str]]


class _Document(msgspec.Struct):
    """A passage of Search-R1's reply; some servers send `title` and `text`, not `contents`."""

    contents: str | None = None
    title: str | None = None
    text: str | None = None
    id: str | int | None = None


class _ScoredDocument(msgspec.Struct):
    document: _Document
    score: float | None = None


class _Documents(msgspec.Struct):
    """Search-R1's reply; without scores its server returns bare documents."""

    result: list[list[Any]]


class HttpRetriever:
    """Searches by `POST {url}`; any number of threads may search at once.

    The end of the URL selects the contract. `/queries` is R1-Searcher's: `{"queries", "k"}` is
    answered by `{"answers": [[line, ...], ...]}`. `/retrieve` is Search-R1's: `{"queries", "topk",
    "return_scores"}` is answered by `{"result": [[{"document": {"contents"}, "score"}]]}`.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 30.0,
        retries: int = 4,
        connections: int = 32,
        cached_bytes: int = 2**27,
    ):
        """`timeout_s` limits all tries of a request together. Lost connections and the statuses
        429 and 5xx are retried, after pauses that double from 0.25 s. Hits are cached, up to
        `cached_bytes`.

        Raises ConfigError for a URL of neither contract.
        """
        contract = urlsplit(url).path.rstrip("/").rpartition("/")[2]
        if contract not in ("queries", "retrieve"):
            raise ConfigError(
                f"{without_credentials(url)}: a retriever's URL ends in /queries (R1-Searcher) or "
                "/retrieve (Search-R1)"
            )
        self.url, self._contract = url, contract
        self._client = Client(timeout_s=timeout_s, retries=retries, connections=connections)
        self._cache = HitCache(cached_bytes)

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """The k best passages of each query, best first.

        Scores are NaN for `/queries`, which sends none. Raises RemoteError when no valid reply
        arrives.
        """
        hits_of = {q: hits for q in queries if (hits := self._cache.get(q, k)) is not None}
        if missing := [query for query in dict.fromkeys(queries) if query not in hits_of]:
            for query, hits in zip(missing, self._fetch(missing, k), strict=True):
                hits_of[query] = hits
                self._cache.put(query, k, hits)
        return [hits_of[query] for query in queries]

    def _fetch(self, queries: list[str], k: int) -> list[list[Hit]]:
        if self._contract == "queries":
            body = {"queries": queries, "k": k}
        else:
            body = {"queries": queries, "topk": k, "return_scores": True}
        where = f"{without_credentials(self.url)}: not a reply of the contract /{self._contract}"
        try:
            data = self._client.post(self.url, body)
        except ServerError as error:
            raise RemoteError(str(error)) from error
        reply = parse_object(data, where, RemoteError)
        if self._contract == "queries":
            answers = check(reply, _Lines, where, RemoteError).answers
            rows = [[_line_hit(line) for line in row] for row in answers]
        else:
            rows = [
                [_document_hit(document, where) for document in row]
                for row in check(reply, _Documents, where, RemoteError).result
            ]
        if len(rows) != len(queries):
            raise RemoteError(f"{where}: {len(rows)} answers to {len(queries)} queries")
        return [row[:k] for row in rows]


def _line_hit(line: str) -> Hit:
    """The hit of a line, `{id}\\t{passage}` or the passage alone."""
    id, tab, rest = line.partition("\t")
    numbered = tab and is_whole_number(id)
    return Hit(id, math.nan, rest) if numbered else Hit("", math.nan, line)


def _document_hit(raw: Any, where: str) -> Hit:
    """The hit of a scored document in Search-R1's reply, or of a bare document."""
    bare = not isinstance(raw, dict) or "document" not in raw
    scored = check({"document": raw} if bare else raw, _ScoredDocument, where, RemoteError)
    document, score = scored.document, scored.score
    if document.contents is not None:
        line = contents_line(document.contents)
    elif document.text is not None:
        line = join_line(document.title or "", document.text)
    else:
        raise RemoteError(f"{where}: a document without `contents` or `text`")
    id = "" if document.id is None else str(document.id)
    return Hit(id, float("nan") if score is None else score, line)
