"""Throughput of `r1s serve` for clients over sockets, with our engine and with JetStream's."""

import importlib.util
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from itertools import count
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from benchmarks.serve_target import PASSAGES, open_summaries
from r1s_jax.retrieval.corpus import wiki_summaries
from r1s_jax.system.assets import resolve

_START_S, _STOP_S, _ANSWER_S = 600, 60, 300
_QUESTIONS = 512
# Tokens per answer. The policy's sentences are its queries: see serve_target.py.
_TOKENS = 96


class _Answer(NamedTuple):
    tokens: int
    searches: int
    first_s: float  # time to the first token


def bench_serve(
    *, model: str, clients: int, seconds: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Requests and tokens per second, and times to the first token, of one engine after the other.

    `ratio` is our tokens per second over JetStream's; None where JetStream is not installed.
    """
    open_summaries()  # builds the index once, for both engines
    questions = _questions()
    engines = ["ours"]
    engines += ["jetstream"] if importlib.util.find_spec("jetstream") else []
    result: dict[str, Any] = {"clients": clients, "seconds": seconds, "jetstream": None}
    for engine in engines:
        say(f"{engine}: starting")
        with _server(engine, model, slots=clients) as url:
            _ask_all(url, questions[:1], 1, 0)  # compiles
            say(f"{engine}: {clients} clients for {seconds:g} s")
            result[engine] = _ask_all(url, questions, clients, seconds)
            say(f"{engine}: {result[engine]['tokens_per_s']:.1f} tokens/s")
    theirs = result["jetstream"]
    ratio = theirs and result["ours"]["tokens_per_s"] / theirs["tokens_per_s"]
    return result | {"ratio": ratio, "errors": sum(result[engine]["errors"] for engine in engines)}


def _questions() -> list[str]:
    titles = [passage.title for passage in wiki_summaries(resolve(PASSAGES))]
    return [f"What is {title}?" for title in titles[:: max(1, len(titles) // _QUESTIONS)]]


@contextmanager
def _server(engine: str, model: str, slots: int) -> Iterator[str]:
    command = [sys.executable, "-m", "benchmarks.serve_target", engine, model, str(slots)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
    try:
        yield _address(process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def _address(process: subprocess.Popen) -> str:
    """The URL that the server prints once it listens; a thread drains the rest of its output."""
    urls, ready = [], threading.Event()

    def drain() -> None:
        for line in process.stdout or ():
            if line.startswith("http://") and not urls:
                urls.append(line.strip())
                ready.set()
        ready.set()

    threading.Thread(target=drain, daemon=True).start()
    if not ready.wait(_START_S) or not urls:
        raise OSError("the measured server did not start; see its output above")
    return urls[0]


def _ask_all(url: str, questions: Sequence[str], clients: int, seconds: float) -> dict[str, Any]:
    """Each client asks questions one after the other until the time is over, at least one."""
    answers: list[_Answer] = []
    errors: list[str] = []
    numbers, started = count(), time.monotonic()

    def client() -> None:
        while True:
            question = questions[next(numbers) % len(questions)]
            try:
                answers.append(_ask(url, question))
            except (OSError, ValueError, KeyError) as error:
                errors.append(repr(error))
            if time.monotonic() - started >= seconds:
                return

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - started
    firsts = [a.first_s for a in answers] or [float("nan")]
    return {
        "requests": len(answers),
        "requests_per_s": len(answers) / took,
        "tokens_per_s": sum(a.tokens for a in answers) / took,
        "searches_per_request": float(np.mean([a.searches for a in answers] or [0])),
        "first_token_p50_s": float(np.percentile(firsts, 50)),
        "first_token_p99_s": float(np.percentile(firsts, 99)),
        "errors": len(errors),
        "error": errors[0] if errors else None,
    }


def _ask(url: str, question: str) -> _Answer:
    """One streamed answer; raises OSError, ValueError or KeyError unless it is complete."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": _TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    place = urlsplit(url)
    connection = HTTPConnection(place.hostname or "", place.port, timeout=_ANSWER_S)
    started, first, searches, usage, ended = time.monotonic(), None, set(), None, False
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        reply = connection.getresponse()
        if reply.status != 200:
            raise ValueError(f"status {reply.status}")
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                delta = choice["delta"]
                if first is None and (delta.get("reasoning_content") or delta.get("searches")):
                    first = time.monotonic() - started
                searches |= {search["index"] for search in delta.get("searches", ())}
                ended |= choice["finish_reason"] is not None
    finally:
        connection.close()
    if not ended or usage is None or first is None:
        raise ValueError("an answer ended before it was complete")
    return _Answer(usage["completion_tokens"], len(searches), first)
