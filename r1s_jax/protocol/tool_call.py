"""Tool calls in the form of Hermes, as Qwen2.5 and Qwen3 write them.

The tokenizer's chat template makes the prompt and the text between two turns. The end of a turn
acts: if the turn holds calls they are searched, otherwise the turn is the answer.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

from r1s_jax.io.errors import BadInput, ConfigError
from r1s_jax.io.json import parse
from r1s_jax.protocol.dialect import (
    BEGIN_ANSWER,
    BEGIN_THINK,
    END_ANSWER,
    END_THINK,
    Call,
    Dialect,
    Found,
    Spans,
    extract_answer,
    opens_reasoning,
    passage,
    turns,
)

BEGIN_CALL, END_CALL = "<tool_call>", "</tool_call>"
BEGIN_RESPONSE, END_RESPONSE = "<tool_response>", "</tool_response>"
TAGS = (BEGIN_CALL, END_CALL, BEGIN_RESPONSE, END_RESPONSE, BEGIN_THINK, END_THINK)
TAGS += (BEGIN_ANSWER, END_ANSWER)
TOOL = "search"
SEARCH_TOOL = {
    "type": "function",
    "function": {
        "name": TOOL,
        "description": "Look a fact up with a search engine; returns the passages it finds.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string", "description": "Keywords."}},
            "required": ["query"],
        },
    },
}
_CALL = re.compile(f"{BEGIN_CALL}(.*?){END_CALL}", re.DOTALL)
_SHOWN = re.compile(r"\(\d+\)(.*)")
_PROBLEM = "Error: "
# Further calls in one turn are not searched.
_MOST_CALLS = 8
_LONGEST_PROBLEM = 100  # characters
# Marker texts: rendering them shows the template's words around them.
_QUERY, _FIRST, _SECOND = "r1s-marks-a-query", "r1s-marks-one", "r1s-marks-two"

# Renders messages with a chat template: (messages, tools) -> text.
Render = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None], str]


class Frame(NamedTuple):
    """A chat template's words between an assistant's turn with calls and its next turn."""

    turn_end: str  # the control token that ends a turn; the policy writes it itself
    before: str  # before the first response
    between: str  # between two responses
    after: str  # after the last response


# The frame of Qwen's templates, for texts without a tokenizer.
HERMES = Frame(
    "<|im_end|>",
    f"\n<|im_start|>user\n{BEGIN_RESPONSE}\n",
    f"\n{END_RESPONSE}\n{BEGIN_RESPONSE}\n",
    f"\n{END_RESPONSE}<|im_end|>\n<|im_start|>assistant\n",
)


@dataclass(frozen=True)
class ToolCall(Dialect):
    """See the module; `frame` belongs to the policy's chat template (see `framed`)."""

    frame: Frame = HERMES

    name: ClassVar = "tool_call"
    tags: ClassVar = TAGS
    can_tell_invalid: ClassVar = True
    query_end: ClassVar = END_CALL
    acts_at_turn_end: ClassVar = True
    tagged: ClassVar = {BEGIN_CALL: ("query", END_CALL), BEGIN_ANSWER: ("answer", END_ANSWER)}
    description: ClassVar = (
        f"It calls the tool `{TOOL}(query)` in its chat template's form (`{BEGIN_CALL}`), is handed"
        "\npassages as the tool's response, and answers in its last turn."
    )

    @property
    def tools(self) -> list[dict[str, Any]]:
        return [SEARCH_TOOL]

    def framed(self, render: Render, turn_ends: Sequence[str]) -> Self:
        """The dialect with a template's own words; `turn_ends` are the tokens that end a turn.

        Raises ConfigError for a template without tools or with another form of calls.
        """
        frame = _frame(render, turn_ends)
        return replace(self, frame=frame._replace(after=self.finish_prompt(frame.after)))

    def plain(self, question: str) -> str:
        return (self.prompt or "{question}").replace("{question}", question)

    def calls(self, turn: str, evaluation: bool = False) -> list[Call]:
        action = turn.rpartition(END_THINK)[2]
        calls = [_call(text) for text in _CALL.findall(action)]
        # One problem for all further calls: a response to each could be of any length.
        if len(calls) > _MOST_CALLS:
            return [*calls[:_MOST_CALLS], Call("", f"at most {_MOST_CALLS} calls a turn")]
        return calls or [Call("", "the call stands inside the reasoning")]

    def reply(self, results: Sequence[Found]) -> str:
        f = self.frame
        return f.before + f.between.join(map(_response, results)) + f.after

    def query_call(self, query: str) -> str:
        call = json.dumps({"name": TOOL, "arguments": {"query": query}}, ensure_ascii=False)
        return f"{BEGIN_CALL}\n{call}\n{END_CALL}"

    def first_call(self, query: str) -> str:
        return self.query_call(query) + self.frame.turn_end

    def found(self, reply: str) -> list[str]:
        # In the system's own first search, the call stands before the response.
        body = reply.partition(self.frame.before)[2].removesuffix(self.frame.after)
        return [text[1] for text in map(_SHOWN.fullmatch, body.split("\n")) if text]

    def searched(self, reply: str) -> bool:
        f = self.frame
        body = reply.removeprefix(f.before).removesuffix(f.after)
        valid = any(not part.startswith(_PROBLEM) for part in body.split(f.between))
        return BEGIN_CALL not in reply and f.before in reply and valid

    def answer(self, spans: Spans, complete: bool) -> str | None:
        """The last turn after its reasoning, or its answer tags' content if the prompt has such."""
        own = turns(spans)
        if not own or not complete or not spans[-1][1]:
            return None
        _, closed, text = own[-1].removesuffix(self.frame.turn_end).rpartition(END_THINK)
        thinking = BEGIN_THINK in text or (self._begins_thinking and not closed)
        if END_CALL in own[-1] or thinking:
            return None
        if BEGIN_ANSWER in (self.prompt or ""):
            return extract_answer(text)
        return text.strip() or None

    def well_formed(self, spans: Spans, complete: bool) -> bool:
        """Every call is valid, every thought is closed, and the last turn is the answer."""
        own = turns(spans)
        if self.answer(spans, complete) is None:
            return False
        if any(call.problem for turn in own[:-1] for call in self.calls(turn)):
            return False
        return all(self._reasoned(turn) for turn in own)

    def _reasoned(self, turn: str) -> bool:
        if not self.reasons:
            return BEGIN_THINK not in turn and END_THINK not in turn
        closed = turn.count(END_THINK)
        opened = self._begins_thinking or BEGIN_THINK in turn
        return closed == 1 if opened or self.thinking == "on" else closed <= 1

    @property
    def _begins_thinking(self) -> bool:
        """Whether the chat template opens a thought before each turn."""
        return opens_reasoning(self.frame.after)

    def system_spans(self, text: str) -> Iterator[tuple[int, int]]:
        f = self.frame
        words = (
            f"(?<={re.escape(END_CALL + f.turn_end)}){re.escape(f.before)}.*?{re.escape(f.after)}"
        )
        return (block.span() for block in re.finditer(words, text, re.DOTALL))

    @property
    def turn_end(self) -> str:
        return self.frame.turn_end

    @property
    def talks(self) -> bool:
        return self.reasons  # without reasoning, the whole last turn is the answer

    def search_turn(self, query: str) -> str:
        return f"{self.closing()} {self.query_call(query)}{self.frame.turn_end}"

    def answer_turn(self, answer: str) -> str:
        tagged = BEGIN_ANSWER in (self.prompt or "")
        return f"{self.closing()} {f'{BEGIN_ANSWER} {answer} {END_ANSWER}' if tagged else answer}"

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | {"frame": list(self.frame)}


def _call(text: str) -> Call:
    try:
        value = parse(text, "the call")
    except BadInput as error:
        return Call("", f"{error}")
    if not isinstance(value, dict) or value.get("name") != TOOL:
        return Call("", f"there is one tool, {TOOL}(query)")
    arguments = value.get("arguments")
    if isinstance(arguments, str):  # some templates write the arguments as a string
        try:
            arguments = parse(arguments, "the arguments")
        except BadInput as error:
            return Call("", f"{error}")
    query = arguments.get("query") if isinstance(arguments, dict) else None
    if not isinstance(query, str) or not query.strip():
        return Call("", "the argument `query` must be a text, and not empty")
    return Call(" ".join(query.split()))


def _response(result: Found) -> str:
    if isinstance(result, str):
        return f"{_PROBLEM}{result[:_LONGEST_PROBLEM]}"
    return "\n".join(f"({i}){passage(d, TAGS)}" for i, d in enumerate(result, start=1)) or "None"


def _frame(render: Render, turn_ends: Sequence[str]) -> Frame:
    user = {"role": "user", "content": "?"}
    if render([user], [SEARCH_TOOL]) == render([user], None):
        raise ConfigError(
            "the tokenizer's chat template takes no tools, which dialect tool_call needs: choose "
            "another protocol.dialect or model"
        )
    function = {"name": TOOL, "arguments": {"query": _QUERY}}
    call = {"role": "assistant", "content": "", "tool_calls": [_call_of(function)] * 2}
    answers = [{"role": "tool", "name": TOOL, "content": text} for text in (_FIRST, _SECOND)]
    text = render([user, call, *answers], [SEARCH_TOOL])
    called, _, tail = text.rpartition(_QUERY)
    rest, ends = tail.partition(END_CALL)[2], [end for end in turn_ends if end in tail]
    if BEGIN_CALL not in called or not ends or _FIRST not in rest or _SECOND not in rest:
        raise ConfigError(
            "the tokenizer's chat template does not write tool calls as "
            f"{BEGIN_CALL}{{...}}{END_CALL} and the end of the turn, which dialect tool_call "
            "needs: choose another protocol.dialect or model"
        )
    turn_end = min(ends, key=rest.index)
    before, _, responses = rest.partition(turn_end)[2].partition(_FIRST)
    between, _, after = responses.partition(_SECOND)
    return Frame(turn_end, before, between, after)


def _call_of(function: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": function}
