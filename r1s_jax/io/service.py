"""Shared by all HTTP servers here: bodies, refusals, metrics (needs the extra `serve`)."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from r1s_jax.io.errors import UserError, shorten
from r1s_jax.io.origins import Callers, guarded

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = "2"
_BUSY = (429, 503)

Handler = Callable[[Request], Awaitable[Response]]


class Refused(UserError):
    """A refused request, with the HTTP status and the reason."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status

    def json(self) -> dict[str, Any]:
        """The body of the reply."""
        return {"error": str(self)}

    def reply(self) -> Response:
        """The reply; where the server is busy, with the time after which to retry."""
        headers = {"Retry-After": _RETRY_AFTER_S} if self.status in _BUSY else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.json(), self.status, headers)


# Makes a server's own form of refusal from a status and a reason.
Refuse = Callable[[int, str], Refused]


async def read_body(request: Request, limit: int, refuse: Refuse) -> bytes:
    """The JSON body, at most `limit` bytes; raises a refusal: 413 (too large), 415 (not JSON).

    Reads on for a while after the limit, because a client that is still sending does not read the
    reply. Requires JSON's `Content-Type`, because browsers let any web page send bodies of some
    other types without a CORS preflight.
    """
    size = 0
    parts: list[bytes] = []
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            parts.append(chunk)
        elif size > 16 * limit:
            break
    if size > limit:
        raise refuse(413, f"the request has more than {limit:,} bytes")
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise refuse(
            415, f"expected the header Content-Type: application/json, found {shorten(kind, 80)!r}"
        )
    return b"".join(parts)


def answered(handler: Handler, refuse: Refuse, count: Callable[[Request, int], None]) -> Handler:
    """`handler` for a route: turns exceptions into replies and passes their status to `count`."""

    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except Refused as error:
            refused = error
        except ClientDisconnect:
            refused = refuse(400, "the client went away")
        except Exception:
            logger.exception("a request failed")
            refused = refuse(500, "the server failed")
        count(request, refused.status)
        return refused.reply()

    return handle


def metrics_reply(registry: CollectorRegistry) -> Response:
    """The reply to a Prometheus scraper."""
    return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")


def make_app(
    routes: Sequence[Route],
    *,
    served: str,
    refuse: Refuse,
    close: Callable[[], object],
    allowed: Callers | None = None,
) -> ASGIApp:
    """The ASGI application of `routes`; `close` is called when it stops.

    `served` lists the routes, for the reply to a request for any other. By default only loopback's
    names and the server's own pages are `allowed`.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        yield
        await asyncio.to_thread(close)

    def error(request: Request, raised: Exception) -> Response:
        assert isinstance(raised, HTTPException)  # as registered below
        reason = raised.detail
        if raised.status_code in (404, 405):
            route = f"{request.method} {shorten(request.url.path, 80)}"
            reason = f"{reason}: {route}; this server has {served}"
        body = refuse(raised.status_code, reason).json()
        return JSONResponse(body, raised.status_code, raised.headers)

    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: error})
    return guarded(app, allowed or Callers(), lambda why: refuse(403, why).reply())
