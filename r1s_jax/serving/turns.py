"""The search loop driven from the host: tags found in decoded text, control flow in Python.

A subclass samples the tokens: JetStream's engine here, and in the tests a reference against which
the loop inside the program (rollout/loop.py) is compared.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from r1s_jax.config import RolloutConfig
from r1s_jax.rollout.broker import Broker, Search
from r1s_jax.rollout.callback_arrays import Status
from r1s_jax.rollout.trajectory import Finish

_ENDS = {Status.ERROR: Finish.SEARCH_ERROR, Status.BAD_QUERY: Finish.BAD_QUERY}


@dataclass
class Event:
    """A new part of a growing trajectory."""

    kind: Literal["policy", "documents"]
    tokens: list[int]
    searches: Sequence[Search] = ()


@dataclass(kw_only=True)
class Turns(ABC):
    """Rolls out one trajectory, kept in its fields, with the tokens that a subclass samples."""

    config: RolloutConfig
    eos_ids: Sequence[int]
    broker: Broker
    decode: Any  # token ids -> text

    tokens: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    policy_logprobs: list[float] = field(default_factory=list)
    searches: int = 0
    replies: int = 0
    finish: Finish = Finish.NONE

    def run(self, prompt: Sequence[int], key: Any) -> Iterator[Event]:
        """Yields the policy's tokens, one by one, and each document block."""
        self._force(list(prompt))
        turn: list[int] = []
        while self.finish == Finish.NONE:
            turn.append(self._sample(key))
            yield Event("policy", turn[-1:])
            self.finish, asks = self._end_of_turn(turn)
            if asks:
                yield self._search(turn)
                turn = []

    @abstractmethod
    def _sample(self, key: Any) -> int:
        """Draws the next token and appends it to `tokens`, `mask` and `policy_logprobs`."""

    def _end_of_turn(self, turn: list[int]) -> tuple[Finish, bool]:
        """Whether and how the last token ends the trajectory, and whether the system replies."""
        c, d, text = self.config, self.broker.dialect, self.decode(turn)
        eos, called = turn[-1] in self.eos_ids, d.query_end in text
        answered = bool(d.answer_end) and d.answer_end in text
        full = len(turn) >= c.max_turn_length or len(self.tokens) >= c.max_length
        may_search = self.replies < c.max_searches
        if called and eos == d.acts_at_turn_end:
            return (Finish.NONE, True) if may_search else (Finish.SEARCH_LIMIT, False)
        idle = (eos or full) and not answered
        if d.answers_idle_turns and d.tells_invalid and may_search and idle:
            room = len(self.tokens) < c.max_length
            return (
                (Finish.NONE, True) if room else (Finish.FINISHED if eos else Finish.LENGTH, False)
            )
        if eos or answered:
            return Finish.FINISHED, False
        return (Finish.LENGTH if full else Finish.NONE), False

    def _search(self, turn: list[int]) -> Event:
        """Appends the reply, or ends the trajectory if it cannot."""
        c = self.config
        width = c.max_turn_length if self.broker.dialect.reads_whole_turn else c.max_query_length
        full = len(turn) >= width
        status, count, reply, searches = self.broker.answer_now(turn[-width:], full)
        if status in _ENDS:
            self.finish, reply = _ENDS[status], []
        elif len(self.tokens) + len(reply) >= c.max_length:
            self.finish, reply = Finish.LENGTH, []
        else:
            self._force(reply)
            self.searches += count
            self.replies += 1
        return Event("documents", reply, searches)

    def _force(self, tokens: list[int]) -> None:
        self.tokens += tokens
        self.mask += [False] * len(tokens)
        self.policy_logprobs += [0.0] * len(tokens)
