"""Saving and restoring a run with Orbax: parameters, optimizer state and where the run stands."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from r1s_jax.model import ModelConfig, Params, ParamSpec, param_specs
from r1s_jax.update import LearnerState


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read."""


class Checkpoints:
    """The newest checkpoints of a run, written in the background.

    A checkpoint appears whole or not at all: Orbax writes beside it and renames. `index` grows
    through the whole run, cold start included.
    """

    def __init__(self, directory: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(directory.resolve(), options=options)
        self._directory = directory

    def save(self, index: int, state: LearnerState, progress: Mapping[str, Any]) -> None:
        """Starts saving. A failure to write shows at the latest in `wait`.

        Raises CheckpointError (a full disk, say); the checkpoints before are kept.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(dict(progress))
        )
        self._guard(lambda: self._manager.save(index, args=args, force=True))

    def wait(self) -> None:
        """Blocks until what was saved is on disk. Raises CheckpointError if it is not."""
        self._guard(self._manager.wait_until_finished)

    def close(self) -> None:
        self._guard(self._manager.close)

    def progress(self) -> dict[str, Any] | None:
        """Where the newest checkpoint stands; None when there is none."""
        if self._manager.latest_step() is None:
            return None
        args = ocp.args.Composite(progress=ocp.args.JsonRestore())
        return self._manager.restore(self._manager.latest_step(), args=args)["progress"]

    def restore(self, like: LearnerState) -> LearnerState:
        """The newest state, with the shapes, dtypes and shardings of `like`."""
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self._manager.restore(self._manager.latest_step(), args=args)["state"]

    def _guard(self, action: Any) -> None:
        try:
            action()
        except Exception as error:
            raise CheckpointError(
                f"cannot save a checkpoint in {self._directory}: {error}. Earlier checkpoints are "
                "whole: make room, then go on with --resume."
            ) from error


def read_params(checkpoint: Path, model: ModelConfig, dtype: Any) -> Params:
    """Only the parameters of one checkpoint, as NumPy arrays of `dtype`.

    The optimizer's state is not read. Raises CheckpointError for a damaged or foreign checkpoint.
    """
    specs = param_specs(model)
    restore = jax.tree.map(
        lambda spec: ocp.ArrayRestoreArgs(restore_type=np.ndarray, dtype=dtype),
        {"params": specs},
        is_leaf=lambda x: isinstance(x, ParamSpec),
    )
    item = jax.tree.map(lambda _: 0, restore)
    arguments = ocp.args.PyTreeRestore(item=item, restore_args=restore, partial_restore=True)
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    try:
        return reader.restore((checkpoint / "state").resolve(), arguments)["params"]
    except Exception as error:
        raise CheckpointError(f"{checkpoint} cannot be read: {error}") from error
