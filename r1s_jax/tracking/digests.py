"""Digests of what a step began with, found and made, so that anyone can check the step later."""

from collections.abc import Mapping
from typing import Any

from r1s_jax.io.seals import digest
from r1s_jax.learning.collect import Rewarded
from r1s_jax.learning.policy_gradient import Learned
from r1s_jax.models.checksums import state_digests

# In the order in which a step makes them, and what a difference means where all before are equal.
DIGESTS = {
    "params_before": "the step began with other parameters",
    "optimizer_before": "the step began with another state of the optimizer",
    "questions": "other questions, or other random keys: the data or their order differ, or, with "
    "partial rollouts, what was complete first",
    "documents": "queries or their documents differ: the index, the search engine, or the "
    "arithmetic of sampling",
    "trajectories": "other tokens or probabilities were sampled: the arithmetic differs",
    "rewards": "the rewards differ: their rules, a judge or a server",
    "advantages": "the advantages differ: the arithmetic of the update's scoring",
    "inputs": "the update was given something else",
    "params": "the update made other parameters: the arithmetic differs",
    "optimizer": "the update made another state of the optimizer: the arithmetic differs",
}


def step_digests(
    before: Mapping[str, int], batch: Rewarded, learned: Learned, after: Mapping[str, int]
) -> dict[str, str]:
    """`before` and `after` are checksums of the learner's state.

    The writer of the row adds `traces`, a digest of the step's lines of `traces.jsonl`: these hold
    times too, so that no second run has the same.
    """
    made = state_digests(after)
    return {
        **{f"{name}_before": value for name, value in state_digests(before).items()},
        **batch_digests(batch),
        "advantages": digest(learned.advantages),
        "inputs": learned.inputs,
        **made,
    }


def batch_digests(batch: Rewarded) -> dict[str, str]:
    """Digests of a rewarded batch: its questions, documents, trajectories and rewards."""
    rolled = batch.rolled
    questions = [[q.id, q.question, list(q.answers)] for q in rolled.questions]
    searches = [[_search(s) for s in own] for own in rolled.searches]
    rewards = [[r.parts, r.summands, r.turns] for r in batch.rewards]
    return {
        "questions": digest(questions, rolled.origins, rolled.trajectory.groups),
        "documents": digest(searches),
        "trajectories": digest(*rolled.trajectory),
        "rewards": digest(batch.values, rewards),
    }


def _search(search: Any) -> list[Any]:
    return [search.number, search.query, search.outcome, list(search.documents)]


def first_difference(was: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The first of DIGESTS, in their order, that differs; "": none does."""
    names = (name for name in DIGESTS if name in was or name in now)
    return next((name for name in names if was.get(name) != now.get(name)), "")
