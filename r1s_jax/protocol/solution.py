"""The text of a trajectory after its prompt, split by writer: policy or system."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from r1s_jax.protocol.dialect import Dialect, replies, written
from r1s_jax.protocol.r1_searcher import R1Searcher

R1_SEARCHER = R1Searcher()


@dataclass(frozen=True)
class Solution:
    """The text after the prompt, in order: (text, whether the policy wrote it)."""

    spans: tuple[tuple[str, bool], ...]
    dialect: Dialect = R1_SEARCHER
    complete: bool = True  # the policy ended the trajectory itself (Finish.FINISHED)

    @staticmethod
    def of_text(text: str, dialect: Dialect = R1_SEARCHER) -> "Solution":
        """Splits a plain text by writer: a document block after a query is the system's."""
        spans, end = [], 0
        for start, stop in dialect.system_spans(text):
            spans += [(text[end:start], True), (text[start:stop], False)]
            end = stop
        return Solution((*spans, (text[end:], True)), dialect)

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.spans)

    @property
    def written(self) -> str:
        return written(self.spans)

    @property
    def answer(self) -> str | None:
        """The policy's answer; None without a whole answer."""
        return self.dialect.answer(self.spans, self.complete)

    @property
    def well_formed(self) -> bool:
        """Whether the policy kept the form of its dialect."""
        return self.dialect.well_formed(self.spans, self.complete)

    @property
    def found(self) -> list[str]:
        """The texts of all documents, those of the system's own first search included."""
        return [text for reply in replies(self.spans) for text in self.dialect.found(reply)]

    @property
    def searches_answered(self) -> int:
        """The number of replies to the policy's searches.

        A reply counts once, whatever tags its passages quote. The system's own first search does
        not count.
        """
        return sum(map(self.dialect.searched, replies(self.spans)))

    @property
    def turns_answered(self) -> int:
        """The number of turns of the policy that the system replied to, in whatever way."""
        return sum(a and not b for (_, a), (_, b) in pairwise(self.spans))

    def pieces(self) -> Iterator[tuple[str, str]]:
        """The whole text as (kind, text): policy, query, documents or answer."""
        for text, by_policy in self.spans:
            yield from _policy_pieces(text, self.dialect) if by_policy else [("documents", text)]


def _policy_pieces(text: str, dialect: Dialect) -> Iterator[tuple[str, str]]:
    """Splits text of the policy into plain text, queries and the answer."""
    while text:
        starts = [(at, begin) for begin in dialect.tagged if (at := text.find(begin)) >= 0]
        at, begin = min(starts, default=(len(text), ""))
        if at:
            yield "policy", text[:at]
        if begin:
            kind, end = dialect.tagged[begin]
            close = text.find(end, at)
            stop = close + len(end) if close >= 0 else len(text)
            yield kind, text[at:stop]
            at = stop
        text = text[at:]


def kind_of_new(before: str, text: str, dialect: Dialect = R1_SEARCHER) -> str:
    """The kind (see `pieces`) of the end of the policy's `text`, which begins with `before`."""
    for begin, (kind, end) in dialect.tagged.items():
        if begin in text and end not in before.rpartition(begin)[2]:
            return kind
    return "policy"
