"""Forks: what would have become of a trajectory if a search had gone otherwise.

At a query the trajectory is copied into a row of its own, and into a slot as soon as one is free,
its KV cache included. The copy, a fork, differs in one thing: its search finds nothing, or the
documents of another question, or the query is taken back and the turn must answer. Everything else
is common, the random keys too, so the difference of the two rewards tells what the search was worth
with little noise.

With `rollout.fork_draws` = K above 1 the rest is drawn K times without the search, and K times with
it: the trajectory's own rest, and K - 1 more forks. The k-th draws, with and without, have a random
key of their own in common; that of the 0th is the trajectory's.

The rows of a trajectory and of all forks that it may get are adjacent, in the order of a tree: row
0 is the trajectory, the forks of row n are rows n * F + 1 to n * F + F, where F is
`rollout.forks_per_trajectory` times 2 K - 1; the forks of one query are adjacent, first the K
without its search. Which query is forked depends on its trajectory's key and its place.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from r1s_jax.config import RolloutConfig
from r1s_jax.rollout.state import Phase, State, copy_slot
from r1s_jax.rollout.trajectory import Position, Prompts, Query

# Folded into a trajectory's key for the choice of queries and for further draws; places of tokens
# are below.
_CHOICE = 2**31 - 1
_DRAW = 2**31 - 2


def _children(config: RolloutConfig) -> int:
    """The forks that a trajectory may have."""
    return config.forks_per_trajectory * config.forks_per_query


def parent_node(node: Any, config: RolloutConfig) -> Any:
    """The row, within the tree, of the trajectory that row `node` > 0 is forked from."""
    return (node - 1) // _children(config)


def with_search(node: int, config: RolloutConfig) -> bool:
    """Whether row `node` of the tree is a fork that makes its parent's search, like its parent."""
    return node > 0 and (node - 1) % config.forks_per_query >= config.fork_draws


def draws(node: int, config: RolloutConfig) -> list[int]:
    """Which draw each of `fork_depth` ancestors of row `node` is, from the oldest, itself included;
    0: that of its parent."""
    path = []
    while node:
        place = (node - 1) % config.forks_per_query
        path.append(place if place < config.fork_draws else place - config.fork_draws + 1)
        node = parent_node(node, config)
    path += [0] * (config.fork_depth - len(path))
    return path[::-1]


def fork_keys(keys: Array, nodes: Sequence[int], config: RolloutConfig) -> Array:
    """The random keys of rows `nodes` of trees, given those of their trajectories."""
    if not config.forks or config.fork_draws == 1:
        return keys

    def key(own: Array, path: Int[Array, " D"]) -> Array:
        for draw in path:
            other = jax.random.fold_in(jax.random.fold_in(own, _DRAW), draw)
            own = jnp.where(draw > 0, other, own)
        return own

    return jax.vmap(key)(keys, jnp.array([draws(node, config) for node in nodes]))


def renumbered(parents: Int[np.ndarray, " N"], rows: Int[np.ndarray, " M"]) -> np.ndarray:
    """The parents of `rows` as places among these rows; -1 for one that is not there."""
    place = np.full(len(parents) + 1, -1)  # the last is that of -1
    place[rows] = np.arange(len(rows))
    return place[parents[rows]]


def fork(config: RolloutConfig, prompts: Prompts, state: State, asked: Bool[Array, " S"]) -> State:
    """Makes forks of the slots that just ended a query; they wait for a slot."""
    s, out, size = state.slots, state.out, config.tree_rows
    count, siblings = out.lengths.shape[0], config.forks_per_query
    keys = prompts.keys.at[s.row].get(mode="clip")
    draw = jax.vmap(
        lambda key, at: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, _CHOICE), at))
    )
    node = s.row % size
    first = node * _children(config) + 1
    new = asked & (s.query == Query.NEW)
    chosen = new & (first < size) & (draw(keys, s.length) < config.forks)
    made = chosen & (s.forks < config.forks_per_trajectory)
    row = (s.row - node + first + s.forks * siblings)[:, None] + jnp.arange(siblings)
    row = jnp.where(made[:, None], row, count)
    again = jnp.arange(siblings) >= config.fork_draws
    # A turn that is taken back is not copied.
    cut = s.turn_start if config.fork == "answer" else s.length
    begin = jnp.where(again, s.length[:, None], cut[:, None])

    def copied(rows: Array) -> Array:
        return rows.at[s.row].get(mode="fill", fill_value=0)[:, None]

    def copy(name: str, values: Array | None = None) -> Array:
        rows = getattr(out, name)
        return rows.at[row].set(copied(rows) if values is None else values, mode="drop")

    before = jnp.arange(out.tokens.shape[1]) < begin[..., None]
    names = ("tokens", "sample_logprobs", "policy_logprobs", "kept", "log_kept")
    out = out._replace(
        **{name: copy(name) for name in names},
        loss_mask=copy("loss_mask", copied(out.loss_mask) & before),
        forked=copy("forked", s.length[:, None]),
    )
    none = jnp.zeros_like(s.row)[:, None]
    at = Position(
        turn_start=s.turn_start[:, None],
        tag_state=s.tag_state[:, None],
        searches=s.searches[:, None],
        replies=s.replies[:, None],
        called=s.called[:, None],
        forks=none,
        query=jnp.where(again, Query.AGAIN, Query.COPIED)[None],
        asked=none + 1,
    )
    begins = zip(state.at, at, strict=True)
    return state._replace(
        slots=s._replace(forks=s.forks + made, query=jnp.where(new, Query.SEEN, s.query)),
        out=out,
        waiting=state.waiting.at[row].set(True, mode="drop"),
        lengths=state.lengths.at[row].set(begin, mode="drop"),
        at=Position(*(old.at[row].set(new, mode="drop") for old, new in begins)),
        forks=state.forks + siblings * made.sum(dtype=jnp.int32),
        forks_left_out=state.forks_left_out + (chosen & ~made).sum(dtype=jnp.int32),
    )


def copy_parents(config: RolloutConfig, state: State) -> State:
    """Copies the cache of every parent that is still in a slot to its forks that got one.

    A fork whose parent has left its slot is fed its tokens, like any forced text.
    """
    return lax.while_loop(
        lambda s: jnp.any(_parents(config, s)[1]), lambda s: _copy(config, s), state
    )


def _parents(config: RolloutConfig, state: State) -> tuple[Int[Array, " S"], Bool[Array, " S"]]:
    """The slot of each slot's parent, and whether its cache is to be copied."""
    s, size = state.slots, config.tree_rows
    node = s.row % size
    parent = s.row - node + parent_node(node, config)
    busy = s.phase != Phase.EMPTY
    needed = s.length - 1
    has = busy[None, :] & (s.cached[None, :] >= needed[:, None])
    same = (parent[:, None] == s.row[None, :]) & has
    # Before its reply all that a fork has is its parent's.
    new = busy & (node > 0) & (s.query >= Query.COPIED) & (s.cached < needed)
    return jnp.argmax(same, axis=1), same.any(1) & new


def _copy(config: RolloutConfig, state: State) -> State:
    leader, ready = _parents(config, state)
    slot = jnp.argmax(ready)
    return copy_slot(state, leader[slot], slot, state.slots.length[slot] - 1)
