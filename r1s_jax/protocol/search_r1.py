"""Search-R1's dialect (arXiv 2503.09516), after its released code at commit a14dc3a.

Each turn holds reasoning and ends with a search or the answer; a turn without either gets a reply
that says so. The wording of the prompt and of that reply is ours. If a document block is too long,
its longest documents are cut; its closing tag always stays.
"""

import re
from collections.abc import Iterator, Sequence
from typing import ClassVar

from r1s_jax.protocol.dialect import (
    BEGIN_ANSWER,
    BEGIN_THINK,
    END_ANSWER,
    END_THINK,
    Call,
    Dialect,
    Found,
    Spans,
    passage,
    replies,
    turns,
    written,
)

BEGIN_SEARCH, END_SEARCH = "<search>", "</search>"
BEGIN_INFORMATION, END_INFORMATION = "<information>", "</information>"
TAGS = (BEGIN_SEARCH, END_SEARCH, BEGIN_INFORMATION, END_INFORMATION)
TAGS += (BEGIN_THINK, END_THINK, BEGIN_ANSWER, END_ANSWER)
_SHOWN = re.compile(r"Doc \d+\(Title: (.*)")
_TITLE_END = re.compile(r" {3}|\t")
_ANSWER = re.compile(f"{BEGIN_ANSWER}(.*?){END_ANSWER}", re.DOTALL)
_BLOCK = re.compile(
    f"(?<={END_SEARCH})\\s*{BEGIN_INFORMATION}.*?{END_INFORMATION}(?:\n\n|$)", re.DOTALL
)

_HOW = f"""\
Whenever you are given new information, first think about it inside {BEGIN_THINK} {END_THINK}."""
PROMPT = f"""\
Find the answer to a question.
{{how}}What you do not know you can look up: write {BEGIN_SEARCH} keywords {END_SEARCH}, and what \
a search engine finds is given to you between {BEGIN_INFORMATION} and {END_INFORMATION}. Search as \
often as you need to.
Once you know enough, give the answer alone, in a few words, inside {BEGIN_ANSWER} {END_ANSWER}.
Question: {{question}}"""

INVALID = f"""

That was neither a search nor an answer: write {BEGIN_SEARCH} keywords {END_SEARCH} to search, or \
{BEGIN_ANSWER} answer {END_ANSWER} to answer.

"""


class SearchR1(Dialect):
    """See the module."""

    name: ClassVar = "search_r1"
    tags: ClassVar = TAGS
    can_tell_invalid: ClassVar = True
    query_end: ClassVar = END_SEARCH
    answer_end: ClassVar = END_ANSWER
    answers_idle_turns: ClassVar = True
    tagged: ClassVar = {BEGIN_SEARCH: ("query", END_SEARCH), BEGIN_ANSWER: ("answer", END_ANSWER)}
    description: ClassVar = (
        f"It reasons inside `{BEGIN_THINK}`, searches by writing `{BEGIN_SEARCH} keywords "
        f"{END_SEARCH}`,\nis handed documents between `{BEGIN_INFORMATION}` and "
        f"`{END_INFORMATION}`, and answers inside `{BEGIN_ANSWER}`\n(Search-R1's tags)."
    )

    def plain(self, question: str) -> str:
        question = question.strip()
        question = question if question.endswith("?") else f"{question}?"
        own = PROMPT.replace("{how}", f"{_HOW}\n" if self.reasons else "")
        return (self.prompt or own).replace("{question}", question)

    def calls(self, turn: str, evaluation: bool = False) -> list[Call]:
        before, end, _ = turn.partition(END_SEARCH)
        _, begin, query = before.partition(BEGIN_SEARCH)
        if not end or not begin:
            return [Call("", "neither a search nor an answer")]
        return [Call(query.strip(), "" if query.strip() else "empty query")]

    def reply(self, results: Sequence[Found]) -> str:
        (documents,) = results
        if isinstance(documents, str):
            return INVALID
        lines = [_document(i, line) for i, line in enumerate(documents, start=1)]
        body = "\n".join(lines) or "None"
        return f"\n\n{BEGIN_INFORMATION}{body}{END_INFORMATION}\n\n"

    def query_call(self, query: str) -> str:
        return f"{BEGIN_SEARCH} {query} {END_SEARCH}"

    def first_call(self, query: str) -> str:
        return self.query_call(query)

    def found(self, reply: str) -> list[str]:
        body = reply.partition(BEGIN_INFORMATION)[2].partition(END_INFORMATION)[0]
        return [text[1] for text in map(_SHOWN.fullmatch, body.split("\n")) if text]

    def searched(self, reply: str) -> bool:
        head, begin, _ = reply.partition(BEGIN_INFORMATION)
        return bool(begin) and BEGIN_SEARCH not in head

    def answer(self, spans: Spans, complete: bool) -> str | None:
        answers = _ANSWER.findall(written(spans))
        return answers[-1].strip() if answers else None

    def well_formed(self, spans: Spans, complete: bool) -> bool:
        """Each turn holds a thought and a search; the last one a thought and the answer."""
        own = turns(spans)
        if not own or INVALID in replies(spans):
            return False
        kinds = [(BEGIN_SEARCH, END_SEARCH)] * (len(own) - 1) + [(BEGIN_ANSWER, END_ANSWER)]
        return all(
            self._turn_holds(turn, *kind, first=i == 0)
            for i, (turn, kind) in enumerate(zip(own, kinds, strict=True))
        )

    def _turn_holds(self, turn: str, begin: str, end: str, first: bool) -> bool:
        action = turn.strip()
        if self.reasons:
            thought, closed, action = action.partition(END_THINK)
            opened = thought.startswith(BEGIN_THINK) or first  # the prompt may open the first
            thought = thought.removeprefix(BEGIN_THINK)
            if not closed or not opened or any(tag in thought for tag in TAGS):
                return False
        talk, started, action = action.strip().partition(begin)
        inside, closed, rest = action.partition(end)
        if self.reasons and talk.strip():
            return False
        whole = bool(started and closed and inside.strip()) and not rest.strip()
        return whole and not any(tag in talk + inside for tag in TAGS)

    def system_spans(self, text: str) -> Iterator[tuple[int, int]]:
        notes = [note.span() for note in re.finditer(re.escape(INVALID), text)]
        return iter(sorted([*(block.span() for block in _BLOCK.finditer(text)), *notes]))

    def opening(self) -> str:
        return f" {BEGIN_THINK}" if self.reasons else ""

    def search_turn(self, query: str) -> str:
        return f"{self.closing()} {self.query_call(query)}"

    def answer_turn(self, answer: str) -> str:
        return f"{self.closing()} {BEGIN_ANSWER} {answer} {END_ANSWER}"


def _document(number: int, line: str) -> str:
    """A passage line in the form of the released code, whose corpus has titles in quotes."""
    title, *text = _TITLE_END.split(passage(line, TAGS), maxsplit=1)
    shown = title if title.startswith('"') else f'"{title}"'
    return f"Doc {number}(Title: {shown}) {text[0].strip() if text else ''}".rstrip()
