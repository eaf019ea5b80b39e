"""A policy that searches, behind the chat API of OpenAI's clients (the extra `serve`).

    POST /v1/chat/completions, GET /v1/models, /v1/models/NAME
    GET  /           a page to ask on
    GET  /health, /metrics (Prometheus)

`content` is the answer, `reasoning_content` the thoughts, `searches` what was looked up and found.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from r1s_jax.io import listen
from r1s_jax.io.errors import ConfigError, shorten
from r1s_jax.io.origins import Callers, guarded
from r1s_jax.serving.chat import Refused
from r1s_jax.serving.completion import Completion, Desk, Limits
from r1s_jax.serving.events import EventStream, disconnected
from r1s_jax.serving.jobs import Jobs

logger = logging.getLogger(__name__)

_PAGE = resources.files("r1s_jax.serving").joinpath("page.html")
_SCRIPT = resources.files("r1s_jax.serving").joinpath("page.js")
_POLICY_OF_PAGE = "default-src 'none'; style-src 'unsafe-inline'; script-src 'self'; "
_POLICY_OF_PAGE += "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_RETRY_AFTER_S = "2"
_SERVED = "POST /v1/chat/completions, GET /v1/models, /health, /metrics and the page at /"


class Service:
    """The handlers. One event loop, one serving loop."""

    def __init__(
        self,
        serving_loop: Jobs,
        name: str,
        *,
        key: str = "",
        limits: Limits | None = None,
    ):
        """`name` is the model's to clients; `key`, where given, has to be sent by them."""
        self._serving_loop, self._name, self._key = serving_loop, name, check_key(key)
        self.desk = Desk(serving_loop, name, limits or Limits())
        self.meters, self.limits = self.desk.meters, self.desk.limits
        self.stopping = False

    # Handlers.

    async def chat(self, request: Request) -> Response:
        started = time.monotonic()
        completion: Completion | None = None
        try:
            self._check_key(request)
            if why := self._serving_loop.failed or (
                "the server is stopping" if self.stopping else ""
            ):
                raise Refused(503, why, kind="server_error")
            raw = await self._body(request)
            completion = Completion(self.desk, started)
            asked = await completion.read(raw)
            if asked.stream:
                stream, completion = EventStream(completion.events(), completion.leave), None
                return stream
            return await self._whole(completion, request)
        except Refused as refused:
            return self._refusal(refused)
        except ClientDisconnect:
            return self._refusal(Refused(400, "the client went away"))
        finally:
            if completion:
                completion.leave()

    async def models(self, request: Request) -> Response:
        model = {"id": self._name, "object": "model", "created": 0, "owned_by": "r1s_jax"}
        try:
            self._check_key(request)
            if named := request.path_params.get("name"):
                self.desk.check_model(named)
                return JSONResponse(model)
        except Refused as refused:
            return self._refusal(refused)
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, request: Request) -> Response:
        failed = self._serving_loop.failed
        told = {"status": failed or ("stopping" if self.stopping else "ok"), "model": self._name}
        told |= {"slots": self._serving_loop.rows, "busy": self._serving_loop.slots_busy}
        return JSONResponse(told, 503 if failed or self.stopping else 200)

    async def metrics(self, request: Request) -> Response:
        return Response(self.meters.text(), media_type="text/plain; version=0.0.4")

    async def page(self, request: Request) -> Response:
        headers = {"Content-Security-Policy": _POLICY_OF_PAGE, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(_PAGE.read_text("utf-8"), headers=headers)

    async def script(self, request: Request) -> Response:
        text = _SCRIPT.read_text("utf-8")
        return Response(text, media_type="text/javascript")

    # Behind them.

    def _check_key(self, request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else ""
        if self._key and not hmac.compare_digest(given.encode(), self._key.encode()):
            raise Refused(401, "Incorrect API key provided", code="invalid_api_key")

    async def _body(self, request: Request) -> bytes:
        try:
            return await listen.read_body(request, self.limits.body_bytes)
        except listen.TooLarge as error:
            raise Refused(413, str(error)) from None
        except listen.NotJson as error:
            raise Refused(415, str(error)) from None

    async def _whole(self, completion: Completion, request: Request) -> Response:
        work = asyncio.ensure_future(completion.finish())
        gone = asyncio.ensure_future(disconnected(request.receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise Refused(400, "the client went away")
            work.result()
        finally:
            work.cancel()
            gone.cancel()
        self.meters.request(200)
        return Response(completion.as_json(), media_type="application/json")

    def _refusal(self, refused: Refused) -> Response:
        self.meters.request(refused.status)
        headers = {}
        if refused.status in (429, 503):
            headers["Retry-After"] = _RETRY_AFTER_S
        if refused.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(refused.json(), refused.status, headers)


def check_key(key: str) -> str:
    """A key that clients can send; raises ConfigError for one that no header can hold."""
    if not (key.isascii() and key.isprintable() and key == key.strip()):
        raise ConfigError(
            "--api-key (or R1S_API_KEY): expected printable ASCII characters without spaces at its "
            "ends, since no client can send others in a header; found others"
        )
    return key


def make_app(service: Service, allowed: Callers | None = None) -> ASGIApp:
    """The ASGI application; its serving loop ends with it.

    By default only loopback's names and the server's own page are `allowed`.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.desk.close)

    def error(request: Request, refused: Exception) -> Response:
        assert isinstance(refused, HTTPException)  # as registered below
        told = refused.detail
        if refused.status_code in (404, 405):
            told = f"{told}: {request.method} {shorten(request.url.path, 80)}; served is {_SERVED}"
        body = Refused(refused.status_code, told).json()
        return JSONResponse(body, refused.status_code, refused.headers)

    def handled(handler: Callable[[Request], Awaitable[Response]]) -> Any:
        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except Exception:
                logger.exception("a request failed")
                service.meters.request(500)
                broken = Refused(500, "the server failed", kind="server_error")
                return JSONResponse(broken.json(), 500)

        return handle

    routes = [
        Route("/v1/chat/completions", handled(service.chat), methods=["POST"]),
        Route("/v1/models", handled(service.models)),
        Route("/v1/models/{name:path}", handled(service.models)),
        Route("/health", service.health),
        Route("/metrics", service.metrics),
        Route("/", service.page),
        Route("/page.js", service.script),
    ]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: error})
    return guarded(
        app, allowed or Callers(), lambda why: JSONResponse(Refused(403, why).json(), 403)
    )
