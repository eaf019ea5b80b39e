"""`r1s compile`: a recipe's real program through the compiler of hardware that is not here.

Nothing is run. Bytes come from the compiled program, FLOPs from the traced one with every loop
counted, and how often a rollout's loop turns from a stated `Workload`.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from r1s_jax.border.errors import ConfigError
from r1s_jax.config import Config, ModelConfig
from r1s_jax.kernels.attention.api import cache_dims
from r1s_jax.learning.learner import (
    LOGITS_SCOPE,
    MICRO_SCOPE,
    Learner,
    LearnerState,
    logit_chunks,
    make_optimizer,
)
from r1s_jax.learning.losses import policy_loss
from r1s_jax.learning.packing import PackedBatch
from r1s_jax.models.architectures import architecture_of
from r1s_jax.models.decoder import LAYERS_SCOPE
from r1s_jax.models.lora import is_adapter, merge_adapters, trainable
from r1s_jax.models.params import ParamSpec, param_specs
from r1s_jax.models.sharding import (
    BATCH_AXES,
    attention_impl,
    batch_sharding,
    batch_shards,
    check_divisible,
    make_mesh,
    param_shardings,
    replicated,
)
from r1s_jax.perf.costs import collective_bytes
from r1s_jax.perf.targets import CannotCompile, target_devices
from r1s_jax.rollout.loop import DECODE_SCOPE, PREFILL_SCOPE, Rollout
from r1s_jax.rollout.trajectory import Prompts
from r1s_jax.system.chips import CHIPS, Chip

_GIB = 2**30
_TAG_STATES = 64  # of the automaton that finds the ends of tags: a few dozen for any tokenizer


@dataclass(frozen=True)
class Workload:
    """What a trajectory is taken to be, in tokens: the published runs search two or three times."""

    prompt: int = 300
    sampled: int = 600
    documents: int = 1200


def compile_recipe(
    config: Config,
    topology: str,
    phase: str = "all",
    workload: Workload | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Compiles the rollout and the update of a recipe for a topology that need not exist.

    Returns `topology`, `chips`, `mesh`, `phases` (see `_report`), `fits`, `state_gib` (parameters
    and optimizer state of one device) and `assumptions`. Raises CannotCompile for an unknown
    topology, ValueError for a mesh that does not divide the model.
    """
    workload = workload or Workload()
    devices = target_devices(topology)
    mesh = make_mesh(config.mesh, devices)
    policy = config.policy
    model = architecture_of(policy).with_lora(policy.lora_rank, policy.lora_alpha)
    check_divisible(model, mesh)
    chip = CHIPS.get(devices[0].device_kind)
    if chip is None:
        raise CannotCompile(f"no figures are known for a {devices[0].device_kind}")
    programs = {"rollout": _rollout_program, "update": _update_program}
    if phase not in (*programs, "all"):
        raise ConfigError(f"phase {phase!r}: take rollout, update or all")
    learner = _learner(config, model, mesh)
    state = _abstract_state(learner, config)
    phases = {}
    for name, program in programs.items():
        if phase in (name, "all"):
            progress(f"compiling the {name} for {topology}")
            phases[name] = _report(program(config, learner, state, workload), chip)
    params, everything = _bytes(state.params), _bytes(state)
    if "rollout" in phases:  # it is handed the parameters alone; the rest waits beside it
        phases["rollout"]["resident_gib"] = (everything - params) / _GIB
    for p in phases.values():
        p["fits"] = p["peak_gib"] + p.get("resident_gib", 0.0) <= p["hbm_gib"]
    return {
        "recipe": config.name,
        "topology": topology,
        "device": devices[0].device_kind,
        "chips": len(devices),
        "mesh": dict(mesh.shape),
        "state_gib": everything / _GIB,
        "phases": phases,
        "fits": all(p["fits"] for p in phases.values()),
        "assumptions": _assumptions(config, workload, chip),
    }


@dataclass(frozen=True)
class _Program:
    """Something to compile.

    `trips` says how often each named scope runs; `chips` over how many devices the traced shapes
    are divided.
    """

    function: Callable
    arguments: tuple
    trips: dict[str, float]
    scanned: tuple[str, ...]  # of those, the ones that the traced program counts by itself
    chips: int
    memory_bytes: float  # weights, cache and optimizer state that one device moves in a run
    cache_bytes: float = 0.0
    donate: tuple[int, ...] = ()


def _report(program: _Program, chip: Chip) -> dict[str, Any]:
    """Per device: `peak_gib`, `argument_gib`, `temp_gib`, `output_gib` against `hbm_gib`; `flops`,
    `collective_gib` by kind, `memory_gib` moved, `compile_s`, and the roofline's `seconds`."""
    begin = time.perf_counter()
    traced = jax.jit(program.function, donate_argnums=program.donate).trace(*program.arguments)
    loops = {scope: n for scope, n in program.trips.items() if scope not in program.scanned}
    flops = traced_flops(traced.jaxpr.jaxpr, loops) / program.chips
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return _refused(error, program, chip, flops, time.perf_counter() - begin)
    seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    collectives = collective_bytes(compiled.as_text(), program.trips)
    peak = memory.peak_memory_in_bytes or (
        memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    )
    bounds = {
        "compute": flops / chip.tflops / 1e12,
        "memory": program.memory_bytes / chip.memory_gb_s / 1e9,
        "links": sum(collectives.values()) / chip.link_gb_s / 1e9,
    }
    return {
        "peak_gib": peak / _GIB,
        "argument_gib": memory.argument_size_in_bytes / _GIB,
        "temp_gib": memory.temp_size_in_bytes / _GIB,
        "output_gib": memory.output_size_in_bytes / _GIB,
        "cache_gib": program.cache_bytes / _GIB,
        "hbm_gib": chip.hbm_gib,
        "flops": flops,
        "memory_gib": program.memory_bytes / _GIB,
        "collective_gib": {kind: size / _GIB for kind, size in collectives.items()},
        "compile_s": seconds,
        "roofline_s": bounds | {"total": sum(bounds.values())},
    }


def _refused(
    error: Exception, program: _Program, chip: Chip, flops: float, seconds: float
) -> dict[str, Any]:
    """What is known of a program that the compiler itself found too large."""
    wanted = re.search(r"RESOURCE_EXHAUSTED.*?\(([\d.]+)G\) exceeds", str(error), re.DOTALL)
    if not wanted:
        raise error
    return {
        "peak_gib": float(wanted[1]) + _bytes(program.arguments) / _GIB,
        "argument_gib": _bytes(program.arguments) / _GIB,
        "temp_gib": float(wanted[1]),
        "cache_gib": program.cache_bytes / _GIB,
        "hbm_gib": chip.hbm_gib,
        "flops": flops,
        "memory_gib": program.memory_bytes / _GIB,
        "collective_gib": {},
        "compile_s": seconds,
        "error": str(error).splitlines()[0],
    }


def traced_flops(jaxpr: Any, trips: Mapping[str, float]) -> float:
    """Floating-point operations of matrix products, each as often as its loops turn.

    A scan counts its length; everything inside a scope of `trips` counts that often besides.
    Kernels count by their own estimate, a conditional by its costliest branch.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        stack, kind = str(eqn.source_info.name_stack), eqn.primitive.name
        entered = [scope for scope in trips if scope in stack]
        rest = {scope: n for scope, n in trips.items() if scope not in entered}
        if kind == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            size = math.prod(eqn.invars[0].aval.shape[d] for d in contract)
            flops = 2.0 * size * math.prod(eqn.outvars[0].aval.shape)
        elif kind == "pallas_call":
            flops = eqn.params["cost_estimate"].flops
        else:
            inner = [traced_flops(sub, rest) for sub in _jaxprs(eqn)]
            flops = max(inner, default=0.0) if kind == "cond" else sum(inner)
            flops *= eqn.params["length"] if kind == "scan" else 1
        total += flops * math.prod(trips[scope] for scope in entered)
    return total


def _jaxprs(eqn: Any) -> Iterator[Any]:
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def _learner(config: Config, model: ModelConfig, mesh: Mesh) -> Learner:
    dtype = np.dtype(config.policy.compute_dtype)
    loss = policy_loss(config.algorithm)
    optimizer = make_optimizer(config.optimizer)
    policy = config.policy
    return Learner(model, mesh, dtype, policy.remat, optimizer, loss, policy.attention)


def _abstract(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def _abstract_state(learner: Learner, config: Config) -> LearnerState:
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
    reference = trainable(params) if config.algorithm.kl_coefficient > 0 else None
    return LearnerState(params, optimizer, reference)


def _trajectories(config: Config) -> int:
    questions = max(config.stage1.questions_per_step, config.stage2.questions_per_step)
    return questions * config.algorithm.samples_per_question


def _rollout_program(
    config: Config, learner: Learner, state: LearnerState, workload: Workload
) -> _Program:
    """The whole search loop over one batch, its callback included."""
    c, model, mesh = config.rollout, learner.model, learner.mesh
    count, shards = _trajectories(config), batch_shards(mesh)
    rollout = Rollout(
        model=model.without_lora(),
        config=c,
        mesh=mesh,
        compute_dtype=learner.compute_dtype,
        eos_ids=(0,),
        num_tag_states=_TAG_STATES,
        exchange=_no_host,
        attention=config.policy.attention,
    )

    def by_row(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *shape), dtype, sharding=batch_sharding(mesh))

    prompts = Prompts(
        tokens=by_row(c.max_prompt_length),
        lengths=by_row(),
        groups=by_row(),
        keys=by_row(dtype=jax.random.key(0).dtype),
    )
    table = (_TAG_STATES, model.vocab_size)
    tags = jax.ShapeDtypeStruct(table, jnp.int16, sharding=replicated(mesh))
    slots = min(c.slots, count // shards)
    decode_steps = math.ceil(count / shards / slots) * workload.sampled
    # Samples of a question share its prompt; a chunk takes `prefill_rows` rows.
    forced = workload.documents + workload.prompt / config.algorithm.samples_per_question
    chunks = count / shards * forced / (c.prefill_rows * c.prefill_chunk)
    tensor = mesh.shape["tensor"]
    impl = attention_impl(config.policy.attention, mesh)
    capacity, width = cache_dims(c.max_length + c.prefill_chunk, model.head_dim, impl)
    heads = model.num_layers * model.num_kv_heads / tensor
    cache = 2 * heads * width * learner.compute_dtype.itemsize * slots  # bytes a token of each slot
    tokens = workload.prompt + workload.documents / 2 + workload.sampled / 2
    weights = _parameters(state) / tensor * learner.compute_dtype.itemsize
    return _Program(
        function=lambda p, *rest: rollout(merge_adapters(p, model.lora_scale), *rest),
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


def _no_host(*_: Any) -> np.ndarray:
    raise RuntimeError("a program that was only compiled has been run")


def _update_program(
    config: Config, learner: Learner, state: LearnerState, workload: Workload
) -> _Program:
    """One optimizer step over its share of the batch, packed rows full to the brim."""
    mesh = learner.mesh
    length = config.optimizer.pack_length or config.rollout.max_length
    rows = config.optimizer.micro_rows * batch_shards(mesh)
    sequences = _trajectories(config) // config.algorithm.updates_per_rollout
    tokens = workload.prompt + workload.sampled + workload.documents
    micro = math.ceil(sequences * tokens / (rows * length))
    shape = (math.ceil(sequences / rows), rows, length)
    sharding = NamedSharding(mesh, P(None, BATCH_AXES))
    integers = ("tokens", "segment_ids", "positions")
    batch = PackedBatch(
        **{
            name: jax.ShapeDtypeStruct(
                shape, jnp.int32 if name in integers else jnp.float32, sharding=sharding
            )
            for name in PackedBatch._fields
        }
    )
    scalar = partial(jax.ShapeDtypeStruct, (), sharding=replicated(mesh))
    parameters, chips = _parameters(state), mesh.devices.size
    # Weights are read in the forward, the recomputed and the backward pass; Adam reads and writes
    # parameters and moments, and reads gradients.
    passes = 3 if config.policy.remat == "full" else 2
    reads = passes * micro * parameters / mesh.shape["tensor"] * learner.compute_dtype.itemsize
    return _Program(
        function=partial(type(learner)._update.__wrapped__, learner),
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


def _bytes(tree: Any) -> int:
    """Bytes of one device's part of a sharded tree."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _assumptions(config: Config, workload: Workload, chip: Chip) -> dict[str, Any]:
    return {
        "trajectory_tokens": dataclasses.asdict(workload),
        "trajectories": _trajectories(config),
        "chip": dataclasses.asdict(chip),
        "roofline": "compute, memory and links one after the other at published rates; weights "
        "and cache are all that memory moves; a collective moves its result once",
    }


def advice(report: dict[str, Any]) -> str:
    """What to change when a recipe does not fit."""
    lines = []
    for name, p in report["phases"].items():
        if p["fits"]:
            continue
        needs = p["peak_gib"] + p.get("resident_gib", 0.0)
        fewer = (
            "rollout.slots or rollout.max_length"
            if name == "rollout"
            else ("optimizer.micro_rows or optimizer.pack_length (and set policy.remat=full)")
        )
        lines.append(
            f"the {name} needs {needs:.1f} GiB a chip, {p['hbm_gib']:.0f} are there: "
            f"lower {fewer}, raise mesh.tensor, or take more chips"
        )
    return "\n".join(lines)


def as_text(report: dict[str, Any]) -> str:
    """A report for a reader."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in report["mesh"].items())
    lines = [
        f"{report['recipe']} on {report['topology']}: {report['chips']} x {report['device']}",
        f"mesh: {mesh}",
        f"parameters and optimizer state: {report['state_gib']:.1f} GiB a chip",
    ]
    for name, p in report["phases"].items():
        links = sum(p["collective_gib"].values())
        beside = f" + {p['resident_gib']:.1f} waiting" if p.get("resident_gib") else ""
        if "error" in p:
            lines.append(f"{name:8} {p['error']}")
            continue
        lines.append(
            f"{name:8} peak {p['peak_gib']:.1f}{beside} of {p['hbm_gib']:.0f} GiB, "
            f"{p['flops'] / 1e12:.0f} TFLOP, {links:.1f} GiB over the links, "
            f"roofline {p['roofline_s']['total']:.1f} s, compiled in {p['compile_s']:.0f} s"
        )
    return "\n".join([*lines, "fits" if report["fits"] else "does not fit"])
