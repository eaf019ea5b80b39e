"""The search loop inside the program: prompts in, trajectories out, in one jitted call.

A fixed number of slots works through all trajectories. Each turn of the loop refills empty slots,
exchanges queries and documents with the host, feeds forced tokens (prompts, documents) to the KV
cache in chunks, and samples one token for every slot that is ready. A slot waiting for documents
stops nobody. Every data shard runs the loop on its own trajectories with its own slots.

Shapes: N trajectories and S slots of one data shard, W token columns, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import io_callback
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from r1s_jax.config import Impl, ModelConfig, RolloutConfig
from r1s_jax.models.decoder import Policy
from r1s_jax.models.kv_cache import KVCache
from r1s_jax.models.params import Params, unstack_layers
from r1s_jax.models.sharding import BATCH_AXES, TENSOR_AXIS, attention_impl, param_partition
from r1s_jax.protocol.dialect import Dialect
from r1s_jax.protocol.solution import R1_SEARCHER
from r1s_jax.rollout.exchange import Result, Status, exchange_shape, unpack_head, unpack_result
from r1s_jax.rollout.sampler import sample
from r1s_jax.rollout.trajectory import Finish, Prompts, Trajectory

# The tags whose end the loop acts on, in the order of the tag table.
QUERY_END, ANSWER_END = 0, 1
# Names in the compiled program of what runs once a decode step, and once a chunk of forced tokens.
DECODE_SCOPE, PREFILL_SCOPE = "decode_step", "prefill_chunk"


class Phase(IntEnum):
    """What a slot is doing."""

    EMPTY = 0
    ACTIVE = 1  # has tokens to feed, or is ready to sample
    SUBMIT = 2  # just ended a query
    WAIT = 3  # the host is searching


class Slots(NamedTuple):
    """Bookkeeping of the slots, each int32[S]."""

    row: Array  # the trajectory in the slot; N when empty, so that writes fall away
    length: Array  # tokens known
    cached: Array  # of those, how many are in the KV cache
    turn_start: Array  # length when the policy's turn began
    tag_state: Array  # of the automaton that looks for the end of a tag
    searches: Array
    replies: Array  # of the system's to its turns: searches, and turns that it could not act on
    called: Array  # whether the turn asks for a search, in dialects that act at its end
    phase: Array


class State(NamedTuple):
    """The loop's carry."""

    slots: Slots
    out: Trajectory
    cache: KVCache
    next_row: Array  # first trajectory that no slot has taken yet
    decode_steps: Array
    prefill_chunks: Array


# (shard, idle, rows, submit, query tokens) -> the array of exchange.py; see broker.py.
Exchange = Callable[..., Any]


@dataclass(frozen=True)
class Rollout:
    """Everything static about the loop; call it with arrays, inside or outside of jit."""

    model: ModelConfig
    config: RolloutConfig
    mesh: Mesh
    compute_dtype: Any
    eos_ids: tuple[int, ...]
    num_tag_states: int
    exchange: Exchange
    dialect: Dialect = R1_SEARCHER
    attention: str = "auto"

    def __call__(
        self, params: Params, prompts: Prompts, tag_table: Int[Array, "Q V"]
    ) -> tuple[Trajectory, dict[str, Array]]:
        """Rolls out all prompts; N must be a multiple of the number of data shards.

        Returns the trajectories and counters of the loop (int32, one entry a data shard).
        """
        params = jax.tree.map(lambda p: p.astype(self.compute_dtype), params)
        batch = P(BATCH_AXES)
        return jax.shard_map(
            self._shard,
            mesh=self.mesh,
            in_specs=(param_partition(self.model, sampling=True), batch, P()),
            out_specs=(batch, batch),
            check_vma=False,
        )(params, prompts, tag_table)

    def _shard(self, params: Params, prompts: Prompts, tag_table: Array):
        tensor_parts = self.mesh.shape[TENSOR_AXIS]
        params = unstack_layers(params) if self._impl == "xla" else params
        policy = Policy(
            self.model,
            params,
            compute_dtype=self.compute_dtype,
            tensor_axis=TENSOR_AXIS if tensor_parts > 1 else None,
            impl=self._impl,
        )
        state = lax.while_loop(
            lambda s: jnp.any(s.slots.phase != Phase.EMPTY),
            partial(self._turn, policy, prompts, tag_table),
            self._refill(prompts, self._start(prompts, self.model.num_kv_heads // tensor_parts)),
        )
        counters = {"decode_steps": state.decode_steps, "prefill_chunks": state.prefill_chunks}
        width = self.config.max_length
        out, inside = state.out, jnp.arange(width) < state.out.lengths[:, None]
        out = out._replace(tokens=jnp.where(inside, out.tokens[:, :width], 0))
        for name in ("loss_mask", "sample_logprobs", "policy_logprobs"):
            out = out._replace(**{name: getattr(out, name)[:, :width]})
        return out, jax.tree.map(lambda c: c[None], counters)

    @property
    def _impl(self) -> Impl:
        return attention_impl(self.attention, self.mesh)

    def _turn(self, policy: Policy, prompts: Prompts, tag_table: Array, state: State) -> State:
        phase = state.slots.phase
        searching = jnp.any((phase == Phase.SUBMIT) | (phase == Phase.WAIT))
        state = _when(searching, self._search, state)
        # Forced tokens go first: a decode step costs the same however few slots take part in it.
        state = lax.while_loop(
            lambda s: jnp.any(self._behind(s.slots)),
            partial(self._feed, policy, prompts),
            state,
        )
        ready = jnp.any(state.slots.phase == Phase.ACTIVE)
        state = _when(ready, partial(self._decode, policy, prompts, tag_table), state)
        refillable = jnp.any(state.slots.phase == Phase.EMPTY) & (
            state.next_row < prompts.lengths.shape[0]
        )
        return _when(refillable, partial(self._refill, prompts), state)

    def _start(self, prompts: Prompts, kv_heads: int) -> State:
        c, count = self.config, prompts.lengths.shape[0]
        slots = min(c.slots, count)
        # Room for a whole chunk or document block written near the end; cut off afterwards.
        width = c.max_length + c.max_documents_length
        tokens = jnp.zeros((count, width), jnp.int32)
        tokens = lax.dynamic_update_slice(tokens, prompts.tokens, (0, 0))
        blank, zeros = jnp.zeros((count, width)), jnp.zeros(count, jnp.int32)
        out = Trajectory(
            tokens=tokens,
            loss_mask=blank.astype(bool),
            sample_logprobs=blank,
            policy_logprobs=blank,
            lengths=zeros,
            prompt_lengths=prompts.lengths,
            groups=prompts.groups,
            searches=zeros,
            finish=zeros,
        )
        nothing = jnp.zeros(slots, jnp.int32)
        return State(
            slots=Slots(jnp.full(slots, count), *[nothing] * 8),
            out=out,
            cache=KVCache.empty(
                self.model,
                slots,
                c.max_length + c.prefill_chunk,
                kv_heads,
                self.compute_dtype,
                self._impl,
            ),
            next_row=jnp.int32(0),
            decode_steps=jnp.int32(0),
            prefill_chunks=jnp.int32(0),
        )

    def _refill(self, prompts: Prompts, state: State) -> State:
        """Gives the next trajectories to the empty slots."""
        s, count = state.slots, prompts.lengths.shape[0]
        empty = s.phase == Phase.EMPTY
        row = state.next_row + jnp.cumsum(empty) - 1
        take = empty & (row < count)
        length = prompts.lengths.at[row].get(mode="fill", fill_value=0)
        fresh = Slots(row, length, 0, length, 0, 0, 0, 0, Phase.ACTIVE)
        slots = Slots(*(jnp.where(take, new, old) for new, old in zip(fresh, s, strict=True)))
        return state._replace(slots=slots, next_row=state.next_row + take.sum(dtype=jnp.int32))

    # Feeding forced tokens.

    def _behind(self, s: Slots) -> Array:
        """Slots with forced tokens to feed. The last known token is fed by the decode step."""
        return (s.phase == Phase.ACTIVE) & (s.length - s.cached > 1)

    def _feed(self, policy: Policy, prompts: Prompts, state: State) -> State:
        """Copies every prompt that another slot has in its cache, then feeds one chunk."""
        state = lax.while_loop(
            lambda s: jnp.any(self._prompt_leaders(prompts, s.slots)[1]),
            partial(self._copy_prompt, prompts),
            state,
        )
        behind = jnp.any(self._behind(state.slots))
        return _when(behind, partial(self._prefill, policy, prompts), state)

    def _prompt_leaders(self, prompts: Prompts, s: Slots) -> tuple[Array, Array, Array]:
        """Samples of one prompt compute its keys and values once.

        For every slot: the slot of the same group that is furthest in the prompt, whether its
        cache holds the whole prompt by now, and whether it is worth waiting for.
        """
        group = prompts.groups.at[s.row].get(mode="fill", fill_value=-1)
        prompt = prompts.lengths.at[s.row].get(mode="fill", fill_value=0)
        index = jnp.arange(group.shape[0])
        same = (group[:, None] == group[None, :]) & (group[:, None] >= 0)
        # Furthest first, the lower slot on a tie: one order for all, so nobody waits in a circle.
        rank = s.cached * group.shape[0] + (group.shape[0] - 1 - index)
        leader = jnp.argmax(jnp.where(same, rank[None, :], -1), axis=1)
        follows = self._behind(s) & (leader != index) & (s.cached < prompt - 1)
        complete = s.cached[leader] >= prompt - 1
        return leader, follows & complete, follows & ~complete

    def _copy_prompt(self, prompts: Prompts, state: State) -> State:
        """Copies one leader's cache to the first slot that follows it."""
        s, cache = state.slots, state.cache
        leader, can_copy, _ = self._prompt_leaders(prompts, s)
        slot = jnp.argmax(can_copy)
        size = (cache.k.shape[0], 1, *cache.k.shape[2:])

        def copy(buffer: Array) -> Array:
            taken = lax.dynamic_slice(buffer, (0, leader[slot], 0, 0, 0), size)
            return lax.dynamic_update_slice(buffer, taken, (0, slot, 0, 0, 0))

        cached = s.cached.at[slot].set(prompts.lengths[s.row[slot]] - 1)
        cache = KVCache(copy(cache.k), copy(cache.v))
        return state._replace(slots=s._replace(cached=cached), cache=cache)

    @jax.named_scope(PREFILL_SCOPE)
    def _prefill(self, policy: Policy, prompts: Prompts, state: State) -> State:
        """Feeds the next chunk of the slots that are furthest behind."""
        c, s = self.config, state.slots
        must_wait = self._prompt_leaders(prompts, s)[2]
        count = min(c.prefill_rows, s.row.shape[0])
        want = jnp.where(self._behind(s) & ~must_wait, s.length - s.cached, 0)
        rows = jnp.argsort(-want, stable=True)[:count]
        starts, trajectory = _take(s.cached, rows), _take(s.row, rows)
        at = starts[:, None] + jnp.arange(c.prefill_chunk)
        tokens = state.out.tokens.at[trajectory[:, None], at].get(mode="fill", fill_value=0)
        _, cache = policy.prefill(tokens, rows, starts, state.cache)
        fed = jnp.clip(_take(want, rows) - 1, 0, c.prefill_chunk)
        return state._replace(
            slots=s._replace(cached=s.cached.at[rows].add(fed)),
            cache=cache,
            prefill_chunks=state.prefill_chunks + 1,
        )

    # Sampling.

    @jax.named_scope(DECODE_SCOPE)
    def _decode(self, policy: Policy, prompts: Prompts, tag_table: Array, state: State) -> State:
        """Samples one token for every ready slot and acts on what it ended."""
        c, s, out = self.config, state.slots, state.out
        ready = s.phase == Phase.ACTIVE
        last = out.tokens.at[s.row, s.length - 1].get(mode="fill", fill_value=0)
        # Slots that are not ready take part too: what they write lies past their text.
        hidden, cache = policy.decode(last, s.cached, state.cache)
        keys = prompts.keys.at[s.row].get(mode="clip")
        uniform = jax.vmap(lambda key, at: jax.random.uniform(jax.random.fold_in(key, at)))
        token, sample_logprob, policy_logprob = sample(
            policy.logits(hidden),
            uniform(keys, s.length),
            temperature=c.temperature,
            top_p=c.top_p,
        )
        at = (jnp.where(ready, s.row, out.tokens.shape[0]), s.length)
        out = out._replace(
            tokens=out.tokens.at[at].set(token, mode="drop"),
            loss_mask=out.loss_mask.at[at].set(True, mode="drop"),
            sample_logprobs=out.sample_logprobs.at[at].set(sample_logprob, mode="drop"),
            policy_logprobs=out.policy_logprobs.at[at].set(policy_logprob, mode="drop"),
        )
        one = ready.astype(jnp.int32)
        tag_state = tag_table[s.tag_state, token].astype(jnp.int32)
        ended = jnp.where(ready, tag_state - self.num_tag_states, -1)
        s = s._replace(
            length=s.length + one,
            cached=s.cached + one,
            tag_state=jnp.where(ready & (ended < 0), tag_state, 0),
        )
        state = state._replace(out=out, cache=cache, decode_steps=state.decode_steps + 1)
        return self._end_turns(state._replace(slots=s), token, ended, ready)

    def _end_turns(self, state: State, token: Array, ended: Array, ready: Array) -> State:
        c, s, d = self.config, state.slots, self.dialect
        eos = jnp.isin(token, jnp.array(self.eos_ids, jnp.int32))
        called = s.called | (ended == QUERY_END)
        answered = (ended == ANSWER_END) & c.stop_at_answer
        out_of_tokens = (s.length - s.turn_start >= c.max_turn_length) | (s.length >= c.max_length)
        if d.acts_at_turn_end:
            query, finished = eos & (called > 0), eos & (called == 0)
        else:
            query, finished = (ended == QUERY_END) & ~eos, eos | answered
        too_many = query & (s.replies >= c.max_searches)
        if d.answers_idle_turns and d.tells_invalid:
            idle = (eos | out_of_tokens) & ~answered & ~query & (s.replies < c.max_searches)
            idle &= s.length < c.max_length
            query, finished = query | idle, finished & ~idle
        reason = jnp.select(
            [finished, too_many, query, out_of_tokens],
            [Finish.FINISHED, Finish.SEARCH_LIMIT, Finish.NONE, Finish.LENGTH],
            Finish.NONE,
        )
        slots = s._replace(
            phase=jnp.where(ready & query & ~too_many, Phase.SUBMIT, s.phase),
            called=jnp.where(ready, called, s.called),
        )
        return _finish(state._replace(slots=slots), jnp.where(ready, reason, Finish.NONE))

    # Searching.

    def _search(self, state: State) -> State:
        """Hands new queries to the host and takes the documents that are ready."""
        c, s = self.config, state.slots
        submit = s.phase == Phase.SUBMIT
        width = c.max_turn_length if self.dialect.reads_whole_turn else c.max_query_length
        back = jnp.arange(width) - width
        at = s.length[:, None] + back
        query = state.out.tokens.at[s.row[:, None], at].get(mode="fill", fill_value=0)
        query = jnp.where(at >= s.turn_start[:, None], query, -1)
        idle = ~jnp.any(s.phase == Phase.ACTIVE)
        shard = lax.axis_index(BATCH_AXES)
        rows = shard * state.out.lengths.shape[0] + s.row
        results = self._call_host(shard, idle, rows, submit, query)
        s = s._replace(phase=jnp.where(submit, Phase.WAIT, s.phase))
        count, abort = unpack_head(results)
        state = lax.fori_loop(
            0,
            count,
            lambda i, st: self._deliver(unpack_result(results, i), st),
            state._replace(slots=s),
        )
        busy = state.slots.phase != Phase.EMPTY
        state = _finish(state, jnp.where((abort > 0) & busy, Finish.ABORTED, Finish.NONE))
        next_row = jnp.where(abort > 0, state.out.lengths.shape[0], state.next_row)
        return state._replace(next_row=next_row)

    def _call_host(self, *operands: Array) -> Int[Array, "R D"]:
        shape = exchange_shape(self.config.max_documents_length)
        result = jax.ShapeDtypeStruct(shape, jnp.int32)
        if self.mesh.shape[TENSOR_AXIS] == 1:
            return io_callback(self.exchange, result, *operands, ordered=False)
        # One member of a tensor group asks; the sum hands its answer to the others.
        answer = lax.cond(
            lax.axis_index(TENSOR_AXIS) == 0,
            lambda: io_callback(self.exchange, result, *operands, ordered=False),
            lambda: jnp.zeros(shape, jnp.int32),
        )
        return lax.psum(answer, TENSOR_AXIS)

    def _deliver(self, result: Result, state: State) -> State:
        """Appends one reply to its slot, or ends the trajectory that cannot have it."""
        c, s = self.config, state.slots
        slot, status, searches, count, block = result
        found = (status != Status.ERROR) & (status != Status.BAD_QUERY)
        fits = s.length[slot] + count < c.max_length
        row = jnp.where(found & fits, s.row[slot], state.out.tokens.shape[0])
        at = s.length[slot] + jnp.arange(c.max_documents_length)
        block = jnp.where(jnp.arange(c.max_documents_length) < count, block, 0)
        tokens = state.out.tokens.at[row, at].set(block, mode="drop")
        reason = jnp.select(
            [status == Status.ERROR, status == Status.BAD_QUERY, ~fits],
            [Finish.SEARCH_ERROR, Finish.BAD_QUERY, Finish.LENGTH],
            Finish.NONE,
        )
        grown = s.length.at[slot].add(jnp.where(found & fits, count, 0))
        slots = s._replace(
            length=grown,
            turn_start=s.turn_start.at[slot].set(grown[slot]),
            tag_state=s.tag_state.at[slot].set(0),
            called=s.called.at[slot].set(0),
            searches=s.searches.at[slot].add(jnp.where(found & fits, searches, 0)),
            replies=s.replies.at[slot].add((found & fits).astype(jnp.int32)),
            phase=s.phase.at[slot].set(Phase.ACTIVE),
        )
        reasons = jnp.zeros_like(s.phase).at[slot].set(reason)
        state = state._replace(slots=slots, out=state.out._replace(tokens=tokens))
        return _finish(state, reasons)


def _take(values: Int[Array, " S"], slots: Int[Array, " R"]) -> Int[Array, " R"]:
    """`values[slots]`, compared: the TPU compiler (libtpu 0.0.42) fails on so small a gather."""
    chosen = slots[:, None] == jnp.arange(values.shape[0])
    return jnp.where(chosen, values, 0).sum(1, dtype=values.dtype)


def _when(condition: Array, action: Callable[[State], State], state: State) -> State:
    """`action` if `condition`, without copying the cache.

    A conditional must keep its operand for the other branch, and XLA then copies the cache at
    every turn; a loop that runs at most once updates it in place.
    """
    return lax.while_loop(
        lambda carry: carry[0],
        lambda carry: (jnp.bool_(False), action(carry[1])),
        (condition, state),
    )[1]


def _finish(state: State, reason: Int[Array, " S"]) -> State:
    """Ends the trajectories whose reason is not NONE and empties their slots."""
    s, out = state.slots, state.out
    done = reason > 0
    row = jnp.where(done, s.row, out.lengths.shape[0])
    out = out._replace(
        lengths=out.lengths.at[row].set(s.length, mode="drop"),
        searches=out.searches.at[row].set(s.searches, mode="drop"),
        finish=out.finish.at[row].set(reason, mode="drop"),
    )
    empty = Slots(out.lengths.shape[0], *[0] * 7, Phase.EMPTY)
    slots = Slots(*(jnp.where(done, new, old) for new, old in zip(empty, s, strict=True)))
    return state._replace(slots=slots, out=out)
