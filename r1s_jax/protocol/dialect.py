"""The interface of a dialect: the text format in which a policy and the system communicate.

A dialect defines the prompt, the text that calls a search, the form of documents, the reply to a
turn without a call or an answer, the place of the answer, and which trajectories are well formed.
Like a tokenizer, a dialect belongs to a policy.
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
# An id and its tab; a title may begin with a number too.
_LINE_ID = re.compile(r"^\d+\t")

Message = dict[str, str]
Spans = Sequence[tuple[str, bool]]  # (text, whether the policy wrote it)


class Call(NamedTuple):
    """One search that a turn asks for; `problem` says why it cannot be made."""

    query: str
    problem: str = ""


# The result of a call: the passage lines, or the call's problem.
Found = Sequence[str] | str


@dataclass(frozen=True)
class Dialect:
    """A dialect with the settings of one policy, which are its fields."""

    thinking: Thinking = "template"
    prompt: str | None = None  # a template with {question} instead of the dialect's own prompt
    tell_invalid: bool = True  # reply to an invalid turn, if the dialect has such a reply

    name: ClassVar[str] = ""
    tags: ClassVar[tuple[str, ...]] = ()
    query_end: ClassVar[str] = ""  # the tag that ends a query
    answer_end: ClassVar[str] = ""  # the tag that ends a trajectory; "": only the end of sequence
    # The policy's own prompt is the whole text; otherwise it is the user's message of a chat.
    prompt_is_whole: ClassVar[bool] = False
    # Queries are acted on at the end of the turn, not at their end tag.
    acts_at_turn_end: ClassVar[bool] = False
    # The dialect has a reply to an invalid turn.
    can_tell_invalid: ClassVar[bool] = False
    # A turn that neither searches nor answers is invalid, and its reply counts as a search.
    answers_idle_turns: ClassVar[bool] = False
    # Finding the calls of a turn takes all of its tokens, not only the last ones.
    reads_whole_turn: ClassVar[bool] = True
    # Begin tag -> (kind of its content, end tag), for displays.
    tagged: ClassVar[Mapping[str, tuple[str, str]]] = {}
    description: ClassVar[str] = ""  # how a policy behaves, for a model card

    @property
    def reasons(self) -> bool:
        """Whether the policy should reason before it acts."""
        return self.thinking != "off"

    @property
    def tells_invalid(self) -> bool:
        """Whether an invalid turn gets a reply; otherwise it ends the trajectory."""
        return self.can_tell_invalid and self.tell_invalid

    # The prompt.

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """Tool schemas for the chat template; None if the dialect has no tools."""
        return None

    def messages(self, question: str) -> list[Message]:
        """The messages that the chat template renders."""
        return [{"role": "user", "content": self.plain(question)}]

    def plain(self, question: str) -> str:
        """The prompt without a chat template."""
        raise NotImplementedError

    def finish_prompt(self, rendered: str) -> str:
        """The prompt: the chat template's output, adapted to the `thinking` setting."""
        return without_reasoning(rendered) if self.thinking == "off" else rendered

    # Searching.

    def calls(self, turn: str, evaluation: bool = False) -> list[Call]:
        """The calls of a turn; `evaluation` cleans queries as the published evaluation does."""
        raise NotImplementedError

    def reply(self, results: Sequence[Found]) -> str:
        """The system's text after a turn, from one result per call."""
        raise NotImplementedError

    def query_call(self, query: str) -> str:
        """The text that calls a search."""
        raise NotImplementedError

    def first_call(self, query: str) -> str:
        """A whole first turn with a search, which the system writes in the policy's place."""
        raise NotImplementedError

    def documents_of(self, reply: str) -> list[str] | None:
        """The passage lines in a reply, to be tokenised again; None to keep the reply as it is."""
        return None

    def found(self, reply: str) -> list[str]:
        """The texts of the documents in a reply, without the dialect's words around them."""
        raise NotImplementedError

    def searched(self, reply: str) -> bool:
        """Whether a text of the system answers a search of the policy."""
        raise NotImplementedError

    # The answer.

    def answer(self, spans: Spans, complete: bool) -> str | None:
        """The policy's answer, or None; `complete`: the policy ended the trajectory itself."""
        return extract_answer(written(spans))

    def well_formed(self, spans: Spans, complete: bool) -> bool:
        """Whether the policy kept the dialect's form; `complete` as in `answer`."""
        raise NotImplementedError

    def system_spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Spans of a text after the prompt that the system wrote, judged by the text alone."""
        raise NotImplementedError

    @property
    def turn_end(self) -> str:
        """The control token that ends a turn, in dialects that act at the end of a turn."""
        return ""

    # The text of generated demonstrations. Their prompt opens the reasoning.

    @property
    def talks(self) -> bool:
        """Whether a turn has a place for text other than searches and the answer."""
        return True

    def opening(self) -> str:
        """The text that begins a turn after a reply."""
        return ""

    def search_turn(self, query: str) -> str:
        """The text from the end of a thought to the end of a turn that searches."""
        raise NotImplementedError

    def answer_turn(self, answer: str) -> str:
        """The text from the end of a thought to the end of the answer."""
        raise NotImplementedError

    def closing(self) -> str:
        """The text that ends a thought; "" without reasoning."""
        return f" {END_THINK}" if self.reasons else ""

    # Files.

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; `dialects.from_dict` reads it back."""
        fields = {"thinking": self.thinking, "prompt": self.prompt}
        return {"dialect": self.name, **fields, "tell_invalid": self.tell_invalid}


def neutral(text: str, tags: Sequence[str]) -> str:
    """Foreign text made harmless: it can neither end a block nor pass for the policy's text.

    Tags get a space after their first character; line breaks become spaces.
    """
    any_tag = re.compile("|".join(map(re.escape, tags)))
    return _BREAKS.sub(" ", any_tag.sub(lambda tag: f"{tag[0][0]} {tag[0][1:]}", text))


def passage(line: str, tags: Sequence[str]) -> str:
    """A corpus line without its leading id and tab, if any, made harmless (see `neutral`)."""
    return neutral(_LINE_ID.sub("", line), tags)


def written(spans: Spans) -> str:
    """The policy's text, joined."""
    return "".join(text for text, by_policy in spans if by_policy)


def turns(spans: Spans) -> list[str]:
    """The policy's turns: its texts between the system's replies."""
    return _runs(spans, by_policy=True)


def replies(spans: Spans) -> list[str]:
    """The system's replies: its texts between the policy's turns."""
    return _runs(spans, by_policy=False)


def _runs(spans: Spans, by_policy: bool) -> list[str]:
    runs = groupby(spans, key=lambda span: span[1])
    return ["".join(text for text, _ in run) for writer, run in runs if writer == by_policy]


def extract_answer(text: str) -> str | None:
    """Text between the last `<answer>` and the next `</answer>`, stripped; None without both."""
    _, begin, tail = text.rpartition(BEGIN_ANSWER)
    answer, end, _ = tail.partition(END_ANSWER)
    return answer.strip() if begin and end else None


def opens_reasoning(prompt: str) -> bool:
    """Whether a prompt ends inside the reasoning, as templates of reasoning models do."""
    return prompt.rstrip().endswith(BEGIN_THINK)


def without_reasoning(prompt: str) -> str:
    """The prompt with its reasoning closed, if the template opened it."""
    return f"{prompt.rstrip()}\n\n{END_THINK}\n\n" if opens_reasoning(prompt) else prompt
