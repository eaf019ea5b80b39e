"""A policy that searches, behind the chat API of OpenAI's clients (the extra `serve`).

    POST /v1/chat/completions, GET /v1/models
    GET  /           a page to ask on
    GET  /health, /metrics (Prometheus)

`content` is the answer, `reasoning_content` the thoughts, `searches` what was looked up and found.
"""

import asyncio
import hmac
import itertools
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from r1s_jax.border import listen
from r1s_jax.border.errors import ConfigError
from r1s_jax.protocol.prompts import conversation
from r1s_jax.serving.answer import Answer, Delta, Failed
from r1s_jax.serving.chat import ChatRequest, Refused, read_request
from r1s_jax.serving.events import EventStream, disconnected
from r1s_jax.serving.jobs import Busy, Job, Jobs, Update
from r1s_jax.serving.meters import Meters

logger = logging.getLogger(__name__)

_PAGE = resources.files("r1s_jax.serving").joinpath("page.html")
_POLICY_OF_PAGE = "default-src 'none'; style-src 'unsafe-inline'; script-src 'self'; "
_POLICY_OF_PAGE += "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_RETRY_AFTER_S = "2"


@dataclass(frozen=True)
class Limits:
    """What the server takes on; the rest is refused."""

    body_bytes: int = 2**20  # of a request
    deadline_s: float = 300.0  # from a request to the end of its answer


class Service:
    """The handlers. One event loop, one searcher."""

    def __init__(
        self,
        searcher: Jobs,
        name: str,
        *,
        key: str = "",
        first_search: bool = False,
        limits: Limits | None = None,
    ):
        """`name` is the model's to clients; `key`, where given, has to be sent by them."""
        self._searcher, self._name, self._key = searcher, name, key
        self._first_search, self.limits = first_search, limits or Limits()
        engine = searcher.engine
        self._render = conversation(engine.dialect, engine.tokenizer)
        self._groups = itertools.count(1)
        self.meters = Meters(searcher)
        self.stopping = False

    # Handlers.

    async def chat(self, request: Request) -> Response:
        started = time.monotonic()
        try:
            self._check_key(request)
            if why := self._searcher.failed or ("the server is stopping" if self.stopping else ""):
                raise Refused(503, why, kind="server_error")
            asked = read_request(await self._body(request))
            self._check(asked)
            exchange = await self._begin(asked, started)
        except Refused as refused:
            return self._refusal(refused)
        except ClientDisconnect:
            return self._refusal(Refused(400, "the client went away"))
        if asked.stream:
            return EventStream(exchange.events(), exchange.leave)
        try:
            return await self._whole(exchange, request)
        finally:
            exchange.leave()

    async def models(self, request: Request) -> Response:
        try:
            self._check_key(request)
        except Refused as refused:
            return self._refusal(refused)
        model = {"id": self._name, "object": "model", "created": 0, "owned_by": "r1s_jax"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, request: Request) -> Response:
        failed = self._searcher.failed
        told = {"status": failed or ("stopping" if self.stopping else "ok"), "model": self._name}
        told |= {"slots": self._searcher.rows, "busy": self._searcher.slots_busy}
        return JSONResponse(told, 503 if failed or self.stopping else 200)

    async def metrics(self, request: Request) -> Response:
        return Response(self.meters.text(), media_type="text/plain; version=0.0.4")

    async def page(self, request: Request) -> Response:
        headers = {"Content-Security-Policy": _POLICY_OF_PAGE, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(_PAGE.read_text("utf-8"), headers=headers)

    async def script(self, request: Request) -> Response:
        text = _PAGE.with_name("page.js").read_text("utf-8")
        return Response(text, media_type="text/javascript")

    # Behind them.

    def _check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._key and not hmac.compare_digest(given.encode(), self._key.encode()):
            raise Refused(401, "Incorrect API key provided", code="invalid_api_key")

    async def _body(self, request: Request) -> bytes:
        try:
            return await listen.read_body(request, self.limits.body_bytes)
        except listen.TooLarge as error:
            raise Refused(413, str(error)) from None

    def _check(self, asked: ChatRequest) -> None:
        if self._searcher.greedy_only and asked.temperature:
            raise Refused(400, "this server decodes greedily: temperature 0", param="temperature")
        if asked.model not in (None, self._name):
            message = f"The model {asked.model[:80]!r} does not exist: there is {self._name!r}"
            raise Refused(404, message, param="model", code="model_not_found")

    async def _begin(self, asked: ChatRequest, started: float) -> "Exchange":
        engine, messages = self._searcher.engine, asked.conversation()
        clean = [{**m, "content": engine.foreign(m["content"])} for m in messages]
        try:
            prompt = await asyncio.to_thread(self._render, clean)
        except ConfigError as error:
            raise Refused(400, str(error), param="messages") from None
        tokens = await asyncio.to_thread(engine.start_tokens, prompt)
        first = []
        if self._first_search and len(tokens) < engine.config.max_length:
            first, forced = await asyncio.to_thread(self._search_first, messages[-1]["content"])
            tokens, prompt = tokens + engine.encode(forced), prompt + forced
        if len(tokens) >= engine.config.max_length - 1:
            raise Refused(
                400,
                f"the messages take {len(tokens)} tokens; there is room for "
                f"{engine.config.max_length} with the answer and all documents",
                param="messages",
                code="context_length_exceeded",
            )
        answers = [
            Answer(engine.dialect, prompt, engine.decode, engine.eos_ids, asked.stops, first)
            for _ in range(asked.samples)
        ]
        exchange = Exchange(self, asked, tokens, answers, started + self.limits.deadline_s)
        try:
            self._searcher.submit(exchange.jobs(next(self._groups)))
        except Busy as busy:
            raise Refused(
                429, f"try again later: {busy}", kind="rate_limit_error", code="rate_limit_exceeded"
            ) from None
        return exchange

    def _search_first(self, question: str) -> tuple[list[Any], str]:
        """The system's own search, and how it stands in the sequence."""
        engine = self._searcher.engine
        (search,) = engine.broker.search_now([question])
        block = engine.broker.document_tokens(search.documents)
        return [search], engine.dialect.first_call(engine.foreign(question)) + engine.decode(block)

    async def _whole(self, exchange: "Exchange", request: Request) -> Response:
        work = asyncio.ensure_future(exchange.finish())
        gone = asyncio.ensure_future(disconnected(request.receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return self._refusal(Refused(400, "the client went away"))
            work.result()
        except Refused as refused:
            return self._refusal(refused)
        finally:
            work.cancel()
            gone.cancel()
        self.meters.request(200)
        return _json(exchange.completion())

    def _refusal(self, refused: Refused) -> Response:
        self.meters.request(refused.status)
        headers = {"Retry-After": _RETRY_AFTER_S} if refused.status in (429, 503) else {}
        return JSONResponse(refused.json(), refused.status, headers)

    # What an exchange needs of it.

    @property
    def name(self) -> str:
        return self._name

    @property
    def searcher(self) -> Jobs:
        return self._searcher


class Exchange:
    """One request and its answers."""

    def __init__(
        self,
        service: Service,
        asked: ChatRequest,
        prompt: list[int],
        answers: list[Answer],
        deadline: float,
    ):
        """Times are those of time.monotonic."""
        self._service, self._asked, self._prompt, self._answers = service, asked, prompt, answers
        self._deadline, self._started = deadline, time.monotonic()
        self._news: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._jobs: list[Job] = []
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._left = False

    def jobs(self, group: int) -> list[Job]:
        """What the searcher is to do."""
        asked, seed = self._asked, self._asked.drawn_seed()
        self._jobs = [
            Job(
                prompt=self._prompt,
                seed=seed,
                update=self._listener(i),
                sample=i,
                group=group,
                temperature=1.0 if asked.temperature is None else asked.temperature,
                top_p=1.0 if asked.top_p is None else asked.top_p,
                max_tokens=asked.limit,
            )
            for i in range(asked.samples)
        ]
        return self._jobs

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """(which answer, what is new of it), to the end of all; raises Refused."""
        for i, answer in enumerate(self._answers):
            for delta in answer.first_deltas():
                yield i, delta
        while not all(answer.over for answer in self._answers):
            try:
                async with asyncio.timeout(self._deadline - time.monotonic()):
                    i, update = await self._news.get()
                deltas = self._answers[i].feed(update)
            except TimeoutError:
                seconds = self._deadline - self._started
                raise Refused(
                    504, f"no whole answer within {seconds:.0f} s", kind="timeout", code="deadline"
                ) from None
            except Failed as failed:
                raise Refused(500, str(failed), kind="server_error") from None
            if update.tokens:
                self._service.meters.first_token(self, time.monotonic() - self._started)
            for delta in deltas:
                yield i, delta
            if self._answers[i].over and not update.finish:
                self._service.searcher.cancel([self._jobs[i]])

    async def finish(self) -> None:
        """Waits for the end; raises Refused."""
        async for _ in self.deltas():
            pass

    async def events(self) -> AsyncIterator[bytes]:
        """The stream of server-sent events."""
        status = 200
        try:
            async for i, delta in self.deltas():
                yield self._chunk([{"index": i, "delta": delta, "finish_reason": None}])
            for i, answer in enumerate(self._answers):
                noted = answer.annotations()
                delta = {"annotations": noted} if noted else {}
                end = {"index": i, "delta": delta, "finish_reason": answer.finish_reason}
                yield self._chunk([end])
            if self._asked.include_usage:
                yield self._chunk([], usage=self.usage())
        except Refused as refused:
            status = refused.status
            yield _event(refused.json())
        self._service.meters.request(status)
        yield b"data: [DONE]\n\n"

    def completion(self) -> dict[str, Any]:
        """The whole answer as one object."""
        choices = [
            {
                "index": i,
                "message": answer.message(),
                "finish_reason": answer.finish_reason,
                "logprobs": None,
            }
            for i, answer in enumerate(self._answers)
        ]
        return self._frame("chat.completion") | {"choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens: documents are of the prompt, the policy did not write them."""
        documents = sum(answer.documents for answer in self._answers)
        written = sum(answer.written for answer in self._answers)
        given = len(self._prompt) + documents
        return {
            "prompt_tokens": given,
            "completion_tokens": written,
            "total_tokens": given + written,
            "prompt_tokens_details": {"document_tokens": documents, "cached_tokens": 0},
        }

    def leave(self) -> None:
        """Nobody waits any more, or all is said."""
        if not self._left:
            self._left = True
            self._service.searcher.cancel(self._jobs)
            self._service.meters.answered(self, time.monotonic() - self._started)

    def _listener(self, i: int) -> Callable[[Update], None]:
        def update(new: Update) -> None:
            with suppress(RuntimeError):  # the event loop has ended
                self._loop.call_soon_threadsafe(self._news.put_nowait, (i, new))

        return update

    def _frame(self, kind: str) -> dict[str, Any]:
        name = self._service.name
        return {"id": self._id, "object": kind, "created": self._created, "model": name}

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        usage = {"usage": None} if self._asked.include_usage else {}
        frame = self._frame("chat.completion.chunk")
        return _event(frame | {"choices": choices} | usage | more)


def _json(value: Any) -> Response:
    return Response(_bytes(value), media_type="application/json")


def _event(value: Any) -> bytes:
    return b"data: " + _bytes(value) + b"\n\n"


def _bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


def make_app(service: Service) -> Starlette:
    """The ASGI application; its searcher ends with it."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.searcher.close)

    def error(request: Request, refused: HTTPException) -> Response:
        told = Refused(refused.status_code, refused.detail).json()
        return JSONResponse(told, refused.status_code, refused.headers)

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
        Route("/health", service.health),
        Route("/metrics", service.metrics),
        Route("/", service.page),
        Route("/page.js", service.script),
    ]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: error})
