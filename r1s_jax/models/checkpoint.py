"""Saving and restoring a run with Orbax: parameters, optimizer state and where the run stands.

Orbax notices damage to what describes a checkpoint, not to the numbers in it: so each array's
checksum is kept beside it, and what is read back must have the same.
"""

import importlib.util
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax import Array
from orbax.checkpoint import checkpoint_managers as policies

from r1s_jax.border.errors import BadInput, UserError, reading
from r1s_jax.border.json import parse_object
from r1s_jax.border.schema import check
from r1s_jax.config import ModelConfig
from r1s_jax.models.params import Params, ParamSpec, param_specs
from r1s_jax.system.console import warn
from r1s_jax.system.distributed import on_main

# Any pytree of arrays: a learner's state.
State = TypeVar("State")

_CHECKSUMS = "checksums"
# Orbax warns at every save without a score, which the first stage's are, and at every item whose
# description is asked for without the whole checkpoint's.
_NO_NEWS = ("tracked_metric", "Metadata file does not exist")
logging.getLogger("absl").addFilter(
    lambda record: not any(known in record.getMessage() for known in _NO_NEWS)
)
_PATIENCE_S = 30.0


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that could not be written or read."""


class DamagedCheckpoint(CheckpointError):
    """The newest checkpoint is not what was saved; it was set aside, so the one before is next."""


class Checkpoints:
    """The newest checkpoints of a run and the best one, written in the background.

    A checkpoint appears whole or not at all: Orbax writes beside it and renames. `index` grows
    through the whole run, cold start included.
    """

    def __init__(self, directory: epath.PathLike, keep: int):
        best = policies.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(n=keep), best]),
            best_fn=_score,
            create=True,
        )
        self._directory = _absolute(directory)
        on_main(lambda: _drop_damaged_scores(self._directory))
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(
        self,
        index: int,
        state: State,
        progress: Mapping[str, Any],
        score: float | None = None,
    ) -> None:
        """Starts saving. A failure to write shows at the latest in `wait`.

        The checkpoint with the highest `score` is kept whatever its age. Raises CheckpointError (a
        full disk, say); the checkpoints before are kept.
        """
        metrics = None if score is None else {"score": score}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            progress=ocp.args.JsonSave({**progress, _CHECKSUMS: checksums(state)}),
        )
        self._guard(lambda: self._manager.save(index, args=args, metrics=metrics, force=True))

    def best(self) -> epath.Path | None:
        """The checkpoint with the highest score so far; None where none has one."""
        scored = [step for step in self._manager.all_steps() if self._manager.metrics(step)]
        return self._directory / str(self._manager.best_step()) if scored else None

    def wait(self) -> None:
        """Blocks until what was saved is on disk. Raises CheckpointError if it is not."""
        self._guard(self._manager.wait_until_finished)

    def close_after_error(self) -> None:
        """Lets what is being saved get to the disk, but not for ever: others may have gone."""
        waiting = threading.Thread(target=self._manager.close, daemon=True)
        waiting.start()
        waiting.join(_PATIENCE_S)

    def close(self) -> None:
        self._guard(self._manager.close)

    def progress(self) -> dict[str, Any] | None:
        """Where the newest checkpoint stands; None when there is none.

        Raises DamagedCheckpoint when it cannot be read, having set it aside.
        """
        if self._manager.latest_step() is None:
            return None
        progress = self._read(ocp.args.Composite(progress=ocp.args.JsonRestore())).progress
        progress.pop(_CHECKSUMS, None)
        return progress

    def restore(self, like: State) -> State:
        """The newest state, with the shapes, dtypes and shardings of `like`.

        Raises DamagedCheckpoint when it is not what was saved, having set it aside.
        """
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        read = self._read(
            ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore()
            )
        )
        found, saved = checksums(read.state), read.progress.get(_CHECKSUMS, {})
        if wrong := [name for name, value in saved.items() if found.get(name) != value]:
            self._set_aside(f"{len(wrong)} arrays changed since they were saved, first {wrong[0]}")
        return read.state

    def _read(self, args: ocp.args.Composite) -> Any:
        try:
            return self._manager.restore(self._manager.latest_step(), args=args)
        except jax.errors.JaxRuntimeError:
            raise  # no memory on the devices, say: no fault of the checkpoint
        except Exception as error:
            self._set_aside(f"{type(error).__name__}: {error}")

    def _set_aside(self, reason: str) -> NoReturn:
        """Takes the newest checkpoint out of the way of the one before it, and says so.

        The only one stays where it is: a run that found none would begin anew, over its own files.
        """
        newest, all_steps = self._manager.latest_step(), self._manager.all_steps()
        damaged = f"checkpoint {self._directory / str(newest)} is damaged ({reason})"
        if len(all_steps) == 1:
            raise CheckpointError(f"{damaged} and there is no other: start again elsewhere")
        aside = self._directory.parent / "damaged-checkpoints" / str(newest)
        self._manager.close()

        def move() -> None:
            if aside.exists():
                aside.rmtree()
            _move(self._directory / str(newest), aside)

        on_main(move)
        raise DamagedCheckpoint(f"{damaged} and was moved to {aside}")

    def _guard(self, action: Any) -> None:
        try:
            action()
        except Exception as error:
            raise CheckpointError(
                f"cannot save a checkpoint in {self._directory}: {error}. Earlier checkpoints are "
                "whole: make room, then go on with --resume."
            ) from error


def _drop_damaged_scores(directory: epath.Path) -> None:
    """Of a score that cannot be read nothing but the score is lost: its checkpoint stays."""
    for path in directory.glob("*/metrics/metrics") if directory.exists() else ():
        try:
            check(parse_object(path.read_bytes(), path), dict[str, float], path)
        except BadInput as error:
            warn(f"{error}; the checkpoint counts as one without a score")
            path.parent.rmtree()


def _score(metrics: Mapping[str, float]) -> float:
    return metrics["score"]


def checksums(state: State) -> dict[str, int]:
    """The sum of each array's bits as unsigned integers: any changed byte changes it.

    Integers add up to the same on every mesh, so a state may be read onto another one.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    sums = _bit_sums([leaf for _, leaf in leaves])
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    return {name: int(value) for name, value in zip(names, sums, strict=True)}


@jax.jit
def _bit_sums(arrays: list[Array]) -> list[Array]:
    def add_up(x: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
        return bits.astype(jnp.uint32).sum(dtype=jnp.uint32)

    return [add_up(x) for x in arrays]


def checkpoint_directory(run_dir: epath.PathLike, elsewhere: str) -> epath.Path:
    """Where a run keeps its checkpoints: in its directory, or `elsewhere` (`gs://bucket/path`).

    Raises CheckpointError for a bucket that nothing here can reach.
    """
    if elsewhere.startswith("gs://") and not importlib.util.find_spec("gcsfs"):
        raise CheckpointError(f"to keep checkpoints in {elsewhere}, pip install 'r1s-jax[gcs]'")
    return _absolute(elsewhere or epath.Path(run_dir) / "checkpoints")


def run_of(path: Path) -> Path | None:
    """The directory of the run that a path or a checkpoint belongs to; None for other paths."""
    for run in (path, path.parent.parent):
        # A model's directory has a config.json too; checkpoints may lie elsewhere.
        known = (run / "checkpoints").is_dir() or (run / "versions.json").exists()
        if known and (run / "config.json").exists():
            return run
    return None


def newest_checkpoint(directory: epath.Path) -> epath.Path:
    """The newest of a run's checkpoints. Raises CheckpointError where there is none yet."""
    saved = [p for p in directory.iterdir() if p.name.isdigit()] if directory.exists() else []
    if not saved:
        raise CheckpointError(f"{directory} holds no checkpoint yet")
    return max(saved, key=lambda p: int(p.name))


def _absolute(path: epath.PathLike) -> epath.Path:
    """Orbax wants no relative paths; those of a bucket are none."""
    path = epath.Path(path)
    return path if "://" in str(path) else path.resolve()


def _move(source: epath.Path, target: epath.Path) -> None:
    """Moves a folder, in a bucket file by file: there are no folders there."""
    if "://" not in str(source):
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
        return
    for item in source.iterdir():
        if item.is_dir():
            _move(item, target / item.name)
        else:
            item.copy(target / item.name, overwrite=True)
    if source.exists():
        source.rmtree()


def read_params(checkpoint: epath.PathLike, model: ModelConfig, dtype: Any) -> Params:
    """Only the parameters of one checkpoint, as NumPy arrays of `dtype`.

    The optimizer's state is not read. Raises CheckpointError for a damaged or foreign checkpoint,
    and for one whose numbers are not those that were saved.
    """
    specs, folder = param_specs(model), _absolute(checkpoint)
    stored = _stored_dtypes(folder, specs)
    restore = jax.tree.map(
        lambda _, kind: ocp.ArrayRestoreArgs(restore_type=np.ndarray, dtype=kind),
        {"params": specs},
        {"params": stored},
        is_leaf=lambda x: isinstance(x, ParamSpec),
    )
    item = jax.tree.map(lambda _: 0, restore)
    arguments = ocp.args.PyTreeRestore(item=item, restore_args=restore, partial_restore=True)
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    with reading(checkpoint, CheckpointError):
        params = reader.restore(folder / "state", arguments)["params"]
    _check_shapes(checkpoint, params, specs)
    _check_sums(checkpoint, params, _saved_sums(folder))
    return jax.tree.map(lambda x: np.asarray(x).astype(dtype), params)


def _stored_dtypes(folder: epath.Path, specs: Params) -> Params:
    """Of each parameter, as it was saved: checksums are of its very bits."""
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    with reading(folder, CheckpointError):
        tree = reader.metadata(folder / "state").item_metadata.tree["params"]
        return jax.tree.map(
            lambda _, leaf: np.dtype(leaf.dtype),
            specs,
            tree,
            is_leaf=lambda x: isinstance(x, ParamSpec),
        )


def _saved_sums(folder: epath.Path) -> dict[str, int]:
    """The checksums that a checkpoint keeps; those of early versions kept none."""
    path = folder / "progress" / "metadata"
    if not path.exists():
        raise CheckpointError(f"{path} is missing: this is no whole checkpoint of a run")
    sums = parse_object(path.read_bytes(), path, CheckpointError).get(_CHECKSUMS, {})
    return check(sums, dict[str, int], path, CheckpointError)


def _check_shapes(checkpoint: epath.PathLike, params: Params, specs: Params) -> None:
    named, _ = jax.tree_util.tree_flatten_with_path(params)
    wanted = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, ParamSpec))
    for (path, found), spec in zip(named, wanted, strict=True):
        if found.shape != spec.shape:
            name = jax.tree_util.keystr(path)
            raise CheckpointError(
                f"{checkpoint}: {name} has shape {found.shape}, its run's config says {spec.shape}"
            )


def _host_sum(x: np.ndarray) -> int:
    """As `checksums` does, without a device: all parameters at once may not fit on one."""
    bits = np.ascontiguousarray(x).view(f"uint{8 * x.dtype.itemsize}")
    return int(bits.sum(dtype=np.uint64)) & 0xFFFFFFFF


def _check_sums(checkpoint: epath.PathLike, params: Params, saved: dict[str, int]) -> None:
    named, _ = jax.tree_util.tree_flatten_with_path(params)
    found = {f".params{jax.tree_util.keystr(path)}": _host_sum(leaf) for path, leaf in named}
    # Checkpoints of early versions have none at all; of others every array has one.
    wrong = [name for name, value in found.items() if saved.get(name, value) != value]
    missing = [name for name in found if saved and name not in saved]
    if wrong or missing:
        first = (wrong or missing)[0]
        raise CheckpointError(
            f"{checkpoint} is damaged: {len(wrong or missing)} arrays are not as they were saved, "
            f"first {first}; take another of the run's checkpoints"
        )
