"""Serves an index over HTTP, in both contracts of `retrieval.http` (the extra `serve`).

    POST /queries   {"queries": [...], "k": 3}
                    -> {"queries": [...], "answers": [["{id}\\t{line}", ...], ...]}
    POST /retrieve  {"queries": [...], "topk": 3, "return_scores": true}
                    -> {"result": [[{"document": {"id", "contents"}, "score"}, ...], ...]}
    GET  /healthz, /metrics (Prometheus)

Errors are `{"error": ...}`: 400 for a malformed request, 403 for a web page of another origin,
413 for too large a request, 415 for a Content-Type other than JSON, 500 where the search fails, 503
with `Retry-After` while too many queries wait.
"""

import asyncio
import json
import logging
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from r1s_jax.io import listen
from r1s_jax.io.listen import bind
from r1s_jax.io.origins import Callers, callers
from r1s_jax.io.service import Refused, answered, metrics_reply, read_body
from r1s_jax.io.service import make_app as make_service
from r1s_jax.io.text import is_whole_number
from r1s_jax.retrieval.api import Hit, Retriever

logger = logging.getLogger(__name__)

_DEFAULT_K = 3
_SIZES = [2**i for i in range(7)]
_SERVED = "POST /queries and /retrieve, GET /healthz and /metrics"


class Served(Retriever, Protocol):
    """A retriever that knows its number of passages."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Limits:
    """The limits of a server, which refuses requests beyond them."""

    body_bytes: int = 2**22  # of a request
    queries: int = 4096  # of a request
    k: int = 100
    passages: int = 40_960  # of a reply: queries times k
    characters: int = 2**14  # of a query; also, roughly, of all queries in a batch
    waiting: int = 20_000  # queries that wait for the search thread
    batch: int = 64  # queries searched together; a larger request takes several batches


@dataclass(eq=False)
class _Job:
    """A request that waits, or whose queries are partly searched."""

    queries: list[str]
    k: int
    done: Future[list[Sequence[Hit]]]
    hits: list[Sequence[Hit]] = field(default_factory=list)  # of its first queries
    started: int = 0  # queries whose search has begun


class Batcher:
    """One thread that searches waiting queries of the same k together.

    Requests take turns: a large one is searched in parts, and others between its parts.
    """

    def __init__(self, retriever: Served, limits: Limits, observe: Callable[[int], None]):
        """`observe` is called with the number of queries of each batch."""
        self._retriever, self._limits, self._observe = retriever, limits, observe
        self._jobs: deque[_Job] = deque()
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="search", daemon=True)
        self._thread.start()

    def submit(self, queries: list[str], k: int) -> Future[list[Sequence[Hit]]]:
        """A future of each query's passages; raises Refused where too many queries wait."""
        job = _Job(queries, k, Future())
        if not queries:
            job.done.set_result([])
            return job.done
        with self._changed:
            if self._closed:
                raise Refused(503, "the server is stopping")
            if self._jobs and self._count() + len(queries) > self._limits.waiting:
                raise Refused(503, f"more than {self._limits.waiting} queries are waiting")
            self._jobs.append(job)
            self._changed.notify()
        return job.done

    def waiting(self) -> int:
        """The number of queries whose search has not begun."""
        with self._changed:
            return self._count()

    def close(self) -> None:
        """Searches all waiting queries, then ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _count(self) -> int:
        return sum(len(job.queries) - job.started for job in self._jobs)

    def _work(self) -> None:
        while parts := self._take():
            self._observe(sum(len(queries) for _, queries in parts))
            self._search(parts)

    def _take(self) -> list[tuple[_Job, list[str]]]:
        """The next batch: queries of the request that waits longest, and others that fit.

        A request with queries left moves to the end. Empty once closed and nothing waits.
        """
        parts: list[tuple[_Job, list[str]]] = []
        queries, characters = self._limits.batch, self._limits.characters
        skipped, unfinished = deque[_Job](), deque[_Job]()
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            for job in self._jobs:
                part: list[str] = []
                if not parts or job.k == parts[0][0].k:
                    for query in job.queries[job.started : job.started + queries]:
                        if (parts or part) and len(query) > characters:
                            break
                        characters -= len(query)
                        part.append(query)
                if part:
                    job.started += len(part)
                    queries -= len(part)
                    parts.append((job, part))
                if job.started < len(job.queries):
                    (unfinished if part else skipped).append(job)
            self._jobs = skipped + unfinished
        return parts

    def _search(self, parts: list[tuple[_Job, list[str]]]) -> None:
        try:
            batch = [query for _, queries in parts for query in queries]
            rows = iter(self._retriever.search(batch, parts[0][0].k))
            results = [[next(rows) for _ in queries] for _, queries in parts]
        except Exception as error:
            if len(parts) == 1:
                self._fail(parts[0][0], error)
            else:  # search the requests apart, so that only one of them fails
                for part in parts:
                    self._search([part])
            return
        for (job, _), hits in zip(parts, results, strict=True):
            job.hits += hits
            if len(job.hits) == len(job.queries):
                job.done.set_result(job.hits)

    def _fail(self, job: _Job, error: Exception) -> None:
        with self._changed:
            self._jobs = deque(other for other in self._jobs if other is not job)
        job.done.set_exception(error)


class _Service:
    """The request handlers and their metrics."""

    def __init__(self, retriever: Served, limits: Limits):
        self._retriever, self._limits = retriever, limits
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "r1s_requests", "Requests answered.", ["path", "status"], registry=registry
        )
        self._queries = Counter("r1s_queries", "Queries searched.", registry=registry)
        self._errors = Counter("r1s_errors", "Requests whose search failed.", registry=registry)
        self._seconds = Histogram(
            "r1s_request_seconds", "From request to reply.", ["path"], registry=registry
        )
        batches = Histogram(
            "r1s_batch_queries", "Queries searched together.", buckets=_SIZES, registry=registry
        )
        self.batcher = Batcher(retriever, limits, batches.observe)
        waiting = Gauge("r1s_waiting_queries", "Queries not searched yet.", registry=registry)
        waiting.set_function(self.batcher.waiting)

    async def queries(self, request: Request) -> Response:
        return await self._answer(request, "k", _lines_reply)

    async def retrieve(self, request: Request) -> Response:
        return await self._answer(request, "topk", _documents_reply)

    async def healthz(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "passages": len(self._retriever)})

    async def metrics(self, request: Request) -> Response:
        return metrics_reply(self._registry)

    def count(self, request: Request, status: int) -> None:
        """Counts an answered request."""
        self._requests.labels(request.url.path, status).inc()

    async def _answer(
        self, request: Request, k_name: str, reply: Callable[[dict, list[Sequence[Hit]]], dict]
    ) -> Response:
        with self._seconds.labels(request.url.path).time():
            raw = await read_body(request, self._limits.body_bytes, Refused)
            body = _parse(raw, k_name, self._limits)
            hits = await self._search(body["queries"], body[k_name])
            # Encodes up to thousands of passages; other requests must not wait for that.
            content = await asyncio.to_thread(lambda: msgspec.json.encode(reply(body, hits)))
        self.count(request, 200)
        return Response(content, media_type="application/json")

    async def _search(self, queries: list[str], k: int) -> list[Sequence[Hit]]:
        future = self.batcher.submit(queries, k)
        try:
            hits = await asyncio.wrap_future(future)
        except Exception as error:
            logger.exception("a search failed")
            self._errors.inc()
            raise Refused(500, f"the search failed: {error!r}") from error
        self._queries.inc(len(hits))
        return hits


def _parse(raw: bytes, k_name: str, limits: Limits) -> dict[str, Any]:
    """The checked body of a request; raises Refused for an invalid one."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from error
    queries = body.get("queries") if isinstance(body, dict) else None
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise Refused(400, 'expected {"queries": [text, ...]}')
    if len(queries) > limits.queries:
        raise Refused(413, f"{len(queries)} queries; the most is {limits.queries} a request")
    if (longest := max(map(len, queries), default=0)) > limits.characters:
        most = f"the most is {limits.characters:,}"
        raise Refused(413, f"a query has {longest:,} characters; {most}")
    if not all(map(_encodes, queries)):
        raise Refused(400, "a query is not valid Unicode")
    k = _DEFAULT_K if body.get(k_name) is None else body[k_name]
    if type(k) is not int or not 1 <= k <= limits.k:
        raise Refused(400, f"{k_name!r} must be a whole number from 1 to {limits.k}")
    if len(queries) * k > limits.passages:
        raise Refused(
            413,
            f"{len(queries)} queries of {k} passages each; the most is {limits.passages:,} "
            "passages a request: send the queries in several",
        )
    if not isinstance(body.get("return_scores") or False, bool):
        raise Refused(400, "'return_scores' must be true or false")
    return body | {k_name: k}


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _lines_reply(body: dict[str, Any], hits: list[Sequence[Hit]]) -> dict[str, Any]:
    """The reply of `/queries`: lines as in R1-Searcher's corpora; clients cut a leading id."""
    return {"queries": body["queries"], "answers": [[_line(hit) for hit in row] for row in hits]}


def _line(hit: Hit) -> str:
    return f"{hit.id}\t{hit.line}" if is_whole_number(hit.id) else hit.line


def _documents_reply(body: dict[str, Any], hits: list[Sequence[Hit]]) -> dict[str, Any]:
    """The reply of `/retrieve`, as Search-R1's server: bare documents, or pairs with scores."""
    if not body.get("return_scores"):
        return {"result": [[_document(hit) for hit in row] for row in hits]}
    pairs = [[{"document": _document(hit), "score": hit.score} for hit in row] for row in hits]
    return {"result": pairs}


def _document(hit: Hit) -> dict[str, str]:
    contents = f'"{hit.title}"\n{hit.text}' if hit.title else hit.text
    return {"id": hit.id, "contents": contents}


def make_app(retriever: Served, limits: Limits, allowed: Callers | None = None) -> ASGIApp:
    """The ASGI application; its search thread ends with it.

    By default `allowed` has only loopback host names and the server's own pages.
    """
    service = _Service(retriever, limits)

    routes = [
        Route("/queries", answered(service.queries, Refused, service.count), methods=["POST"]),
        Route("/retrieve", answered(service.retrieve, Refused, service.count), methods=["POST"]),
        Route("/healthz", service.healthz),
        Route("/metrics", service.metrics),
    ]
    close = service.batcher.close
    return make_service(routes, served=_SERVED, refuse=Refused, close=close, allowed=allowed)


def serve(
    retriever: Served,
    bound: socket.socket,
    *,
    limits: Limits | None = None,
    allowed: Callers | None = None,
    announce: Callable[[str], None] = print,
) -> None:
    """Serves on a bound socket until SIGTERM or SIGINT; requests in flight are answered first.

    `announce` is called with the address once connections are accepted. Call `serve` on the main
    thread.
    """
    listen.serve(make_app(retriever, limits or Limits(), allowed), bound, announce)


def serve_in_background(retriever: Served, host: str) -> str:
    """Serves on a free port of `host` while this process lives; returns the address."""
    app = make_app(retriever, Limits(), callers(host, ()))
    return listen.serve_in_background(app, bind(host, 0))
