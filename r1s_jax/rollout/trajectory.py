"""The input and the output of a rollout: the contract between sampling and learning.

Shapes: N trajectories, P columns of prompts, W token columns.
"""

from enum import IntEnum
from typing import Generic, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int
from typing_extensions import TypeVar

# The fields' type: JAX arrays in a program, NumPy arrays on the host, or shapes and partitions.
A = TypeVar("A", default=Array)


class Finish(IntEnum):
    """Why a trajectory ended."""

    NONE = 0
    FINISHED = 1  # answered, or ended the sequence
    LENGTH = 2  # ran out of tokens, in the turn or in total
    SEARCH_LIMIT = 3  # asked for one search too many
    BAD_QUERY = 4  # an empty query, or an end of query without its beginning
    SEARCH_ERROR = 5  # the retriever timed out or failed
    ABORTED = 6  # too many searches failed in this rollout
    TOO_OLD = 7  # unfinished after as many steps as `rollout.max_staleness` allows

    @property
    def complete(self) -> bool:
        """Whether the policy itself ended the trajectory."""
        return self is Finish.FINISHED


# Ended for lack of tokens, searches or time, so how the policy would have ended is unknown.
CUT_OFF = (Finish.LENGTH, Finish.SEARCH_LIMIT, Finish.TOO_OLD)


class Query(IntEnum):
    """Whether a trajectory may be forked at the query that it has just written, or writes now."""

    NEW = 0
    SEEN = 1  # forked, or not chosen
    COPIED = 2  # it is the fork itself, and the query its parent's (see forks.py)
    AGAIN = 3  # the same, and the fork makes its parent's search


class Position(NamedTuple, Generic[A]):
    """Where in its turn a trajectory stands, each int32[N]; initially all 0 but `turn_start`."""

    turn_start: A  # length when the policy's turn began
    tag_state: A  # state of the automaton that finds the end of a tag
    searches: A
    replies: A  # the system's replies to its turns: documents, and notes on invalid turns
    called: A  # whether the turn holds a call, in dialects that act at the end of a turn
    forks: A  # forks made of it
    query: A  # what is known of its query: see Query
    asked: A  # whether the turn has ended in a query that is not answered yet


class Settings(NamedTuple, Generic[A]):
    """Sampling settings of each trajectory."""

    temperature: Float[A, " N"]
    top_p: Float[A, " N"]


class Prompts(NamedTuple, Generic[A]):
    """The input of a rollout: N trajectories, those of one group adjacent.

    `tokens` are the prompt and, for a resumed trajectory, everything after it.
    """

    tokens: Int[A, "N P"]
    lengths: Int[A, " N"]
    prompt_lengths: Int[A, " N"]
    limits: Int[A, " N"]  # most tokens of a trajectory, at most `rollout.max_length`
    groups: Int[A, " N"]  # equal for samples of the same prompt
    shared: Int[A, " N"]  # leading tokens that all prompts have in common; equal in all rows
    keys: A  # one random key per trajectory
    broker: Int[A, " N"]  # number of the broker that answers searches; equal in all rows
    live: Bool[A, " N"]  # false for rows that only pad, and for the rows of forks to come
    at: Position[A]
    settings: Settings[A] | None = None  # None: those of the config

    @staticmethod
    def fresh(
        tokens: Int[np.ndarray, "N P"],
        lengths: Int[np.ndarray, " N"],
        groups: Int[np.ndarray, " N"],
        keys: np.ndarray,
        live: Bool[np.ndarray, " N"],
        limits: Int[np.ndarray, " N"],
        broker: int,
    ) -> "Prompts[np.ndarray]":
        """Trajectories that hold only their prompts, as NumPy arrays."""
        zeros = np.zeros_like(lengths)
        at = Position(lengths, *[zeros] * (len(Position._fields) - 1))
        same = np.full_like(lengths, broker)
        return Prompts(tokens, lengths, lengths, limits, groups, zeros, keys, same, live, at)


class Trajectory(NamedTuple, Generic[A]):
    """The contract between sampling and learning."""

    tokens: Int[A, "N W"]  # prompt, then thoughts, queries, documents, answer; 0 after the end
    loss_mask: Bool[A, "N W"]  # true exactly where the policy sampled the token
    sample_logprobs: Float[A, "N W"]  # under the distribution the token was drawn from
    policy_logprobs: Float[A, "N W"]  # under temperature 1 and top-p 1
    kept: Int[A, "N W C"]  # the nucleus that a token was drawn from (see sampler.Drawn); C may be 0
    log_kept: Float[A, "N W"]  # log of the nucleus's probability, for the ratio; 0: not recorded
    lengths: Int[A, " N"]  # all tokens, the prompt's included
    prompt_lengths: Int[A, " N"]
    groups: Int[A, " N"]  # index of the prompt; equal for samples of one question
    searches: Int[A, " N"]  # document blocks received, the system's own first search included
    finish: Int[A, " N"]  # see Finish
    forked: Int[A, " N"]  # of a fork: tokens of its parent at the query; 0: not a fork


def turn_numbers(mask: Bool[np.ndarray, "N W"]) -> Int[np.ndarray, "N W"]:
    """The turn of each token of a loss mask, counted from 0; -1 for tokens of the system.

    A turn is what the policy sampled between two texts of the system.
    """
    begins = mask.copy()
    begins[:, 1:] &= ~mask[:, :-1]
    return np.where(mask, np.cumsum(begins, axis=1) - 1, -1)


def turn_begins(t: Trajectory[np.ndarray], row: int) -> list[int]:
    """How many tokens trajectory `row` had when each of its turns could begin: after the prompt,
    and after each reply of the system."""
    mask, length = t.loss_mask[row], int(t.lengths[row])
    sampled = np.flatnonzero(mask[:length])
    if not len(sampled):
        return [int(t.prompt_lengths[row])]
    breaks = np.flatnonzero(np.diff(sampled) > 1) + 1
    begins = [int(sampled[0]), *sampled[breaks].tolist()]
    return begins if mask[length - 1] else [*begins, length]
