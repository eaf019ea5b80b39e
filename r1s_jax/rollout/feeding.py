"""Feeding forced tokens (prompts, documents) to the KV cache, a chunk of a few slots at a time."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from r1s_jax.config import RolloutConfig
from r1s_jax.models.decoder import Policy
from r1s_jax.rollout.state import Phase, Slots, State, copy_slot, places, take, when
from r1s_jax.rollout.trajectory import Prompts

# Scope in the compiled program of the operations that run once per chunk.
PREFILL_SCOPE = "prefill_chunk"


def behind(s: Slots) -> Array:
    """Slots with forced tokens to feed. The decode step feeds the last token of a slot."""
    return (s.phase == Phase.ACTIVE) & (s.length - s.cached > 1)


class _Copies(NamedTuple):
    """For each slot: a slot with the same beginning, and what to do about it; each [S]."""

    leader: Array  # int32: the slot to copy from
    length: Array  # int32: how many tokens
    ready: Array  # bool: the leader has cached them, so copy now
    wait: Array  # bool: the leader is computing them, so wait


def feed(config: RolloutConfig, policy: Policy, prompts: Prompts, state: State) -> State:
    """Copies the beginnings that another slot has already cached, then feeds one chunk."""
    state = lax.while_loop(
        lambda s: jnp.any(_copies(prompts, s.slots).ready), partial(_copy, prompts), state
    )
    some = jnp.any(behind(state.slots))
    return when(some, partial(_prefill, config, policy, prompts), state)


def _copies(prompts: Prompts, s: Slots) -> _Copies:
    """Copies of whole prompts within a group, and of the beginning that all prompts share.

    So the keys and values of each are computed once. A slot that may copy its whole prompt, or
    waits for it, does not copy the shorter beginning.
    """
    group = prompts.groups.at[s.row].get(mode="fill", fill_value=-1)
    prompt = prompts.prompt_lengths.at[s.row].get(mode="fill", fill_value=0)
    same = (group[:, None] == group[None, :]) & (group[:, None] >= 0)
    whole = _leaders(s, same, prompt - 1)
    beginning = _leaders(s, jnp.ones_like(same), jnp.full_like(prompt, prompts.shared.max()))
    later = whole.ready | whole.wait
    return _Copies(
        jnp.where(whole.ready, whole.leader, beginning.leader),
        jnp.where(whole.ready, whole.length, beginning.length),
        whole.ready | (beginning.ready & ~later),
        whole.wait | (beginning.wait & ~whole.ready),
    )


def _leaders(s: Slots, same: Array, length: Array) -> _Copies:
    """For each slot, the slot with the most tokens in its cache among the `same` ones.

    `length` int32[S] is the number of tokens that they have in common.
    """
    count = s.row.shape[0]
    index = jnp.arange(count)
    # Only an active slot feeds tokens; any other can lead only if it has them all.
    leads = (s.phase == Phase.ACTIVE) | (s.cached >= length)
    # Most cached first, the lower slot on a tie: one total order, so no slots wait in a circle.
    rank = s.cached * count + (count - 1 - index)
    leader = jnp.argmax(jnp.where(same & leads[None, :], rank[None, :], -1), axis=1)
    follows = behind(s) & (leader != index) & (s.cached < length)
    complete = s.cached[leader] >= length
    return _Copies(leader, length, follows & complete, follows & ~complete)


def _copy(prompts: Prompts, state: State) -> State:
    """Copies one leader's cache to the first slot that may copy."""
    copies = _copies(prompts, state.slots)
    slot = jnp.argmax(copies.ready)
    return copy_slot(state, copies.leader[slot], slot, copies.length[slot])


@jax.named_scope(PREFILL_SCOPE)
def _prefill(config: RolloutConfig, policy: Policy, prompts: Prompts, state: State) -> State:
    """Feeds the next chunk of the slots that are furthest behind."""
    c, s = config, state.slots
    must_wait = _copies(prompts, s).wait
    count = min(c.prefill_rows, s.row.shape[0])
    missing = jnp.where(behind(s) & ~must_wait, s.length - s.cached, 0)
    rows = jnp.argsort(-missing, stable=True)[:count]
    starts, trajectory = take(places(prompts, s), rows), take(s.row, rows)
    at = starts[:, None] + jnp.arange(c.prefill_chunk)
    tokens = state.out.tokens.at[trajectory[:, None], at].get(mode="fill", fill_value=0)
    _, cache = policy.prefill(tokens, rows, starts, state.cache)
    fed = jnp.clip(take(missing, rows) - 1, 0, c.prefill_chunk)
    return state._replace(
        slots=s._replace(cached=s.cached.at[rows].add(fed)),
        cache=cache,
        prefill_chunks=state.prefill_chunks + 1,
        prefill_tokens=state.prefill_tokens + fed.sum(dtype=jnp.int32),
    )
