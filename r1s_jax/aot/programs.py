"""The programs of a run as shapes on a mesh, ready to compile, with the trip counts of their loops.

A rollout's trip counts follow from a stated `Workload`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from r1s_jax.config import Config, ModelConfig
from r1s_jax.kernels.attention.api import cache_dims
from r1s_jax.learning.learner import MICRO_SCOPE, Learner, LearnerState, make_optimizer
from r1s_jax.learning.logprobs import LOGITS_SCOPE, logit_chunks
from r1s_jax.learning.losses import policy_loss
from r1s_jax.learning.micro_batch_rows import most_rows, packed_shapes
from r1s_jax.learning.packing import row_length
from r1s_jax.models.decoder import LAYERS_SCOPE
from r1s_jax.models.lora import is_adapter, trainable
from r1s_jax.models.params import ParamSpec, param_specs
from r1s_jax.models.sharding import (
    attention_impl,
    batch_sharding,
    batch_shards,
    param_shardings,
    replicated,
)
from r1s_jax.protocol.dialects import make_dialect
from r1s_jax.rollout.feeding import PREFILL_SCOPE
from r1s_jax.rollout.loop import DECODE_SCOPE, Rollout
from r1s_jax.rollout.sampler import kept_width
from r1s_jax.rollout.trajectory import Position, Prompts
from r1s_jax.system.dtype import AUTO

_TAG_STATES = 64  # of the automaton that finds ends of tags; any tokenizer needs a few dozen


@dataclass(frozen=True)
class Workload:
    """Assumed tokens of a trajectory; the published runs search two or three times in one."""

    prompt: int = 300
    sampled: int = 600
    documents: int = 1200


@dataclass(frozen=True)
class Program:
    """A function to compile.

    `trips` is how often each named scope runs; `chips` is the number of devices over which the
    traced shapes are divided.
    """

    function: Callable
    arguments: tuple
    trips: dict[str, float]
    scanned: tuple[str, ...]  # the scopes of `trips` that the traced program counts by itself
    chips: int
    memory_bytes: float  # weights, cache and optimizer state that one device moves in a run
    cache_bytes: float = 0.0
    donate: tuple[int, ...] = ()


def make_learner(config: Config, model: ModelConfig, mesh: Mesh) -> Learner:
    """The learner of a recipe on a mesh whose devices need not be present."""
    optimizer, loss = make_optimizer(config.optimizer), policy_loss(config.algorithm)
    policy = config.policy
    if policy.compute_dtype == AUTO:  # this machine is not the target
        policy = replace(policy, compute_dtype="bfloat16")
    return Learner.of(policy, model, mesh, optimizer, loss)


def _abstract(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def abstract_state(learner: Learner, config: Config) -> LearnerState:
    """The learner's state as shapes on the mesh."""
    dtype = np.dtype(config.policy.param_dtype)
    shapes = jax.tree_util.tree_map_with_path(
        lambda path, spec: jax.ShapeDtypeStruct(
            spec.shape, np.float32 if is_adapter(path[-1].key) else dtype
        ),
        param_specs(learner.model),
        is_leaf=lambda x: isinstance(x, ParamSpec),
    )
    params = _abstract(shapes, param_shardings(learner.model, learner.mesh))
    moments = jax.eval_shape(learner.optimizer.init, trainable(params))
    optimizer = _abstract(moments, learner.optimizer_shardings(params))
    reference = trainable(params) if config.algorithm.keeps_reference else None
    return LearnerState(params, optimizer, reference)


def trajectories(config: Config) -> int:
    questions = max(config.stage1.questions_per_step, config.stage2.questions_per_step)
    return questions * config.algorithm.samples_per_question


def rollout_program(
    config: Config, learner: Learner, state: LearnerState, workload: Workload
) -> Program:
    """The whole search loop over one batch, its callback included."""
    c, model, mesh = config.rollout, learner.model, learner.mesh
    count, shards = trajectories(config), batch_shards(mesh)
    rollout = Rollout(
        model=model,
        config=c,
        mesh=mesh,
        compute_dtype=learner.compute_dtype,
        eos_ids=(0,),
        num_tag_states=_TAG_STATES,
        dialect=make_dialect(config.protocol.dialect),
        attention=config.policy.attention,
    )

    prompts = _prompts(config, mesh)
    table = (_TAG_STATES, model.vocab_size)
    tags = jax.ShapeDtypeStruct(table, jnp.int16, sharding=replicated(mesh))
    slots = min(c.slots, prompts.lengths.shape[0] // shards)
    # Trajectories per slot: with partial rollouts, no slot waits for the last one of the others.
    per_slot = count / shards / slots
    decode_steps = (per_slot if c.partial_rollouts else math.ceil(per_slot)) * workload.sampled
    # Samples of a question share its prompt; a chunk takes `prefill_rows` rows.
    forced = workload.documents + workload.prompt / config.algorithm.samples_per_question
    chunks = count / shards * forced / (c.prefill_rows * c.prefill_chunk)
    tensor = mesh.shape["tensor"]
    impl = attention_impl(config.policy.attention, mesh)
    capacity, width = cache_dims(c.max_length + c.prefill_chunk, model.head_dim, impl)
    heads = model.num_layers * model.num_kv_heads / tensor
    # In int8, each token and head also has a float32 scale.
    entry = width + 4 if c.cache_dtype == "int8" else width * learner.compute_dtype.itemsize
    cache = 2 * heads * entry * slots  # bytes of one token in every slot
    tokens = workload.prompt + workload.documents / 2 + workload.sampled / 2
    weights = _parameters(state) / tensor * learner.compute_dtype.itemsize
    return Program(
        function=rollout,
        arguments=(state.params, prompts, tags),
        trips={
            DECODE_SCOPE: decode_steps,
            PREFILL_SCOPE: chunks,
            LAYERS_SCOPE: model.num_layers,
        },
        scanned=(LAYERS_SCOPE,),
        chips=1,  # inside shard_map the shapes are those of one device
        memory_bytes=(decode_steps + chunks) * weights + decode_steps * cache * tokens,
        cache_bytes=cache * capacity,
    )


def _prompts(config: Config, mesh: Mesh) -> Prompts[jax.ShapeDtypeStruct]:
    """The inputs of a rollout as shapes on the mesh."""
    c, count = config.rollout, trajectories(config)
    # With partial rollouts, twice as many trajectories are in flight as a step learns from, each
    # with its text so far.
    rows, columns = (
        (2 * count, c.max_length) if c.partial_rollouts else (count, c.max_prompt_length)
    )

    rows *= c.tree_rows

    def by_row(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=batch_sharding(mesh))

    return Prompts(
        tokens=by_row(columns),
        lengths=by_row(),
        prompt_lengths=by_row(),
        limits=by_row(),
        groups=by_row(),
        shared=by_row(),
        keys=by_row(dtype=jax.random.key(0).dtype),
        broker=by_row(),
        live=by_row(dtype=bool),
        at=Position(*[by_row()] * len(Position._fields)),
    )


def update_program(
    config: Config, learner: Learner, state: LearnerState, workload: Workload
) -> Program:
    """One optimizer step over its share of the batch, all packed rows full."""
    mesh = learner.mesh
    length = row_length(config)
    shards = batch_shards(mesh)
    sequences = trajectories(config) // config.algorithm.updates_per_rollout
    per_shard = config.optimizer.micro_batch_rows or most_rows(config, sequences, shards)
    rows = per_shard * shards
    # As many samples of a question as a row holds share its prompt.
    own = workload.sampled + workload.documents
    sharing = max(1, min((length - workload.prompt) // own, config.algorithm.samples_per_question))
    tokens = own + workload.prompt / sharing
    micro = math.ceil(sequences * tokens / (rows * length))
    kept = kept_width(config.rollout.temperature, config.rollout.top_p)
    batch = packed_shapes(learner, sequences, per_shard, length, kept)
    scalar = partial(jax.ShapeDtypeStruct, (), sharding=replicated(mesh))
    parameters, chips = _parameters(state), mesh.devices.size
    # Weights are read in the forward, the recomputed and the backward pass; Adam reads and writes
    # parameters and moments, and reads gradients.
    passes = 3 if config.policy.remat == "full" else 2
    reads = passes * micro * parameters / mesh.shape["tensor"] * learner.compute_dtype.itemsize
    return Program(
        function=learner.update_step,
        arguments=(state, batch, scalar(jnp.int32), scalar(jnp.float32)),
        trips={
            MICRO_SCOPE: micro,
            LAYERS_SCOPE: learner.model.num_layers,
            LOGITS_SCOPE: logit_chunks(length),
        },
        scanned=(LAYERS_SCOPE, LOGITS_SCOPE),
        chips=chips,
        memory_bytes=reads + 7 * 4 * parameters / chips,
        donate=(0,),
    )


def _parameters(state: LearnerState) -> int:
    return sum(math.prod(p.shape) for p in jax.tree.leaves(state.params))


def device_bytes(tree: Any) -> int:
    """Bytes of one device's part of a sharded tree."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
