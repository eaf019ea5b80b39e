"""The live web as a search engine: asks a search API, reads the best pages, ranks their passages.

Pages are untrusted: they are read with limits on time and size, and only from public addresses,
whatever a link, a redirect or a name server says. Where the environment names a proxy, the proxy
resolves addresses, and has to protect its own network.
"""

import ipaddress
import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import msgspec
import numpy as np
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from r1s_jax.io.errors import BadInput, ConfigError
from r1s_jax.io.http import Client, Connections, Deadline, ServerError, is_late, left, within
from r1s_jax.io.json import parse_object
from r1s_jax.io.schema import check
from r1s_jax.retrieval.api import Hit, join_line
from r1s_jax.retrieval.cache import HitCache
from r1s_jax.retrieval.encoder import Encoder
from r1s_jax.retrieval.http import RemoteError

SERPER = "https://google.serper.dev/search"
_PASSAGE_WORDS = 100  # as the KILT corpus is split
_CHUNK_BYTES = 2**16


class _Page(msgspec.Struct):
    title: str
    link: str


class _Reply(msgspec.Struct):
    """A reply of the API: best page first."""

    organic: list[_Page] = []


class OnlineRetriever:
    """Searches with a Serper-compatible API; any number of threads may search at once.

    The API takes `POST {"q", "num"}` with the key in `X-API-KEY` and answers
    `{"organic": [{"title", "link", "snippet"}]}`.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        site: str = "",
        endpoint: str = SERPER,
        pages: int = 3,
        timeout_s: float = 10.0,
        max_bytes: int = 1_000_000,
        max_characters: int = 35_000,
        trusted_hosts: Collection[str] = (),
        cached_bytes: int = 2**27,
    ):
        """Reads the API's key from SERPER_API_KEY.

        Args:
            encoder: picks the passages nearest the query.
            site: only pages of this site (en.wikipedia.org).
            endpoint: the URL of the search API.
            pages: read for each query, in parallel, within `timeout_s` and `max_bytes` each.
            timeout_s: seconds for the API, and for each page.
            max_bytes: read of a page; the rest is ignored. Time and memory grow with it: a million
                bytes take about 2 s and 130 MB at worst (a page of nothing but links).
            max_characters: used of a page's main text.
            trusted_hosts: names of hosts that may have a private address (an intranet's wiki).
            cached_bytes: of hits kept, so that a repeated query is not searched again.

        Raises ValueError without a key.
        """
        key = os.environ.get("SERPER_API_KEY")
        if not key:
            raise ConfigError("searching the web needs a key in SERPER_API_KEY (see serper.dev)")
        self._encoder, self._site, self._endpoint, self._pages = encoder, site, endpoint, pages
        self._timeout_s, self._max_bytes = timeout_s, max_bytes
        self._max_characters = max_characters
        self._api = Client(timeout_s=timeout_s, retries=3, headers={"X-API-KEY": key})
        self._web = _guarded(frozenset(trusted_hosts))
        self._cache = HitCache(cached_bytes)

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """The k passages nearest each query, best first; their ids are the pages' addresses.

        Raises RemoteError when the API fails, or none of the pages it names can be read.
        """
        return [self._search(query, k) for query in queries]

    def _search(self, query: str, k: int) -> list[Hit]:
        if (cached := self._cache.get(query, k)) is not None:
            return cached
        links = self._ask(query)
        hits = self._nearest(query, self._read_all(links), k) if links else []
        self._cache.put(query, k, hits)
        return hits

    def _ask(self, query: str) -> list[tuple[str, str]]:
        """(title, address) of the best pages."""
        terms = f"{query} site:{self._site}" if self._site else query
        body = {"q": terms, "num": max(10, self._pages)}
        try:
            reply = parse_object(self._api.post(self._endpoint, body), self._endpoint)
            pages = check(reply, _Reply, self._endpoint).organic
        except ServerError as error:
            raise RemoteError(str(error)) from error
        except BadInput as error:
            raise RemoteError(f"{self._endpoint}: not the reply of a search API") from error
        return [(page.title, page.link) for page in pages[: self._pages]]

    def _read_all(self, links: Sequence[tuple[str, str]]) -> list[tuple[str, str, str]]:
        """(title, address, main text) of the pages that could be read."""
        pages, errors = [], []
        with ThreadPoolExecutor(len(links)) as threads:
            seconds = min(self._timeout_s, left())  # threads do not inherit this thread's `within`
            texts = [(t, link, threads.submit(self._read, link, seconds)) for t, link in links]
        for title, link, text in texts:
            try:
                pages.append((title, link, text.result()))
            except RemoteError as error:
                errors.append(str(error))
        if not pages:
            raise RemoteError(f"no page could be read: {'; '.join(errors)}")
        return pages

    def _read(self, link: str, seconds: float) -> str:
        """The main text of a page."""
        from trafilatura import extract

        if urlsplit(link).scheme not in ("http", "https"):
            raise RemoteError(f"{link}: not a web page")
        with within(seconds):
            try:
                page = self._receive(link)
            except (urllib3.exceptions.HTTPError, OSError) as error:
                late = f"not received within {seconds:g} s"
                raise RemoteError(f"{link}: {late if is_late() else error}") from error
        text = extract(page, include_comments=False) or ""
        return text[: self._max_characters]

    def _receive(self, link: str) -> bytes:
        response = self._web.request("GET", link, hops=4, timeout=left())
        try:
            if is_late():  # the headers may be incomplete
                raise TimeoutError
            if response.status != 200:
                raise RemoteError(f"{link}: status {response.status}")
            kind = response.headers.get("Content-Type", "")
            if not kind.startswith(("text/", "application/xhtml")):
                raise RemoteError(f"{link}: {kind or 'no content type'} is not text")
            page = b""
            while chunk := response.read1(_CHUNK_BYTES):  # `stream` would wait for a whole chunk
                page += chunk
                if len(page) >= self._max_bytes:
                    return page[: self._max_bytes]
            if is_late():
                raise TimeoutError
            return page
        finally:
            response.close()

    def _nearest(self, query: str, pages: Sequence[tuple[str, str, str]], k: int) -> list[Hit]:
        lines, addresses = [], []
        for title, link, text in pages:
            words = text.split()
            for i in range(0, len(words), _PASSAGE_WORDS):
                lines.append(join_line(title, " ".join(words[i : i + _PASSAGE_WORDS])))
                addresses.append(link)
        if not lines:
            return []
        # All as queries: only queries may be encoded from any thread.
        vectors = self._encoder.encode([query, *lines], kind="query")
        scores = vectors[1:] @ vectors[0]
        best = np.argsort(-scores, kind="stable")[:k]
        return [Hit(addresses[i], float(scores[i]), lines[i]) for i in best]


def _guarded(trusted_hosts: frozenset[str]) -> Connections:
    """Connections to public addresses only; checks the address of the connected socket."""

    class Guard:
        host: str
        proxy: Any

        def _new_conn(self) -> Any:
            sock = super()._new_conn()  # type: ignore[misc]
            address = ipaddress.ip_address(sock.getpeername()[0].partition("%")[0])
            if not (self.proxy or address.is_global or self.host in trusted_hosts):
                sock.close()
                raise PermissionError(f"{self.host} is not a public address")
            return sock

    return Connections(
        type("GuardedHTTP", (Guard, Deadline, HTTPConnection), {}),
        type("GuardedHTTPS", (Guard, Deadline, HTTPSConnection), {}),
    )
