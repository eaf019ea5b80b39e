"""Choosing questions by how hard they are for a model (R1-Searcher, section 3.1).

Each question is rolled out many times; its difficulty is the number of the first rollout that
solves it. A run stores its measurements beside its output, and a stopped run resumes from them.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np

from r1s_jax.data.benchmarks import questions_file
from r1s_jax.data.questions import Question, read_questions
from r1s_jax.data.results import header_path
from r1s_jax.eval.header import begun, describe, load_described
from r1s_jax.io.errors import ConfigError
from r1s_jax.io.journal import DataError
from r1s_jax.io.schema import check
from r1s_jax.models.pretrained import Pretrained
from r1s_jax.models.sharding import shard_params
from r1s_jax.presets import SELECTION, Settings
from r1s_jax.retrieval.api import Retriever
from r1s_jax.rewards.answer_scores import cover_exact_match
from r1s_jax.rollout.engine import Engine, Rolled
from r1s_jax.system.files import write_json, write_rows
from r1s_jax.system.locks import only_one


class _Measured(TypedDict):
    """The keys of a measured row that are read again."""

    idx: int
    question: str
    answer: str | list[str]
    first_solved: int | None
    solved: int
    difficulty: Literal["easy", "medium", "hard"]


CLASSES = ("easy", "medium", "hard")
_EASY_BELOW, _HARD_ABOVE = 10, 20  # rollouts, as published


@dataclass(frozen=True)
class Selection:
    """What to measure, and the `ratio` of easy, medium and hard questions to keep."""

    questions: str
    model: str
    settings: Settings = SELECTION
    rollouts: int = 20
    ratio: tuple[float, ...] = (0.0, 1.0, 1.0)
    questions_at_a_time: int = 8

    def __post_init__(self) -> None:
        if self.rollouts < _HARD_ABOVE:
            raise ConfigError(
                f"rollouts={self.rollouts}: must be at least {_HARD_ABOVE}, because a question is "
                f"hard if {_HARD_ABOVE} rollouts do not solve it"
            )
        shares = all(0 <= share < math.inf for share in self.ratio)
        if len(self.ratio) != 3 or not shares or not any(self.ratio):
            raise ConfigError(f"ratio {self.ratio}: give easy:medium:hard, such as 0:1:1")


def difficulty(first_solved: int | None) -> str:
    """The class of a question; `first_solved` is a rollout, counted from 1, or None: never."""
    if first_solved is None or first_solved > _HARD_ABOVE:
        return "hard"
    return "easy" if first_solved < _EASY_BELOW else "medium"


def select(
    selection: Selection,
    retriever: Retriever,
    source: dict[str, Any],
    out: Path,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Measures every question, then writes the chosen ones to `out` (JSON lines, in file order).

    Writes beside it `OUT.measured.jsonl` (every question with `first_solved`, 1-based or null,
    `solved`, the number of rollouts that solve it, and `difficulty`), its `.header.json` (model,
    questions and `source`, a description of the index) and `OUT.png` (a histogram). Returns the
    number of questions in each class and of chosen ones. Raises DataError if another selection was
    begun there, or if a requested class is empty.
    """
    file = questions_file(selection.questions)
    if out.resolve() == Path(file).resolve():
        raise DataError(f"{out} holds the questions to choose from: name another file")
    questions = read_questions(file)
    measured = out.with_name(out.name + ".measured.jsonl")
    with only_one(out, "the file of chosen questions"):
        return _select(selection, retriever, source, questions, measured, out, progress)


def _select(
    selection: Selection,
    retriever: Retriever,
    source: dict[str, Any],
    questions: Sequence[Question],
    measured: Path,
    out: Path,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    measured.parent.mkdir(parents=True, exist_ok=True)
    described = describe(
        selection.model,
        selection.questions,
        questions,
        selection.settings,
        source,
        rollouts=selection.rollouts,
    )
    described["dialect"].pop("frame", None)
    rows, before = _resume(measured, described, questions)
    policy = load_described(measured, selection.model, described, before)
    if not before:
        write_json(header_path(measured), described)
    if len(rows) < len(questions):
        policy = policy.speaking(selection.settings.config().protocol)
        rest = questions[len(rows) :]
        rows += _measure(selection, policy, retriever, rest, measured, progress, len(rows))
    progress(len(rows), len(questions))
    try:
        chosen = mixed(rows, selection.ratio, selection.settings.config().seed)
    except DataError as error:
        raise DataError(f"{selection.questions}: {error} in {measured}") from error
    write_rows(out, chosen)
    _plot(rows, selection.rollouts, out.with_name(out.name + ".png"))
    counts = Counter(row["difficulty"] for row in rows)
    return {"file": str(out), "chosen": len(chosen), **{name: counts[name] for name in CLASSES}}


def mixed(rows: Sequence[dict[str, Any]], ratio: Sequence[float], seed: int) -> list[dict]:
    """The largest random sample of rows with that ratio of classes, in file order.

    Raises DataError if a requested class is empty.
    """
    places = {
        name: [i for i, row in enumerate(rows) if row["difficulty"] == name] for name in CLASSES
    }
    shares = {name: share for name, share in zip(CLASSES, ratio, strict=True) if share}
    if empty := [name for name in shares if not places[name]]:
        counts = ", ".join(f"{len(places[name])} {name}" for name in CLASSES)
        raise DataError(
            f"no {' and no '.join(empty)} question among {len(rows)} ({counts}): choose another "
            "ratio; the measurements are kept"
        )
    unit = min(len(places[name]) / share for name, share in shares.items())
    rng = np.random.default_rng(seed)
    chosen = [
        i
        for name, share in shares.items()
        for i in rng.permutation(places[name])[: max(1, int(unit * share + 1e-9))]
    ]
    return [rows[i] for i in sorted(chosen)]


def _resume(
    measured: Path, described: dict[str, Any], questions: Sequence[Question]
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The rows measured before, and their header.

    Raises DataError if they are of other questions or another index.
    """
    rows, before = begun(measured, described)
    if len(rows) > len(questions):
        raise DataError(f"{measured} holds more rows than there are questions: remove it")
    for i, (row, question) in enumerate(zip(rows, questions, strict=False)):
        check(row, _Measured, f"{measured}, line {i + 1}", DataError)
        if row["question"] != question.question:
            raise DataError(
                f"{measured}, line {i + 1} holds another question, {row['question'][:60]!r}: "
                "choose another file with --out"
            )
    return rows, before


def _measure(
    selection: Selection,
    policy: Pretrained,
    retriever: Retriever,
    questions: Sequence[Question],
    measured: Path,
    progress: Callable[[int, int], None],
    done: int,
) -> Iterator[dict[str, Any]]:
    """Rolls out a few questions at a time, and writes their rows before it starts the next.

    `done` is the number of questions measured before.
    """
    engine = _engine(selection, policy)
    params = shard_params(policy.params, policy.model, engine.mesh)
    size = selection.questions_at_a_time
    seed = selection.settings.config().seed
    total = done + len(questions)
    with measured.open("a", encoding="utf-8") as file:
        for first in range(0, len(questions), size):
            progress(done, total)
            batch = list(questions[first : first + size])
            # Every batch has the same shape, so that the program compiles once.
            padded = [*batch, *[batch[-1]] * (size - len(batch))]
            rolled = engine.run(
                params,
                padded,
                samples=selection.rollouts,
                seed=seed,
                step=0,
                retriever=retriever,
            )
            rows = [_row(rolled, i, question, selection) for i, question in enumerate(batch)]
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            done += len(batch)
            yield from rows


def _row(rolled: Rolled, i: int, question: Question, selection: Selection) -> dict[str, Any]:
    own = range(i * selection.rollouts, (i + 1) * selection.rollouts)
    answers = [rolled.solutions[j].answer for j in own]
    solved = [a is not None and cover_exact_match(a, question.answers) for a in answers]
    first = solved.index(True) + 1 if any(solved) else None
    return {
        "idx": question.id,
        **({"_id": question.source_id} if question.source_id else {}),
        "question": question.question,
        "answer": question.answers[0] if len(question.answers) == 1 else list(question.answers),
        "first_solved": first,
        "solved": sum(solved),
        "difficulty": difficulty(first),
    }


def _engine(selection: Selection, policy: Pretrained) -> Engine:
    config = selection.settings.config(policy.model.max_position)
    most = selection.questions_at_a_time * selection.rollouts
    rollout = replace(config.rollout, slots=min(config.rollout.slots, most))
    return Engine(policy, rollout, search=config.search)


def _plot(rows: Sequence[dict[str, Any]], rollouts: int, path: Path) -> None:
    """A histogram of the rollouts that first solved a question, a colour per class."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    firsts = [row["first_solved"] for row in rows]
    for name, colour in zip(CLASSES, ("#2a9d8f", "#e9c46a", "#e76f51"), strict=True):
        at = [f or rollouts + 1 for f in firsts if difficulty(f) == name]
        bins = np.arange(0.5, rollouts + 2)
        axes.hist(at, bins=bins.tolist(), color=colour, label=f"{name} ({len(at)})")
    axes.set(
        title=f"{len(rows)} questions: the rollout that first solved each",
        xlabel=f"rollout ({rollouts + 1}: none of {rollouts})",
        ylabel="questions",
    )
    axes.legend()
    figure.savefig(path, dpi=120)
