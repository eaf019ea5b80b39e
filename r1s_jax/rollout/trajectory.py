"""What goes into a rollout and what comes out: the contract between sampling and learning.

Shapes: N trajectories, P columns of prompts, W token columns.
"""

from enum import IntEnum
from typing import NamedTuple

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


class Prompts(NamedTuple):
    """What a rollout starts from. `N` trajectories, those of one group adjacent."""

    tokens: Int[Array, "N P"]
    lengths: Int[Array, " N"]
    groups: Int[Array, " N"]  # equal for samples of the same prompt
    keys: Array  # one random key a trajectory


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
