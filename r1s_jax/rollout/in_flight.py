"""A trajectory on the host, which may stay unfinished over several learning steps."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from r1s_jax.config import RolloutConfig
from r1s_jax.data.questions import Question
from r1s_jax.rollout.broker import FAILED, Search
from r1s_jax.rollout.forks import parent_node
from r1s_jax.rollout.trajectory import Finish, Position, Trajectory

# A step's further draws use the random keys of steps beyond the end of any run.
_DRAWS_APART = 1 << 20
# The arrays of a trajectory, with an entry per token, and their dtypes in a checkpoint.
ARRAYS = {
    "tokens": np.int32,
    "loss_mask": np.bool_,
    "sample_logprobs": np.float32,
    "policy_logprobs": np.float32,
    "kept": np.int32,
    "log_kept": np.float32,
    "drawn": np.int32,
}
# A shorter common beginning is not worth a copy between slots.
_LEAST_SHARED = 16


class Origin(NamedTuple):
    """What names a trajectory in a run: with it, the seed and the question all its draws are known.

    A fork has that of its trajectory.
    """

    step: int  # at which its question was drawn, from 0
    draw: int  # of that step
    occurrence: int  # of its question in that draw
    sample: int


@dataclass
class InFlight:
    """One trajectory; its arrays have one entry per token."""

    question: Question
    sample: int
    occurrence: int  # counts repetitions of the question in its batch, from 0
    step: int  # step at which the question was drawn, from 0
    draw: int  # index of the draw in that step
    prompt_length: int
    start: int  # first token of the solution; the system's own first search belongs to it
    tokens: Int[np.ndarray, " T"]
    loss_mask: Bool[np.ndarray, " T"]
    sample_logprobs: Float[np.ndarray, " T"]
    policy_logprobs: Float[np.ndarray, " T"]
    kept: Int[np.ndarray, "T C"]
    log_kept: Float[np.ndarray, " T"]
    drawn: Int[np.ndarray, " T"]  # step at which each token was sampled; -1: not sampled
    at: tuple[int, ...]  # its Position
    found: int = 0  # document blocks received; set at the end
    finish: int = 0
    searches: list[Search] = field(default_factory=list)
    # Of a fork (see forks.py): its row in the tree, its parent's tokens at the query, and how many
    # of them it begins with.
    node: int = 0
    forked: int = 0
    shared: int = 0
    forks: dict[int, "InFlight"] = field(default_factory=dict)  # of a trajectory, by row

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
        """A trajectory that holds only its prompt."""
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
            kept=np.zeros((n, 0), np.int32),
            log_kept=blank,
            drawn=np.full(n, -1, np.int32),
            at=tuple(Position(n, *[0] * (len(Position._fields) - 1))),
        )

    @property
    def ended(self) -> bool:
        return self.finish != Finish.NONE

    @property
    def over(self) -> bool:
        """Whether it and its forks have ended."""
        return all(flight.ended for flight in self.tree.values())

    @property
    def key_step(self) -> int:
        """The step number that enters its random key (see `_DRAWS_APART`)."""
        return self.step + self.draw * _DRAWS_APART

    @property
    def origin(self) -> Origin:
        return Origin(self.step, self.draw, self.occurrence, self.sample)

    @property
    def tree(self) -> dict[int, "InFlight"]:
        """A trajectory and its forks, by their rows in the tree, in order."""
        return {0: self} | dict(sorted(self.forks.items()))

    def fork(self, node: int, forked: int, *, taken_back: bool) -> "InFlight":
        """The fork of this trajectory at the query that ends after `forked` tokens, and which may
        be taken back."""
        own = self.loss_mask[:forked]
        turn = np.flatnonzero(np.diff(own, prepend=False) & own)
        shared = int(turn[-1]) if taken_back else forked
        arrays = {name: getattr(self, name)[:shared].copy() for name in ARRAYS}
        inherited = [s for s in self.searches if s.number < len(turn) - 1]
        fresh = {"found": 0, "finish": 0, "searches": inherited, "forks": {}}
        place = {"node": node, "forked": forked, "shared": shared}
        return replace(self, **arrays, **fresh, **place)

    @property
    def own(self) -> Bool[np.ndarray, " T"]:
        """The tokens that the policy sampled in it, and not in its parent."""
        return self.loss_mask & (np.arange(len(self.loss_mask)) >= self.shared)

    @property
    def opening(self) -> Bool[np.ndarray, " T"]:
        """The beginning of an answer that a fork was given in place of a turn, if it was."""
        at = np.arange(len(self.loss_mask))
        end = self.own.argmax() if self.shared != self.forked else 0
        return (at >= self.shared) & (at < end)

    @property
    def written(self) -> Bool[np.ndarray, " T"]:
        """The tokens that count as the policy's text."""
        return self.loss_mask | self.opening

    def note_first(self, search: Search) -> None:
        """Records the system's own first search; if it failed, ends the trajectory."""
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
        """Takes over row `row` of a rollout; `at` is the position of an unfinished trajectory."""
        length = int(t.lengths[row])
        if not length:
            return  # it got no slot yet
        new, old = t.loss_mask[row, :length], len(self.tokens)

        def grown(values: np.ndarray, fill: float) -> np.ndarray:
            return np.concatenate([values, np.full(length - old, fill, values.dtype)])

        self.tokens = t.tokens[row, :length].copy()
        for name in ("sample_logprobs", "policy_logprobs", "log_kept"):
            values = getattr(t, name)[row, :length]
            setattr(self, name, np.where(new, values, grown(getattr(self, name), 0)))
        kept, before = t.kept[row, :length].copy(), self.kept
        if before.shape[1]:  # sampled before, in an earlier step
            kept[:old] = np.where(new[:old, None], kept[:old], before)
        self.kept = kept
        self.drawn = np.where(new, np.int32(step), grown(self.drawn, -1))
        self.loss_mask = grown(self.loss_mask, False) | new
        self.finish = self.finish or int(t.finish[row])  # a failed first search ended it
        self.found = int(t.searches[row])
        if at is not None:
            self.at = tuple(int(values[row]) for values in at)

    def expire(self) -> None:
        """Ends it and its forks, as far as they are unfinished, as too old."""
        for flight in self.tree.values():
            if not flight.ended:
                flight.finish, flight.found = int(Finish.TOO_OLD), Position(*flight.at).searches


def shared_beginning(flights: Sequence[InFlight | None]) -> int:
    """The number of leading tokens that all prompts have in common; 0 for a few.

    The last token of a prompt never counts: the decode step feeds it.
    """
    prompts = [f.tokens[: f.prompt_length - 1] for f in flights if f is not None]
    least = min(map(len, prompts), default=0)
    if least < _LEAST_SHARED:
        return 0
    same = (np.stack([p[:least] for p in prompts]) == prompts[0][:least]).all(0)
    count = least if same.all() else int(same.argmin())
    return count if count >= _LEAST_SHARED else 0


def parents(flights: Sequence[InFlight], config: RolloutConfig) -> Int[np.ndarray, " N"]:
    """The place among `flights`, where each tree is whole and adjacent, of each one's parent; -1
    for a trajectory that is no fork."""
    out, places = np.full(len(flights), -1), dict[int, int]()
    for i, flight in enumerate(flights):
        places = places if flight.node else {}
        places[flight.node] = i
        if flight.node:
            out[i] = places[parent_node(flight.node, config)]
    return out


def stacked(values: Sequence[np.ndarray], width: int) -> np.ndarray:
    """The arrays as rows of `width` columns, filled up with zeros."""
    out = np.zeros((len(values), width), values[0].dtype)
    for row, own in zip(out, values, strict=True):
        row[: len(own)] = own
    return out


def trajectories(
    flights: Sequence[InFlight], width: int, groups: Sequence[int], kept: int = 0
) -> Trajectory[np.ndarray]:
    """Stacks flights as rows of arrays of `width` columns; nuclei have room for `kept` tokens."""

    def rows(name: str) -> np.ndarray:
        return stacked([getattr(flight, name) for flight in flights], width)

    def nuclei() -> np.ndarray:
        out = np.full((len(flights), width, kept), -1, np.int32)
        for i, flight in enumerate(flights):
            out[i, : len(flight.kept), : flight.kept.shape[1]] = flight.kept
        return out

    def each(values: Sequence[int]) -> np.ndarray:
        return np.array(values, np.int32)

    return Trajectory(
        tokens=rows("tokens"),
        loss_mask=rows("own"),
        sample_logprobs=rows("sample_logprobs"),
        policy_logprobs=rows("policy_logprobs"),
        kept=nuclei(),
        log_kept=rows("log_kept"),
        lengths=each([len(f.tokens) for f in flights]),
        prompt_lengths=each([f.prompt_length for f in flights]),
        groups=each(groups),
        searches=each([f.found for f in flights]),
        finish=each([f.finish for f in flights]),
        forked=each([f.forked for f in flights]),
    )


def group_numbers(flights: Sequence[InFlight]) -> list[int]:
    """Group numbers from 0; neighbours from one draw of one question form a group."""
    groups, last = [], None
    for flight in flights:
        group = (flight.question.id, flight.occurrence, flight.key_step)
        groups.append(groups[-1] + (group != last) if groups else 0)
        last = group
    return groups


# Fills an unused row.
NOBODY = InFlight.begun(Question(0, "", ()), [0], sample=0, occurrence=0, step=0, draw=0, start=0)
