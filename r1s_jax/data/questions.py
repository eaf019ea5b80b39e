"""Questions: read from files, streamed in a shuffled order that can be saved and restored."""

import itertools
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grain

from r1s_jax.border.errors import shorten
from r1s_jax.data.rows import DataError, gold_answers, read_rows
from r1s_jax.rewards.answer_scores import normalize_answer
from r1s_jax.system.console import console


@dataclass(frozen=True)
class Question:
    """One question; `answers` are equally good, `hops` is how many facts it takes (0: unknown)."""

    id: int
    question: str
    answers: tuple[str, ...]
    hops: int = 0


def read_questions(path: str | Path) -> list[Question]:
    """Reads JSONL or a table (see read_rows).

    Its rows hold `question`, `answer` (text or list), perhaps `idx` or `id`. A row without a whole
    number for an id is known by its position among the rows, from 0. Blank lines are skipped.
    Raises DataError on a broken line, an empty question, a missing answer, two rows of one id, or a
    file without questions.
    """
    found: list[tuple[int | None, Question]] = []
    ids: set[int] = set()
    unanswerable = 0
    for number, row in read_rows(path):
        if row.get("answerable") is False:  # MuSiQue has such rows
            unanswerable += 1
            continue
        try:
            question, given = _parse(row), row.get("idx", row.get("id"))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        given = given if isinstance(given, int) and not isinstance(given, bool) else None
        if given in ids:
            raise DataError(f"{path}, line {number}: id {given} was used before")
        ids |= set() if given is None else {given}
        found.append((given, question))
    if unanswerable:
        console.print(f"{path}: {unanswerable} rows that cannot be answered are left out")
    if not found:
        raise DataError(f"{path}: no questions in this file")
    return _numbered(found, ids)


def _numbered(found: Sequence[tuple[int | None, Question]], taken: set[int]) -> list[Question]:
    """Those without an id of their own are known by their position, or by the next free number."""
    questions, free = [], itertools.count(len(found))
    for position, (given, question) in enumerate(found):
        id = given
        if id is None:
            id = position if position not in taken else next(n for n in free if n not in taken)
            taken.add(id)
        questions.append(replace(question, id=id))
    return questions


def _parse(row: dict[str, Any]) -> Question:
    """One row as a Question, its id apart; ValueError says what is wrong with it."""
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        known = shorten(", ".join(map(str, row)), 100)
        raise ValueError(f"`question` must be a text, and not empty; the keys here are {known}")
    return Question(0, question.strip(), gold_answers(row))


class QuestionStream:
    """Batches of questions without end, from a grain iterator whose cursor can be saved."""

    def __init__(self, batches: grain.DatasetIterator[list[Question]]):
        self._batches = batches

    def __iter__(self) -> "QuestionStream":
        return self

    def __next__(self) -> list[Question]:
        return next(self._batches)

    def state(self) -> dict[str, Any]:
        """The cursor, ready for JSON."""
        return self._batches.get_state()

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on as the stream that gave `state`, made of the same questions, seed and batch."""
        self._batches.set_state(state)


def question_stream(
    sources: Sequence[Sequence[Question]],
    *,
    seed: int,
    batch_size: int,
    mix: Sequence[float] = (),
) -> QuestionStream:
    """Shuffled questions in batches: each epoch is a fresh permutation, the same for one seed.

    Batches run on across the end of an epoch, so every one has `batch_size` questions. With `mix`
    each source has an epoch of its own, and its share of the stream.
    """
    if not sources or not all(sources) or batch_size < 1:
        raise ValueError("a stream needs at least one question and a batch size of at least 1")
    if mix:
        parts = [_shuffled(source, seed + i) for i, source in enumerate(sources)]
        dataset = grain.MapDataset.mix(parts, [share / sum(mix) for share in mix])
    else:
        dataset = _shuffled([question for source in sources for question in source], seed)
    # The questions lie in memory: threads that read ahead would only cost start-up time.
    in_memory = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return QuestionStream(iter(dataset.batch(batch_size, batch_fn=list).to_iter_dataset(in_memory)))


def _shuffled(questions: Sequence[Question], seed: int) -> grain.MapDataset[Question]:
    return grain.MapDataset.source(questions).seed(seed).shuffle().repeat()


def without(questions: Sequence[Question], unwanted: Container[str]) -> list[Question]:
    """The questions whose normalised text is not in `unwanted`."""
    return [q for q in questions if normalize_answer(q.question) not in unwanted]


def texts(questions: Iterable[Question]) -> set[str]:
    """Their normalised texts: equal for what differs in case, punctuation and articles."""
    return {normalize_answer(q.question) for q in questions}
