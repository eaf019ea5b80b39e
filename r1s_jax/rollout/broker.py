"""The broker between the running program and a retriever.

The program calls `exchange` from a host callback at every turn in which a slot searches. New
queries go to threads; the call returns at once with the documents that are ready (it waits a
moment only when no slot has anything else to do). It never raises and calls no JAX: an exception
inside a callback would hang the other devices.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from r1s_jax.border.errors import ConfigError, UserError
from r1s_jax.config import SearchConfig
from r1s_jax.protocol import r1_searcher as protocol
from r1s_jax.retrieval.api import Retriever
from r1s_jax.rollout.exchange import RESULTS, Status, pack_results
from r1s_jax.system.distributed import gather

# With nothing else to do the program waits this long for documents before it asks again.
_IDLE_WAIT_S = 0.02
# Fewer failures than this never stop a rollout midway, whatever their share.
_MIN_FAILURES = 8


class SearchFailure(UserError, RuntimeError):
    """Too many searches failed: the run must stop rather than learn from missing documents."""


@dataclass
class Search:
    """One query of one trajectory and what became of it."""

    trajectory: int  # row in the rollout's batch
    query: str
    outcome: str = "pending"  # found, empty, timeout, error, bad_query
    documents: tuple[str, ...] = ()
    seconds: float = 0.0
    detail: str = ""
    slot: int = 0
    shard: int = 0
    started: float = field(default_factory=time.monotonic)


class Broker:
    """Serves the searches of rollouts, one rollout at a time.

    `log` holds every search of the current rollout in the order they ended.
    """

    def __init__(
        self,
        config: SearchConfig,
        *,
        decode: Callable[[Sequence[int]], str],
        encode: Callable[[str], list[int]],
        documents_per_query: int,
        max_documents_length: int,
        extract_query: Callable[[str], str | None] = protocol.extract_query,
    ):
        self.config = config
        self._decode, self._encode, self._extract = decode, encode, extract_query
        self._k, self._width = documents_per_query, max_documents_length
        self._changed = threading.Condition()
        self.begin(None)

    def begin(self, retriever: Retriever | None) -> None:
        """Starts a rollout over `retriever`; what late threads of the last one bring is dropped."""
        with self._changed:
            self._retriever = retriever
            self._pending: dict[tuple[int, int], Search] = {}
            self._ready: dict[int, deque[Search]] = {}
            self._counts: Counter[str] = Counter()
            self._stopped = False  # the program was told to end the rollout
            self.log: list[Search] = []

    @property
    def counts(self) -> dict[str, int]:
        """Searches of this rollout by outcome."""
        return dict(self._counts)

    @property
    def failures(self) -> int:
        """Searches that brought no documents through no fault of the policy."""
        return sum(self._counts[outcome] for outcome in ("timeout", "error", "empty"))

    def share(self) -> None:
        """Adds what the brokers of the other processes saw, so that all judge it alike."""
        with self._changed:
            mine = (Counter(self._counts), self._stopped, list(self.log))
        shared = gather(mine)
        with self._changed:
            self._counts = sum((counts for counts, _, _ in shared), Counter())
            self._stopped = any(stopped for _, stopped, _ in shared)
            self.log = [search for _, _, log in shared for search in log]

    def check(self) -> None:
        """Raises SearchFailure when too many searches failed, now or midway in the rollout."""
        total = sum(self._counts.values()) - self._counts["bad_query"]
        if self._stopped or self.failures > self.config.max_failure_rate * total:
            details = Counter(f"{s.outcome}: {s.detail}" for s in self.log if s.detail)
            common = "; ".join(f"{text} ({n}x)" for text, n in details.most_common(3))
            raise SearchFailure(
                f"{self.failures} of {total} searches brought no documents "
                f"({common or 'nothing found'}). The limit is search.max_failure_rate="
                f"{self.config.max_failure_rate}. Check the retriever, then resume."
            )

    # Called by the program.

    def exchange(self, shard: Any, idle: Any, rows: Any, submit: Any, query: Any) -> np.ndarray:
        """The host callback: takes new queries, returns what is ready.

        Args:
          shard: the calling data shard.
          idle: true when no slot of the shard has anything to do but wait.
          rows: int32[S] trajectory in each slot.
          submit: bool[S] slots that just ended a query.
          query: int32[S, Q] their last tokens of this turn, -1 where the turn is shorter.

        Returns the array of exchange.py.
        """
        shard, submit = int(shard), np.asarray(submit)
        try:
            if submit.any():
                self._submit(shard, np.asarray(rows), np.flatnonzero(submit), np.asarray(query))
            done = self._collect(shard, wait=bool(idle))
            self._stopped |= self._past_limit()
            results = [(search.slot, *self._tokens(search)) for search in done]
            return pack_results(results, self._stopped, self._width)
        except Exception as error:  # a bug here must end the rollout, not hang its devices
            self._counts["error"] += 1
            self.log.append(Search(-1, "", "error", detail=f"broker: {error!r}"))
            self._stopped = True
            return pack_results([], stop=True, width=self._width)

    def search_now(self, queries: Sequence[str]) -> list[Search]:
        """Searches outside of the program (the system's own first search) under the same rules."""
        searches = [Search(-1, query) for query in queries]
        self._start(searches)
        deadline = time.monotonic() + self.config.timeout_s
        with self._changed:
            while any(s.outcome == "pending" for s in searches):
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    break
            for search in searches:
                if search.outcome == "pending":
                    self._close(search, "timeout", detail=self._timeout_text())
        return searches

    def document_tokens(self, documents: Sequence[str]) -> list[int]:
        """The tokenised document block, documents cut alike until it fits."""
        cut, share = documents, 1.0
        while len(tokens := self._encode(protocol.document_block(cut))) > self._width:
            if all(len(line) <= 1 for line in cut):
                raise ConfigError(
                    f"rollout.max_documents_length={self._width} is too short for "
                    f"{len(documents)} documents: their tags alone take more"
                )
            share *= 0.95 * self._width / len(tokens)
            cut = [line[: max(1, int(len(line) * share))] for line in documents]
        return tokens

    # Behind the scenes.

    def _submit(self, shard: int, rows: np.ndarray, slots: np.ndarray, query: np.ndarray) -> None:
        searches = []
        for slot in slots:
            text = self._extract(self._decode(query[slot][query[slot] >= 0].tolist()))
            search = Search(int(rows[slot]), text or "", slot=int(slot), shard=shard)
            with self._changed:
                self._pending[shard, search.slot] = search
                if not text:
                    why = "no beginning of a query" if text is None else "empty query"
                    self._close(search, "bad_query", detail=why)
                else:
                    searches.append(search)
        if searches:
            self._start(searches)

    def _start(self, searches: list[Search]) -> None:
        # A daemon thread for each batch: one that hangs for ever must not keep the process alive.
        threading.Thread(target=self._run, args=(self._retriever, searches), daemon=True).start()

    def _run(self, retriever: Retriever, searches: list[Search]) -> None:
        deadline = searches[0].started + self.config.timeout_s
        queries, detail = [s.query for s in searches], ""
        for attempt in range(self.config.retries + 1):
            if time.monotonic() > deadline:
                return  # already given up on
            try:
                lines = _passage_lines(retriever.search(queries, self._k), len(queries))
            except Exception as error:
                detail = f"{type(error).__name__}: {error}"
                time.sleep(min(0.05 * 2**attempt, max(0.0, deadline - time.monotonic())))
                continue
            with self._changed:
                for search, documents in zip(searches, lines, strict=True):
                    self._close(search, "found" if documents else "empty", documents)
            return
        with self._changed:
            for search in searches:
                self._close(search, "error", detail=detail)

    def _close(
        self, search: Search, outcome: str, documents: Sequence[str] = (), detail: str = ""
    ) -> None:
        """Settles a search, once; the lock is held."""
        if search.outcome != "pending":
            return
        search.outcome, search.documents, search.detail = outcome, tuple(documents), detail
        search.seconds = time.monotonic() - search.started
        if search.trajectory >= 0:
            if self._pending.get((search.shard, search.slot)) is not search:
                return  # from a rollout that is over
            del self._pending[search.shard, search.slot]
            self._ready.setdefault(search.shard, deque()).append(search)
        self._counts[outcome] += 1
        self.log.append(search)
        self._changed.notify_all()

    def _collect(self, shard: int, wait: bool) -> list[Search]:
        with self._changed:
            ready = self._ready.setdefault(shard, deque())
            if wait and not ready:
                self._changed.wait(_IDLE_WAIT_S)
            now = time.monotonic()
            for search in list(self._pending.values()):
                if now - search.started > self.config.timeout_s:
                    self._close(search, "timeout", detail=self._timeout_text())
            return [ready.popleft() for _ in range(min(len(ready), RESULTS))]

    def _tokens(self, search: Search) -> tuple[Status, list[int]]:
        if search.outcome in ("found", "empty"):
            status = Status.FOUND if search.documents else Status.EMPTY
            return status, self.document_tokens(search.documents)
        return (Status.BAD_QUERY if search.outcome == "bad_query" else Status.ERROR), []

    def _past_limit(self) -> bool:
        total = sum(self._counts.values()) - self._counts["bad_query"]
        failures = self.failures
        return failures >= _MIN_FAILURES and failures > self.config.max_failure_rate * total

    def _timeout_text(self) -> str:
        return f"no answer within search.timeout_s={self.config.timeout_s}"


def _passage_lines(results: Any, queries: int) -> list[list[str]]:
    """Checks what a retriever returned; anything else than passages for each query raises."""
    if not isinstance(results, Sequence) or len(results) != queries:
        found = len(results) if isinstance(results, Sequence) else type(results).__name__
        raise TypeError(f"the retriever returned {found} results for {queries} queries")
    lines = [[getattr(hit, "line", None) for hit in hits] for hits in results]
    if not all(isinstance(line, str) for row in lines for line in row):
        raise TypeError("the retriever returned something else than passages with a text line")
    return lines
