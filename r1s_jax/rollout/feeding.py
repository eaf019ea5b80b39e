"""Feeding forced tokens (prompts, documents) to the KV cache, a chunk of a few slots at a time."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from r1s_jax.config import RolloutConfig
from r1s_jax.models.decoder import Policy
from r1s_jax.rollout.state import Phase, Slots, State, take, when
from r1s_jax.rollout.trajectory import Prompts

# Scope in the compiled program of the operations that run once per chunk.
PREFILL_SCOPE = "prefill_chunk"


def behind(s: Slots) -> Array:
    """Slots with forced tokens to feed. The decode step feeds the last token of a slot."""
    return (s.phase == Phase.ACTIVE) & (s.length - s.cached > 1)


def feed(config: RolloutConfig, policy: Policy, prompts: Prompts, state: State) -> State:
    """Copies each prompt that another slot has already cached, then feeds one chunk."""
    state = lax.while_loop(
        lambda s: jnp.any(_prompt_leaders(prompts, s.slots)[1]),
        partial(_copy_prompt, prompts),
        state,
    )
    some = jnp.any(behind(state.slots))
    return when(some, partial(_prefill, config, policy, prompts), state)


def _prompt_leaders(prompts: Prompts, s: Slots) -> tuple[Array, Array, Array]:
    """Finds, for each slot, a slot of the same group (its leader) that prefills their prompt.

    Returns for every slot: the leader, which has the most of the prompt in its cache; whether the
    slot can copy the whole prompt from the leader now; whether the slot must wait for the leader.
    So samples of one prompt compute its keys and values once.
    """
    group = prompts.groups.at[s.row].get(mode="fill", fill_value=-1)
    prompt = prompts.prompt_lengths.at[s.row].get(mode="fill", fill_value=0)
    index = jnp.arange(group.shape[0])
    # A slot that waits for documents feeds nothing, so it can lead only with a whole prompt.
    leads = (s.phase == Phase.ACTIVE) | (s.cached >= prompt - 1)
    same = (group[:, None] == group[None, :]) & (group[:, None] >= 0) & leads[None, :]
    # Most cached first, the lower slot on a tie: one total order, so no slots wait in a circle.
    rank = s.cached * group.shape[0] + (group.shape[0] - 1 - index)
    leader = jnp.argmax(jnp.where(same, rank[None, :], -1), axis=1)
    follows = behind(s) & (leader != index) & (s.cached < prompt - 1)
    complete = s.cached[leader] >= prompt - 1
    return leader, follows & complete, follows & ~complete


def _copy_prompt(prompts: Prompts, state: State) -> State:
    """Copies one leader's cache to the first slot that follows it."""
    s, cache = state.slots, state.cache
    leader, can_copy, _ = _prompt_leaders(prompts, s)
    slot = jnp.argmax(can_copy)

    def copy(buffer: Array) -> Array:
        rest = (0,) * (buffer.ndim - 2)
        size = (buffer.shape[0], 1, *buffer.shape[2:])
        source = lax.dynamic_slice(buffer, (0, leader[slot], *rest), size)
        return lax.dynamic_update_slice(buffer, source, (0, slot, *rest))

    cached = s.cached.at[slot].set(prompts.prompt_lengths[s.row[slot]] - 1)
    cache = jax.tree.map(copy, cache)
    return state._replace(slots=s._replace(cached=cached), cache=cache)


@jax.named_scope(PREFILL_SCOPE)
def _prefill(config: RolloutConfig, policy: Policy, prompts: Prompts, state: State) -> State:
    """Feeds the next chunk of the slots that are furthest behind."""
    c, s = config, state.slots
    must_wait = _prompt_leaders(prompts, s)[2]
    count = min(c.prefill_rows, s.row.shape[0])
    missing = jnp.where(behind(s) & ~must_wait, s.length - s.cached, 0)
    rows = jnp.argsort(-missing, stable=True)[:count]
    starts, trajectory = take(s.cached, rows), take(s.row, rows)
    at = starts[:, None] + jnp.arange(c.prefill_chunk)
    tokens = state.out.tokens.at[trajectory[:, None], at].get(mode="fill", fill_value=0)
    _, cache = policy.prefill(tokens, rows, starts, state.cache)
    fed = jnp.clip(take(missing, rows) - 1, 0, c.prefill_chunk)
    return state._replace(
        slots=s._replace(cached=s.cached.at[rows].add(fed)),
        cache=cache,
        prefill_chunks=state.prefill_chunks + 1,
    )
