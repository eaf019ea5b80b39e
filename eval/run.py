"""Answering a file of questions with a model, and writing down everything that came of it.

The rollout engine is that of training, with the published evaluation settings (greedy, 512 tokens
a turn, five documents a search, at most nine searches).
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from r1s_jax.border.errors import ConfigError
from r1s_jax.config import RolloutConfig, SearchConfig
from r1s_jax.data.benchmarks import questions_file
from r1s_jax.data.questions import Question, read_questions
from r1s_jax.data.results import ResultRow, header_path, read_header
from r1s_jax.data.rows import DataError, journal_rows
from r1s_jax.models.pretrained import Pretrained, default_dtype, load_pretrained
from r1s_jax.models.sharding import shard_params
from r1s_jax.protocol import r1_searcher as protocol
from r1s_jax.protocol.prompts import renderer
from r1s_jax.retrieval.api import Retriever
from r1s_jax.rollout.engine import Engine, Rolled
from r1s_jax.rollout.trajectory import Finish
from r1s_jax.system.files import write_json

Mode = Literal["search", "rag", "direct"]

# The published names of how a trajectory ends.
STOP_REASONS = {
    Finish.FINISHED: "finished",
    Finish.SEARCH_LIMIT: "many_retrieve",
    Finish.BAD_QUERY: "query_inst_error",
    Finish.LENGTH: "shot_down",
    Finish.SEARCH_ERROR: "retrieve_error",
    Finish.ABORTED: "retrieve_error",
}
NO_ANSWER = "I don't know."


@dataclasses.dataclass(frozen=True)
class EvalRun:
    """One evaluation. `rag` searches the question itself once; `direct` never searches."""

    questions: str  # a benchmark's name, a path or another reference to a file
    model: str
    mode: Mode = "search"
    prompt: str | None = None  # a template with {question}; None: the chat template, or the base
    k: int = 5
    temperature: float = 0.0
    slots: int = 16
    max_length: int = 4096
    max_turn_length: int = 512
    limit: int = 0  # questions at most; 0: all
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("search", "rag", "direct"):
            raise ConfigError(f"mode {self.mode!r}: take search, rag or direct")


def answer_file(
    run: EvalRun,
    retriever: Retriever | None,
    source: dict[str, Any],
    out: Path,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Path:
    """Answers every question of a file, in order, a row a question in `out` (JSON lines).

    Rows hold `id`, `question`, `answer`, `pred_ans`, `stop_reason_final`, `gen_text_store`,
    `searches`, `prompt_tokens`, `sampled_tokens` and `seconds`. `OUT.header.json` says what was run
    on what (`source` describes the index), so that numbers over different corpora are never taken
    for comparable. A stopped run continues where its file ends. Raises DataError for a file that
    another run wrote, or where `retriever` is missing.
    """
    if retriever is None and run.mode != "direct":
        raise DataError(f"mode {run.mode} searches: name an index, or take --mode direct")
    questions = read_questions(questions_file(run.questions))
    questions = questions[: run.limit or None]
    if Path(run.questions).resolve() == out.resolve():
        raise DataError(f"{out} holds the questions: name another file for the answers")
    described = _header(run, source)
    done = _already(out, described, questions)
    progress(done, len(questions))
    policy = load_pretrained(run.model, default_dtype())
    engine = _engine(run, policy)
    engine.check_prompts(questions)
    params = shard_params(policy.params, policy.model, engine.mesh)
    write_json(header_path(out), described)
    with out.open("a", encoding="utf-8") as file:
        for batch in _batches(questions[done:], run.slots):
            # Every batch has the same shape, so that the program compiles once.
            padded = [*batch, *[batch[-1]] * (min(run.slots, len(questions)) - len(batch))]
            begin = time.perf_counter()
            rolled = engine.run(
                params, padded, samples=1, seed=run.seed, step=0, retriever=retriever or _Nothing()
            )
            seconds = (time.perf_counter() - begin) / len(batch)
            for i, question in enumerate(batch):
                row = _row(rolled, i, question, seconds)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            done += len(batch)
            progress(done, len(questions))
    return out


class _Nothing:
    """Stands where no search is made."""

    def search(self, queries: Sequence[str], k: int) -> list[list]:
        raise RuntimeError("a search in a run that makes none")


def _engine(run: EvalRun, policy: Pretrained) -> Engine:
    longest = min(run.max_length, policy.model.max_position)
    rag, documents = run.mode == "rag", min(1280, longest // 3)
    config = RolloutConfig(
        slots=run.slots,
        temperature=run.temperature,
        top_p=0.95,
        max_length=longest,
        # With a first search the documents belong to the prompt.
        max_prompt_length=longest // 2 + rag * documents,
        max_turn_length=run.max_turn_length,
        max_searches=9 if run.mode == "search" else 0,
        documents_per_query=run.k,
        max_documents_length=documents,
        first_search=rag,
        prefill_rows=1,
        prefill_chunk=128,
    )
    return Engine(
        policy,
        config,
        renderer(run.prompt, policy.tokenizer),
        # An evaluation goes on whatever a retriever does: every failure is in its row.
        search=SearchConfig(max_failure_rate=1.0),
        extract_query=protocol.extract_eval_query,
    )


def _row(rolled: Rolled, i: int, question: Question, seconds: float) -> ResultRow:
    t, solution = rolled.trajectory, rolled.solutions[i]
    finish = Finish(int(t.finish[i]))
    answer = solution.answer if finish == Finish.FINISHED else None
    answers = list(question.answers)
    return ResultRow(
        id=question.id,
        question=question.question,
        answer=answers[0] if len(answers) == 1 else answers,
        pred_ans=NO_ANSWER if answer is None else answer,
        stop_reason_final=STOP_REASONS[finish],
        gen_text_store=solution.text,
        searches=int(t.searches[i]),
        prompt_tokens=int(t.prompt_lengths[i]),
        sampled_tokens=int(t.loss_mask[i].sum()),
        seconds=round(seconds, 3),
    )


def _batches(questions: Sequence[Question], size: int) -> Iterator[Sequence[Question]]:
    for first in range(0, len(questions), size):
        yield questions[first : first + size]


def _header(run: EvalRun, source: dict[str, Any]) -> dict[str, Any]:
    described = dataclasses.asdict(run)
    if (file := Path(run.questions)).exists():
        described["questions"] = file.name
    # How many are answered at a time, and how many in all, changes no answer.
    for name in ("slots", "limit"):
        del described[name]
    return {"run": described, "source": source, "dtype": default_dtype().name}


def _already(out: Path, described: dict[str, Any], questions: Sequence[Question]) -> int:
    """How many answers the file holds; a line cut off by a crash is taken away first."""
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        return 0
    if read_header(out) != described:
        raise DataError(
            f"{out} was written by another run (see {header_path(out).name}): choose another file"
        )
    rows = journal_rows(out)
    for row, question in zip(rows, questions, strict=False):
        if row["id"] != question.id:
            raise DataError(f"{out} holds answers to other questions: {row['id']}, {question.id}")
    return min(len(rows), len(questions))
