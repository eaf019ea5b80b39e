"""What goes into a rollout and what comes out: the contract between sampling and learning.

Shapes: N trajectories, P columns of prompts, W token columns.
"""

from enum import IntEnum
from typing import Generic, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int
from typing_extensions import TypeVar

# What the tuples hold: arrays of JAX in a program, of NumPy on the host, or shapes and partitions.
A = TypeVar("A", default=Array)


class Finish(IntEnum):
    """Why a trajectory ended."""

    NONE = 0
    FINISHED = 1  # answered, or ended the sequence
    LENGTH = 2  # ran out of tokens: of the turn, or in all
    SEARCH_LIMIT = 3  # asked for one search too many
    BAD_QUERY = 4  # an empty query, or an end of query without its beginning
    SEARCH_ERROR = 5  # the retriever timed out or failed
    ABORTED = 6  # too many searches failed in this rollout
    TOO_OLD = 7  # unfinished after as many steps as `rollout.max_staleness` allows

    @property
    def complete(self) -> bool:
        """Whether the policy ended the trajectory; a Solution is told so and hands it on."""
        return self is Finish.FINISHED


# The ends for want of tokens, searches or time: what would have come is not known.
CUT_OFF = (Finish.LENGTH, Finish.SEARCH_LIMIT, Finish.TOO_OLD)


class Position(NamedTuple, Generic[A]):
    """Where in its turn a trajectory stands, each int32[N]; zeros but for `turn_start` at first."""

    turn_start: A  # tokens known when the policy's turn began
    tag_state: A  # of the automaton that looks for the end of a tag
    searches: A
    replies: A  # of the system's to its turns: searches, and turns that it could not act on
    called: A  # whether the turn asks for a search, in dialects that act at its end
    asked: A  # whether the turn has ended in a query that nobody has answered yet


class Settings(NamedTuple, Generic[A]):
    """How each trajectory is sampled."""

    temperature: Float[A, " N"]
    top_p: Float[A, " N"]


class Prompts(NamedTuple, Generic[A]):
    """What a rollout starts from. `N` trajectories, those of one group adjacent.

    `tokens` are the prompt and, of a trajectory that was begun before, all that followed.
    """

    tokens: Int[A, "N P"]
    lengths: Int[A, " N"]
    prompt_lengths: Int[A, " N"]
    limits: Int[A, " N"]  # of a trajectory's tokens in all, below `rollout.max_length`
    groups: Int[A, " N"]  # equal for samples of the same prompt
    keys: A  # one random key a trajectory
    live: Bool[A, " N"]  # the others only fill a data shard's rows, after the live ones
    at: Position[A]
    settings: Settings[A] | None = None  # None: all as the config says

    @staticmethod
    def fresh(
        tokens: Int[np.ndarray, "N P"],
        lengths: Int[np.ndarray, " N"],
        groups: Int[np.ndarray, " N"],
        keys: np.ndarray,
        live: Bool[np.ndarray, " N"],
        limits: Int[np.ndarray, " N"],
    ) -> "Prompts[np.ndarray]":
        """Trajectories of which there is nothing yet but the prompt; NumPy arrays."""
        none = np.zeros_like(lengths)
        at = Position(lengths, none, none, none, none, none)
        return Prompts(tokens, lengths, lengths, limits, groups, keys, live, at)


class Trajectory(NamedTuple, Generic[A]):
    """The contract between sampling and learning."""

    tokens: Int[A, "N W"]  # prompt, then thoughts, queries, documents, answer; 0 after the end
    loss_mask: Bool[A, "N W"]  # true exactly where the policy sampled the token
    sample_logprobs: Float[A, "N W"]  # under the distribution the token was drawn from
    policy_logprobs: Float[A, "N W"]  # under temperature 1 and top-p 1, for the ratio
    lengths: Int[A, " N"]  # tokens in all
    prompt_lengths: Int[A, " N"]
    groups: Int[A, " N"]  # the prompt's index: samples of one question share it
    searches: Int[A, " N"]  # document blocks received, a first search of the system's included
    finish: Int[A, " N"]  # see Finish
