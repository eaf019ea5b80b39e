"""The metrics of a server, for Prometheus."""

import time
from collections import deque

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from r1s_jax.serving.jobs import Jobs

_WINDOW_S = 10.0
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Meters:
    """Requests, tokens, searches, slots and times of one serving loop."""

    def __init__(self, serving_loop: Jobs):
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "r1s_requests", "Requests by HTTP status.", ["status"], registry=registry
        )
        self._first = Histogram(
            "r1s_first_token_seconds",
            "Seconds from request to the first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._seconds = Histogram(
            "r1s_answer_seconds",
            "Seconds from request to the end of its answers.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._begun: set[int] = set()
        self._samples: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        self._serving_loop = serving_loop
        gauges = {
            "r1s_tokens_written": ("Tokens that the policy wrote.", lambda: serving_loop.tokens),
            "r1s_tokens_given": ("Tokens of documents.", lambda: serving_loop.documents),
            "r1s_queue": ("Answers that wait for a slot.", lambda: serving_loop.queued),
            "r1s_slots_busy": ("Slots with an answer.", lambda: serving_loop.slots_busy),
            "r1s_slots": ("Slots.", lambda: serving_loop.rows),
            "r1s_tokens_per_second": (
                f"Tokens that the policy wrote per second, over {_WINDOW_S:.0f} s.",
                self._rate,
            ),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=registry).set_function(value)
        self._searches = Gauge(
            "r1s_searches", "Searches by outcome.", ["outcome"], registry=registry
        )

    def request(self, status: int) -> None:
        """Counts one answered request."""
        self._requests.labels(status).inc()

    def first_token(self, completion: object, seconds: float) -> None:
        """Observes the first token of a completion; later calls for it do nothing."""
        if id(completion) not in self._begun:
            self._begun.add(id(completion))
            self._first.observe(seconds)

    def answered(self, completion: object, seconds: float) -> None:
        """Observes the end of a completion."""
        self._begun.discard(id(completion))
        self._seconds.observe(seconds)

    def registry(self) -> CollectorRegistry:
        """The registry with current values, for a scraper."""
        for outcome, count in self._serving_loop.engine.broker.counts.items():
            self._searches.labels(outcome).set(count)
        return self._registry

    def _rate(self) -> float:
        """Tokens per second over the last ten seconds, or since the last scrape if longer ago."""
        now, tokens = time.monotonic(), self._serving_loop.tokens
        self._samples.append((now, tokens))
        while len(self._samples) > 2 and now - self._samples[1][0] >= _WINDOW_S:
            self._samples.popleft()
        then, before = self._samples[0]
        return (tokens - before) / max(now - then, 1e-3)
