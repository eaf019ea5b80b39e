"""Answers a second of `r1s serve`, our engine beside JetStream's, asked by clients over sockets."""

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
# Tokens of an answer. Its policy searches whatever it has just said: see serve_target.py.
_TOKENS = 96


class _Answered(NamedTuple):
    tokens: int
    searches: int
    first_s: float  # to the first token


def bench_serve(
    *, model: str, clients: int, seconds: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Requests and tokens a second, and times to the first token, of both engines in turn.

    `ratio` is of tokens a second, ours over JetStream's; None where that is not installed.
    """
    open_summaries()  # built once, for both
    questions = _questions()
    engines = ["ours"]
    engines += ["jetstream"] if importlib.util.find_spec("jetstream") else []
    told: dict[str, Any] = {"clients": clients, "seconds": seconds, "jetstream": None}
    for engine in engines:
        say(f"{engine}: starting")
        with _server(engine, model, slots=clients) as url:
            _ask_all(url, questions[:1], 1, 0)  # compiles what is not yet
            say(f"{engine}: {clients} clients for {seconds:g} s")
            told[engine] = _ask_all(url, questions, clients, seconds)
            say(f"{engine}: {told[engine]['tokens_per_s']:.1f} tokens/s")
    theirs = told["jetstream"]
    ratio = theirs and told["ours"]["tokens_per_s"] / theirs["tokens_per_s"]
    return told | {"ratio": ratio, "errors": sum(told[engine]["errors"] for engine in engines)}


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
    """What the server prints once it listens; the rest of what it prints is read away."""
    found, ready = [], threading.Event()

    def read() -> None:
        for line in process.stdout or ():
            if line.startswith("http://") and not found:
                found.append(line.strip())
                ready.set()
        ready.set()

    threading.Thread(target=read, daemon=True).start()
    if not ready.wait(_START_S) or not found:
        raise OSError("the server to be measured did not start")
    return found[0]


def _ask_all(url: str, questions: Sequence[str], clients: int, seconds: float) -> dict[str, Any]:
    """Each client asks one question after the other; at least one each."""
    answered: list[_Answered] = []
    errors: list[str] = []
    numbers, started = count(), time.monotonic()

    def client() -> None:
        while True:
            question = questions[next(numbers) % len(questions)]
            try:
                answered.append(_ask(url, question))
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
    firsts = [a.first_s for a in answered] or [float("nan")]
    return {
        "requests": len(answered),
        "requests_per_s": len(answered) / took,
        "tokens_per_s": sum(a.tokens for a in answered) / took,
        "searches_per_request": float(np.mean([a.searches for a in answered] or [0])),
        "first_token_p50_s": float(np.percentile(firsts, 50)),
        "first_token_p99_s": float(np.percentile(firsts, 99)),
        "errors": len(errors),
        "error": errors[0] if errors else None,
    }


def _ask(url: str, question: str) -> _Answered:
    """One streamed answer; raises for anything but a whole one."""
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
        raise ValueError("an answer broke off")
    return _Answered(usage["completion_tokens"], len(searches), first)
