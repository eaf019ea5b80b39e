"""A trajectory as the host keeps it: from its prompt, over steps of learning, to its end."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int

from r1s_jax.data.questions import Question
from r1s_jax.rollout.broker import FAILED, Search
from r1s_jax.rollout.trajectory import Finish, Position, Trajectory

# Random keys of a step's further draws are those of steps that no run reaches.
_DRAWS_APART = 1 << 20


@dataclass
class InFlight:
    """One trajectory; its arrays have an entry a token."""

    question: Question
    sample: int
    occurrence: int  # of its question among those drawn with it
    step: int  # at which its question was drawn, from 0
    draw: int  # which of the step's draws that was
    prompt_length: int
    start: int  # of what the solution is: where the system's own first search begins
    tokens: Int[np.ndarray, " T"]
    loss_mask: Bool[np.ndarray, " T"]
    sample_logprobs: Float[np.ndarray, " T"]
    policy_logprobs: Float[np.ndarray, " T"]
    drawn: Int[np.ndarray, " T"]  # the step at which each was sampled; -1: by nobody
    at: tuple[int, ...]  # its Position
    found: int = 0  # document blocks received, once it has ended
    finish: int = 0
    searches: list[Search] = field(default_factory=list)

    @staticmethod
    def begun(
        question: Question,
        prompt: Sequence[int],
        *,
        sample: int,
        occurrence: int,
        step: int,
        draw: int,
        start: int,
    ) -> "InFlight":
        """One of which there is nothing yet but the prompt."""
        n = len(prompt)
        blank = np.zeros(n, np.float32)
        return InFlight(
            question=question,
            sample=sample,
            occurrence=occurrence,
            step=step,
            draw=draw,
            prompt_length=n,
            start=start,
            tokens=np.array(prompt, np.int32),
            loss_mask=np.zeros(n, bool),
            sample_logprobs=blank,
            policy_logprobs=blank,
            drawn=np.full(n, -1, np.int32),
            at=tuple(Position(n, 0, 0, 0, 0, 0)),
        )

    @property
    def ended(self) -> bool:
        return self.finish != Finish.NONE

    @property
    def key_step(self) -> int:
        """The step that its random key is made of; further draws have ones that no run reaches."""
        return self.step + self.draw * _DRAWS_APART

    def note_first(self, search: Search) -> None:
        """The system's own first search; where that failed, nothing can be learned from it."""
        self.searches.append(search)
        if search.outcome in FAILED:
            self.finish = int(Finish.SEARCH_ERROR)
        else:
            self.at = tuple(Position(*self.at)._replace(searches=1))

    def absorb(
        self,
        t: Trajectory[np.ndarray],
        row: int,
        *,
        step: int,
        at: Position[np.ndarray] | None = None,
    ) -> None:
        """Takes over what row `row` of a rollout has become of it.

        `at` says where it stands, should it not have ended.
        """
        length = int(t.lengths[row])
        if not length:
            return  # its turn never came
        new, old = t.loss_mask[row, :length], len(self.tokens)

        def grown(mine: np.ndarray, fill: float) -> np.ndarray:
            return np.concatenate([mine, np.full(length - old, fill, mine.dtype)])

        self.tokens = t.tokens[row, :length].copy()
        for name in ("sample_logprobs", "policy_logprobs"):
            theirs = getattr(t, name)[row, :length]
            setattr(self, name, np.where(new, theirs, grown(getattr(self, name), 0)))
        self.drawn = np.where(new, np.int32(step), grown(self.drawn, -1))
        self.loss_mask = grown(self.loss_mask, False) | new
        self.finish = self.finish or int(t.finish[row])  # a failed first search is an end
        self.found = int(t.searches[row])
        if at is not None:
            self.at = tuple(int(values[row]) for values in at)

    def expire(self) -> None:
        """Ends it as it is, for being too old."""
        self.finish, self.found = int(Finish.TOO_OLD), Position(*self.at).searches


def trajectories(
    flights: Sequence[InFlight], width: int, groups: Sequence[int]
) -> Trajectory[np.ndarray]:
    """Flights as the rows of arrays of `width` columns."""

    def rows(name: str) -> np.ndarray:
        first = getattr(flights[0], name)
        out = np.zeros((len(flights), width), first.dtype)
        for i, flight in enumerate(flights):
            values = getattr(flight, name)
            out[i, : len(values)] = values
        return out

    def each(values: Sequence[int]) -> np.ndarray:
        return np.array(values, np.int32)

    return Trajectory(
        tokens=rows("tokens"),
        loss_mask=rows("loss_mask"),
        sample_logprobs=rows("sample_logprobs"),
        policy_logprobs=rows("policy_logprobs"),
        lengths=each([len(f.tokens) for f in flights]),
        prompt_lengths=each([f.prompt_length for f in flights]),
        groups=each(groups),
        searches=each([f.found for f in flights]),
        finish=each([f.finish for f in flights]),
    )


def group_numbers(flights: Sequence[InFlight]) -> list[int]:
    """From 0 on: a group is the neighbours whose question was drawn once."""
    groups, last = [], None
    for flight in flights:
        drawn = (flight.question.id, flight.occurrence, flight.key_step)
        groups.append(groups[-1] + (drawn != last) if groups else 0)
        last = drawn
    return groups


# In the place of a row that is not used.
NOBODY = InFlight.begun(Question(0, "", ()), [0], sample=0, occurrence=0, step=0, draw=0, start=0)
