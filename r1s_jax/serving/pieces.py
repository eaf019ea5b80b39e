"""What a policy writes, told apart as it comes: thoughts, and the answer without its tags."""

import re
from collections.abc import Collection
from typing import Literal, NamedTuple

from r1s_jax.protocol.dialect import (
    BEGIN_ANSWER,
    BEGIN_THINK,
    END_ANSWER,
    END_THINK,
    Dialect,
    opens_reasoning,
)

_HALF = "\N{REPLACEMENT CHARACTER}"  # of a character whose other tokens are still to come


class Piece(NamedTuple):
    """Text of the answer, or of the thoughts before it."""

    kind: Literal["content", "reasoning"]
    text: str


class Pieces:
    """One answer's text, split in two. Joined, the pieces are the same however it comes.

    Tags and queries are in neither; white space at both ends of the answer and of the thoughts is
    left away.
    """

    def __init__(self, dialect: Dialect, prompt: str):
        """`prompt` as the policy was given it: it may have opened the reasoning."""
        self._rules = _rules(dialect)
        # Without a tag for it, the answer is what stands behind the reasoning.
        self._first = "reasoning" if dialect.answer_end or _asks_for_tags(dialect) else "content"
        self._tag = re.compile("|".join(map(re.escape, self._rules)))
        self._before = {"content": "", "reasoning": ""}  # of the turns that are over
        self._now = dict(self._before)
        self._told = dict(self._before)
        self._begin_turn(prompt)

    def write(self, turn: str, *, over: bool = False) -> list[Piece]:
        """What is new with `turn`, all that the policy wrote since the system's last text."""
        self._now = self._split(turn if over else _settled(turn, self._rules))
        return self._news()

    def reply(self, text: str) -> list[Piece]:
        """The system answers the turn: the policy's next one begins."""
        self._before = {kind: self._before[kind] + self._now[kind] for kind in self._now}
        self._now = {kind: "" for kind in self._now}
        self._begin_turn(text)
        return self._news()

    def text(self, kind: Literal["content", "reasoning"]) -> str:
        """All of a kind that was given out."""
        return self._told[kind]

    def _begin_turn(self, given: str) -> None:
        self._kind = "reasoning" if opens_reasoning(given) else self._first

    def _split(self, turn: str) -> dict[str, str]:
        parts = {"content": "", "reasoning": "", "query": ""}
        kind, at = self._kind, 0
        for tag in self._tag.finditer(turn):
            parts[kind] += turn[at : tag.start()]
            kind, at = self._rules[tag[0]], tag.end()
        parts[kind] += turn[at:]
        return {name: parts[name] for name in self._told}

    def _news(self) -> list[Piece]:
        out = []
        for kind in ("reasoning", "content"):
            whole = (self._before[kind] + self._now[kind]).strip()
            if new := whole[len(self._told[kind]) :]:
                self._told[kind] = whole
                out.append(Piece(kind, new))
        return out


def _asks_for_tags(dialect: Dialect) -> bool:
    return BEGIN_ANSWER in (dialect.prompt or "")


def _rules(dialect: Dialect) -> dict[str, str]:
    """What follows each tag."""
    queries = {begin: end for begin, (kind, end) in dialect.tagged.items() if kind == "query"}
    tagged = bool(dialect.answer_end) or _asks_for_tags(dialect)
    after = "reasoning" if tagged else "content"
    rules = {BEGIN_THINK: "reasoning", END_THINK: after}
    if tagged:
        rules |= {BEGIN_ANSWER: "content", END_ANSWER: "reasoning"}
    for begin, end in queries.items():
        rules |= {begin: "query", end: after}
    if dialect.turn_end:
        rules[dialect.turn_end] = after
    return rules


def _settled(text: str, tags: Collection[str]) -> str:
    """`text` without an end that may become something else: a tag, or a character."""
    text = text.rstrip(_HALF)
    for size in range(min(len(text), max(map(len, tags)) - 1), 0, -1):
        if any(len(tag) > size and tag.startswith(text[-size:]) for tag in tags):
            return text[:-size]
    return text
