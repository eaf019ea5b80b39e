"""What goes into a rollout and what comes out: the contract between sampling and learning.

Shapes: N trajectories, P columns of prompts, W token columns.
"""

from enum import IntEnum
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Finish(IntEnum):
    """Why a trajectory ended."""

    NONE = 0
    FINISHED = 1  # answered, or ended the sequence
    LENGTH = 2  # ran out of tokens: of the turn, or in all
    SEARCH_LIMIT = 3  # asked for one search too many
    BAD_QUERY = 4  # an empty query, or an end of query without its beginning
    SEARCH_ERROR = 5  # the retriever timed out or failed
    ABORTED = 6  # too many searches failed in this rollout
    TOO_OLD = 7  # unfinished after as many steps as `rollout.max_age` allows

    @property
    def complete(self) -> bool:
        """Whether the policy ended the trajectory; a Solution is told so and hands it on."""
        return self is Finish.FINISHED


# The ends for want of tokens, searches or time: what would have come is not known.
CUT_OFF = (Finish.LENGTH, Finish.SEARCH_LIMIT, Finish.TOO_OLD)


class Position(NamedTuple):
    """Where in its turn a trajectory stands, each int32[N]; zeros but for `turn_start` at first."""

    turn_start: Array  # tokens known when the policy's turn began
    tag_state: Array  # of the automaton that looks for the end of a tag
    searches: Array
    replies: Array  # of the system's to its turns: searches, and turns that it could not act on
    called: Array  # whether the turn asks for a search, in dialects that act at its end
    asked: Array  # whether the turn has ended in a query that nobody has answered yet


class Settings(NamedTuple):
    """How each trajectory is sampled."""

    temperature: Float[Array, " N"]
    top_p: Float[Array, " N"]


class Prompts(NamedTuple):
    """What a rollout starts from. `N` trajectories, those of one group adjacent.

    `tokens` are the prompt and, of a trajectory that was begun before, all that followed.
    """

    tokens: Int[Array, "N P"]
    lengths: Int[Array, " N"]
    prompt_lengths: Int[Array, " N"]
    limits: Int[Array, " N"]  # of a trajectory's tokens in all, below `rollout.max_length`
    groups: Int[Array, " N"]  # equal for samples of the same prompt
    keys: Array  # one random key a trajectory
    live: Bool[Array, " N"]  # the others only fill a data shard's rows, after the live ones
    at: Position
    settings: Settings | None = None  # None: all as the config says

    @staticmethod
    def fresh(
        tokens: Int[Array, "N P"],
        lengths: Int[Array, " N"],
        groups: Int[Array, " N"],
        keys: Array,
        live: Bool[Array, " N"],
        limits: Int[Array, " N"],
    ) -> "Prompts":
        """Trajectories of which there is nothing yet but the prompt; NumPy arrays."""
        none = np.zeros_like(lengths)
        at = Position(lengths, none, none, none, none, none)
        return Prompts(tokens, lengths, lengths, limits, groups, keys, live, at)


class Trajectory(NamedTuple):
    """The contract between sampling and learning."""

    tokens: Int[Array, "N W"]  # prompt, then thoughts, queries, documents, answer; 0 after the end
    loss_mask: Bool[Array, "N W"]  # true exactly where the policy sampled the token
    sample_logprobs: Float[Array, "N W"]  # under the distribution the token was drawn from
    policy_logprobs: Float[Array, "N W"]  # under temperature 1 and top-p 1, for the ratio
    lengths: Int[Array, " N"]  # tokens in all
    prompt_lengths: Int[Array, " N"]
    groups: Int[Array, " N"]  # the prompt's index: samples of one question share it
    searches: Int[Array, " N"]  # document blocks received, a first search of the system's included
    finish: Int[Array, " N"]  # see Finish
