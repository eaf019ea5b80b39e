"""One request for answers, from its body to the last event for its client."""

import asyncio
import itertools
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from r1s_jax.io.errors import ConfigError
from r1s_jax.protocol.prompts import conversation
from r1s_jax.rollout.broker import CHARACTERS_A_TOKEN, Search
from r1s_jax.rollout.sampler import GREEDY_BELOW
from r1s_jax.serving.answer import Answer, Delta, Failed, search_json
from r1s_jax.serving.chat import ChatRequest, Refused, read_request
from r1s_jax.serving.jobs import Busy, Job, Jobs, Update
from r1s_jax.serving.meters import Meters

logger = logging.getLogger(__name__)

_QUIET_S = 5.0  # a stream silent for so long gets a comment, since proxies close silent streams
_READERS, _SEARCHERS = 2, 32  # threads that read prompts, and that make first searches
_USUAL_CHARACTERS = 8  # characters per token; most texts have fewer
_CUT_TOKENS = 64  # bounds the extra tokens of a word that is cut in two


@dataclass(frozen=True)
class Limits:
    """Limits of a request; a request beyond them is refused."""

    body_bytes: int = 2**20  # of a request
    deadline_s: float = 300.0  # from a request to the end of its answer


class Asked(NamedTuple):
    """A request after reading."""

    request: ChatRequest
    prompt: str
    tokens: list[int]  # of the prompt
    question: str  # the last message


class Desk:
    """The state that a server's completions share.

    Only `read` and `search` may be called outside of the event loop's thread.
    """

    def __init__(self, serving_loop: Jobs, name: str, limits: Limits):
        self.serving_loop, self.name, self.limits = serving_loop, name, limits
        self.retrieve_first = serving_loop.config.retrieve_first
        self.meters = Meters(serving_loop)
        self.groups = itertools.count(1)
        self.readers = ThreadPoolExecutor(_READERS, "prompts")
        self.searchers = ThreadPoolExecutor(_SEARCHERS, "first-search")
        self._render = conversation(serving_loop.engine.dialect, serving_loop.engine.tokenizer)
        self._promised = 0  # answers with a place in the queue that are not jobs yet

    def take_places(self, count: int) -> None:
        """Reserves places in the queue for answers; raises Refused (429) if too many wait."""
        free = self.serving_loop.rows - self.serving_loop.slots_busy
        waiting = self.serving_loop.queued + self._promised
        if waiting + count > self.serving_loop.waiting + free:
            raise too_busy(f"{waiting} answers are waiting")
        self._promised += count

    def give_places(self, count: int) -> None:
        """Releases places, when their answers have become jobs or were dropped."""
        self._promised -= count

    def read(self, raw: bytes) -> Asked:
        """Reads the body of a request; raises Refused. Slow, so it runs on a thread.

        A text that is certainly too long is not encoded.
        """
        request, engine = read_request(raw), self.serving_loop.engine
        self._check(request)
        messages = request.conversation()
        characters = sum(len(message["content"]) for message in messages)
        if characters > engine.config.max_length * CHARACTERS_A_TOKEN:
            raise self._too_long(f"{characters:,} characters")
        clean = [{**m, "content": engine.foreign(m["content"])} for m in messages]
        try:
            prompt = self._render(clean)
        except ConfigError as error:
            raise Refused(400, str(error), param="messages") from None
        if self._begins_too_long(prompt):
            raise self._too_long(f"more than {engine.config.max_length} tokens")
        tokens, question = engine.start_tokens(prompt), messages[-1]["content"]
        most, needed = engine.config.max_length - 2, len(tokens)
        if self.retrieve_first:
            most = min(most, engine.config.max_prompt_length)
            needed += engine.first_search_room(question)
        if needed > most:
            raise self._too_long(f"{needed} tokens")
        return Asked(request, prompt, tokens, question)

    def search(self, asked: Asked) -> tuple[Search, list[int]]:
        """The system's own first search of the question, and its tokens after the prompt."""
        engine = self.serving_loop.engine
        (search,) = engine.broker.search_now([asked.question])
        return search, engine.first_search_tokens(search, len(asked.tokens))

    def close(self) -> None:
        """Waits for the answers in progress and stops all threads."""
        self.serving_loop.close()
        self.readers.shutdown()
        self.searchers.shutdown()

    def _check(self, request: ChatRequest) -> None:
        if self.serving_loop.greedy_only and (request.temperature or 0) >= GREEDY_BELOW:
            message = "this server decodes greedily: expected temperature 0"
            raise Refused(400, message, param="temperature")
        if request.model is not None:
            self.check_model(request.model)

    def check_model(self, name: str) -> None:
        """Raises Refused (404) for any model but the served one."""
        if name != self.name:
            message = f"The model {name[:80]!r} does not exist: there is {self.name!r}"
            raise Refused(404, message, param="model", code="model_not_found")

    def _begins_too_long(self, prompt: str) -> bool:
        """Whether the beginning of a long text alone has too many tokens; cheaper to encode."""
        most, engine = self.serving_loop.engine.config.max_length, self.serving_loop.engine
        part = prompt[: _USUAL_CHARACTERS * most]
        return len(part) < len(prompt) and len(engine.encode(part)) > most + _CUT_TOKENS

    def _too_long(self, size: str) -> Refused:
        most = self.serving_loop.engine.config.max_length
        return Refused(
            400,
            f"the messages take {size}; prompt, documents and answer together may take {most} "
            "tokens: shorten the messages",
            param="messages",
            code="context_length_exceeded",
        )


def too_busy(why: str) -> Refused:
    """The refusal when the queue is full."""
    return Refused(
        429, f"try again later: {why}", kind="rate_limit_error", code="rate_limit_exceeded"
    )


class Completion:
    """One request and its answers."""

    def __init__(self, desk: Desk, started: float):
        """Reserves a place for one answer; raises Refused. `started`: a time.monotonic() value."""
        desk.take_places(1)
        self._desk, self._started, self._places = desk, started, 1
        self._deadline = started + desk.limits.deadline_s
        self._updates: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._answers: list[Answer] = []
        self._jobs: list[Job] = []
        self._prompt_tokens = 0  # tokens before the policy's first token
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._left = False

    async def read(self, raw: bytes) -> ChatRequest:
        """Reads the body; raises Refused. Must be called first."""
        self._asked = await self._in_thread(self._desk.readers, self._desk.read, raw)
        more = self._asked.request.samples - 1
        self._desk.take_places(more)
        self._places += more
        return self._asked.request

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yields (index of an answer, its new delta) to the end of all answers; raises Refused.

        Yields an empty delta when nothing was new for `_QUIET_S`.
        """
        answers = range(self._asked.request.samples)
        for i in answers:
            yield i, {"role": "assistant", "content": ""}
        if self._desk.retrieve_first:
            search = {"index": 0, **search_json(Search(-1, self._asked.question))}
            for i in answers:
                yield i, {"searches": [search]}
        starting = asyncio.ensure_future(self._start())
        try:
            while not (await asyncio.wait({starting}, timeout=_QUIET_S))[0]:
                yield 0, {}
            starting.result()
        finally:
            starting.cancel()
        for i in answers:
            for delta in self._answers[i].first_deltas():
                yield i, delta
        while not all(answer.over for answer in self._answers):
            if (new := await self._next()) is None:
                yield 0, {}
                continue
            i, update = new
            try:
                deltas = self._answers[i].feed(update)
            except Failed as failed:
                raise Refused(500, str(failed)) from None
            if update.tokens:
                self._desk.meters.first_token(self, time.monotonic() - self._started)
            for delta in deltas:
                yield i, delta
            if self._answers[i].over and not update.finish:
                self._desk.serving_loop.cancel([self._jobs[i]])

    async def finish(self) -> None:
        """Waits for the end; raises Refused."""
        async for _ in self.deltas():
            pass

    async def events(self) -> AsyncGenerator[bytes]:
        """The stream of server-sent events."""
        status = 200
        try:
            async for i, delta in self.deltas():
                new = [{"index": i, "delta": delta, "finish_reason": None}]
                yield self._chunk(new) if delta else b": waiting\n\n"
            for i, answer in enumerate(self._answers):
                annotations = answer.annotations()
                delta = {"annotations": annotations} if annotations else {}
                end = {"index": i, "delta": delta, "finish_reason": answer.finish_reason}
                yield self._chunk([end])
            if self._asked.request.include_usage:
                yield self._chunk([], usage=self.usage())
        except Refused as refused:
            status = refused.status
            yield _event(refused.json())
        self._desk.meters.request(status)
        yield b"data: [DONE]\n\n"

    def as_json(self) -> bytes:
        """All answers as one JSON object."""
        choices = [
            {
                "index": i,
                "message": answer.message(),
                "finish_reason": answer.finish_reason,
                "logprobs": None,
            }
            for i, answer in enumerate(self._answers)
        ]
        frame = self._frame("chat.completion")
        return _bytes(frame | {"choices": choices, "usage": self.usage()})

    def usage(self) -> dict[str, Any]:
        """Token counts; documents count as prompt, since the policy did not write them."""
        documents = sum(answer.documents for answer in self._answers)
        written = sum(answer.written for answer in self._answers)
        prompt = self._prompt_tokens + documents
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"document_tokens": documents, "cached_tokens": 0},
        }

    def leave(self) -> None:
        """Releases everything the request holds; called at its end, or when its client is gone."""
        if self._left:
            return
        self._left = True
        self._desk.give_places(self._places)
        if self._jobs:
            self._desk.serving_loop.cancel(self._jobs)
            self._desk.meters.answered(self, time.monotonic() - self._started)

    async def _start(self) -> None:
        """Makes the system's own first search, if any, then submits the jobs; raises Refused."""
        desk, asked = self._desk, self._asked
        engine, prompt, tokens, first = desk.serving_loop.engine, asked.prompt, asked.tokens, []
        if desk.retrieve_first:
            search, forced = await self._in_thread(desk.searchers, desk.search, asked)
            first, tokens, prompt = [search], tokens + forced, prompt + engine.decode(forced)
        if self._left:  # the client is gone: submit no jobs
            raise asyncio.CancelledError
        self._prompt_tokens = len(tokens)
        self._answers = [
            Answer(
                engine.dialect, prompt, engine.decode, engine.eos_ids, asked.request.stops, first
            )
            for _ in range(asked.request.samples)
        ]
        jobs = self._make_jobs(tokens)
        try:
            desk.serving_loop.submit(jobs)
        except Busy as busy:
            raise too_busy(str(busy)) from None
        self._jobs = jobs
        desk.give_places(self._places)
        self._places = 0

    def _make_jobs(self, tokens: list[int]) -> list[Job]:
        request, seed = self._asked.request, self._asked.request.drawn_seed()
        c = self._desk.serving_loop.config
        group = next(self._desk.groups)
        return [
            Job(
                prompt=tokens,
                seed=seed,
                update=self._listener(i),
                sample=i,
                group=group,
                temperature=c.temperature if request.temperature is None else request.temperature,
                top_p=c.top_p if request.top_p is None else request.top_p,
                max_tokens=request.limit,
            )
            for i in range(request.samples)
        ]

    async def _next(self) -> tuple[int, Update] | None:
        """The next (index, update) of the serving loop, None after `_QUIET_S`; raises Refused."""
        seconds = self._deadline - time.monotonic()
        try:
            async with asyncio.timeout(min(seconds, _QUIET_S)):
                return await self._updates.get()
        except TimeoutError:
            if seconds <= _QUIET_S:
                raise self._late() from None
            return None

    async def _in_thread(
        self, pool: ThreadPoolExecutor, call: Callable[..., Any], *args: Any
    ) -> Any:
        """Runs a call on a thread of the pool; raises Refused at the deadline."""
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                return await self._loop.run_in_executor(pool, call, *args)
        except TimeoutError:
            raise self._late() from None

    def _late(self) -> Refused:
        seconds = self._desk.limits.deadline_s
        text = f"no whole answer within {seconds:.0f} s"
        return Refused(504, text, kind="timeout", code="deadline")

    def _listener(self, i: int) -> Callable[[Update], None]:
        def update(new: Update) -> None:
            with suppress(RuntimeError):  # the event loop has ended
                self._loop.call_soon_threadsafe(self._updates.put_nowait, (i, new))

        return update

    def _frame(self, kind: str) -> dict[str, Any]:
        name = self._desk.name
        return {"id": self._id, "object": kind, "created": self._created, "model": name}

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        usage = {"usage": None} if self._asked.request.include_usage else {}
        frame = self._frame("chat.completion.chunk")
        return _event(frame | {"choices": choices} | usage | more)


def _event(value: Any) -> bytes:
    return b"data: " + _bytes(value) + b"\n\n"


def _bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
