"""Questions: read from files, streamed in a shuffled order that can be saved and restored."""

import gzip
import json
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain

from r1s_jax.border.errors import UserError
from r1s_jax.retrieval.corpus import CorpusError
from r1s_jax.retrieval.tables import is_table, table_rows
from r1s_jax.rewards.answer_scores import normalize_answer


class DataError(UserError, ValueError):
    """A data file that cannot be used; the message names the file and the line."""


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
    questions: dict[int, Question] = {}
    for number, row in read_rows(path):
        try:
            question = _parse(row, position=len(questions))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        if question.id in questions:
            raise DataError(f"{path}, line {number}: id {question.id} was used before")
        questions[question.id] = question
    if not questions:
        raise DataError(f"{path}: no questions in this file")
    return list(questions.values())


def read_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a JSONL file (`.gz` too) with their line numbers; blank lines skipped.

    So are the rows of a Parquet file, of a folder that `datasets` saved, and of
    `datasets:ORG/NAME[:SPLIT]`. Raises DataError, naming the file and the line, for what is no JSON
    object, and for a table that cannot be read.
    """
    if is_table(path):
        try:
            yield from table_rows(str(path))
        except CorpusError as error:
            raise DataError(str(error)) from error
        return
    path = Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig") as lines:
        for number, line in _numbered(lines, path):
            if not line.strip():
                continue
            yield number, parse_row(line, path, number)


def parse_row(line: str | bytes, path: Path, number: int) -> dict[str, Any]:
    """The JSON object of line `number` of `path`, which a DataError names if it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: {error}") from error
    if not isinstance(row, dict):
        found = type(row).__name__
        raise DataError(f"{path}, line {number}: expected a JSON object, found {found}")
    return row


def whole_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a JSONL file that may be being written, with their line numbers.

    A last line without its end is left out. Raises DataError, naming the file and the line, for
    what is no JSON object.
    """
    # Bytes, not `splitlines`: it would also cut at U+2028 and its kin, which a model may write.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.endswith(b"\n") and line.strip():
                yield number, parse_row(line, path, number)


def journal_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file that is being written; an unfinished last line is cut off it.

    A file that is not there has none. Raises DataError as read_rows does.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
    return [row for _, row in read_rows(path)]


def _numbered(lines: Iterable[str], path: Path) -> Iterator[tuple[int, str]]:
    """Numbers the lines from 1; what cannot be read as text becomes a DataError as well."""
    number = 0
    try:
        for number, line in enumerate(lines, start=1):
            yield number, line
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}, after line {number}: {error}") from error


def _parse(row: dict[str, Any], position: int) -> Question:
    """One row as a Question; ValueError says what is wrong with it."""
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise ValueError("the question is empty")
    return Question(_row_id(row, position), question.strip(), gold_answers(row))


def gold_answers(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The right answers of a row, under `answer` or FlashRAG's `golden_answers`.

    Raises ValueError where there is none.
    """
    answer = row.get("answer", row.get("golden_answers"))
    answers = answer if isinstance(answer, list) else [answer]
    if not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise ValueError("`answer` must be a text, or a list of texts, none of them empty")
    return tuple(answers)


def _row_id(row: dict[str, Any], position: int) -> int:
    given = row.get("idx", row.get("id"))
    return given if isinstance(given, int) else position


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
