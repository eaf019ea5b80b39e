"""What every dialect says: the contract between the text of a policy and the rest of the program.

A dialect is all there is between policy and search engine: how a prompt is made, what asks for a
search, how documents are shown, what a turn without either gets, where the answer is, and what
well formed means. It belongs to a policy as its tokenizer does.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, NamedTuple

from r1s_jax.config import Thinking

BEGIN_THINK, END_THINK = "<think>", "</think>"
BEGIN_ANSWER, END_ANSWER = "<answer>", "</answer>"
_BREAKS = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+")
# An id and its tab, not a title that begins with a number.
_LINE_ID = re.compile(r"^\d+\t")

Message = dict[str, str]
Spans = Sequence[tuple[str, bool]]  # (text, whether the policy wrote it)


class Call(NamedTuple):
    """What a turn asks of the search engine; `problem` says why it cannot be asked."""

    query: str
    problem: str = ""


# What became of a call: the passage lines found, or its problem.
Found = Sequence[str] | str


@dataclass(frozen=True)
class Dialect:
    """One dialect as one policy speaks it; the fields belong to the policy."""

    thinking: Thinking = "template"
    prompt: str | None = None  # a template with {question} instead of the dialect's own prompt
    tell_invalid: bool = True  # a turn that cannot be acted on is told so, where a dialect does

    name: ClassVar[str] = ""
    tags: ClassVar[tuple[str, ...]] = ()
    query_end: ClassVar[str] = ""  # the tag that ends a query
    answer_end: ClassVar[str] = ""  # the tag that ends a trajectory; none: the end of sequence does
    # A prompt of the policy's own is all of the text; else it is the user's message of a chat.
    prompt_is_whole: ClassVar[bool] = False
    # Queries are acted on at the end of the turn, not at their tag.
    acts_at_turn_end: ClassVar[bool] = False
    # There is a reply to a turn that cannot be acted on.
    can_tell_invalid: ClassVar[bool] = False
    # A turn that neither searches nor answers is one of those, and counts as a search.
    answers_idle_turns: ClassVar[bool] = False
    # To find what a turn asks takes all of it, not only its last tokens.
    reads_whole_turn: ClassVar[bool] = True
    # Begin of a tag -> (kind of what it holds, its end), for those who show texts.
    tagged: ClassVar[Mapping[str, tuple[str, str]]] = {}
    description: ClassVar[str] = ""  # how a policy behaves, for the card of a model

    @property
    def reasons(self) -> bool:
        """Whether the policy is to reason before it acts."""
        return self.thinking != "off"

    @property
    def tells_invalid(self) -> bool:
        """Whether a turn that cannot be acted on is told so; else it ends the trajectory."""
        return self.can_tell_invalid and self.tell_invalid

    # The prompt.

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """What a chat template is told of tools; None where the dialect has none."""
        return None

    def messages(self, question: str) -> list[Message]:
        """What a chat template renders."""
        return [{"role": "user", "content": self.plain(question)}]

    def plain(self, question: str) -> str:
        """The prompt without a chat template."""
        raise NotImplementedError

    def finish_prompt(self, rendered: str) -> str:
        """What a chat template rendered, made ready for the policy's first token."""
        return without_reasoning(rendered) if self.thinking == "off" else rendered

    # Searching.

    def calls(self, turn: str, evaluation: bool = False) -> list[Call]:
        """What a turn asks; `evaluation` cleans a query as the published evaluation does."""
        raise NotImplementedError

    def reply(self, found: Sequence[Found]) -> str:
        """What the system writes after a turn, one entry a call."""
        raise NotImplementedError

    def query_call(self, query: str) -> str:
        """How a search is asked for."""
        raise NotImplementedError

    def first_call(self, query: str) -> str:
        """A whole first turn that asks for a search, as the system writes it for the policy."""
        raise NotImplementedError

    def documents_of(self, reply: str) -> list[str] | None:
        """The passage lines in a reply, to be cut anew; None where they stay as they are."""
        return None

    def found(self, reply: str) -> list[str]:
        """The documents' own texts in a reply, without the dialect's words around them."""
        raise NotImplementedError

    def searched(self, reply: str) -> bool:
        """Whether a text of the system's answers a search of the policy's."""
        raise NotImplementedError

    # The answer.

    def answer(self, spans: Spans, complete: bool) -> str | None:
        """What the policy answered; `complete`: it ended by itself. None without an answer."""
        return extract_answer(written(spans))

    def well_formed(self, spans: Spans, complete: bool) -> bool:
        """Whether the policy kept the form that the dialect asks for; `complete` as in `answer`."""
        raise NotImplementedError

    def system_spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Where in a bare text after the prompt the system wrote, as far as text can tell."""
        raise NotImplementedError

    @property
    def turn_end(self) -> str:
        """The control token that a policy ends its turns with, where that is what acts."""
        return ""

    # How a generated demonstration speaks. Its prompt opens the reasoning.

    @property
    def talks(self) -> bool:
        """Whether there is a place for words beside searches and the answer."""
        return True

    def opening(self) -> str:
        """What begins a turn after a reply."""
        return ""

    def search_turn(self, query: str) -> str:
        """From the end of a thought to the end of a turn that searches."""
        raise NotImplementedError

    def answer_turn(self, answer: str) -> str:
        """From the end of a thought to the end of the answer."""
        raise NotImplementedError

    def _closing(self) -> str:
        """What ends a thought, where there is any."""
        return f" {END_THINK}" if self.reasons else ""

    # Files.

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; `dialects.from_dict` reads it back."""
        fields = {"thinking": self.thinking, "prompt": self.prompt}
        return {"dialect": self.name, **fields, "tell_invalid": self.tell_invalid}


def neutral(text: str, tags: Sequence[str]) -> str:
    """Text of others without what would end a block or speak for the policy.

    Tags get a space inside, line breaks become spaces.
    """
    found = re.compile("|".join(map(re.escape, tags)))
    return _BREAKS.sub(" ", found.sub(lambda tag: f"{tag[0][0]} {tag[0][1:]}", text))


def passage(line: str, tags: Sequence[str]) -> str:
    """A line of a corpus without the id and tab that it may begin with, made harmless."""
    return neutral(_LINE_ID.sub("", line), tags)


def written(spans: Spans) -> str:
    """What the policy wrote, joined."""
    return "".join(text for text, by_policy in spans if by_policy)


def turns(spans: Spans) -> list[str]:
    """The policy's turns: what it wrote between two texts of the system's."""
    return _runs(spans, by_policy=True)


def replies(spans: Spans) -> list[str]:
    """What the system wrote, between two turns of the policy's each."""
    return _runs(spans, by_policy=False)


def _runs(spans: Spans, by_policy: bool) -> list[str]:
    runs = groupby(spans, key=lambda span: span[1])
    return ["".join(text for text, _ in run) for who, run in runs if who == by_policy]


def extract_answer(text: str) -> str | None:
    """Text between the last `<answer>` and the next `</answer>`, stripped; None without both."""
    _, begin, tail = text.rpartition(BEGIN_ANSWER)
    answer, end, _ = tail.partition(END_ANSWER)
    return answer.strip() if begin and end else None


def opens_reasoning(prompt: str) -> bool:
    """Whether a prompt ends inside the reasoning: templates of models that think open it."""
    return prompt.rstrip().endswith(BEGIN_THINK)


def without_reasoning(prompt: str) -> str:
    """The prompt, its reasoning closed again where the template opened it."""
    return f"{prompt.rstrip()}\n\n{END_THINK}\n\n" if opens_reasoning(prompt) else prompt
