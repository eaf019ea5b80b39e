"""A question, and the forms of its row in published files."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from r1s_jax.data.rows import gold_answers, keys_found

# Precedes the question in the user message of a verl row, as Search-R1 writes it.
_MARKER = "Question:"
_QUESTION_KEYS = ("question", "problem")
_SOURCE_IDS = ("_id", "id", "question_id", "idx")


@dataclass(frozen=True)
class Question:
    """One question. All `answers` are equally right; `hops` counts the facts needed (0: unknown).

    `memorised`: its facts never change, so a policy may know the answer without a search.
    """

    id: int
    question: str
    answers: tuple[str, ...]
    hops: int = 0
    source_id: str = ""  # its id in its file, if that is a text
    supporting: tuple[str, ...] = ()  # titles of the pages with its facts, if known
    memorised: bool = False


def parse_question(row: Mapping[str, Any]) -> tuple[int | None, Question]:
    """(a row's whole-number id, its question with id 0); raises ValueError for a faulty row."""
    number = row.get("idx", row.get("id"))
    number = number if isinstance(number, int) and not isinstance(number, bool) else None
    key = next((key for key in _QUESTION_KEYS if key in row), None)
    text = row[key] if key else _verl_question(row.get("prompt"))
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"`{key or 'question'}` must be a text, and not empty; {keys_found(row)}")
    names = (row.get(key) for key in _SOURCE_IDS)
    name = next((n for n in names if isinstance(n, str) and n.strip()), "")
    question = Question(
        0, text.strip(), gold_answers(row), source_id=name, supporting=supporting_titles(row)
    )
    return number, question


def _verl_question(prompt: Any) -> str | None:
    """The text after the last marker in the last user message of verl's `prompt`."""
    messages = [m for m in prompt if isinstance(m, dict)] if isinstance(prompt, list) else []
    texts = [m.get("content") for m in messages if m.get("role") == "user"]
    if not texts or not isinstance(texts[-1], str):
        return None
    return texts[-1].rpartition(_MARKER)[2]


def supporting_titles(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The titles of a row's supporting pages, each once; () if it names none.

    HotpotQA and 2Wiki have `supporting_facts`: pairs (title, sentence), or on the hub an object of
    two lists; MuSiQue has `paragraphs`; FlashRAG keeps either under `metadata`, for MuSiQue
    the paragraph of each step. Any other form names no titles.
    """
    about = row.get("metadata")
    titles = [*_titles(row), *(_titles(about) if isinstance(about, dict) else ())]
    return tuple(dict.fromkeys(t for t in titles if isinstance(t, str) and t.strip()))


def _titles(row: Mapping[str, Any]) -> Iterable[Any]:
    facts = row.get("supporting_facts")
    if isinstance(facts, dict):
        titles = facts.get("title")
        yield from titles if isinstance(titles, list) else ()
    elif isinstance(facts, list):
        yield from (fact[0] for fact in facts if isinstance(fact, list) and fact)
    yield from (p.get("title") for p in _objects(row, "paragraphs") if p.get("is_supporting"))
    steps = _objects(row, "question_decomposition")
    paragraphs = (step.get("support_paragraph") for step in steps)
    yield from (p.get("title") for p in paragraphs if isinstance(p, dict))


def _objects(row: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    value = row.get(key)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
