"""The carry of the search loop: its slots, trajectories and KV cache.

Shapes: N trajectories and S slots of one data shard, W token columns. The carry can leave the
program and enter it again; outside, every array holds the parts of all data shards in order.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Generic, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int

from r1s_jax.config import RolloutConfig
from r1s_jax.models.kv_cache import KVCache
from r1s_jax.models.sharding import BATCH_AXES, TENSOR_AXIS
from r1s_jax.rollout.sampler import kept_width
from r1s_jax.rollout.trajectory import A, Position, Prompts, Trajectory


class Phase(IntEnum):
    """The state of a slot."""

    EMPTY = 0
    ACTIVE = 1  # has tokens to feed, or is ready to sample
    SUBMIT = 2  # just ended a query
    WAIT = 3  # the host is searching


class Slots(NamedTuple, Generic[A]):
    """Bookkeeping of the slots, each int32[S]."""

    row: A  # the trajectory in the slot; N when empty, so that writes are dropped
    length: A  # tokens so far
    cached: A  # how many of them are in the KV cache
    turn_start: A  # length when the policy's turn began
    tag_state: A  # state of the automaton that finds the end of a tag
    searches: A
    replies: A  # the system's replies to its turns: documents, and notes on invalid turns
    called: A  # whether the turn holds a call, in dialects that act at the end of a turn
    forks: A  # forks made of it
    query: A  # what is known of its query: see Query
    phase: A


class State(NamedTuple, Generic[A]):
    """The loop's carry. Counters have one entry; outside of the program, one per data shard."""

    slots: Slots[A]
    out: Trajectory[A]
    cache: KVCache
    waiting: Bool[A, " N"]  # trajectories that wait for a slot
    lengths: Int[A, " N"]  # tokens with which each begins; 0: padding, or a fork not made yet
    at: Position[A]  # where each begins
    decode_steps: Int[A, "1"]
    prefill_chunks: Int[A, "1"]
    prefill_tokens: Int[A, "1"]  # forced tokens that were computed, not copied
    busy: Int[A, "1"]  # sum over decode steps of the slots that sampled
    forks: Int[A, "1"]
    forks_left_out: Int[A, "1"]  # chosen, but the trajectory had its most forks

    @staticmethod
    def partition() -> "State[P]":
        """The PartitionSpec of every array."""
        batch, cache = P(BATCH_AXES), P(None, BATCH_AXES, TENSOR_AXIS)
        return State(
            slots=Slots(*[batch] * len(Slots._fields)),
            out=Trajectory(*[batch] * len(Trajectory._fields)),
            cache=cache,  # pyright: ignore[reportArgumentType]  # one for all its arrays
            waiting=batch,
            lengths=batch,
            at=Position(*[batch] * len(Position._fields)),
            decode_steps=batch,
            prefill_chunks=batch,
            prefill_tokens=batch,
            busy=batch,
            forks=batch,
            forks_left_out=batch,
        )


def initial(config: RolloutConfig, prompts: Prompts, cache: Callable[[int], KVCache]) -> State:
    """Every slot empty and no trajectory begun; `cache` makes a KV cache for n slots."""
    c, count = config, prompts.lengths.shape[0]
    slots = min(c.slots, count)
    # The extra columns hold a chunk or document block written near the end; cut off afterwards.
    kept = kept_width(c.temperature, c.top_p) if prompts.settings is None else 0
    out = _prompts_only(prompts, c.max_length + c.max_documents_length, kept)
    zeros, zero = jnp.zeros(slots, jnp.int32), jnp.zeros(1, jnp.int32)
    free = Slots(jnp.full(slots, count), *[zeros] * (len(Slots._fields) - 1))
    lengths = jnp.where(prompts.live, prompts.lengths, 0)
    return State(free, out, cache(slots), prompts.live, lengths, prompts.at, *[zero] * 6)


def _prompts_only(prompts: Prompts, width: int, kept: int) -> Trajectory:
    """Trajectories that hold only their prompts; nuclei have room for `kept` tokens."""
    count = prompts.lengths.shape[0]
    tokens = jnp.zeros((count, width), jnp.int32)
    blank, zeros = jnp.zeros((count, width)), jnp.zeros(count, jnp.int32)
    return Trajectory(
        tokens=lax.dynamic_update_slice(tokens, prompts.tokens, (0, 0)),
        loss_mask=blank.astype(bool),
        sample_logprobs=blank,
        policy_logprobs=blank,
        kept=jnp.full((count, width, kept), -1, jnp.int32),
        log_kept=blank,
        lengths=zeros,
        prompt_lengths=prompts.prompt_lengths,
        groups=prompts.groups,
        searches=zeros,
        finish=zeros,
        forked=zeros,
    )


def refill(prompts: Prompts, state: State) -> State:
    """Puts the next trajectories into the empty slots: forks first, the others in their order.

    An emptied slot still has the shared beginning of all prompts in its cache.
    """
    s, fork = state.slots, state.waiting & (state.out.forked > 0)
    other = state.waiting & ~fork
    empty = s.phase == Phase.EMPTY
    place = jnp.where(fork, jnp.cumsum(fork), fork.sum() + jnp.cumsum(other)) - 1
    turn = jnp.cumsum(empty) - 1
    chosen = (empty & (turn < state.waiting.sum()))[:, None] & state.waiting
    chosen &= place == turn[:, None]
    started = _started(state, jnp.argmax(chosen, axis=1).astype(jnp.int32))
    started = started._replace(cached=jnp.minimum(s.cached, prompts.shared.max()))
    slots = _where(chosen.any(1), started, s)
    return state._replace(slots=slots, waiting=state.waiting & ~chosen.any(0))


def places(prompts: Prompts, s: Slots) -> Int[Array, " S"]:
    """The position in the cache at which each slot writes next.

    An empty slot, which takes part in all passes, writes past the shared beginning that it keeps.
    """
    kept = jnp.minimum(s.cached, prompts.shared.max())
    return jnp.where(s.phase == Phase.EMPTY, kept, s.cached)


def admit(
    prompts: Prompts, state: State, new_rows: Bool[Array, " N"], ended_rows: Bool[Array, " N"]
) -> State:
    """Empties the slots of `ended_rows` and starts `new_rows`; row i is in slot i."""
    count, out = prompts.lengths.shape[0], state.out
    # Rows that begin later count as padding until then.
    lengths = jnp.where(new_rows, prompts.lengths, state.lengths)
    at = Position(*(jnp.where(new_rows, n, o) for n, o in zip(prompts.at, state.at, strict=True)))
    state = state._replace(lengths=lengths, at=at)
    slots = _where(ended_rows, _empty(count), state.slots)
    slots = _where(new_rows, _started(state, jnp.arange(count)), slots)
    blank = _prompts_only(prompts, out.tokens.shape[1], out.kept.shape[2])

    def chosen(new: Array, old: Array) -> Array:
        return jnp.where(new_rows.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    return state._replace(slots=slots, out=Trajectory(*map(chosen, blank, out)))


def _started(state: State, row: Int[Array, " S"]) -> Slots:
    """Slots that start these rows, or resume them at their positions."""
    length, at = jax.tree.map(
        lambda x: x.at[row].get(mode="fill", fill_value=0), (state.lengths, state.at)
    )
    return Slots(
        row=row,
        length=length,
        cached=jnp.zeros_like(row),
        turn_start=at.turn_start,
        tag_state=at.tag_state,
        searches=at.searches,
        replies=at.replies,
        called=at.called,
        forks=at.forks,
        query=at.query,
        phase=jnp.where(at.asked > 0, Phase.SUBMIT, Phase.ACTIVE),
    )


def _empty(rows: int) -> Slots[int]:
    return Slots(rows, *[0] * (len(Slots._fields) - 1))._replace(phase=Phase.EMPTY)


def _where(chosen: Bool[Array, " S"], new: Slots[Array] | Slots[int], old: Slots) -> Slots:
    return Slots(*(jnp.where(chosen, n, o) for n, o in zip(new, old, strict=True)))


def complete_groups(prompts: Prompts, state: State) -> Int[Array, ""]:
    """The number of groups whose trajectories have all ended. A group's rows are adjacent."""
    count = prompts.groups.shape[0]
    starts = jnp.append(True, prompts.groups[1:] != prompts.groups[:-1])
    group = jnp.cumsum(starts) - 1
    begun = state.lengths > 0
    going = begun & (state.out.finish == 0)
    live = jax.ops.segment_max(begun.astype(jnp.int32), group, count)
    unfinished = jax.ops.segment_sum(going.astype(jnp.int32), group, count)
    return ((live > 0) & (unfinished == 0)).sum(dtype=jnp.int32)


def copy_slot(state: State, source: Array, slot: Array, length: Array) -> State:
    """Copies a slot's cache to another slot, of which the first `length` tokens count."""

    def copy(buffer: Array) -> Array:
        rest = (0,) * (buffer.ndim - 2)
        size = (buffer.shape[0], 1, *buffer.shape[2:])
        own = lax.dynamic_slice(buffer, (0, source, *rest), size)
        return lax.dynamic_update_slice(buffer, own, (0, slot, *rest))

    cached = state.slots.cached.at[slot].set(length)
    cache = jax.tree.map(copy, state.cache)
    return state._replace(slots=state.slots._replace(cached=cached), cache=cache)


def take(values: Int[Array, " S"], slots: Int[Array, " R"]) -> Int[Array, " R"]:
    """`values[slots]` by comparison; the TPU compiler (libtpu 0.0.42) fails on a small gather."""
    chosen = slots[:, None] == jnp.arange(values.shape[0])
    return jnp.where(chosen, values, 0).sum(1, dtype=values.dtype)


def when(condition: Array, action: Callable[[State], State], state: State) -> State:
    """Applies `action` if `condition`, without copying the cache.

    `lax.cond` keeps its operand for the other branch, so XLA would copy the cache at every
    iteration; a `lax.while_loop` that runs at most once updates it in place.
    """
    return lax.while_loop(
        lambda carry: carry[0],
        lambda carry: (jnp.bool_(False), action(carry[1])),
        (condition, state),
    )[1]


def finish(state: State, reason: Int[Array, " S"]) -> State:
    """Ends the trajectories whose reason is not NONE and empties their slots."""
    s, out = state.slots, state.out
    done = reason > 0
    row = jnp.where(done, s.row, out.lengths.shape[0])
    out = out._replace(
        lengths=out.lengths.at[row].set(s.length, mode="drop"),
        searches=out.searches.at[row].set(s.searches, mode="drop"),
        finish=out.finish.at[row].set(reason, mode="drop"),
    )
    slots = _where(done, _empty(out.lengths.shape[0]), s)
    # The cache stays: `refill` starts from the shared beginning in it.
    return state._replace(slots=slots._replace(cached=s.cached), out=out)
