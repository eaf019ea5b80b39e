"""Passages with a title and a text, hits, and the protocol of search engines."""

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

_ABSTRACT = re.compile(r"Title: (.*?) Text:\s+(.*)", re.DOTALL)
_QUOTED = re.compile(r'"(Title: .*)"', re.DOTALL)


def split_line(line: str) -> tuple[str, str]:
    """The (title, text) of a passage's line; the title is empty where the line has neither form."""
    quoted = _QUOTED.fullmatch(line)
    plain = quoted[1].replace('""', '"') if quoted else line
    if abstract := _ABSTRACT.fullmatch(plain):
        return abstract[1], abstract[2]
    title, separator, text = line.partition("   ")
    return (title, text) if separator else ("", line)


def join_line(title: str, text: str) -> str:
    """A line in the KILT form; white space in both parts is reduced to single spaces."""
    title, text = " ".join(title.split()), " ".join(text.split())
    return f"{title}   {text}" if title else text


def contents_line(contents: str) -> str:
    """A line of Search-R1's `contents`: a title in quotes, a newline, the text; or the text."""
    title, newline, body = contents.partition("\n")
    if not newline:
        return join_line("", title)
    return join_line(title.removeprefix('"').removesuffix('"'), body)


_title = property(lambda self: split_line(self.line)[0], doc="The page's title; may be empty.")
_text = property(lambda self: split_line(self.line)[1], doc="The line without the title.")


class Passage(NamedTuple):
    """One passage: its id in the corpus and its line."""

    id: str
    line: str

    title = _title
    text = _text


class Hit(NamedTuple):
    """A passage found, with its score: for vectors, the cosine of passage and query.

    `id` is empty and `score` NaN where a server does not send them.
    """

    id: str
    score: float
    line: str

    title = _title
    text = _text


class Retriever(Protocol):
    """Finds passages: an index, a remote service, the web. Several threads may call it at once."""

    def search(self, queries: Sequence[str], k: int) -> Sequence[Sequence[Hit]]:
        """The `k` best passages of each query, best first."""
        ...
