"""The broker between the running program and a retriever.

The program calls `exchange` from a host callback at every iteration in which a slot searches. New
queries go to threads; the call returns at once with the documents that are ready (it waits
briefly only when no slot has anything else to do). `exchange` never raises and calls no JAX: an
exception inside a callback would hang the other devices.
"""

import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from r1s_jax.config import Fork, SearchConfig
from r1s_jax.io.errors import ConfigError, UserError, reason, shorten
from r1s_jax.io.http import within
from r1s_jax.io.text import whole
from r1s_jax.protocol.dialect import Call, Dialect, Found
from r1s_jax.protocol.solution import R1_SEARCHER
from r1s_jax.retrieval.api import Hit, Retriever
from r1s_jax.rollout.callback_arrays import RESULTS, Status, pack_results
from r1s_jax.rollout.reply import fitted
from r1s_jax.system.distributed import gather

# An idle program waits this long for documents before it calls again.
_IDLE_WAIT_S = 0.02
# Outcomes of a search without documents. FAILED: caused by the retriever. UNANSWERED: malformed by
# the policy; the reply to an invalid turn names the problem, a bad query gets no reply.
FAILED, UNANSWERED = ("timeout", "error"), ("bad_query", "long_query", "invalid_turn")
# What a fork gets in place of its documents (see forks.py): no search is made.
WITHHELD = {"nothing": "withheld", "answer": "taken_back"}
# In a steady rollout (see `Broker.begin`) documents arrive this many iterations after their query.
_LAG = 8
# A retriever counts as broken if a rollout's searches, at least this many, all find nothing.
_ALL_EMPTY = 64
CHARACTERS_A_TOKEN = 32  # an upper bound for any text but runs of white space
# Fewer failures than this never stop a rollout midway.
_MIN_FAILURES = 8

_numbers = itertools.count()
_brokers: WeakValueDictionary[int, "Broker"] = WeakValueDictionary()


def exchange(broker: Any, *operands: Any) -> np.ndarray:
    """The host callback of every program: `exchange` of the broker with this number.

    A program names no broker, so that engines with equal settings share one compiled program.
    """
    return _brokers[int(broker)].exchange(*operands)


class SearchFailure(UserError, RuntimeError):
    """Too many searches failed: the run must stop rather than learn from missing documents."""


def too_many(failed: int, total: int, rate: float, *, midway: bool = False) -> bool:
    """Whether more than a share `rate` of the searches failed; `midway`: and at least 8 did."""
    return failed > rate * total and (not midway or failed >= _MIN_FAILURES)


@dataclass
class Search:
    """One query of one trajectory and its outcome."""

    trajectory: int  # row in the rollout's batch
    query: str
    outcome: str = "pending"  # found, empty, one of FAILED, one of UNANSWERED
    documents: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()  # of the documents; "" where the retriever gives none
    seconds: float = 0.0
    detail: str = ""
    number: int = -1  # replies that the trajectory had before; -1: not recorded
    sent: str = ""  # the query that the retriever got, where it was another one
    tried: str = ""  # the error of the last failed attempt
    turn: "Turn | None" = field(default=None, repr=False, compare=False)
    started: float = field(default_factory=time.monotonic)


@dataclass
class Turn:
    """A turn of a trajectory in the program, and its searches: one in most dialects."""

    slot: int
    shard: int
    searches: list[Search] = field(default_factory=list)
    delivered: bool = False
    opening: list[int] = field(default_factory=list)  # begins an answer in the turn's place
    due: int = 0  # in a steady rollout: the shard's iteration in which the reply is delivered

    @property
    def settled(self) -> bool:
        return all(search.outcome != "pending" for search in self.searches)


class Broker:
    """Serves the searches of rollouts, one rollout at a time.

    `log` holds every search of the current rollout in the order they ended. Programs find the
    broker by its `number`. `others` is another question for each row, whose documents a fork gets.
    """

    def __init__(
        self,
        config: SearchConfig,
        *,
        decode: Callable[[Sequence[int]], str],
        encode: Callable[[str], list[int]],
        documents_per_query: int,
        max_documents_length: int,
        dialect: Dialect = R1_SEARCHER,
        evaluation: bool = False,
        clean: Callable[[str], str] = whole,
        forgiving: bool = False,
        fork: Fork = "nothing",
        openings: Callable[[bool], list[int]] = lambda first_turn: [],
    ):
        """`clean` makes the text of documents harmless to the tokenizer (see tokenizer.foreign);
        `evaluation` reads queries as the published evaluation does; `forgiving` shows the policy a
        failed search as one that found nothing, while the log keeps the failure. `fork` is
        what forks get, `openings` the tokens that begin an answer in a first or a later turn.
        Raises ConfigError if max_documents_length has no room for the documents' tags."""
        self.config, self._clean, self._forgiving = config, clean, forgiving
        self.dialect, self._evaluation = dialect, evaluation
        self._decode, self._encode = decode, encode
        self._fork, self._openings = fork, openings
        self._k, self._width = documents_per_query, max_documents_length
        self._most_characters = max_documents_length * CHARACTERS_A_TOKEN
        self._changed = threading.Condition()
        self.number = next(_numbers)
        _brokers[self.number] = self
        self.begin(None)
        self.reply_tokens([["-"] * documents_per_query])  # raises now, not at the first search

    def begin(
        self,
        retriever: Retriever | None,
        by_row: Sequence[Retriever | None] | None = None,
        *,
        steady: bool = False,
    ) -> None:
        """Starts a rollout over `retriever`, or over one for each of its rows.

        By default documents are delivered as soon as they are ready. With `steady` they are
        delivered a fixed number of iterations after their query, and the loop waits for them if
        need be, so that progress after n iterations does not depend on the clock. Results that
        arrive late from the previous rollout are dropped.
        """
        with self._changed:
            self._retriever, self._by_row = retriever, by_row
            self.others: Sequence[str] = ()
            self._steady, self._iterations = steady, Counter[int]()  # iterations by shard
            self._pending: dict[tuple[int, int], Turn] = {}
            self._ready: dict[int, deque[Turn]] = {}
            self._counts: Counter[str] = Counter()
            self._stopped = False  # whether the program must end the rollout
            self.log: list[Search] = []

    @property
    def counts(self) -> dict[str, int]:
        """Searches of this rollout by outcome."""
        return dict(self._counts)

    @property
    def failures(self) -> int:
        """Failed searches. Empty ones count too if at least 64 were empty and none found any."""
        failed = sum(self._counts[outcome] for outcome in FAILED)
        empty = self._counts["empty"]
        return failed + (empty if empty >= _ALL_EMPTY and not self._counts["found"] else 0)

    @property
    def _total(self) -> int:
        """Searches that reached the retriever."""
        others = (*UNANSWERED, *WITHHELD.values())
        return sum(self._counts.values()) - sum(self._counts[outcome] for outcome in others)

    def share(self) -> None:
        """Adds the counts and logs of all other processes, so that every process decides alike."""
        with self._changed:
            mine = (Counter(self._counts), self._stopped, list(self.log))
        shared = gather(mine)
        with self._changed:
            self._counts = sum((counts for counts, _, _ in shared), Counter())
            self._stopped = any(stopped for _, stopped, _ in shared)
            self.log = [search for _, _, log in shared for search in log]

    def check(self) -> None:
        """Raises SearchFailure when too many searches failed, now or midway in the rollout."""
        total = self._total
        if self._stopped or too_many(self.failures, total, self.config.max_failure_rate):
            raise SearchFailure(
                f"{self.failures} of {total} searches failed ({self.common_failures()}). The limit "
                f"is search.max_failure_rate={self.config.max_failure_rate}. Check the retriever, "
                "then resume."
            )

    def take_log(self) -> list[Search]:
        """Returns and clears `log`; for loops without end, whose log would grow for ever."""
        with self._changed:
            searches, self.log = self.log, []
            return searches

    def pending(self) -> list[Search]:
        """The searches in progress."""
        with self._changed:
            searches = [s for turn in self._pending.values() for s in turn.searches]
        return [search for search in searches if search.outcome == "pending"]

    def forget(self, rows: Collection[int]) -> None:
        """Drops the searches of these rows; only between two entries of the loop."""

        def keep(turn: Turn) -> bool:
            return turn.searches[0].trajectory not in rows

        with self._changed:
            self._pending = {at: turn for at, turn in self._pending.items() if keep(turn)}
            self._ready = {at: deque(filter(keep, turns)) for at, turns in self._ready.items()}
            self.log = [search for search in self.log if search.trajectory not in rows]

    def wake(self) -> None:
        """Ends the wait of an idle loop."""
        with self._changed:
            self._changed.notify_all()

    def common_failures(self) -> str:
        """The most frequent reasons of failure, for a message."""
        failed = [s for s in self.log if s.outcome in FAILED and s.detail]
        details = Counter(f"{s.outcome}: {shorten(s.detail, 120)}" for s in failed)
        common = "; ".join(f"{text} ({n}x)" for text, n in details.most_common(2))
        return common or "nothing was ever found"

    # Called by the program.

    def exchange(
        self,
        shard: Any,
        idle: Any,
        rows: Any,
        submit: Any,
        query: Any,
        copied: Any = None,
        replies: Any = None,
    ) -> np.ndarray:
        """Takes new queries, returns the replies that are ready.

        Args:
          shard: the calling data shard.
          idle: true when every busy slot of the shard waits for documents.
          rows: int32[S] trajectory in each slot.
          submit: bool[S] slots that just ended a query.
          query: int32[S, Q] last tokens of each slot's turn, -1 where the turn is shorter.
          copied: with forks, bool[S] slots of forks whose query is their parent's.
          replies: with forks, int32[S] replies that each trajectory has got.

        Returns the array of callback_arrays.py.
        """
        shard, submit = int(shard), np.asarray(submit)
        try:
            if submit.any():
                turns = np.asarray(rows), np.asarray(query), copied, replies
                self._submit(shard, np.flatnonzero(submit), *turns)
            collect = self._collect_due if self._steady else self._collect
            done = collect(shard, bool(idle))
            self._stopped |= self._past_limit()
            results = [(turn.slot, *self._result(turn.searches, turn.opening)) for turn in done]
            for turn in done:
                turn.delivered = True
            return pack_results(results, self._stopped, self._width)
        except Exception as error:  # a bug here must end the rollout, not hang its devices
            self._counts["error"] += 1
            self.log.append(Search(-1, "", "error", detail=f"broker: {error!r}"))
            self._stopped = True
            return pack_results([], stop=True, width=self._width)

    def answer_now(
        self, turn: Sequence[int], full: bool
    ) -> tuple[Status, int, list[int], list[Search]]:
        """Answers a turn outside of the program.

        Returns its Status, the number of searches made, the tokens of the reply, and the searches.

        `full`: the turn fills the window of a query, so that its beginning may be missing.
        """
        calls = self._calls(turn, full)
        done = iter(self.search_now([call.query for call, unanswered in calls if not unanswered]))
        searches = [
            Search(-1, call.query, unanswered, detail=call.problem) if unanswered else next(done)
            for call, unanswered in calls
        ]
        return *self._result(searches), searches

    def search_now(self, queries: Sequence[str]) -> list[Search]:
        """Searches outside of the program, with the same retries, time-out and counts."""
        searches = [Search(-1, query) for query in queries]
        if searches:
            self._start(searches)
        deadline = time.monotonic() + self.config.timeout_s
        with self._changed:
            while any(s.outcome == "pending" for s in searches):
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    break
            for search in searches:
                if search.outcome == "pending":
                    self._close(search, "timeout", detail=self._timeout_text(search))
        return searches

    def document_tokens(self, documents: Sequence[str], width: int | None = None) -> list[int]:
        """The tokens of the reply to one search with these passage lines (see reply_tokens)."""
        return self.reply_tokens([documents], width)

    def reply_tokens(self, results: Sequence[Found], width: int | None = None) -> list[int]:
        """The tokenised reply to a turn, at most `width` tokens (by default the config's).

        Raises ConfigError if not even the tags fit; see reply.fitted.
        """
        room = self._width if width is None else min(width, self._width)
        return fitted(
            [r if isinstance(r, str) else self._cleaned(r) for r in results],
            room,
            lambda texts: self._encode(self.dialect.reply(texts)),
            may_drop=room < self._width or len(results) > 1,
        )

    def _cleaned(self, documents: Sequence[str]) -> list[str]:
        """Cuts before anything is encoded: a document may be arbitrarily long."""
        return [self._clean(document[: self._most_characters]) for document in documents]

    # Internal.

    def _submit(
        self,
        shard: int,
        slots: np.ndarray,
        rows: np.ndarray,
        query: np.ndarray,
        copied: Any,
        replies: Any,
    ) -> None:
        valid = []
        for slot in slots:
            ids = query[slot][query[slot] >= 0].tolist()
            calls = self._calls(ids, full=len(ids) == query.shape[1])
            turn = Turn(int(slot), shard, due=self._iterations[shard] + _LAG)
            number = -1 if replies is None else int(replies[slot])
            turn.searches = [
                Search(int(rows[slot]), call.query, number=number, turn=turn) for call, _ in calls
            ]
            withheld = ""
            if copied is not None and copied[slot]:
                withheld = self._prepare_fork(turn)
            with self._changed:
                self._pending[shard, turn.slot] = turn
                for search, (call, unanswered) in zip(turn.searches, calls, strict=True):
                    if unanswered and withheld != WITHHELD["answer"]:
                        self._close(search, unanswered, detail=call.problem)
                    elif withheld:
                        self._close(search, withheld)
                    else:
                        valid.append(search)
        if valid:
            self._start(valid)

    def _prepare_fork(self, turn: Turn) -> str:
        """Makes a fork's turn differ from its parent's; the outcome of its searches, if known."""
        if self._fork == "answer":
            turn.opening = self._openings(turn.searches[0].number == 0)
        elif self._fork == "random":
            for search in turn.searches:
                search.sent = self.others[search.trajectory]
        return WITHHELD.get(self._fork, "")

    def _calls(self, ids: Sequence[int], full: bool) -> list[tuple[Call, str]]:
        """The calls of a turn, each with "" or, if it cannot be searched, its outcome."""
        calls = []
        for call in self.dialect.calls(self._decode(ids), self._evaluation):
            unanswered = "" if not call.problem else "bad_query"
            if unanswered and self.dialect.tells_invalid:
                unanswered = "invalid_turn"
            elif unanswered and full and not self.dialect.reads_whole_turn and not call.query:
                unanswered = "long_query"
                call = Call("", f"over rollout.max_query_length={len(ids)} tokens")
            calls.append((call, unanswered))
        return calls

    def _start(self, searches: list[Search]) -> None:
        batches: dict[int, tuple[Retriever | None, list[Search]]] = {}
        for search in searches:
            retriever = self._retriever
            if self._by_row and search.trajectory >= 0:
                retriever = self._by_row[search.trajectory]
            batches.setdefault(id(retriever), (retriever, []))[1].append(search)
        # Daemon threads: a search that hangs for ever must not keep the process alive.
        for batch in batches.values():
            threading.Thread(target=self._run, args=batch, daemon=True).start()

    def _run(self, retriever: Retriever | None, searches: list[Search]) -> None:
        deadline = searches[0].started + self.config.timeout_s
        queries, detail = [s.sent or s.query for s in searches], ""
        for attempt in range(self.config.retries + 1):
            if time.monotonic() > deadline:
                return  # late: the waiting side closes the searches as timed out
            try:
                assert retriever is not None, "a rollout that searches has a retriever"
                with within(deadline - time.monotonic()):  # so that the thread ends in time
                    results = _checked(retriever.search(queries, self._k), len(queries))
            except Exception as error:
                detail = reason(error)
                for search in searches:  # a later time-out names this error too
                    search.tried = detail
                time.sleep(min(0.05 * 2**attempt, max(0.0, deadline - time.monotonic())))
                continue
            with self._changed:
                for search, hits in zip(searches, results, strict=True):
                    self._close(search, "found" if hits else "empty", hits)
            return
        if time.monotonic() > deadline:
            return  # late too
        with self._changed:
            for search in searches:
                self._close(search, "error", detail=detail)

    def _close(
        self, search: Search, outcome: str, hits: Sequence[Hit] = (), detail: str = ""
    ) -> None:
        """Settles a search, once. The caller holds the lock."""
        if search.outcome != "pending":
            return
        search.documents = tuple(hit.line[: self._most_characters] for hit in hits)
        search.ids = tuple(str(getattr(hit, "id", "")) for hit in hits)
        search.seconds, search.detail = time.monotonic() - search.started, detail
        search.outcome = outcome  # last, for readers without the lock
        if turn := search.turn:
            if self._pending.get((turn.shard, turn.slot)) is not turn:
                return  # from an earlier rollout
            if turn.settled:
                del self._pending[turn.shard, turn.slot]
                self._ready.setdefault(turn.shard, deque()).append(turn)
        self._counts[outcome] += 1
        self.log.append(search)
        self._changed.notify_all()

    def _collect(self, shard: int, wait: bool) -> list[Turn]:
        with self._changed:
            ready = self._ready.setdefault(shard, deque())
            if wait and not ready:
                self._changed.wait(_IDLE_WAIT_S)
            self._abandon_late_ones()
            return [ready.popleft() for _ in range(min(len(ready), RESULTS))]

    def _collect_due(self, shard: int, idle: bool) -> list[Turn]:
        """The turns that are due; when idle, advances to the next one's due iteration."""
        with self._changed:
            ready = self._ready.setdefault(shard, deque())
            pending = [turn for turn in self._pending.values() if turn.shard == shard]
            turns = sorted([*ready, *pending], key=lambda turn: (turn.due, turn.slot))
            self._iterations[shard] += 1
            if idle and turns:
                self._iterations[shard] = max(self._iterations[shard], turns[0].due)
            due = [turn for turn in turns if turn.due <= self._iterations[shard]][:RESULTS]
            while not all(turn.settled for turn in due):
                self._changed.wait(_IDLE_WAIT_S)
                self._abandon_late_ones()
            for turn in due:
                ready.remove(turn)
            return due

    def _abandon_late_ones(self) -> None:
        now = time.monotonic()
        for search in [s for turn in self._pending.values() for s in turn.searches]:
            if now - search.started > self.config.timeout_s:
                self._close(search, "timeout", detail=self._timeout_text(search))

    def _result(
        self, searches: Sequence[Search], opening: Sequence[int] = ()
    ) -> tuple[Status, int, list[int]]:
        """The status of a turn, the number of searches made, and the tokens of the reply."""
        if opening:
            return Status.TAKEN_BACK, 0, list(opening)
        outcomes = {search.outcome for search in searches}
        if not outcomes.isdisjoint(FAILED) and not self._forgiving:
            return Status.ERROR, 0, []
        if not outcomes.isdisjoint(UNANSWERED) and not self.dialect.tells_invalid:
            return Status.BAD_QUERY, 0, []
        count = sum(search.outcome not in UNANSWERED for search in searches)
        status = Status.EMPTY if count else Status.INVALID
        if any(search.documents for search in searches):
            status = Status.FOUND
        results: list[Found] = [
            s.detail if s.outcome in UNANSWERED else s.documents for s in searches
        ]
        try:
            return status, count, self.reply_tokens(results)
        except ConfigError as error:  # too many replies for the width counts as a failed search
            self._counts["error"] += 1
            self.log.append(Search(searches[0].trajectory, "", "error", detail=str(error)))
            return Status.ERROR, 0, []

    def _past_limit(self) -> bool:
        return too_many(self.failures, self._total, self.config.max_failure_rate, midway=True)

    def _timeout_text(self, search: Search) -> str:
        before = f"; the attempt before failed: {search.tried}" if search.tried else ""
        return f"no answer within search.timeout_s={self.config.timeout_s}{before}"


def _checked(results: Any, queries: int) -> Sequence[Sequence[Hit]]:
    """The passages that a retriever returned for each query, without blank ones.

    Raises TypeError for anything other than passages.
    """
    if not isinstance(results, Sequence) or len(results) != queries:
        size = len(results) if isinstance(results, Sequence) else type(results).__name__
        raise TypeError(f"the retriever returned {size} results for {queries} queries")
    if not all(isinstance(getattr(hit, "line", None), str) for hits in results for hit in hits):
        raise TypeError("the retriever returned results that are not passages with a text line")
    return [[hit for hit in hits if hit.line.strip()] for hits in results]
