"""Splitting the policy's text, as it grows, into reasoning and the answer without its tags."""

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

_HALF = "\N{REPLACEMENT CHARACTER}"  # stands for a character that lacks its last tokens


class Piece(NamedTuple):
    """A new text of the answer or of the reasoning."""

    kind: Literal["content", "reasoning"]
    text: str


class Pieces:
    """One answer's text as pieces; joined by kind, they do not depend on how the text arrives.

    Tags and queries are in no piece. Answer and reasoning are stripped of white space at both ends.
    """

    def __init__(self, dialect: Dialect, prompt: str):
        """`prompt` is the policy's whole prompt, which may open the reasoning."""
        self._rules = _rules(dialect)
        # In dialects without answer tags, the answer is the text after the reasoning.
        self._first = "reasoning" if dialect.answer_end or _asks_for_tags(dialect) else "content"
        self._tag = re.compile("|".join(map(re.escape, self._rules)))
        self._before = {"content": "", "reasoning": ""}  # text of finished turns
        self._now = dict(self._before)  # text of the current turn
        self._sent = dict(self._before)  # text of all pieces so far
        self._begin_turn(prompt)

    def write(self, turn: str, *, over: bool = False) -> list[Piece]:
        """The new pieces, with `turn` all text of the policy's current turn so far."""
        self._now = self._split(turn if over else _settled(turn, self._rules))
        return self._new_pieces()

    def reply(self, text: str) -> list[Piece]:
        """Ends the turn with the system's reply `text`, and begins the next turn."""
        self._before = {kind: self._before[kind] + self._now[kind] for kind in self._now}
        self._now = {kind: "" for kind in self._now}
        self._begin_turn(text)
        return self._new_pieces()

    def text(self, kind: Literal["content", "reasoning"]) -> str:
        """The joined text of all pieces of a kind so far."""
        return self._sent[kind]

    def _begin_turn(self, before: str) -> None:
        self._kind = "reasoning" if opens_reasoning(before) else self._first

    def _split(self, turn: str) -> dict[str, str]:
        parts = {"content": "", "reasoning": "", "query": ""}
        kind, at = self._kind, 0
        for tag in self._tag.finditer(turn):
            parts[kind] += turn[at : tag.start()]
            kind, at = self._rules[tag[0]], tag.end()
        parts[kind] += turn[at:]
        return {name: parts[name] for name in self._sent}

    def _new_pieces(self) -> list[Piece]:
        out = []
        for kind in ("reasoning", "content"):
            whole = (self._before[kind] + self._now[kind]).strip()
            if new := whole[len(self._sent[kind]) :]:
                self._sent[kind] = whole
                out.append(Piece(kind, new))
        return out


def _asks_for_tags(dialect: Dialect) -> bool:
    return BEGIN_ANSWER in (dialect.prompt or "")


def _rules(dialect: Dialect) -> dict[str, str]:
    """The kind of the text after each tag."""
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
    """`text` without an end that may grow into a tag or a character."""
    text = text.rstrip(_HALF)
    for size in range(min(len(text), max(map(len, tags)) - 1), 0, -1):
        if any(len(tag) > size and tag.startswith(text[-size:]) for tag in tags):
            return text[:-size]
    return text
