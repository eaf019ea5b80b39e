"""Questions: read from files, and streamed in a shuffled order whose cursor can be saved."""

import itertools
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jaxtyping import Float

from r1s_jax.data.aliases import Aliases
from r1s_jax.data.question_forms import Question, parse_question
from r1s_jax.data.rows import answerable, placed_rows
from r1s_jax.io.errors import reading, shorten
from r1s_jax.io.journal import DataError
from r1s_jax.rewards.answer_scores import normalize_answer
from r1s_jax.system.console import console


def read_questions(path: str | Path) -> list[Question]:
    """Reads a published file of questions: JSON, JSON lines or a table (see read_rows).

    A row holds the question under `question` or `problem`, or as the last user message of verl's
    `prompt`; its answers in a form of gold_answers; optionally a whole-number id `idx` or `id`, or
    a text id `_id`, `id`, `question_id` or `idx`. A row without a whole-number id gets its position
    among the rows, from 0, or the next free number. Blank lines are skipped. Raises DataError for a
    broken line, an empty question, a missing answer, two rows of one id, or a file without
    questions.
    """
    parsed: list[tuple[int | None, Question]] = []
    ids: set[int | str] = set()
    unanswerable, aliases = 0, Aliases(path)
    for place, row in placed_rows(path):
        if not answerable(row):
            unanswerable += 1
            continue
        try:
            number, question = parse_question(row)
            question = aliases.added(question, row)
        except ValueError as error:
            raise DataError(f"{place}: {error}") from error
        for id in (number, question.source_id or None):
            if id in ids:
                raise DataError(f"{place}: id {shorten(str(id), 60)} was used before")
            ids |= set() if id is None else {id}
        parsed.append((number, question))
    if unanswerable:
        console.print(f"{path}: {unanswerable} rows marked as unanswerable are left out")
    if not parsed:
        raise DataError(f"{path}: no questions in this file")
    return _numbered(parsed, {id for id in ids if isinstance(id, int)})


def _numbered(parsed: Sequence[tuple[int | None, Question]], used: set[int]) -> list[Question]:
    """Sets the ids: a question without one gets its position, or the next number not in `used`."""
    questions, numbers = [], itertools.count(len(parsed))
    for position, (id, question) in enumerate(parsed):
        if id is None:
            id = position if position not in used else next(n for n in numbers if n not in used)
            used.add(id)
        questions.append(replace(question, id=id))
    return questions


class QuestionStream:
    """An endless stream of questions, from a grain iterator whose cursor can be saved."""

    def __init__(self, questions: grain.DatasetIterator[Question]):
        self._questions = questions

    def take(self, count: int) -> list[Question]:
        """The next `count` questions."""
        return list(itertools.islice(self._questions, count))

    def state(self) -> dict[str, Any]:
        """The cursor, ready for JSON."""
        return self._questions.get_state()

    def restore(self, state: dict[str, Any]) -> None:
        """Continues at the cursor `state` of a stream of the same questions and seed."""
        self._questions.set_state(state)


class ByDifficulty:
    """Draws questions by what they earned last: most often those that some samples solve.

    Questions whose group earned a mean of at most 0.25, or more than 0.75, teach little; they are
    drawn a fifth as often as the others and those not seen yet (prime-rl's curriculum). A draw
    depends on (seed, step, draw) and the rewards noted before.
    """

    _HARD, _EASY, _SELDOM = 0.25, 0.75, 0.2

    def __init__(self, questions: Sequence[Question], seed: int):
        self._questions, self._seed = questions, seed
        self._place = {question.id: i for i, question in enumerate(questions)}
        self._names = [
            sha256(question.question.encode()).hexdigest()[:16] for question in questions
        ]
        self._scores = np.full(len(questions), np.nan)

    def take(self, size: int, step: int, draw: int) -> list[Question]:
        """`size` questions, different ones as far as there are as many."""
        known, scores = ~np.isnan(self._scores), self._scores
        seldom = known & ((scores <= self._HARD) | (scores > self._EASY))
        weights = np.where(seldom, self._SELDOM, 1.0)
        rng = np.random.default_rng((self._seed, step, draw))
        again = size > len(self._questions)
        chosen = rng.choice(len(weights), size, replace=again, p=weights / weights.sum())
        return [self._questions[i] for i in chosen]

    def note(self, questions: Sequence[Question], rewards: Float[np.ndarray, " N"]) -> None:
        """Notes the mean reward of each question's samples; NaN: no reward."""
        ids = np.array([question.id for question in questions])
        for number in np.unique(ids):
            values = rewards[(ids == number) & ~np.isnan(rewards)]
            if len(values) and number in self._place:
                self._scores[self._place[int(number)]] = float(values.mean())

    def state(self) -> dict[str, float]:
        """The scores by a hash of the question, for a checkpoint."""
        known = np.flatnonzero(~np.isnan(self._scores))
        return {self._names[i]: float(self._scores[i]) for i in known}

    def restore(self, state: dict[str, float]) -> None:
        """Restores what `state` returned; questions that it lacks count as not seen. Raises
        BadInput where a score is no number."""
        with reading("the scores of questions in a checkpoint"):
            self._scores[:] = [float(state.get(name, np.nan)) for name in self._names]


def question_stream(
    sources: Sequence[Sequence[Question]],
    *,
    seed: int,
    mix: Sequence[float] = (),
) -> QuestionStream:
    """Shuffled questions: each epoch is a new permutation, which depends only on the seed.

    With `mix`, each source has its own epochs and its share of the stream.
    """
    if not sources or not all(sources):
        raise ValueError("a stream needs at least one question of each source")
    if mix:
        parts = [_shuffled(source, seed + i) for i, source in enumerate(sources)]
        dataset = grain.MapDataset.mix(parts, [share / sum(mix) for share in mix])
    else:
        dataset = _shuffled([question for source in sources for question in source], seed)
    # The questions are in memory: threads that read ahead would only cost start-up time.
    in_memory = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return QuestionStream(iter(dataset.to_iter_dataset(in_memory)))


def _shuffled(questions: Sequence[Question], seed: int) -> grain.MapDataset[Question]:
    return grain.MapDataset.source(questions).seed(seed).shuffle().repeat()


def without(questions: Sequence[Question], unwanted: Container[str]) -> list[Question]:
    """The questions whose normalised text is not in `unwanted`."""
    return [q for q in questions if normalize_answer(q.question) not in unwanted]


def texts(questions: Iterable[Question]) -> set[str]:
    """The normalised texts of questions, without differences in case, punctuation and articles."""
    return {normalize_answer(q.question) for q in questions}
