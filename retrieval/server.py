"""An index behind HTTP, in both contracts that `retrieval.http` asks in (the extra `serve`).

    POST /queries   {"queries": [...], "k": 3}
                    -> {"queries": [...], "answers": [["{id}\\t{line}", ...], ...]}
    POST /retrieve  {"queries": [...], "topk": 3, "return_scores": true}
                    -> {"result": [[{"document": {"id", "contents"}, "score"}, ...], ...]}
    GET  /healthz, /metrics (Prometheus)

What cannot be answered is `{"error": ...}`: 400 for a wrong request, 403 where a web page of
elsewhere asks, 413 for too large a request, 415 for one that is no JSON by its header, 503 with
`Retry-After` while too much is waiting, 500 where the search fails.
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
    """What is served: a retriever that knows how many passages it has."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Limits:
    """What a server takes on; the rest is refused."""

    body_bytes: int = 2**22  # of a request
    queries: int = 4096  # of a request
    k: int = 100
    passages: int = 40_960  # of a reply: queries times k
    characters: int = 2**14  # of a query, and about so many of those that are searched together
    waiting: int = 20_000  # queries that wait for the search thread
    batch: int = 64  # queries searched together; a larger request takes several turns


@dataclass(eq=False)
class _Job:
    """A request that waits, or of which a part is searched."""

    queries: list[str]
    k: int
    done: Future[list[Sequence[Hit]]]
    found: list[Sequence[Hit]] = field(default_factory=list)  # of its first queries
    taken: int = 0  # of its queries, those that are searched or were


class Batcher:
    """One thread that searches whatever is waiting for the same k, together.

    Requests take turns: a large one is searched in parts, with those of others between them.
    """

    def __init__(self, retriever: Served, limits: Limits, observe: Callable[[int], None]):
        """`observe` is told the number of queries of each batch."""
        self._retriever, self._limits, self._observe = retriever, limits, observe
        self._jobs: deque[_Job] = deque()
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="search", daemon=True)
        self._thread.start()

    def submit(self, queries: list[str], k: int) -> Future[list[Sequence[Hit]]]:
        """The passages of each query, once found; raises Refused where too many wait."""
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
        """Queries that are not searched yet."""
        with self._changed:
            return self._count()

    def close(self) -> None:
        """Searches what is waiting, then ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _count(self) -> int:
        return sum(len(job.queries) - job.taken for job in self._jobs)

    def _work(self) -> None:
        while parts := self._take():
            self._observe(sum(len(queries) for _, queries in parts))
            self._search(parts)

    def _take(self) -> list[tuple[_Job, list[str]]]:
        """The next queries of the longest waiting request, and of those that fit beside them.

        A request of which some are left goes to the end; none once closed and done.
        """
        parts: list[tuple[_Job, list[str]]] = []
        queries, characters = self._limits.batch, self._limits.characters
        kept, again = deque[_Job](), deque[_Job]()
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            for job in self._jobs:
                part: list[str] = []
                if not parts or job.k == parts[0][0].k:
                    for query in job.queries[job.taken : job.taken + queries]:
                        if (parts or part) and len(query) > characters:
                            break
                        characters -= len(query)
                        part.append(query)
                if part:
                    job.taken += len(part)
                    queries -= len(part)
                    parts.append((job, part))
                if job.taken < len(job.queries):
                    (again if part else kept).append(job)
            self._jobs = kept + again
        return parts

    def _search(self, parts: list[tuple[_Job, list[str]]]) -> None:
        try:
            asked = [query for _, queries in parts for query in queries]
            rows = iter(self._retriever.search(asked, parts[0][0].k))
            found = [[next(rows) for _ in queries] for _, queries in parts]
        except Exception as error:
            if len(parts) == 1:
                self._fail(parts[0][0], error)
            else:  # one request's failure is not its neighbours'
                for part in parts:
                    self._search([part])
            return
        for (job, _), hits in zip(parts, found, strict=True):
            job.found += hits
            if len(job.found) == len(job.queries):
                job.done.set_result(job.found)

    def _fail(self, job: _Job, error: Exception) -> None:
        with self._changed:
            self._jobs = deque(other for other in self._jobs if other is not job)
        job.done.set_exception(error)


class _Service:
    """The handlers, and what they count."""

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
        """One more request was answered."""
        self._requests.labels(request.url.path, status).inc()

    async def _answer(
        self, request: Request, k_name: str, reply: Callable[[dict, list[Sequence[Hit]]], dict]
    ) -> Response:
        with self._seconds.labels(request.url.path).time():
            raw = await read_body(request, self._limits.body_bytes, Refused)
            body = _parse(raw, k_name, self._limits)
            hits = await self._search(body["queries"], body[k_name])
            # Of thousands of passages: the other requests must not wait for it.
            content = await asyncio.to_thread(lambda: msgspec.json.encode(reply(body, hits)))
        self.count(request, 200)
        return Response(content, media_type="application/json")

    async def _search(self, queries: list[str], k: int) -> list[Sequence[Hit]]:
        found = self.batcher.submit(queries, k)
        try:
            hits = await asyncio.wrap_future(found)
        except Exception as error:
            logger.exception("a search failed")
            self._errors.inc()
            raise Refused(500, f"the search failed: {error!r}") from error
        self._queries.inc(len(hits))
        return hits


def _parse(raw: bytes, k_name: str, limits: Limits) -> dict[str, Any]:
    """The body of a request, checked; raises Refused."""
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
    """Lines as R1-Searcher's corpora hold them; clients cut a number at their start."""
    return {"queries": body["queries"], "answers": [[_line(hit) for hit in row] for row in hits]}


def _line(hit: Hit) -> str:
    return f"{hit.id}\t{hit.line}" if is_whole_number(hit.id) else hit.line


def _documents_reply(body: dict[str, Any], hits: list[Sequence[Hit]]) -> dict[str, Any]:
    """With scores as pairs, without them bare documents, as Search-R1's server has it."""
    if not body.get("return_scores"):
        return {"result": [[_document(hit) for hit in row] for row in hits]}
    pairs = [[{"document": _document(hit), "score": hit.score} for hit in row] for row in hits]
    return {"result": pairs}


def _document(hit: Hit) -> dict[str, str]:
    contents = f'"{hit.title}"\n{hit.text}' if hit.title else hit.text
    return {"id": hit.id, "contents": contents}


def make_app(retriever: Served, limits: Limits, allowed: Callers | None = None) -> ASGIApp:
    """The ASGI application; its search thread ends with it.

    By default only loopback's names and the server's own pages are `allowed`.
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

    `announce` is told the address once connections are taken. Call it on the main thread.
    """
    listen.serve(make_app(retriever, limits or Limits(), allowed), bound, announce)


def serve_in_background(retriever: Served, host: str) -> str:
    """Serves on a free port of `host` while this process lives; returns the address."""
    app = make_app(retriever, Limits(), callers(host, ()))
    return listen.serve_in_background(app, bind(host, 0))
