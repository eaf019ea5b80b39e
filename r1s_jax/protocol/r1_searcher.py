"""R1-Searcher's dialect (arXiv 2503.05592): its tags are ordinary text, not special tokens.

The policy reasons in one block from the prompt to the answer and searches inside it.
"""

import re
from collections.abc import Iterator, Sequence
from typing import ClassVar

from r1s_jax.protocol import dialect
from r1s_jax.protocol.dialect import (
    BEGIN_ANSWER,
    BEGIN_THINK,
    END_ANSWER,
    END_THINK,
    Call,
    Dialect,
    Found,
    Message,
    Spans,
    extract_answer,
    opens_reasoning,
    replies,
    written,
)

BEGIN_QUERY = "<|begin_of_query|>"
END_QUERY = "<|end_of_query|>"
BEGIN_DOCUMENTS = "<|begin_of_documents|>"
END_DOCUMENTS = "<|end_of_documents|>"

TAGS = (BEGIN_QUERY, END_QUERY, BEGIN_DOCUMENTS, END_DOCUMENTS)
TAGS += (BEGIN_THINK, END_THINK, BEGIN_ANSWER, END_ANSWER)
_NUMBERED = re.compile(r"^\((\d+)\)", re.MULTILINE)
_CJK = re.compile("[\u4e00-\u9fff]")
# The system's reply to a query; a passage inside may quote any tag but the closing one.
_BLOCK = re.compile(
    f"(?<={re.escape(END_QUERY)})"
    rf"\s*{re.escape(BEGIN_DOCUMENTS)}.*?{re.escape(END_DOCUMENTS)}(?:\n\n|$)",
    re.DOTALL,
)

# The prompt of a base model. It ends inside the reasoning, so the policy starts by thinking.
BASE_PROMPT = f"""\
A User asks a question and an Assistant answers it.
The Assistant reasons first, inside {BEGIN_THINK} {END_THINK}, and then gives a short final answer \
inside {BEGIN_ANSWER} {END_ANSWER}.
While reasoning, the Assistant may look up what it is not sure of by writing \
{BEGIN_QUERY} keywords {END_QUERY}. Each query asks for one single fact.
A search engine then inserts what it found as {BEGIN_DOCUMENTS} documents {END_DOCUMENTS}.

User: {{question}}
Assistant: {BEGIN_THINK}"""

# The system message of a chat model; the question is the user's turn.
CHAT_PROMPT = f"""\
You answer questions. Reason first, inside {BEGIN_THINK} {END_THINK}, and then give a short final \
answer inside {BEGIN_ANSWER} {END_ANSWER}.
While reasoning, look up what you are not sure of by writing {BEGIN_QUERY} keywords {END_QUERY}; \
each query asks for one single fact. A search engine then inserts what it found as \
{BEGIN_DOCUMENTS} documents {END_DOCUMENTS}."""

_DIRECT = f"""\
You answer questions with a short final answer inside {BEGIN_ANSWER} {END_ANSWER}, without \
reasoning aloud.
Before it, look up what you are not sure of by writing {BEGIN_QUERY} keywords {END_QUERY}; \
each query asks for one single fact. A search engine then inserts what it found as \
{BEGIN_DOCUMENTS} documents {END_DOCUMENTS}."""
_DIRECT_BASE = f"{_DIRECT}\n\nUser: {{question}}\nAssistant:"

# How a policy behaves, for the card of an exported model.
DESCRIPTION = f"""\
It reasons inside `{BEGIN_THINK}`, searches by writing `{BEGIN_QUERY} keywords {END_QUERY}`,
is handed documents between `{BEGIN_DOCUMENTS}` and `{END_DOCUMENTS}`, and answers inside
`{BEGIN_ANSWER}`. The tags are ordinary text."""


def query_call(query: str) -> str:
    """The text that calls a search; the system writes it too for its own first search."""
    return f"{BEGIN_QUERY} {query} {END_QUERY}"


def neutral(text: str) -> str:
    """Foreign text without the tags of this dialect (see dialect.neutral)."""
    return dialect.neutral(text, TAGS)


def document_block(documents: Sequence[str]) -> str:
    """The text that the system appends after the policy's `<|end_of_query|>`.

    Each document is a passage line without its leading id and tab; tags in it are made harmless
    (see `neutral`). Without documents the body is `None`.
    """
    lines = [f"({i}){dialect.passage(doc, TAGS)}\n" for i, doc in enumerate(documents, start=1)]
    body = "".join(lines) if lines else "None\n"
    return f"\n\n{BEGIN_DOCUMENTS}\n{body}{END_DOCUMENTS}\n\n"


def documents_of(block: str) -> list[str]:
    """The passage lines of a `document_block`; [] for `None`."""
    body = block.partition(f"{BEGIN_DOCUMENTS}\n")[2].partition(END_DOCUMENTS)[0]
    _, *parts = _NUMBERED.split(body)
    return [doc.removesuffix("\n") for doc in parts[1::2]]


def extract_query(turn: str) -> str | None:
    """The cleaned query of one turn: the text between its last begin tag and the next end tag.

    Double quotes are dropped and white space is collapsed (the published training form).
    Returns None if the turn holds no begin tag, "" if there is nothing between the tags.
    """
    _, begin, tail = turn.rpartition(BEGIN_QUERY)
    if not begin:
        return None
    query = tail.partition(END_QUERY)[0]
    return " ".join(query.replace('"', "").split())


def extract_eval_query(turn: str) -> str | None:
    """`extract_query` as the published evaluation cleans it.

    Double and single quotes and `...` are dropped, a tab becomes a space.
    """
    _, begin, tail = turn.rpartition(BEGIN_QUERY)
    if not begin:
        return None
    query = tail.partition(END_QUERY)[0]
    for mark in ('"', "'", "..."):
        query = query.replace(mark, "")
    return query.replace("\t", " ").strip()


def count_searches(text: str) -> int:
    """The number of document blocks in the text of a trajectory."""
    return text.count(BEGIN_DOCUMENTS)


class R1Searcher(Dialect):
    """See the module."""

    name: ClassVar = "r1_searcher"
    tags: ClassVar = TAGS
    query_end: ClassVar = END_QUERY
    answer_end: ClassVar = END_ANSWER
    prompt_is_whole: ClassVar = True
    reads_whole_turn: ClassVar = False
    tagged: ClassVar = {BEGIN_QUERY: ("query", END_QUERY), BEGIN_ANSWER: ("answer", END_ANSWER)}
    description: ClassVar = DESCRIPTION

    def messages(self, question: str) -> list[Message]:
        system = CHAT_PROMPT if self.reasons else _DIRECT
        return [{"role": "system", "content": system}, {"role": "user", "content": question}]

    def plain(self, question: str) -> str:
        own = BASE_PROMPT if self.reasons else _DIRECT_BASE
        return (self.prompt or own).replace("{question}", question)

    def finish_prompt(self, rendered: str) -> str:
        if not self.reasons or opens_reasoning(rendered):
            return super().finish_prompt(rendered)
        return rendered + BEGIN_THINK

    def calls(self, turn: str, evaluation: bool = False) -> list[Call]:
        query = extract_eval_query(turn) if evaluation else extract_query(turn)
        if query:
            return [Call(query)]
        return [Call("", "no beginning of a query" if query is None else "empty query")]

    def reply(self, results: Sequence[Found]) -> str:
        (documents,) = results
        return document_block(documents)

    def query_call(self, query: str) -> str:
        return query_call(query)

    def first_call(self, query: str) -> str:
        return f" {query_call(query)}"

    def documents_of(self, reply: str) -> list[str] | None:
        return documents_of(reply) if BEGIN_DOCUMENTS in reply else None

    def found(self, reply: str) -> list[str]:
        return documents_of(reply)

    def searched(self, reply: str) -> bool:
        # In the system's own first search, the query stands before the documents.
        head, begin, _ = reply.partition(BEGIN_DOCUMENTS)
        return bool(begin) and BEGIN_QUERY not in head

    def well_formed(self, spans: Spans, complete: bool) -> bool:
        """One thought, one answer after it, and a reply to every query, whose tags are paired."""
        text = written(spans)
        count = text.count
        reasoning, _, closing = text.partition(END_THINK) if self.reasons else ("", "", text)
        answer = extract_answer(closing)
        answered = sum(map(self.searched, replies(spans)))
        return (
            answer is not None
            and count(END_THINK) == self.reasons
            and count(BEGIN_THINK) == 0  # the prompt ends with the begin tag
            and count(BEGIN_ANSWER) == count(END_ANSWER) == 1
            and BEGIN_ANSWER not in reasoning
            and count(BEGIN_QUERY) == count(END_QUERY) == answered
            and count(BEGIN_DOCUMENTS) == count(END_DOCUMENTS) == 0
            and BEGIN_QUERY not in answer
            and END_QUERY not in answer
            and not has_cjk(text)
        )

    def system_spans(self, text: str) -> Iterator[tuple[int, int]]:
        return (block.span() for block in _BLOCK.finditer(text))

    def search_turn(self, query: str) -> str:
        return f" {query_call(query)}"

    def answer_turn(self, answer: str) -> str:
        return f"{self.closing()} {BEGIN_ANSWER} {answer} {END_ANSWER}"


def has_cjk(text: str) -> bool:
    """Whether a Chinese character (U+4E00 to U+9FFF) occurs."""
    return bool(_CJK.search(text))
