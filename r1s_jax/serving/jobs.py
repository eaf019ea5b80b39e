"""The queue of answers: the interface between a server and a serving loop."""

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
    """The queue is full, or the server is stopping."""


class Update(NamedTuple):
    """The news of an answer since its last update."""

    tokens: list[int]
    mask: list[bool]  # whether the policy wrote each token
    searches: list[Search]  # searches that began or ended
    finish: Finish
    error: str = ""


@dataclass(eq=False)
class Job:
    """One answer to make. Jobs of one `group` share their prompt, whose KV is computed once."""

    prompt: Sequence[int]
    seed: int
    update: Callable[[Update], None]  # called on the serving loop's thread
    sample: int = 0
    group: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int | None = None  # the most tokens that the policy may write

    seen: int = 0  # tokens reported, the prompt's included
    wrote: int = 0  # tokens that the policy wrote
    reported: list[tuple[Search, str]] = field(default_factory=list)  # and the outcomes reported
    cancelled: bool = False


class Jobs:
    """Answers in slots, which a thread works on, and the queue of answers that wait for a slot.

    A subclass starts its threads, which take jobs from `_queue` when `_changed` is notified.
    """

    greedy_only = False  # whether jobs are decoded greedily, whatever their temperature
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
        self.tokens = self.documents = 0  # tokens written by the policy, and of documents

    @property
    def queued(self) -> int:
        return len(self._queue)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues all jobs or none. Raises Busy, or ValueError for a prompt that is too long."""
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
        """Drops jobs whose client is gone; frees their slots as soon as possible."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._queue = deque(job for job in self._queue if not job.cancelled)
            self._changed.notify_all()

    def close(self) -> None:
        """Accepts no more jobs and finishes the accepted ones; a subclass joins its threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
