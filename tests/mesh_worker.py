"""Saves the tokens of a rollout and the parameters after an update, on meshes of this process.

`python -m tests.mesh_worker OUT.npz DATAxFSDPxTENSOR ...`
"""

import sys
from dataclasses import replace

import jax
import numpy as np
import optax

from r1s_jax.config import MeshConfig, ModelConfig
from r1s_jax.models.sharding import make_mesh
from tests import makers

# Divides over eight devices in every way.
MODEL = ModelConfig(160, 32, 64, 2, 8, 8, 8, rope_theta=1000.0)


def on_mesh(shape: str) -> dict[str, np.ndarray]:
    """The result on a mesh: `tokens`, `lengths` and every parameter."""
    data, fsdp, tensor = map(int, shape.split("x"))
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    engine = makers.make_engine(model=MODEL, mesh=mesh)
    trajectory = makers.roll(engine).trajectory
    assert (makers.roll_in_pieces(engine).tokens == trajectory.tokens).all()
    forking = replace(makers.ROLLOUT, forks=1.0, fork_depth=2, fork_draws=2)
    forked = makers.roll(makers.make_engine(forking, model=MODEL, mesh=mesh))
    assert (forked.trajectory.tokens[forked.trunks] == trajectory.tokens).all()
    learner = makers.make_learner(optax.sgd(1.0), model=MODEL, mesh=mesh)
    batch, micro = makers.packed(makers.make_sequences(), micro_batch_rows=8)
    params, metrics = makers.step(learner, batch, micro)
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    named = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    tokens = {"tokens": trajectory.tokens, "forked tokens": forked.trajectory.tokens}
    return {**tokens, "loss": np.asarray(metrics["loss"]), **named}


if __name__ == "__main__":
    out, *shapes = sys.argv[1:]
    results = {shape: on_mesh(shape) for shape in shapes}
    np.savez(out, **{f"{s} {k}": v for s, values in results.items() for k, v in values.items()})
