"""What a policy and a search engine wrote together, and who wrote which of it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from r1s_jax.protocol import r1_searcher as protocol

# What the system answers a query with; inside, a passage may quote any tag but the closing one.
_BLOCK = re.compile(
    f"(?<={re.escape(protocol.END_QUERY)})"
    rf"\s*{re.escape(protocol.BEGIN_DOCUMENTS)}.*?{re.escape(protocol.END_DOCUMENTS)}(?:\n\n|$)",
    re.DOTALL,
)


_TAGGED = {
    protocol.BEGIN_QUERY: ("query", protocol.END_QUERY),
    protocol.BEGIN_ANSWER: ("answer", protocol.END_ANSWER),
}


@dataclass(frozen=True)
class Solution:
    """What came after the prompt, in order: (text, whether the policy wrote it)."""

    spans: tuple[tuple[str, bool], ...]

    @staticmethod
    def of_text(text: str) -> "Solution":
        """Reads off a bare text who wrote what: a document block after a query is the system's."""
        spans, end = [], 0
        for block in _BLOCK.finditer(text):
            spans += [(text[end : block.start()], True), (block[0], False)]
            end = block.end()
        return Solution((*spans, (text[end:], True)))

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.spans)

    @property
    def written(self) -> str:
        return "".join(text for text, by_policy in self.spans if by_policy)

    @property
    def answer(self) -> str | None:
        """What the policy answered; None where it wrote no whole answer."""
        return protocol.extract_answer(self.written)

    def pieces(self) -> Iterator[tuple[str, str]]:
        """The whole text as (kind, text): policy, query, documents or answer."""
        for text, by_policy in self.spans:
            yield from _policy_pieces(text) if by_policy else [("documents", text)]


def _policy_pieces(text: str) -> Iterator[tuple[str, str]]:
    """Text of the policy, its queries and its answer set off."""
    while text:
        starts = [(at, begin) for begin in _TAGGED if (at := text.find(begin)) >= 0]
        at, begin = min(starts, default=(len(text), ""))
        if at:
            yield "policy", text[:at]
        if begin:
            kind, end = _TAGGED[begin]
            close = text.find(end, at)
            stop = close + len(end) if close >= 0 else len(text)
            yield kind, text[at:stop]
            at = stop
        text = text[at:]


def kind_of_new(before: str, text: str) -> str:
    """The kind, as in `pieces`, of what the policy's `text` has more than `before`."""
    for begin, (kind, end) in _TAGGED.items():
        if begin in text and end not in before.rpartition(begin)[2]:
            return kind
    return "policy"
