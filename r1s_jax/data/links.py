"""Questions of two hops from pages that name other pages of the corpus.

"What is the capital of the country that Kano lies in?": the page of Kano names Nigeria, and the
page of Nigeria its capital. Rules say what to look for, as regular expressions; those of this
package are in `links.jsonl`, and a user adds more. A rule is one of three objects:

    {"kind": "country", "is": "..."}
        Pages whose text matches `is` are of this kind.
    {"kind": "country", "link": "the country that {title} lies in", "pattern": "... {page} ..."}
        A page is linked to the page of that kind whose title stands for {page} in its text.
    {"kind": "country", "question": "What is the capital of {link}?", "pattern": "... {answer} ..."}
        The text of a page of that kind has the answer.

`{answer}` stands for words that begin with a capital letter; a group named `answer` for anything
else. Links are looked for in the first sentences of a page, answers in all of it. A question is
made where all is unambiguous: one page is linked, one answer found, and neither the first page nor
the question has the answer in it.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from r1s_jax.data.demonstrations import Demonstration
from r1s_jax.data.question_forms import Question
from r1s_jax.data.results import without_brackets
from r1s_jax.data.rows import read_rows
from r1s_jax.io.journal import DataError
from r1s_jax.io.schema import check
from r1s_jax.protocol.dialect import Dialect
from r1s_jax.retrieval.api import Passage, join_line
from r1s_jax.rewards.answer_scores import normalize_answer
from r1s_jax.system.files import write_rows

RULES = "links.jsonl"
LINKS = "links:"  # before a corpus: the questions that its pages make
KEPT = 200  # questions for demonstrations
SEARCHING = 0.4  # share of the demonstrations that search
_SENTENCES = 2  # of a page that are searched for a link
_END = re.compile(r"(?<=[a-z)\]\"0-9])\.\s+(?=[A-Z])")
_NAME = r"[A-Z][\w'’-]*(?:[ -](?:of|the|de|del|la|da|du|[A-Z][\w'’-]*))*"


class _Row(msgspec.Struct):
    kind: str
    is_: str = msgspec.field(name="is", default="")
    link: str = ""
    question: str = ""
    pattern: str = ""


class Rules(NamedTuple):
    """Rules by kind of page."""

    kinds: dict[str, re.Pattern[str]]
    links: list[tuple[str, str, str]]  # (kind, phrase with {title}, pattern with {page})
    facts: list[tuple[str, str, re.Pattern[str]]]  # (kind, question with {link}, pattern)


def read_rules(added: Path | None = None) -> Rules:
    """The rules of this package and those in a file; raises DataError for a faulty one."""
    own = files("r1s_jax.data") / RULES
    rows = [
        (f"{RULES}, line {i}", json.loads(t))
        for i, t in enumerate(own.read_text("utf-8").splitlines(), 1)
    ]
    if added:
        rows += [(f"{added}, line {number}", row) for number, row in read_rows(added)]
    rules = Rules({}, [], [])
    for where, row in rows:
        _add(rules, check(row, _Row, where, DataError), where)
    for kind, *_ in (*rules.links, *rules.facts):
        if kind not in rules.kinds:
            raise DataError(f"{added or RULES}: no rule says which pages are of the kind {kind!r}")
    return rules


def _add(rules: Rules, row: _Row, where: str) -> None:
    forms = {"is": row.is_, "link": row.link, "question": row.question}
    given = [name for name, text in forms.items() if text]
    if len(given) != 1 or (row.pattern == "") != (given == ["is"]):
        raise DataError(f"{where}: a rule has `is`, or `link` or `question` with a `pattern`")
    needs = {"link": ("{title}", "{page}"), "question": ("{link}", "{answer}"), "is": ("", "")}
    pattern = row.pattern.replace("(?P<answer>", "{answer}")
    for text, word in zip((forms[given[0]], pattern), needs[given[0]], strict=True):
        if word not in text:
            raise DataError(f"{where}: {text!r} lacks {word}")
    if row.is_:
        rules.kinds[row.kind] = _compiled(row.is_, where)
    elif row.link:
        _compiled(row.pattern.replace("{page}", "x"), where)
        rules.links.append((row.kind, row.link, row.pattern))
    else:
        pattern = row.pattern.replace("{answer}", f"(?P<answer>{_NAME})")
        rules.facts.append((row.kind, row.question, _compiled(pattern, where)))


def _compiled(pattern: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise DataError(f"{where}: {pattern!r} is no regular expression ({error})") from error


def link_questions(passages: Sequence[Passage], rules: Rules) -> list[Question]:
    """All questions of two hops, each with the titles of its two pages.

    Raises DataError if no passage has a title.
    """
    pages = _pages(passages)
    if not pages:
        raise DataError("the passages have no titles: no page can name another")
    questions: dict[str, Question] = {}
    for title, phrase, kind, page in _links(pages, rules):
        for question, answer in _facts(pages[page], kind, rules):
            text = question.replace("{link}", phrase.replace("{title}", without_brackets(title)))
            if _is_sound(title, page, pages[title], text, answer):
                made = Question(len(questions), text, (answer,), 2, supporting=(title, page))
                questions.setdefault(text, made)
    return list(questions.values())


def apart(questions: Sequence[Question]) -> tuple[list[Question], list[Question]]:
    """(questions for demonstrations, the others), by a hash of the question."""
    kept = sorted(questions, key=_hash)[: min(KEPT, len(questions) // 2)]
    ids = {question.id for question in kept}
    return kept, [question for question in questions if question.id not in ids]


def _hash(question: Question) -> str:
    return hashlib.sha256(f"demonstration {question.question}".encode()).hexdigest()


def link_demonstrations(
    shown: Sequence[Question], passages: Sequence[Passage], dialect: Dialect, *, seed: int
) -> list[Demonstration]:
    """Worked solutions of questions from the passages (see `apart`).

    The share SEARCHING looks up both pages, the others answer at once: that searching pays is left
    to reinforcement learning.
    """
    pages = _pages(passages)
    searches = np.random.default_rng(seed).random(len(shown)) < SEARCHING
    return [_demonstration(q, pages, dialect, s) for q, s in zip(shown, searches, strict=True)]


def _demonstration(
    question: Question, pages: Mapping[str, str], dialect: Dialect, searches: bool
) -> Demonstration:
    spans: list[tuple[str, float]] = []
    thought = " I know this."
    if searches:
        thought = ""
        for title in question.supporting:
            look_up = f"{dialect.opening()}{thought} Let me look up {title}."
            spans.append(((look_up if dialect.talks else "") + dialect.search_turn(title), 1.0))
            spans.append((dialect.reply([[join_line(title, pages[title])]]), 0.0))
            thought = f" It names {question.supporting[-1]}."
        thought = " The document says it."
    last = f"{dialect.opening()}{thought}" if dialect.talks else ""
    answer = dialect.answer_turn(question.answers[0]) + dialect.turn_end
    return Demonstration(question.question, (*spans, (last + answer, 1.0)))


def _pages(passages: Iterable[Passage]) -> dict[str, str]:
    """The first passage of each page, by title."""
    pages: dict[str, str] = {}
    for passage in passages:
        if passage.title:
            pages.setdefault(passage.title, passage.text)
    return pages


def _links(pages: Mapping[str, str], rules: Rules) -> Iterator[tuple[str, str, str, str]]:
    """(title, phrase, kind, linked title) of every link that is the only one of its rule."""
    for kind, phrase, pattern in rules.links:
        of_kind = [t for t, text in pages.items() if rules.kinds[kind].search(_beginning(text))]
        if not of_kind:
            continue
        names = "|".join(map(re.escape, sorted(of_kind, key=len, reverse=True)))
        compiled = re.compile(pattern.replace("{page}", rf"(?P<page>{names})\b"))
        for title, text in pages.items():
            found = {match["page"] for match in compiled.finditer(_beginning(text))}
            if len(found) == 1 and title not in found:
                yield title, phrase, kind, next(iter(found))


def _facts(text: str, kind: str, rules: Rules) -> Iterator[tuple[str, str]]:
    """(question, answer) of every question to which a page has one answer."""
    found: dict[str, set[str]] = defaultdict(set)
    for fact_kind, question, pattern in rules.facts:
        if fact_kind == kind:
            found[question] |= {m["answer"].strip(" .,") for m in pattern.finditer(text)}
    yield from ((question, next(iter(a))) for question, a in found.items() if len(a) == 1)


def _is_sound(title: str, page: str, text: str, question: str, answer: str) -> bool:
    """Whether both pages are needed: neither the question nor the first page has the answer."""
    key = f" {normalize_answer(answer)} "
    shown = f" {normalize_answer(f'{title} {text} {question}')} "
    return key.strip() != "" and key not in shown and page not in title


def _beginning(text: str) -> str:
    return ". ".join(_END.split(text)[:_SENTENCES])


def write_links(passages: Sequence[Passage], out: Path, patterns: Path | None) -> dict[str, Any]:
    """Writes the questions to a file; returns how many, by the question that is asked.

    Raises DataError if the file exists or no question can be made.
    """
    if out.exists():
        raise DataError(f"{out} is there already: name another file, or remove it")
    questions = link_questions(passages, read_rules(patterns))
    if not questions:
        raise DataError("no page names another as the rules say: add rules with --patterns")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_rows(out, map(_row, questions))
    return {"questions": len(questions), "file": str(out)}


def _row(question: Question) -> dict[str, Any]:
    return {
        "idx": question.id,
        "question": question.question,
        "answer": question.answers[0],
        "supporting_facts": [[title, 0] for title in question.supporting],
    }
