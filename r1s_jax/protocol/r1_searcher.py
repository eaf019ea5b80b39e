"""The text protocol between the policy and the search engine: every string of it lives here.

The tags are ordinary text, not special tokens, as in R1-Searcher (arXiv 2503.05592).
"""

import re
from collections.abc import Sequence

BEGIN_QUERY = "<|begin_of_query|>"
END_QUERY = "<|end_of_query|>"
BEGIN_DOCUMENTS = "<|begin_of_documents|>"
END_DOCUMENTS = "<|end_of_documents|>"
BEGIN_THINK = "<think>"
END_THINK = "</think>"
BEGIN_ANSWER = "<answer>"
END_ANSWER = "</answer>"

# An id and its tab, not a title that begins with a number.
_LINE_ID = re.compile(r"^\d+\t")
_TAGS = (BEGIN_QUERY, END_QUERY, BEGIN_DOCUMENTS, END_DOCUMENTS)
_TAGS += (BEGIN_THINK, END_THINK, BEGIN_ANSWER, END_ANSWER)
_FOREIGN_TAGS = re.compile("|".join(map(re.escape, _TAGS)))
_BREAKS = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+")
_NUMBERED = re.compile(r"^\((\d+)\)", re.MULTILINE)

# The prompt of a base model; ends inside the reasoning, so the policy starts by thinking.
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


# How a policy behaves, for the card of a model that is given away.
DESCRIPTION = f"""\
It reasons inside `{BEGIN_THINK}`, searches by writing `{BEGIN_QUERY} keywords {END_QUERY}`,
is handed documents between `{BEGIN_DOCUMENTS}` and `{END_DOCUMENTS}`, and answers inside
`{BEGIN_ANSWER}`. The tags are ordinary text."""


def query_call(query: str) -> str:
    """How a policy asks for a search, and the system for it where it searches first."""
    return f"{BEGIN_QUERY} {query} {END_QUERY}"


def neutral(text: str) -> str:
    """Text of others without what would end a block or speak for the policy.

    Tags of the protocol get a space inside, line breaks become spaces.
    """
    return _BREAKS.sub(" ", _FOREIGN_TAGS.sub(lambda tag: f"{tag[0][0]} {tag[0][1:]}", text))


def document_block(documents: Sequence[str]) -> str:
    """What the system appends after the model's `<|end_of_query|>`.

    Each document is a passage line, cut of the id and tab that a line of a corpus file begins
    with; what it quotes of the protocol is made harmless (see `neutral`). Without documents the
    body is `None`.
    """
    lines = [f"({i}){neutral(_LINE_ID.sub('', doc))}\n" for i, doc in enumerate(documents, start=1)]
    body = "".join(lines) if lines else "None\n"
    return f"\n\n{BEGIN_DOCUMENTS}\n{body}{END_DOCUMENTS}\n\n"


def documents_of(block: str) -> list[str]:
    """The passage lines of a `document_block`; [] for `None`."""
    body = block.partition(f"{BEGIN_DOCUMENTS}\n")[2].partition(END_DOCUMENTS)[0]
    _, *parts = _NUMBERED.split(body)
    return [doc.removesuffix("\n") for doc in parts[1::2]]


def extract_query(turn: str) -> str | None:
    """The cleaned query of one model turn: between its last begin tag and the next end tag.

    Double quotes are dropped and white space is collapsed (the published training form).
    Returns None when the turn holds no begin tag, "" when there is nothing between the tags.
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


def extract_answer(text: str) -> str | None:
    """Text between the last `<answer>` and the next `</answer>`, stripped; None without both."""
    _, begin, tail = text.rpartition(BEGIN_ANSWER)
    answer, end, _ = tail.partition(END_ANSWER)
    return answer.strip() if begin and end else None


def count_searches(text: str) -> int:
    """Document blocks in the text of a trajectory."""
    return text.count(BEGIN_DOCUMENTS)
