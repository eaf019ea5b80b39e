"""Trajectories of a run or of a file of answers, and filters of them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import msgspec
import numpy as np

from r1s_jax.data.results import ForkAnswer, header_path, read_header, score_row
from r1s_jax.data.rows import gold_answers, read_rows
from r1s_jax.io.journal import DataError, parse_row, whole_rows
from r1s_jax.io.json import read_object
from r1s_jax.io.schema import check
from r1s_jax.protocol.dialect import Dialect
from r1s_jax.protocol.dialects import from_dict
from r1s_jax.protocol.solution import R1_SEARCHER, Solution
from r1s_jax.rewards.answer_scores import score_answer
from r1s_jax.rewards.rules import search_worth


class SearchRow(TypedDict):
    """One search of a trajectory."""

    query: str
    outcome: str
    documents: list[str]  # passage lines
    seconds: float


class ForkRow(TypedDict):
    """A fork of a trajectory (see rollout/forks.py)."""

    turn: int  # of the trajectory, from 0: the search at its end went otherwise
    reward: float | None  # None: the judge gave no verdict
    finish: str
    spans: list[tuple[str, bool]]  # as in TraceRow
    with_search: NotRequired[bool]  # the search was made, and only the rest drawn again


class TraceRow(TypedDict):
    """A row of a run's `traces.jsonl`."""

    step: NotRequired[int]  # the writer of the file adds it
    question_id: int
    question: str
    answers: list[str]
    reward: float
    parts: dict[str, float]
    advantage: float  # mean over the policy's tokens
    finish: str  # a name of Finish, in lower case
    spans: list[tuple[str, bool]]  # (text, written by the policy?)
    # The policy's tokens only, in order; joined, their texts are the policy's spans.
    token_advantages: list[tuple[str, float]]
    # The KL of each of these tokens to the reference or teacher; empty without one.
    token_kl: NotRequired[list[float]]
    searches: list[SearchRow]
    prompt_tokens: int
    sampled_tokens: int
    tokens: int
    forks: NotRequired[list[ForkRow]]  # in the order of the searches


class _RunConfig(msgspec.Struct):
    protocol: dict[str, Any]


class _Readable(TypedDict):
    """The keys that a row needs to be shown."""

    step: int
    question: str
    answers: list[str]
    reward: float
    finish: str
    spans: list[tuple[str, bool]]
    token_advantages: NotRequired[list[tuple[str, float]]]  # demonstrations have none
    token_kl: NotRequired[list[float]]
    searches: list[Any]
    forks: NotRequired[list[ForkRow]]


@dataclass(frozen=True)
class Trace:
    """One trajectory; in a file of answers, `reward` is the F1."""

    question: str
    answers: tuple[str, ...]
    spans: Sequence[tuple[str, bool]]  # (text, written by the policy?)
    reward: float | None = None
    searches: int | None = None
    finish: str = ""
    step: int | None = None
    # (text, advantage) of each token of the policy's spans, in order; empty if unknown
    token_advantages: Sequence[tuple[str, float]] = ()
    token_kl: Sequence[float] = ()  # of the same tokens; empty without a reference or teacher
    dialect: Dialect = R1_SEARCHER
    cause: str = ""  # why the answer is wrong: see eval/explain.py
    forks: Sequence["Branch"] = ()  # in the order of the searches

    @property
    def solution(self) -> Solution:
        """The text, and whether the trajectory finished."""
        return Solution(tuple(self.spans), self.dialect, is_complete(self.finish))

    def pieces(self) -> Iterator[tuple[str, str]]:
        """The whole text as (kind, text); see Solution.pieces."""
        return self.solution.pieces()

    def token_pieces(self) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """`pieces` cut into tokens: (kind, [(text, advantages)]).

        A character made of several tokens has the advantages of all of them, in order; a token
        that lies in two pieces is in both. An advantage is followed by a slash and the token's KL,
        where that is known. Advantages are "" if unknown.
        """
        tokens = _whole_characters(self.token_advantages, self.token_kl)
        at, end, shown = 0, 0, ""
        for kind, text in self.pieces():
            if kind == "documents" or not self.token_advantages:
                yield kind, [(text, "")]
                continue
            stop, parts = at + len(text), []
            while at < stop:
                if at == end:
                    token, shown = next(tokens)
                    end += len(token)
                take = min(end, stop)
                parts.append((text[len(text) - (stop - at) :][: take - at], shown))
                at = take
            yield kind, parts

    def forks_at(self, search: int) -> list["Branch"]:
        """The forks at a search, counted from 0."""
        return [fork for fork in self.forks if fork.turn == search]

    def forks_from(self, search: int) -> list["Branch"]:
        """The forks at this and later searches: of searches that got no reply."""
        return [fork for fork in self.forks if fork.turn >= search]

    def title(self) -> str:
        """Step, reward, number of searches and finish, as far as they are known."""
        numbers = {"step": self.step, "reward": self.reward, "searches": self.searches}
        parts = [f"{k} {v:.3g}" for k, v in numbers.items() if v is not None]
        return "  ".join([*parts, *filter(None, (self.finish, self.cause))])


@dataclass(frozen=True)
class Branch:
    """What became of a trajectory when one search went otherwise."""

    turn: int  # the search, from 0
    reward: float | None
    finish: str
    pieces: Sequence[tuple[str, str]]  # (kind, text) from where it differs
    with_search: bool  # it was made, and only the rest drawn again
    worth: float | None = None  # of the search, at its first branch

    @staticmethod
    def of(
        trunk: Trace, turn: int, reward: float | None, finish: str, own: Solution, again: bool
    ) -> "Branch":
        """`own` is the whole text of the fork of `trunk`."""
        theirs, pieces = list(trunk.pieces()), list(own.pieces())
        same = next((i for i, p in enumerate(pieces) if p not in theirs[i : i + 1]), len(pieces))
        return Branch(turn, reward, finish, pieces[same:], again)

    def title(self) -> str:
        """What the search was worth, and how the fork ended."""
        worth = "" if self.worth is None else f"the search was worth {self.worth:+.3g}; "
        reward = "" if self.reward is None else f" reward {self.reward:.3g}"
        made = "with it once more" if self.with_search else "without it"
        return f"{worth}{made}:{reward} {self.finish}".rstrip()


def is_complete(finish: str) -> bool:
    """Whether `finish` says that a trajectory ended by itself; an empty one counts as such."""
    return finish in ("", "finished")


@dataclass(frozen=True)
class Wanted:
    """Filters of traces; None and the empty text match every trace."""

    min_reward: float | None = None
    max_reward: float | None = None
    searches: int | None = None
    finish: str = ""
    step: int | None = None
    contains: str = ""
    cause: str = ""

    def fits(self, trace: Trace) -> bool:
        """Whether a trace passes every filter; an unknown value fails its filter."""
        reward = trace.reward
        low, high = self.min_reward, self.max_reward
        return (
            (low is None or (reward is not None and reward >= low))
            and (high is None or (reward is not None and reward <= high))
            and (self.searches is None or trace.searches == self.searches)
            and (not self.finish or trace.finish == self.finish)
            and (not self.cause or trace.cause == self.cause)
            and (self.step is None or trace.step == self.step)
            and any(self.contains in text for text in (trace.question, *dict(trace.spans)))
        )


def read_traces(source: Path) -> Iterator[Trace]:
    """Traces of a run's directory, of a `traces.jsonl`, or of a file of evaluated answers.

    Raises DataError for a row that is neither, or a directory without traces.
    """
    path = source / "traces.jsonl" if source.is_dir() else source
    if source.is_dir() and not path.exists():
        raise DataError(f"{source} holds no traces.jsonl: is it the directory of a run?")
    rows = whole_rows(path) if path.name == "traces.jsonl" else read_rows(path)
    dialect = dialect_of_file(path)
    for number, row in rows:
        try:
            yield _of_run(row, dialect) if "spans" in row else _of_answers(row, dialect)
        except (KeyError, TypeError, ValueError) as error:
            raise _no_trajectory(path, number, error) from error


def sample_traces(path: Path, count: int) -> tuple[list[Trace], int]:
    """At most `count` traces spread evenly over a run's `traces.jsonl`, and how many it holds.

    A last line that is still being written does not count. Raises DataError for a row that is no
    trajectory.
    """
    with path.open("rb") as lines:
        total = sum(line.endswith(b"\n") for line in lines)
    chosen = set(np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist())
    traces, dialect = [], dialect_of_file(path)
    with path.open("rb") as lines:
        for i, line in enumerate(lines):
            if i not in chosen:
                continue
            row = parse_row(line, path, i + 1)
            try:
                traces.append(_of_run(row, dialect))
            except (KeyError, TypeError, ValueError) as error:
                raise _no_trajectory(path, i + 1, error) from error
    return traces, total


def dialect_of_file(path: Path) -> Dialect:
    """The dialect of a file's trajectories, from the run's config or the file's header."""
    config = path.parent / "config.json"
    if path.name == "traces.jsonl" and config.exists():
        protocol = check(read_object(config, DataError), _RunConfig, config, DataError).protocol
        return from_dict(protocol | {"prompt": None}, config, DataError)
    dialect = (read_header(path) or {}).get("dialect")
    return from_dict(dialect, header_path(path), DataError) if dialect else R1_SEARCHER


def _no_trajectory(path: Path, number: int, error: Exception) -> DataError:
    return DataError(f"{path}, line {number}: no trajectory ({error})")


def _whole_characters(
    tokens: Sequence[tuple[str, float]], kl: Sequence[float]
) -> Iterator[tuple[str, str]]:
    """(text, advantages); tokens without text are merged into the next token that has some."""
    waiting: list[str] = []
    for i, (text, advantage) in enumerate(tokens):
        waiting.append(f"{advantage:+.3g}" + (f"/{kl[i]:.2g}" if kl else ""))
        if text:
            yield text, " ".join(waiting)
            waiting = []


def _of_run(row: dict[str, Any], dialect: Dialect) -> Trace:
    fields = check(row, _Readable, "this row", DataError)
    trace = Trace(
        fields["question"],
        tuple(fields["answers"]),
        fields["spans"],
        fields["reward"],
        len(fields["searches"]),
        fields["finish"],
        fields["step"],
        fields.get("token_advantages", ()),
        fields.get("token_kl", ()),
        dialect,
    )
    if len(trace.token_kl) not in (0, len(trace.token_advantages)):
        raise ValueError("`token_kl` and `token_advantages` differ in length")
    tokens = "".join(text for text, _ in trace.token_advantages)
    if tokens and tokens != "".join(text for text, by_policy in trace.spans if by_policy):
        raise ValueError("the tokens of `token_advantages` do not spell what the policy wrote")
    return _with_branches(trace, [_branch(trace, fork) for fork in fields.get("forks", ())])


def _with_branches(trace: Trace, branches: Sequence[Branch]) -> Trace:
    """The trace with its branches, the first of each search with what the search was worth."""
    judged, seen = [], set[int]()
    for branch in branches:
        rewards = [(b.reward, b.with_search) for b in branches if b.turn == branch.turn]
        known = [(reward, made) for reward, made in rewards if reward is not None]
        worth = math.nan if trace.reward is None else search_worth(trace.reward, known)
        first = branch.turn not in seen and not math.isnan(worth)
        judged.append(replace(branch, worth=worth if first else None))
        seen.add(branch.turn)
    return replace(trace, forks=judged)


def _branch(trace: Trace, fork: ForkRow) -> Branch:
    own = Solution(tuple(fork["spans"]), trace.dialect, is_complete(fork["finish"]))
    again = fork.get("with_search", False)
    return Branch.of(trace, fork["turn"], fork["reward"], fork["finish"], own, again)


def _answered_branch(trace: Trace, fork: ForkAnswer) -> Branch:
    f1 = score_answer(fork["pred_ans"], trace.answers).f1
    own = Solution.of_text(fork["gen_text_store"], trace.dialect)
    again = fork.get("with_search", False)
    return Branch.of(trace, fork["search"] - 1, f1, fork["stop_reason_final"], own, again)


def _of_answers(row: dict[str, Any], dialect: Dialect) -> Trace:
    chat = next((key for key in ("messages", "conversations", "prompt") if key in row), "")
    if chat and "gen_text_store" not in row:
        raise ValueError(
            f"a chat under `{chat}` does not say who wrote what; give a run's traces.jsonl, or "
            "rows of `question`, `answer`, `pred_ans` and `gen_text_store`, all after the prompt"
        )
    scores = score_row(row)
    text = row["gen_text_store"]
    if not isinstance(text, str):
        raise ValueError("`gen_text_store` must be a text")
    solution = Solution.of_text(text, dialect)
    trace = Trace(
        row["question"],
        gold_answers(row),
        [(text, by_policy) for text, by_policy in solution.spans if text],
        scores["f1"],
        int(scores["searches"]),
        str(row.get("stop_reason_final", "")),
        dialect=dialect,
        cause=str(row.get("cause", "")),
    )
    forks = check(row.get("forks", []), list[ForkAnswer], "`forks`", DataError)
    return _with_branches(trace, [_answered_branch(trace, fork) for fork in forks])
