"""Answers a file of questions with a model and writes one row per answer.

The rollout engine is that of training, with the published evaluation settings (greedy, 512 tokens
a turn, five documents a search, at most nine searches).
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

import numpy as np

from r1s_jax.data.benchmarks import questions_file
from r1s_jax.data.questions import Question, read_questions
from r1s_jax.data.results import ForkAnswer, ResultRow, supporting_recall, write_header
from r1s_jax.eval.header import begun, describe, load_described, refuse_other
from r1s_jax.io.errors import ConfigError
from r1s_jax.io.journal import DataError
from r1s_jax.io.schema import check
from r1s_jax.models.params import Params
from r1s_jax.models.pretrained import Pretrained
from r1s_jax.models.sharding import shard_params
from r1s_jax.presets import EVALUATION, Settings
from r1s_jax.retrieval.api import Retriever
from r1s_jax.rollout.broker import FAILED, UNANSWERED, SearchFailure, too_many
from r1s_jax.rollout.engine import Engine, Rolled
from r1s_jax.rollout.sampler import GREEDY_BELOW
from r1s_jax.rollout.trajectory import Finish
from r1s_jax.system.facts import facts
from r1s_jax.system.files import write_rows
from r1s_jax.system.locks import only_one

T = TypeVar("T")
Mode = Literal["search", "rag", "direct"]

# The published names of stop reasons.
STOP_REASONS = {
    Finish.FINISHED: "finished",
    Finish.SEARCH_LIMIT: "many_retrieve",
    Finish.BAD_QUERY: "query_inst_error",
    Finish.LENGTH: "shot_down",
    Finish.SEARCH_ERROR: "retrieve_error",
    Finish.ABORTED: "retrieve_error",
}
NO_ANSWER = "I don't know."


@dataclass(frozen=True)
class EvalRun:
    """One evaluation. `rag` searches the question itself once; `direct` never searches."""

    questions: str  # a benchmark's name, a path or another reference to a file
    model: str
    settings: Settings = EVALUATION
    mode: Mode = "search"
    samples: int = 1  # answers per question
    limit: int = 0  # questions at most; 0: all

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ConfigError(f"mode {self.mode!r}: take search, rag or direct")
        if self.samples < 1:
            raise ConfigError(f"samples={self.samples}: must be at least 1")
        if self.mode != "search" and self.settings.config().rollout.forks:
            raise ConfigError(
                f"mode {self.mode} makes no searches of the policy's own, so there is none to "
                "fork: leave out --forks, or take --mode search"
            )
        if self.samples > 1 and self.settings.config().rollout.temperature < GREEDY_BELOW:
            raise ConfigError(
                f"samples={self.samples} at temperature 0 would all be the same: set "
                "rollout.temperature above 0, such as 1.0"
            )


def answer_file(
    run: EvalRun,
    retriever: Retriever | None,
    source: dict[str, Any],
    out: Path,
    progress: Callable[[int, int], None] = lambda *_: None,
    *,
    retry_failed: bool = False,
) -> Path:
    """Answers every question of a file, in order, one row per answer in `out` (JSON lines).

    The rows are data.results.ResultRow. `OUT.header.json` holds digests of the model and the
    questions, the settings, `source` (a description of the index) and the outcomes of the searches.
    A stopped run continues where its file ends, with the checkpoint that it began with;
    `retry_failed` first answers again, in place, the rows whose search failed.

    Raises DataError for a file with answers of another model, to other questions or of another run,
    or if `retriever` is missing; InUse if another process writes the file; SearchFailure, after the
    rows are written, if more than search.max_failure_rate of the searches failed.
    """
    if retriever is None and run.mode != "direct":
        raise DataError(f"mode {run.mode} searches: name an index, or take --mode direct")
    config = run.settings.config()
    all_questions = read_questions(questions_file(run.questions))
    if Path(run.questions).resolve() == out.resolve():
        raise DataError(f"{out} holds the questions: name another file for the answers")
    described = _header(run, all_questions, source)
    with only_one(out, "the file of answers"):
        rows, before = _resume(out, described, all_questions, run.samples)
        questions = all_questions[: run.limit or None]
        progress(len(rows), len(questions) * run.samples)
        engine, params = _load(run, out, described, before)
        engine.check_prompts(questions)
        _begin(run, out, described)
        searches = _Searches(rows, config.search.max_failure_rate, before)
        at_a_time = max(1, config.rollout.slots // run.samples)

        def answer(batch: Sequence[Question]) -> list[ResultRow]:
            size = min(at_a_time, len(questions))
            answered = _answer(run, engine, params, batch, size, retriever or _NoSearch(), searches)
            searches.note(answered, engine.broker.common_failures())
            return answered

        if retry_failed:
            _answer_again(out, rows, questions, run.samples, at_a_time, answer, searches)
        whole, part = divmod(len(rows), run.samples)  # part: samples of an unfinished question
        with out.open("a", encoding="utf-8") as file:
            for batch in _batches(questions[whole:], at_a_time):
                for row in (answered := answer(batch)[part:]):
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                rows += answered
                part = 0
                searches.add(answered)
                progress(len(rows), len(questions) * run.samples)
                write_header(out, described | searches.header())
                searches.check(out, midway=True)
        write_header(out, described | searches.header())
        searches.check(out)
    return out


def _begin(run: EvalRun, out: Path, described: dict[str, Any]) -> None:
    """Adds how the answers are made to the header, and writes it."""
    # Beside what a resumed run compares: it may go on on another machine.
    described["made_by"] = {"changes": list(run.settings.changes), "facts": facts()}
    out.touch()
    write_header(out, described)


def answer_some(
    run: EvalRun,
    policy: Pretrained,
    questions: Sequence[Question],
    total: int,
    retriever: Retriever | None,
) -> Iterator[Sequence[ResultRow]]:
    """The rows of each of these questions, answered as in a file of `total` questions."""
    engine = _engine(run, policy.speaking(run.settings.config().protocol))
    params = shard_params(policy.params, policy.model, engine.mesh)
    at_a_time = max(1, run.settings.config().rollout.slots // run.samples)
    size, searches = min(at_a_time, total), _Searches([], 1.0)
    for batch in _batches(questions, size):
        rows = _answer(run, engine, params, batch, size, retriever or _NoSearch(), searches)
        yield from _batches(rows, run.samples)


def _answer_again(
    out: Path,
    rows: list[ResultRow],
    questions: Sequence[Question],
    samples: int,
    at_a_time: int,
    answer: Callable[[Sequence[Question]], list[ResultRow]],
    searches: "_Searches",
) -> None:
    """Answers again the rows whose search failed, in place, in `rows` and in the file."""
    limit = len(questions) * samples
    failed = [i for i, row in enumerate(rows[:limit]) if searches.failed(row)]
    for places in _batches(sorted({i // samples for i in failed}), at_a_time):
        again = [p * samples + j for p in places for j in range(samples)]
        for i, row in zip(again, answer([questions[p] for p in places]), strict=True):
            # The last question may lack samples; samples that did not fail stay as they are.
            if i < len(rows) and searches.failed(rows[i]):
                rows[i] = row
        write_rows(out, rows)
        searches.recount(rows)


def _load(
    run: EvalRun, out: Path, described: dict[str, Any], before: dict[str, Any] | None
) -> tuple[Engine, Params]:
    """The engine and its parameters; adds the model's digest and dialect to the header."""
    protocol = run.settings.config().protocol
    policy = load_described(out, run.model, described, before).speaking(protocol)
    engine = _engine(run, policy)
    described["dialect"] |= engine.dialect.as_dict()
    if before:
        refuse_other(out, before, described, "dialect")
    return engine, shard_params(policy.params, policy.model, engine.mesh)


def _answer(
    run: EvalRun,
    engine: Engine,
    params: Params,
    batch: Sequence[Question],
    size: int,
    retriever: Retriever,
    searches: "_Searches",
) -> list[ResultRow]:
    """The rows of a few questions, the samples of a question side by side.

    Every batch is padded to `size` questions, so that the program compiles once.
    """
    padded = [*batch, *[batch[-1]] * (size - len(batch))]
    begin = time.perf_counter()
    k, seed = run.samples, run.settings.config().seed
    rolled = engine.run(params, padded, samples=k, seed=seed, step=0, retriever=retriever)
    searches.prefill_tokens += rolled.counters["prefill_tokens"]
    seconds = (time.perf_counter() - begin) / (len(batch) * k)
    trunks = np.flatnonzero(rolled.trunks)[: len(batch) * k].tolist()
    rows: list[ResultRow] = [
        _row(rolled, row, batch[i // k], seconds) for i, row in enumerate(trunks)
    ]
    if k > 1:
        rows = [{**row, "sample": i % k} for i, row in enumerate(rows)]
    return rows


class _Searches:
    """The outcomes of the searches of all rows, and whether too many failed.

    `prefill_tokens` counts the tokens of prompts and documents that were computed, not copied.
    """

    def __init__(
        self, rows: Sequence[ResultRow], limit: float, before: dict[str, Any] | None = None
    ):
        self.limit, self.reasons = limit, ""
        self.prefill_tokens = (before or {}).get("prefill_tokens", 0)
        self.recount(rows)

    def header(self) -> dict[str, Any]:
        """The entries of the header of the answers."""
        return {"searches": self.counts(), "prefill_tokens": self.prefill_tokens}

    def recount(self, rows: Sequence[ResultRow]) -> None:
        self.outcomes = Counter(o for row in rows for o in row["search_outcomes"])

    def add(self, rows: Sequence[ResultRow]) -> None:
        """Counts the searches of more rows."""
        self.outcomes.update(o for row in rows for o in row.get("search_outcomes", ()))

    def note(self, rows: Sequence[ResultRow], reasons: str) -> None:
        """Keeps `reasons`, the causes of failures, if a search of these rows failed."""
        if any(map(self.failed, rows)):
            self.reasons = reasons

    @staticmethod
    def failed(row: ResultRow) -> bool:
        """Whether a search of this row failed."""
        return any(outcome in FAILED for outcome in row["search_outcomes"])

    def counts(self) -> dict[str, int]:
        """The number of searches by outcome: found, empty, failed, unanswered."""
        failed = sum(self.outcomes[name] for name in FAILED)
        unanswered = sum(self.outcomes[name] for name in UNANSWERED)
        found, empty = self.outcomes["found"], self.outcomes["empty"]
        return {"found": found, "empty": empty, "failed": failed, "unanswered": unanswered}

    def check(self, out: Path, *, midway: bool = False) -> None:
        """Raises SearchFailure past the limit (see broker.too_many)."""
        counts = self.counts()
        failed = counts["failed"]
        total = counts["found"] + counts["empty"] + failed
        if not too_many(failed, total, self.limit, midway=midway):
            return
        raise SearchFailure(
            f"{failed} of {total} searches failed ({failed / total:.0%}; "
            f"{self.reasons or 'in an earlier run'}); the limit is {self.limit:.0%}. Their rows in "
            f"{out.name} say retrieve_error: check the retriever, then run the same command with "
            "--retry-failed"
        )


class _NoSearch:
    """The retriever of a run without searches."""

    def search(self, queries: Sequence[str], k: int) -> list[list]:
        raise RuntimeError("a search in a run that makes none")


def _engine(run: EvalRun, policy: Pretrained) -> Engine:
    config = run.settings.config(policy.model.max_position)
    rollout = config.rollout
    if run.mode == "rag":
        # With retrieve_first, the documents are a part of the prompt.
        longest = rollout.max_prompt_length + rollout.max_documents_length
        longest = min(longest, rollout.max_length - 1)
        rollout = replace(rollout, retrieve_first=True, max_prompt_length=longest)
    if run.mode != "search":
        rollout = replace(rollout, max_searches=0)
    # Failures are counted over all rows, not per batch: see _Searches.
    search = replace(config.search, max_failure_rate=1.0)
    return Engine(policy, rollout, search=search, evaluation=True)


def _row(rolled: Rolled, i: int, question: Question, seconds: float) -> ResultRow:
    t, solution = rolled.trajectory, rolled.solutions[i]
    finish = Finish(int(t.finish[i]))
    answer = solution.answer if solution.complete else None
    answers = list(question.answers)
    row = ResultRow(
        id=question.source_id or question.id,
        question=question.question,
        answer=answers[0] if len(answers) == 1 else answers,
        pred_ans=NO_ANSWER if answer is None else answer,
        stop_reason_final=STOP_REASONS[finish],
        gen_text_store=solution.text,
        searches=int(t.searches[i]),
        prompt_tokens=int(t.prompt_lengths[i]),
        sampled_tokens=int(t.loss_mask[i].sum()),
        search_outcomes=[search.outcome for search in rolled.searches[i]],
        seconds=round(seconds, 3),
    )
    if question.supporting:
        lines = (line for search in rolled.searches[i] for line in search.documents)
        row["supporting_recall"] = supporting_recall(question.supporting, lines)
    if rolled.parents is not None:
        row["hops"] = question.hops
        forks = np.flatnonzero(rolled.parents == i).tolist()
        row["forks"] = [_fork(rolled, fork) for fork in forks]
    return row


def _fork(rolled: Rolled, fork: int) -> ForkAnswer:
    """The answer of the fork in row `fork`."""
    assert rolled.with_search is not None
    t, solution = rolled.trajectory, rolled.solutions[fork]
    answer = solution.answer if solution.complete else None
    return ForkAnswer(
        search=int(rolled.forked_turns[fork]) + 1,
        pred_ans=NO_ANSWER if answer is None else answer,
        stop_reason_final=STOP_REASONS[Finish(int(t.finish[fork]))],
        gen_text_store=solution.text,
        with_search=bool(rolled.with_search[fork]),
    )


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def _header(run: EvalRun, questions: Sequence[Question], source: dict[str, Any]) -> dict[str, Any]:
    rollout = run.settings.config().rollout
    names = ("forks", "fork", "forks_per_trajectory", "fork_depth", "fork_draws")
    forks = {name: getattr(rollout, name) for name in names} if rollout.forks else {}
    if forks.get("fork_draws") == 1:
        del forks["fork_draws"]  # older files, which do not name it, can be continued
    return describe(
        run.model,
        run.questions,
        questions,
        run.settings,
        source,
        mode=run.mode,
        samples=run.samples,
        **forks,
    )


def _resume(
    out: Path, described: dict[str, Any], questions: Sequence[Question], samples: int
) -> tuple[list[ResultRow], dict[str, Any] | None]:
    """The answers in the file, each checked against its question, and its header; see begun."""
    rows, before = begun(out, described)
    for i, row in enumerate(rows):
        check(row, ResultRow, f"{out}, line {i + 1}", DataError)
        question = questions[i // samples] if i < len(questions) * samples else None
        expected = question and (question.source_id or question.id, question.question, i % samples)
        if (row["id"], row["question"], row.get("sample", 0)) != expected:
            raise DataError(
                f"{out}, line {i + 1} answers another question (id {row['id']!r}) than the one "
                "expected there: choose another file with --out"
            )
    return cast("list[ResultRow]", rows), before  # checked above
