"""Answers to be made: what a server asks of whatever makes them, and those that wait."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from r1s_jax.config import RolloutConfig, SearchConfig
from r1s_jax.models.pretrained import Pretrained
from r1s_jax.models.sharding import batch_shards
from r1s_jax.rollout.broker import Search
from r1s_jax.rollout.engine import Engine
from r1s_jax.rollout.trajectory import Finish


class Busy(Exception):
    """As much is waiting as may wait, or the server is stopping."""


class Update(NamedTuple):
    """What has become of an answer since the update before."""

    tokens: list[int]
    mask: list[bool]  # which of them the policy wrote
    searches: list[Search]  # that began or ended
    finish: Finish
    error: str = ""


@dataclass(eq=False)
class Job:
    """One answer to make. Those of one `group` have one prompt, which is computed once."""

    prompt: Sequence[int]
    seed: int
    update: Callable[[Update], None]  # called on the serving loop's thread
    sample: int = 0
    group: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int | None = None  # that the policy writes

    seen: int = 0  # tokens told, the prompt's included
    wrote: int = 0
    reported: list[tuple[Search, str]] = field(default_factory=list)  # with the last outcome
    cancelled: bool = False


class Jobs:
    """Answers in the slots of a thread of its own, and those that wait for a slot.

    A subclass starts its threads, which take from `_queue` whenever `_changed` says so.
    """

    greedy_only = False  # whether the temperature of a job is not heeded
    slots_busy: int

    def __init__(
        self,
        policy: Pretrained,
        config: RolloutConfig,
        search: SearchConfig | None,
        waiting: int,
        **engine: Any,
    ):
        search = search or SearchConfig(max_failure_rate=1.0)
        self.engine = Engine(policy, config, search=search, forgiving=True, **engine)
        self.config, self.waiting = self.engine.config, waiting
        self.rows = config.slots * batch_shards(self.engine.mesh)
        self._queue: deque[Job] = deque()
        self._changed, self._closed, self.failed = threading.Condition(), False, ""
        self.tokens = self.documents = 0  # written by the policy, given to it

    @property
    def queued(self) -> int:
        return len(self._queue)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Takes all of them or none; raises Busy. ValueError for a prompt that is too long."""
        if any(len(job.prompt) >= self.config.max_length for job in jobs):
            raise ValueError("the prompt leaves no room for an answer")
        with self._changed:
            if self._closed or self.failed:
                raise Busy(self.failed or "the server is stopping")
            free = self.rows - self.slots_busy
            if len(self._queue) + len(jobs) > self.waiting + free:
                raise Busy(f"{len(self._queue)} answers are waiting")
            self._queue.extend(jobs)
            self._changed.notify_all()
        self.engine.broker.wake()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these any more: their slots are free as soon as may be."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._queue = deque(job for job in self._queue if not job.cancelled)
            self._changed.notify_all()

    def close(self) -> None:
        """Finishes what was taken, and takes no more; a subclass waits for its threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
