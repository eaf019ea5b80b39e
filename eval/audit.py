"""Whether a corpus can answer questions: its pages, its answers, and the rank of both."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from r1s_jax.data.benchmarks import questions_file
from r1s_jax.data.question_forms import Question
from r1s_jax.data.questions import read_questions
from r1s_jax.data.results import page_key, without_brackets
from r1s_jax.data.rows import read_rows
from r1s_jax.eval.score import interval
from r1s_jax.io.errors import shorten
from r1s_jax.io.journal import DataError
from r1s_jax.protocol.r1_searcher import has_cjk
from r1s_jax.retrieval.api import Passage, Retriever, split_line
from r1s_jax.retrieval.corpus import PassageStore
from r1s_jax.retrieval.index import Index
from r1s_jax.retrieval.references import read_corpus
from r1s_jax.rewards.answer_scores import normalize_answer
from r1s_jax.system.files import write_rows

DEPTH = 100  # passages searched for each question
RANKS = (1, 5, 20, 100)
_AT_ONCE = 64  # queries of one search
_NAMED = 5  # titles alike that are named
_THERE = ("title", "redirect")
_YES_NO = {"yes", "no"}
Progress = Callable[[int, int], None]  # (done, total)


class Lines(Sequence[str]):
    """The lines of passages, read as they are needed."""

    def __init__(self, passages: Sequence[Passage] | PassageStore):
        self._passages = passages

    def __len__(self) -> int:
        return len(self._passages)

    def __getitem__(self, i: Any) -> Any:
        return self._passages[i].line

    def __iter__(self) -> Iterator[str]:
        return (passage.line for passage in self._passages)


def silent(title: str) -> Progress:
    """No progress."""
    return lambda done, total: None


def can_be_found(answers: Sequence[str]) -> bool:
    """Whether a passage with an answer says anything: yes, no and numbers are everywhere."""
    return any(_tells(key) for answer in answers if (key := normalize_answer(answer)))


def _tells(key: str) -> bool:
    return key not in _YES_NO and not key.replace(" ", "").isdigit()


@dataclass
class Holdings:
    """What a corpus holds of some questions.

    `pages` has the keys of wanted titles that are there. `similar` has, for the key of a wanted
    title, titles that differ in what is in brackets. `answered` has the numbers of questions with
    an answer in some passage. `titled` says whether any passage has a title.
    """

    pages: set[str] = field(default_factory=set)
    similar: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    answered: set[int] = field(default_factory=set)
    titled: bool = False

    def page(self, title: str, redirects: Mapping[str, str]) -> str:
        """How the corpus has a page: `title`, `redirect`, `brackets` or `absent`."""
        key = page_key(title)
        if key in self.pages:
            return "title"
        if redirects.get(key) in self.pages:
            return "redirect"
        return "brackets" if self.alike(title) else "absent"

    def alike(self, title: str) -> list[str]:
        """Titles that differ from an absent one in brackets only."""
        key = page_key(title)
        return [] if key in self.pages else self.similar.get(key, [])


class Answers:
    """Finds the gold answers of questions in passages, as whole words."""

    def __init__(self, questions: Sequence[Question]):
        self._by_first: dict[str, list[tuple[list[str], int]]] = defaultdict(list)
        self._anywhere: list[tuple[str, int]] = []  # without spaces between words
        for number, question in enumerate(questions):
            for key in filter(_tells, filter(None, map(normalize_answer, question.answers))):
                if has_cjk(key):
                    self._anywhere.append((key, number))
                else:
                    words = key.split()
                    self._by_first[words[0]].append((words, number))

    @property
    def any(self) -> bool:
        """Whether there is an answer to look for."""
        return bool(self._by_first or self._anywhere)

    def in_text(self, text: str) -> set[int]:
        """The numbers of the questions that a passage answers."""
        plain = normalize_answer(text)
        words = plain.split()
        return {
            number
            for at, word in enumerate(words)
            for phrase, number in self._by_first.get(word, ())
            if words[at : at + len(phrase)] == phrase
        } | {number for key, number in self._anywhere if key in plain}


def holdings(
    lines: Iterable[str],
    questions: Sequence[Question],
    redirects: Mapping[str, str],
    progress: Callable[[int], None] = lambda done: None,
) -> Holdings:
    """Reads a whole corpus once; `progress` gets the number of passages read."""
    wanted = {page_key(title) for question in questions for title in question.supporting}
    wanted |= {redirects[key] for key in wanted & redirects.keys()}
    bare = defaultdict(set)
    for question in questions:
        for title in question.supporting:
            bare[page_key(without_brackets(title))].add(page_key(title))
    held, answers = Holdings(), Answers(questions)
    for number, line in enumerate(lines):
        title, _ = split_line(line)
        if title:
            held.titled = True
            if (key := page_key(title)) in wanted:
                held.pages.add(key)
            for other in bare.get(page_key(without_brackets(title)), ()):
                if other != key and len(names := held.similar[other]) < _NAMED:
                    names.append(title)
        held.answered |= answers.in_text(line)
        if number % 1000 == 0:
            progress(number)
    return held


@dataclass(frozen=True)
class Finding:
    """What a corpus and its search engine have for one question; None: it cannot be told."""

    question: Question
    pages: tuple[str, ...]  # of each supporting title: see Holdings.page
    answered: bool | None  # an answer stands in some passage
    page_rank: int | None  # of the last supporting page that the question itself finds, from 1
    answer_rank: int | None
    similar: tuple[str, ...] = ()  # titles that differ from absent ones in brackets only

    @property
    def answerable(self) -> bool | None:
        """Whether the corpus has all supporting pages, or, where these are not known, an answer."""
        return not self.missing if self.pages else self.answered

    @property
    def missing(self) -> list[str]:
        """The titles of pages that the corpus lacks."""
        pairs = zip(self.question.supporting, self.pages, strict=False)
        return [title for title, how in pairs if how not in _THERE]


def audit(
    questions: Sequence[Question],
    lines: Sequence[str],
    engine: Retriever,
    redirects: Mapping[str, str] | None = None,
    progress: Callable[[str], Progress] = silent,
) -> list[Finding]:
    """A finding for each question; `engine` searches the passages whose `lines` are given."""
    redirects = redirects or {}
    reading, searching = progress("Reading passages"), progress("Searching questions")
    held = holdings(lines, questions, redirects, lambda done: reading(done, len(lines)))
    findings = []
    for start in range(0, len(questions), _AT_ONCE):
        batch = questions[start : start + _AT_ONCE]
        hits = engine.search([question.question for question in batch], DEPTH)
        for number, (question, found) in enumerate(zip(batch, hits, strict=True), start):
            pages = [held.page(title, redirects) for title in question.supporting]
            findings.append(
                Finding(
                    question,
                    tuple(pages) if held.titled else (),
                    number in held.answered if can_be_found(question.answers) else None,
                    _page_rank(question, [hit.title for hit in found], redirects),
                    _answer_rank(question, [hit.line for hit in found]),
                    tuple(t for title in question.supporting for t in held.alike(title)),
                )
            )
        searching(len(findings), len(questions))
    return findings


def _page_rank(
    question: Question, titles: Sequence[str], redirects: Mapping[str, str]
) -> int | None:
    """The rank with which the last of the supporting pages is found; None if one is not."""
    found = list(map(page_key, titles))
    ranks = []
    for key in map(page_key, question.supporting):
        names = {key, redirects.get(key, key)}
        ranks.append(next((rank for rank, t in enumerate(found, 1) if t in names), None))
    known = [rank for rank in ranks if rank is not None]
    return max(known) if known and len(known) == len(ranks) else None


def _answer_rank(question: Question, lines: Sequence[str]) -> int | None:
    answers = Answers([question])
    return next((rank for rank, line in enumerate(lines, 1) if answers.in_text(line)), None)


def summarize(findings: Sequence[Finding]) -> dict[str, Any]:
    """Counts, and shares with 95 % bootstrap intervals over questions (None: none can be told).

    `answerable` is a share of the questions of which it can be told. `pages` counts how supporting
    pages are there. `page_at` and `answer_at` are shares of questions for which all supporting
    pages, or an answer, are among the first k passages that the question itself finds; of those
    with known pages, and of those whose answers can be looked for.
    """
    titled = [f for f in findings if f.pages]
    told = [f for f in findings if f.answered is not None]
    known = [f.answerable for f in findings if f.answerable is not None]
    how = [page for f in titled for page in f.pages]
    return {
        "questions": len(findings),
        "with_titles": len(titled),
        "answers_looked_for": len(told),
        "yes_no_or_number": len(findings) - len(told),
        "cannot_tell": len(findings) - len(known),
        "answerable": _share(known),
        "all_pages": _share([f.answerable for f in titled]),
        "pages": {name: how.count(name) for name in ("title", "redirect", "brackets", "absent")},
        "answer_somewhere": _share([f.answered for f in told]),
        "page_at": {str(k): _share([_within(f.page_rank, k) for f in titled]) for k in RANKS},
        "answer_at": {str(k): _share([_within(f.answer_rank, k) for f in told]) for k in RANKS},
    }


def _within(rank: int | None, k: int) -> bool:
    return rank is not None and rank <= k


def _share(values: Sequence[bool | None]) -> dict[str, Any] | None:
    """A share with its interval and the number of questions behind it."""
    if not values:
        return None
    numbers = np.array([float(bool(value)) for value in values])
    low, high = interval(numbers)
    return {"share": float(numbers.mean()), "low": low, "high": high, "n": len(numbers)}


def repaired(
    findings: Sequence[Finding], lines: Iterable[str], redirects: Mapping[str, str]
) -> dict[str, Any]:
    """What a second corpus adds to questions that the first cannot answer.

    Returns how many of those could then be answered, how many not, and the `titles` of the pages
    that it would bring.
    """
    lost = [f for f in findings if f.answerable is False]
    held = holdings(lines, [f.question for f in lost], redirects)
    brought, repaired = [], 0
    for number, finding in enumerate(lost):
        there = [t for t in finding.missing if held.page(t, redirects) in _THERE]
        brought += there
        whole = len(there) == len(finding.missing) if finding.pages else number in held.answered
        repaired += whole
    titles = list(dict.fromkeys(brought))
    return {"repaired": repaired, "still_lost": len(lost) - repaired, "titles": titles}


def read_redirects(path: Path) -> dict[str, str]:
    """Keys of titles and of the pages that they lead to, from rows with `title` and `target`."""
    redirects = {}
    for number, row in read_rows(path):
        title, target = row.get("title"), row.get("target")
        if not isinstance(title, str) or not isinstance(target, str):
            raise DataError(
                f"{path}, line {number}: expected `title` and `target`, not {shorten(str(row), 80)}"
            )
        redirects[page_key(title)] = page_key(target)
    return redirects


def audit_files(
    files: Sequence[str],
    index: Index,
    *,
    redirects: Path | None = None,
    repair: str = "",
    out: Path | None = None,
    progress: Callable[[str], Progress] = silent,
) -> dict[str, Any]:
    """Audits an index for files of questions (paths, references or names of benchmarks).

    Returns `files`: a summary of each by its name, `warnings`, and with `repair`, a reference to
    another corpus, what that would add. Writes the questions that cannot be answered to `out`, each
    with the titles that are `missing` and those that are `similar`. Raises DataError for what
    `read_questions` refuses, and if `out` exists.
    """
    if out and out.exists():
        raise DataError(f"{out} is there already: name another file, or remove it")
    sets = {name: read_questions(questions_file(name)) for name in files}
    leads = read_redirects(redirects) if redirects else {}
    questions = [question for asked in sets.values() for question in asked]
    findings = audit(questions, Lines(index.passages), index, leads, progress)
    parts = iter(findings)
    by_file = {name: list(islice(parts, len(asked))) for name, asked in sets.items()}
    result: dict[str, Any] = {"files": {name: summarize(f) for name, f in by_file.items()}}
    result["warnings"] = _warnings(by_file)
    if repair:
        lines = (passage.line for passage in read_corpus(repair))
        result["repair"] = {"corpus": repair, **repaired(findings, lines, leads)}
    if out:
        lost = ((n, f) for n, found in by_file.items() for f in found if f.answerable is False)
        write_rows(out, (_row(name, finding) for name, finding in lost))
    return result


def _warnings(by_file: Mapping[str, Sequence[Finding]]) -> list[str]:
    """What the audit cannot tell, and why."""
    warnings = []
    for name, findings in by_file.items():
        named = [f for f in findings if f.question.supporting]
        if not named:
            warnings.append(
                f"{name} names no supporting titles: whether a page is absent cannot be told, only "
                "whether an answer stands in some passage"
            )
        elif not any(f.pages for f in named):
            warnings.append("the passages of this index have no titles: no page can be looked up")
    return list(dict.fromkeys(warnings))


def _row(name: str, finding: Finding) -> dict[str, Any]:
    question = finding.question
    return {
        "idx": question.id,
        "question": question.question,
        "answer": list(question.answers),
        "file": name,
        "missing": finding.missing,
        "similar": list(finding.similar),
    }


def as_table(summary: Mapping[str, Any]) -> Table:
    """Shares of an audit by file, for a terminal."""
    files = summary["files"]
    table = Table("share of questions (95 %)", *(Path(name).name for name in files))
    rows = {"can be answered": "answerable", "all supporting pages": "all_pages"}
    rows |= {"answer in some passage": "answer_somewhere"}
    for title, key in rows.items():
        table.add_row(title, *(_cell(s[key]) for s in files.values()))
    for title, key in (
        ("pages among the first", "page_at"),
        ("answer among the first", "answer_at"),
    ):
        for k in RANKS:
            table.add_row(f"{title} {k}", *(_cell(s[key][str(k)]) for s in files.values()))
    counts = {"questions": "questions", "with titles": "with_titles"}
    counts |= {"yes, no or a number": "yes_no_or_number", "cannot be told": "cannot_tell"}
    for title, key in counts.items():
        table.add_row(title, *(str(s[key]) for s in files.values()))
    for how in ("redirect", "brackets", "absent"):
        table.add_row(f"pages: {how}", *(str(s["pages"][how]) for s in files.values()))
    return table


def _cell(share: Mapping[str, Any] | None) -> str:
    if share is None:
        return "-"
    low, high = 100 * share["low"], 100 * share["high"]
    return f"{100 * share['share']:.1f} % ({low:.1f} to {high:.1f}), n={share['n']}"
