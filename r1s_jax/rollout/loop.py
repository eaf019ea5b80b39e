"""The search loop inside the program: prompts in, trajectories out, in one jitted call.

A fixed number of slots works through all trajectories. Each iteration refills empty slots,
exchanges queries and documents with the host, feeds forced tokens (prompts, documents) to the KV
cache in chunks, and samples one token for every slot that is ready. A slot that waits for documents
stops no other slot. Every data shard runs the loop on its own trajectories with its own slots.

Shapes: N trajectories and S slots of one data shard, W token columns, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import io_callback
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from r1s_jax.config import Attention, Impl, ModelConfig, RolloutConfig
from r1s_jax.kernels.tuning import Tuning
from r1s_jax.models.decoder import Policy
from r1s_jax.models.kv_cache import KVCache
from r1s_jax.models.params import Params, as_computed, unstack_layers
from r1s_jax.models.sharding import (
    BATCH_AXES,
    TENSOR_AXIS,
    attention_impl,
    mesh_tuning,
    sampling_partition,
)
from r1s_jax.protocol.dialect import Dialect
from r1s_jax.protocol.solution import R1_SEARCHER
from r1s_jax.rollout.broker import exchange
from r1s_jax.rollout.callback_arrays import (
    Result,
    Status,
    callback_shape,
    unpack_head,
    unpack_result,
)
from r1s_jax.rollout.feeding import behind, feed
from r1s_jax.rollout.forks import copy_parents, fork
from r1s_jax.rollout.lookup import lookup
from r1s_jax.rollout.sampler import sample, sample_each
from r1s_jax.rollout.state import (
    Phase,
    State,
    admit,
    complete_groups,
    finish,
    initial,
    places,
    refill,
    when,
)
from r1s_jax.rollout.trajectory import Finish, Prompts, Query, Trajectory

# Indices in the tag table of the tags whose end the loop acts on.
QUERY_END, ANSWER_END = 0, 1
# Scope in the compiled program of the operations that run once per decode step.
DECODE_SCOPE = "decode_step"
_NEVER = 2**30


class Until(NamedTuple):
    """When to leave the loop early: at the first limit reached, each data shard for itself.

    int32[] each: decode steps of this entry, complete groups, iterations of this entry. An
    iteration in which every slot waits for documents has no decode step.
    """

    steps: Array | int = _NEVER
    groups: Array | int = _NEVER
    iterations: Array | int = _NEVER


_TO_THE_END = Until()


@dataclass(frozen=True)
class Rollout:
    """The search loop and its static settings; call it with arrays, inside or outside of jit."""

    model: ModelConfig
    config: RolloutConfig
    mesh: Mesh
    compute_dtype: Any
    eos_ids: tuple[int, ...]
    num_tag_states: int
    dialect: Dialect = R1_SEARCHER
    attention: Attention = "auto"

    def __call__(
        self, params: Params, prompts: Prompts, tag_table: Int[Array, "Q V"]
    ) -> tuple[Trajectory, dict[str, Array]]:
        """Rolls out all prompts; N must be a multiple of the number of data shards.

        Returns the trajectories and the loop's counters (int32, one entry per data shard).
        """
        state = self.run(self.prepare(params), prompts, tag_table, self.start(prompts))
        return self.results(state)

    def prepare(self, params: Params) -> Params:
        """Parameters in the form that `run` takes, for one call of it or many."""
        params = as_computed(params, self.compute_dtype)
        if not self._tuning.unstack:
            return params
        stacked = sampling_partition(self.model)
        return self._on_shards(unstack_layers, (stacked,), self._partition)(params)

    def start(self, prompts: Prompts) -> State:
        """The state before the first iteration."""
        heads = self.model.num_kv_heads // self.mesh.shape[TENSOR_AXIS]
        c = self.config
        capacity = c.max_length + max(c.prefill_chunk, c.speculative_tokens + 1)

        def cache(slots: int) -> KVCache:
            dtype = self._tuning.cache_dtype or self.compute_dtype
            quantized = c.cache_dtype == "int8"
            sizes = self.model, slots, capacity, heads
            return KVCache.empty(*sizes, dtype, self._impl, quantized=quantized)

        def begin(prompts: Prompts) -> State:
            return refill(prompts, initial(c, prompts, cache))

        return self._on_shards(begin, (P(BATCH_AXES),), State.partition())(prompts)

    def run(
        self,
        params: Params,
        prompts: Prompts,
        tag_table: Int[Array, "Q V"],
        state: State,
        until: Until = _TO_THE_END,
    ) -> State:
        """Continues the loop to its end, or to `until`; `params` are those of `prepare`.

        Leaving the loop changes no token: the broker keeps pending searches and answers them when
        the loop is entered again with the returned state.
        """
        batch = P(BATCH_AXES)
        until = jax.tree.map(jnp.int32, until)
        return self._on_shards(
            self._shard, (self._partition, batch, P(), State.partition(), P()), State.partition()
        )(params, prompts, tag_table, state, until)

    def admit(
        self,
        prompts: Prompts,
        state: State,
        new_rows: Bool[Array, " N"],
        ended_rows: Bool[Array, " N"],
    ) -> State:
        """Between two entries: starts `new_rows` of `prompts` and empties `ended_rows`.

        For loops with a slot for every trajectory: row i is in slot i. The earlier content of the
        slots of these rows is lost.
        """
        batch = P(BATCH_AXES)
        inputs = batch, State.partition(), batch, batch
        admit_rows = self._on_shards(admit, inputs, State.partition())
        return admit_rows(prompts, state, new_rows, ended_rows)

    def results(self, state: State) -> tuple[Trajectory, dict[str, Array]]:
        """The trajectories, finished or not, and the counters."""

        def cut(state: State) -> Trajectory:
            s, width = state.slots, self.config.max_length
            lengths = jnp.where(state.waiting, state.lengths, state.out.lengths)
            lengths = lengths.at[s.row].set(s.length, mode="drop")
            out = state.out._replace(lengths=lengths)
            inside = jnp.arange(width) < lengths[:, None]
            out = out._replace(tokens=jnp.where(inside, out.tokens[:, :width], 0))
            for name in ("loss_mask", "sample_logprobs", "policy_logprobs", "kept", "log_kept"):
                out = out._replace(**{name: getattr(out, name)[:, :width]})
            return out

        shards = state.busy.shape[0]
        counters = {
            "decode_steps": state.decode_steps,
            "prefill_chunks": state.prefill_chunks,
            "prefill_tokens": state.prefill_tokens,
            "busy": state.busy,
            **self._fork_counters(state),
            "room": state.decode_steps * (state.slots.row.shape[0] // shards),
        }
        out = self._on_shards(cut, (State.partition(),), P(BATCH_AXES))(state)
        return out, counters

    def _fork_counters(self, state: State) -> dict[str, Array]:
        names = ("forks", "forks_left_out") if self.config.forks else ()
        return {name: getattr(state, name) for name in names}

    def _on_shards(self, function: Callable, inputs: Any, outputs: Any) -> Callable:
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False
        )

    def _shard(
        self, params: Params, prompts: Prompts, tag_table: Array, state: State, until: Until
    ) -> State:
        policy = Policy(
            self.model,
            params,
            compute_dtype=self.compute_dtype,
            tensor_axis=TENSOR_AXIS if self.mesh.shape[TENSOR_AXIS] > 1 else None,
            impl=self._impl,
            tuning=self._tuning,
        )
        last_step = state.decode_steps + until.steps

        def goes_on(carry: tuple[Array, State]) -> Array:
            iteration, s = carry
            busy = jnp.any(s.slots.phase != Phase.EMPTY) & (iteration < until.iterations)
            early = (s.decode_steps >= last_step) | (complete_groups(prompts, s) >= until.groups)
            return busy & ~early[0]

        def iterate(carry: tuple[Array, State]) -> tuple[Array, State]:
            return carry[0] + 1, self._iteration(policy, prompts, tag_table, carry[1])

        return lax.while_loop(goes_on, iterate, (jnp.int32(0), state))[1]

    @property
    def _partition(self) -> Params:
        """The PartitionSpec of prepared parameters."""
        return sampling_partition(self.model, unstacked=self._tuning.unstack)

    @property
    def _impl(self) -> Impl:
        return attention_impl(self.attention, self.mesh)

    @property
    def _tuning(self) -> Tuning:
        return mesh_tuning(self.mesh)

    def _iteration(self, policy: Policy, prompts: Prompts, tag_table: Array, state: State) -> State:
        phase = state.slots.phase
        searching = jnp.any((phase == Phase.SUBMIT) | (phase == Phase.WAIT))
        state = when(searching, partial(self._search, prompts), state)
        # Forced tokens first: a decode step costs the same for few slots as for many.
        state = lax.while_loop(
            lambda s: jnp.any(behind(s.slots)),
            partial(feed, self.config, policy, prompts),
            state,
        )
        ready = jnp.any(state.slots.phase == Phase.ACTIVE)
        state = when(ready, partial(self._decode, policy, prompts, tag_table), state)
        refillable = jnp.any(state.waiting) & jnp.any(state.slots.phase == Phase.EMPTY)
        state = when(refillable, partial(refill, prompts), state)
        return copy_parents(self.config, state) if self.config.forks else state

    # Sampling.

    @jax.named_scope(DECODE_SCOPE)
    def _decode(self, policy: Policy, prompts: Prompts, tag_table: Array, state: State) -> State:
        """Samples the next token of every ready slot and verifies its speculative tokens."""
        s, out, speculative_tokens = state.slots, state.out, self.config.speculative_tokens
        ready = s.phase == Phase.ACTIVE
        fed = out.tokens.at[s.row, s.length - 1].get(mode="fill", fill_value=0)[:, None]
        proposed = fed[:, :0]
        if speculative_tokens:
            text = out.tokens.at[s.row].get(mode="fill", fill_value=0)
            proposed = lookup(text, s.length, speculative_tokens)
            fed = jnp.concatenate([fed, proposed], axis=1)
        # Slots that are not ready take part too; they write to the cache past their text.
        hidden, cache = policy.decode(fed, places(prompts, s), state.cache)
        state = state._replace(
            cache=cache,
            decode_steps=state.decode_steps + 1,
            busy=state.busy + ready.sum(dtype=jnp.int32),
        )
        sample_at = partial(self._sample, prompts, tag_table, policy.logits(hidden))
        state, token = sample_at(0, ready, state)

        def verify(j: Array, carry: tuple) -> tuple:
            state, token, accepted = carry
            # The cache holds the proposed tokens, so logits after an accepted one are exact.
            accepted &= (state.slots.phase == Phase.ACTIVE) & (token == proposed[:, j - 1])
            return *sample_at(j, accepted, state), accepted

        if speculative_tokens:
            state, *_ = lax.fori_loop(1, speculative_tokens + 1, verify, (state, token, ready))
        return state

    def _sample(
        self,
        prompts: Prompts,
        tag_table: Array,
        logits: Float[Array, "S T V"],
        column: Array | int,
        ready: Bool[Array, " S"],
        state: State,
    ) -> tuple[State, Int[Array, " S"]]:
        """Samples from a column of logits for the ready slots, and ends turns and trajectories."""
        c, s, out = self.config, state.slots, state.out
        keys = prompts.keys.at[s.row].get(mode="clip")
        draw = jax.vmap(lambda key, at: jax.random.uniform(jax.random.fold_in(key, at)))
        logits, uniform = logits[:, column], draw(keys, s.length)
        if prompts.settings is None:
            drawn = sample(logits, uniform, temperature=c.temperature, top_p=c.top_p)
        else:
            settings = jax.tree.map(lambda x: x.at[s.row].get(mode="clip"), prompts.settings)
            drawn = sample_each(logits, uniform, *settings)
        at = (jnp.where(ready, s.row, out.tokens.shape[0]), s.length)
        out = out._replace(
            tokens=out.tokens.at[at].set(drawn.token, mode="drop"),
            loss_mask=out.loss_mask.at[at].set(True, mode="drop"),
            sample_logprobs=out.sample_logprobs.at[at].set(drawn.sample_logprob, mode="drop"),
            policy_logprobs=out.policy_logprobs.at[at].set(drawn.policy_logprob, mode="drop"),
        )
        if out.kept.shape[-1]:
            out = out._replace(
                kept=out.kept.at[at].set(drawn.kept, mode="drop"),
                log_kept=out.log_kept.at[at].set(drawn.log_kept, mode="drop"),
            )
        token = drawn.token
        one = ready.astype(jnp.int32)
        tag_state = tag_table[s.tag_state, token].astype(jnp.int32)
        ended = jnp.where(ready, tag_state - self.num_tag_states, -1)
        s = s._replace(
            length=s.length + one,
            cached=s.cached + one,
            tag_state=jnp.where(ready & (ended >= 0), 0, jnp.where(ready, tag_state, s.tag_state)),
        )
        state = state._replace(slots=s, out=out)
        return self._end_turns(prompts, state, token, ended, ready), token

    def _end_turns(
        self, prompts: Prompts, state: State, token: Array, ended: Array, ready: Array
    ) -> State:
        c, s, d = self.config, state.slots, self.dialect
        eos = jnp.isin(token, jnp.array(self.eos_ids, jnp.int32))
        called = s.called | (ended == QUERY_END)
        answered = ended == ANSWER_END
        limit = prompts.limits.at[s.row].get(mode="fill", fill_value=0)
        limit = jnp.minimum(limit, c.max_length)
        out_of_tokens = (s.length - s.turn_start >= c.max_turn_length) | (s.length >= limit)
        if d.acts_at_turn_end:
            query, finished = eos & (called > 0), eos & (called == 0)
        else:
            query, finished = (ended == QUERY_END) & ~eos, eos | answered
        too_many = query & (s.replies >= c.max_searches)
        if d.answers_idle_turns and d.tells_invalid:
            idle = (eos | out_of_tokens) & ~answered & ~query & (s.replies < c.max_searches)
            idle &= s.length < limit
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
        return finish(state._replace(slots=slots), jnp.where(ready, reason, Finish.NONE))

    # Searching.

    def _search(self, prompts: Prompts, state: State) -> State:
        """Hands new queries to the host and takes the documents that are ready."""
        c, s = self.config, state.slots
        submit = s.phase == Phase.SUBMIT
        if c.forks:
            state = fork(c, prompts, state, submit)
            s = state.slots
        width = c.max_turn_length if self.dialect.reads_whole_turn else c.max_query_length
        back = jnp.arange(width) - width
        at = s.length[:, None] + back
        query = state.out.tokens.at[s.row[:, None], at].get(mode="fill", fill_value=0)
        query = jnp.where(at >= s.turn_start[:, None], query, -1)
        idle = ~jnp.any(s.phase == Phase.ACTIVE)
        shard = lax.axis_index(BATCH_AXES)
        rows = shard * state.out.lengths.shape[0] + s.row
        turns = (s.query == Query.COPIED, s.replies) if c.forks else ()
        results = self._call_host(prompts.broker[0], shard, idle, rows, submit, query, *turns)
        s = s._replace(phase=jnp.where(submit, Phase.WAIT, s.phase))
        count, abort = unpack_head(results)
        state = lax.fori_loop(
            0,
            count,
            lambda i, st: self._deliver(unpack_result(results, i), st),
            state._replace(slots=s),
        )
        busy = state.slots.phase != Phase.EMPTY
        state = finish(state, jnp.where((abort > 0) & busy, Finish.ABORTED, Finish.NONE))
        return state._replace(waiting=state.waiting & (abort == 0))

    def _call_host(self, *operands: Array) -> Int[Array, "R D"]:
        shape = callback_shape(self.config.max_documents_length)
        result = jax.ShapeDtypeStruct(shape, jnp.int32)
        if self.mesh.shape[TENSOR_AXIS] == 1:
            return io_callback(exchange, result, *operands, ordered=False)
        # One member of a tensor group calls the host; the sum gives its result to the others.
        answer = lax.cond(
            lax.axis_index(TENSOR_AXIS) == 0,
            lambda: io_callback(exchange, result, *operands, ordered=False),
            lambda: jnp.zeros(shape, jnp.int32),
        )
        return lax.psum(answer, TENSOR_AXIS)

    def _deliver(self, result: Result, state: State) -> State:
        """Appends one reply to its slot, or ends the trajectory if it cannot."""
        c, s = self.config, state.slots
        slot, status, searches, count, block = result
        answered = (status != Status.ERROR) & (status != Status.BAD_QUERY)
        replied = answered & (status != Status.TAKEN_BACK)
        fits = s.length[slot] + count < c.max_length
        row = jnp.where(answered & fits, s.row[slot], state.out.tokens.shape[0])
        at = s.length[slot] + jnp.arange(c.max_documents_length)
        block = jnp.where(jnp.arange(c.max_documents_length) < count, block, 0)
        tokens = state.out.tokens.at[row, at].set(block, mode="drop")
        reason = jnp.select(
            [status == Status.ERROR, status == Status.BAD_QUERY, ~fits],
            [Finish.SEARCH_ERROR, Finish.BAD_QUERY, Finish.LENGTH],
            Finish.NONE,
        )
        grown = s.length.at[slot].add(jnp.where(answered & fits, count, 0))
        slots = s._replace(
            length=grown,
            turn_start=s.turn_start.at[slot].set(grown[slot]),
            tag_state=s.tag_state.at[slot].set(0),
            called=s.called.at[slot].set(0),
            searches=s.searches.at[slot].add(jnp.where(answered & fits, searches, 0)),
            replies=s.replies.at[slot].add((replied & fits).astype(jnp.int32)),
            query=s.query.at[slot].set(Query.NEW),
            phase=s.phase.at[slot].set(Phase.ACTIVE),
        )
        reasons = jnp.zeros_like(s.phase).at[slot].set(reason)
        state = state._replace(slots=slots, out=state.out._replace(tokens=tokens))
        return finish(state, reasons)
