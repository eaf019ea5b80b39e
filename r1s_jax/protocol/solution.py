"""What a policy and a search engine wrote together, and who wrote which of it."""

from collections.abc import Iterator
from dataclasses import dataclass

from r1s_jax.protocol.dialect import Dialect, replies, written
from r1s_jax.protocol.r1_searcher import R1Searcher

R1_SEARCHER = R1Searcher()


@dataclass(frozen=True)
class Solution:
    """What came after the prompt, in order: (text, whether the policy wrote it)."""

    spans: tuple[tuple[str, bool], ...]
    dialect: Dialect = R1_SEARCHER
    complete: bool = True  # it ended by itself (Finish.FINISHED), not for want of something

    @staticmethod
    def of_text(text: str, dialect: Dialect = R1_SEARCHER) -> "Solution":
        """Reads off a bare text who wrote what: a document block after a query is the system's."""
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
        """What the policy answered; None where it wrote no whole answer."""
        return self.dialect.answer(self.spans, self.complete)

    @property
    def well_formed(self) -> bool:
        """Whether the policy kept the form of its dialect."""
        return self.dialect.well_formed(self.spans, self.complete)

    @property
    def found(self) -> list[str]:
        """The documents' own texts, those of a first search forced by the system among them."""
        return [text for reply in replies(self.spans) for text in self.dialect.found(reply)]

    @property
    def searches_answered(self) -> int:
        """Texts of the system's that answer the policy's own searches.

        One counts once however many tags its passages quote, and a first search forced by the
        system does not count.
        """
        return sum(map(self.dialect.searched, replies(self.spans)))

    def pieces(self) -> Iterator[tuple[str, str]]:
        """The whole text as (kind, text): policy, query, documents or answer."""
        for text, by_policy in self.spans:
            yield from _policy_pieces(text, self.dialect) if by_policy else [("documents", text)]


def _policy_pieces(text: str, dialect: Dialect) -> Iterator[tuple[str, str]]:
    """Text of the policy, its queries and its answer set off."""
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
    """The kind, as in `pieces`, of what the policy's `text` has more than `before`."""
    for begin, (kind, end) in dialect.tagged.items():
        if begin in text and end not in before.rpartition(begin)[2]:
            return kind
    return "policy"
