"""`r1s compile`: compiles a recipe's real program for hardware that this machine lacks.

Nothing is run. Bytes come from the compiled program, FLOPs from the traced one with every loop
counted, and trip counts of a rollout's loops from a stated `Workload`.
"""

import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

import jax

from r1s_jax.aot.costs import collective_bytes, traced_flops
from r1s_jax.aot.programs import (
    Program,
    Workload,
    abstract_state,
    device_bytes,
    make_learner,
    rollout_program,
    trajectories,
    update_program,
)
from r1s_jax.aot.targets import CannotCompile, target_devices
from r1s_jax.config import Config
from r1s_jax.io.errors import ConfigError
from r1s_jax.models.architectures import architecture_of
from r1s_jax.models.sharding import check_divisible, make_mesh
from r1s_jax.system.chips import CHIPS, Chip

_GIB = 2**30


def compile_recipe(
    config: Config,
    topology: str,
    phase: str = "all",
    workload: Workload | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Compiles the rollout and the update of a recipe for a topology that need not be present.

    Returns `topology`, `chips`, `mesh`, `phases` (see `_report`), `fits`, `state_gib` (parameters
    and optimizer state of one device) and `assumptions`. Raises CannotCompile for an unknown
    topology, ValueError for a mesh that does not divide the model.
    """
    workload, names = workload or Workload(), phases_named(phase)
    devices = target_devices(topology)
    mesh = make_mesh(config.mesh, devices)
    policy = config.policy
    model = architecture_of(policy).with_lora(policy.lora_rank, policy.lora_alpha)
    check_divisible(model, mesh)
    chip = CHIPS.get(devices[0].device_kind)
    if chip is None:
        raise CannotCompile(f"the memory and peak rates of a {devices[0].device_kind} are unknown")
    programs = {"rollout": rollout_program, "update": update_program}
    learner = make_learner(config, model, mesh)
    state = abstract_state(learner, config)
    phases = {}
    for name in names:
        progress(f"compiling the {name} for {topology}")
        phases[name] = _report(programs[name](config, learner, state, workload), chip)
    params, everything = device_bytes(state.params), device_bytes(state)
    if "rollout" in phases:  # its only argument is the parameters; the rest stays resident
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


def phases_named(phase: str) -> tuple[str, ...]:
    """The phases that `phase` names: rollout, update, or both as "all"; raises ConfigError."""
    both = ("rollout", "update")
    if phase not in (*both, "all"):
        raise ConfigError(f"phase {phase!r}: take rollout, update or all")
    return both if phase == "all" else (phase,)


def _report(program: Program, chip: Chip) -> dict[str, Any]:
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
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None  # every target's compiler gives both
    collectives = collective_bytes(text, program.trips)
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
    error: Exception, program: Program, chip: Chip, flops: float, seconds: float
) -> dict[str, Any]:
    """The report of a program that the compiler rejected as too large."""
    needed = re.search(r"RESOURCE_EXHAUSTED.*?\(([\d.]+)G\) exceeds", str(error), re.DOTALL)
    if not needed:
        raise error
    return {
        "peak_gib": float(needed[1]) + device_bytes(program.arguments) / _GIB,
        "argument_gib": device_bytes(program.arguments) / _GIB,
        "temp_gib": float(needed[1]),
        "cache_gib": program.cache_bytes / _GIB,
        "hbm_gib": chip.hbm_gib,
        "flops": flops,
        "memory_gib": program.memory_bytes / _GIB,
        "collective_gib": {},
        "compile_s": seconds,
        "error": str(error).splitlines()[0],
    }


def _assumptions(config: Config, workload: Workload, chip: Chip) -> dict[str, Any]:
    return {
        "trajectory_tokens": dataclasses.asdict(workload),
        "trajectories": trajectories(config),
        "chip": dataclasses.asdict(chip),
        "roofline": "compute, memory and links one after the other at published rates; memory "
        "moves weights and cache only; a collective moves its result once",
    }


def advice(report: dict[str, Any]) -> str:
    """What to change when a recipe does not fit."""
    lines = []
    for name, p in report["phases"].items():
        if p["fits"]:
            continue
        needs = p["peak_gib"] + p.get("resident_gib", 0.0)
        settings = (
            "rollout.slots or rollout.max_length"
            if name == "rollout"
            else ("optimizer.micro_batch_rows or optimizer.pack_length (and set policy.remat=full)")
        )
        lines.append(
            f"the {name} needs {needs:.1f} GiB a chip, {p['hbm_gib']:.0f} are there: "
            f"lower {settings}, raise mesh.tensor, or take more chips"
        )
    return "\n".join(lines)


def as_text(report: dict[str, Any]) -> str:
    """The report as text."""
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
