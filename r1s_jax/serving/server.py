"""A policy that searches, behind the chat API of OpenAI's clients (the extra `serve`).

    POST /v1/chat/completions, GET /v1/models, /v1/models/NAME
    GET  /           a page with a question form
    GET  /health, /metrics (Prometheus)

`content` is the answer, `reasoning_content` the reasoning, `searches` the queries and documents.
"""

import asyncio
import hmac
import time
from importlib import resources

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from r1s_jax.io.errors import ConfigError
from r1s_jax.io.origins import Callers
from r1s_jax.io.service import Handler, answered, metrics_reply, read_body
from r1s_jax.io.service import make_app as make_service
from r1s_jax.serving.chat import Refused
from r1s_jax.serving.completion import Completion, Desk, Limits
from r1s_jax.serving.events import EventStream, disconnected
from r1s_jax.serving.jobs import Jobs

_PAGE = resources.files("r1s_jax.serving").joinpath("page.html")
_SCRIPT = resources.files("r1s_jax.serving").joinpath("page.js")
_POLICY_OF_PAGE = "default-src 'none'; style-src 'unsafe-inline'; script-src 'self'; "
_POLICY_OF_PAGE += "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_SERVED = "POST /v1/chat/completions, GET /v1/models, /health, /metrics and the page at /"


class Service:
    """The handlers, for one event loop and one serving loop."""

    def __init__(
        self,
        serving_loop: Jobs,
        name: str,
        *,
        key: str = "",
        limits: Limits | None = None,
    ):
        """`name` is the model's name for clients; they must send `key`, unless it is empty."""
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
                raise Refused(503, why)
            raw = await read_body(request, self.limits.body_bytes, Refused)
            completion = Completion(self.desk, started)
            chat_request = await completion.read(raw)
            if chat_request.stream:
                stream, completion = EventStream(completion.events(), completion.leave), None
                return stream
            return await self._whole(completion, request)
        finally:
            if completion:
                completion.leave()

    async def models(self, request: Request) -> Response:
        model = {"id": self._name, "object": "model", "created": 0, "owned_by": "r1s_jax"}
        self._check_key(request)
        if name := request.path_params.get("name"):
            self.desk.check_model(name)
            return JSONResponse(model)
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, request: Request) -> Response:
        failed = self._serving_loop.failed
        body = {"status": failed or ("stopping" if self.stopping else "ok"), "model": self._name}
        body |= {"slots": self._serving_loop.rows, "busy": self._serving_loop.slots_busy}
        return JSONResponse(body, 503 if failed or self.stopping else 200)

    async def metrics(self, request: Request) -> Response:
        return metrics_reply(self.meters.registry())

    async def page(self, request: Request) -> Response:
        headers = {"Content-Security-Policy": _POLICY_OF_PAGE, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(_PAGE.read_text("utf-8"), headers=headers)

    async def script(self, request: Request) -> Response:
        text = _SCRIPT.read_text("utf-8")
        return Response(text, media_type="text/javascript")

    # Internal.

    def _check_key(self, request: Request) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        key = key.strip() if scheme.lower() == "bearer" else ""
        if self._key and not hmac.compare_digest(key.encode(), self._key.encode()):
            raise Refused(401, "Incorrect API key provided", code="invalid_api_key")

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

    def count(self, request: Request, status: int) -> None:
        """Counts one answered request."""
        self.meters.request(status)


def check_key(key: str) -> str:
    """Returns `key`; raises ConfigError for a key that no HTTP header can hold."""
    if not (key.isascii() and key.isprintable() and key == key.strip()):
        raise ConfigError(
            "--api-key (or R1S_API_KEY) holds characters that no client can send in a header: use "
            "printable ASCII characters without spaces at either end"
        )
    return key


def make_app(service: Service, allowed: Callers | None = None) -> ASGIApp:
    """The ASGI application; its shutdown closes the serving loop.

    By default only loopback names and the server's own page are `allowed`.
    """

    def handled(handler: Handler) -> Handler:
        return answered(handler, Refused, service.count)

    routes = [
        Route("/v1/chat/completions", handled(service.chat), methods=["POST"]),
        Route("/v1/models", handled(service.models)),
        Route("/v1/models/{name:path}", handled(service.models)),
        Route("/health", service.health),
        Route("/metrics", service.metrics),
        Route("/", service.page),
        Route("/page.js", service.script),
    ]
    close = service.desk.close
    return make_service(routes, served=_SERVED, refuse=Refused, close=close, allowed=allowed)
