"""Saving and restoring a run with Orbax: parameters, optimizer state and progress.

Orbax detects some damage to a checkpoint's metadata and none to its arrays. So a checkpoint also
holds a checksum of each array and a seal on its JSON (seals.py); reading verifies both.
"""

import contextlib
import importlib.util
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import jax
import msgspec
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from r1s_jax.config import ModelConfig
from r1s_jax.io.errors import BadInput, UserError, reading, reason, shorten
from r1s_jax.io.json import parse_object
from r1s_jax.io.schema import check
from r1s_jax.io.seals import SEAL, is_sealed, sealed
from r1s_jax.models.checkpoint_owner import (
    CheckpointError,
    check_owner,
    held_for,
    is_local,
    saved_in,
)
from r1s_jax.models.checksums import State, checksums, host_checksum
from r1s_jax.models.params import Params, ParamSpec, param_specs
from r1s_jax.system.console import warn
from r1s_jax.system.distributed import is_main, on_main
from r1s_jax.system.files import changed_names, folder_digests, write_json

T = TypeVar("T")

_CHECKSUMS = "array_checksums"
FILES = "digests.json"  # in a checkpoint: the digests of its other files
# Orbax warns at every save without a score (stage 1 has none), and whenever the metadata of an item
# is read without the metadata of the whole checkpoint.
_HIDDEN = ("tracked_metric", "Metadata file does not exist", "Failed to get item metadata")
_HIDDEN += ("Failed to json parse Metadata file",)
# Tracebacks of Orbax's threads are hidden too: `wait` raises their errors.
logging.getLogger("absl").addFilter(
    lambda record: not (record.exc_info or any(text in record.getMessage() for text in _HIDDEN))
)
_CLOSE_TIMEOUT_S = 30.0


class DamagedCheckpoint(CheckpointError):
    """The newest checkpoint is damaged; it was moved away, so the one before is now the newest."""


class Checkpoints:
    """The newest checkpoints of a run and the best one, written in the background.

    A checkpoint appears whole or not at all: Orbax writes it under another name and renames it.
    `index` grows through the whole run, cold start included. With a `run`, no other run or process
    may use the directory until `close`. Raises CheckpointError where the directory belongs to
    another run, InUse where another process writes there.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        keep: int,
        run: Path | None = None,
        also: Callable[[int], bool] = lambda index: False,
    ):
        """Keeps the `keep` newest, the best one, and those whose index `also` names."""
        best = policies.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
        kept = [policies.LatestN(n=keep), best, _Also(also)]
        self._directory, self._run = _absolute(directory), run
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            best_fn=_score,
            create=True,
            # In the background, before the new checkpoint has its name: notes the one before.
            async_options=ocp.AsyncOptions(
                post_finalization_callback=lambda: _note_files(self._directory)
            ),
        )
        self._held = contextlib.ExitStack()
        _ignore_late_errors()
        if run:
            on_main(lambda: self._held.enter_context(held_for(run, self._directory)))
        on_main(lambda: _drop_damaged(self._directory))
        # Compressing floats saves little, and takes a core and memory from the next step.
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(use_compression=False),
            "progress": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(
            self._directory, item_handlers=handlers, options=options
        )

    def save(
        self,
        index: int,
        state: State,
        progress: Mapping[str, Any],
        score: float | None = None,
        sums: Mapping[str, int] | None = None,
    ) -> None:
        """Starts to save; `wait` raises the errors of writing in the background.

        The checkpoint with the highest `score` is kept whatever its age. `sums` are the checksums
        of the state, where they are known. Raises CheckpointError
        (for a full disk, say); earlier checkpoints stay whole.
        """
        if (run := self._run) and not is_local(self._directory):
            on_main(lambda: check_owner(run, self._directory))
        metrics = None if score is None else sealed({"score": score})
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            progress=ocp.args.JsonSave(
                sealed({**progress, _CHECKSUMS: dict(sums or checksums(state))})
            ),
        )
        self._guard(lambda: self._manager.save(index, args=args, metrics=metrics, force=True))

    def best(self) -> epath.Path | None:
        """The checkpoint with the highest score so far; None where no checkpoint has a score."""
        scored = [step for step in self._manager.all_steps() if self._manager.metrics(step)]
        return self._directory / str(self._manager.best_step()) if scored else None

    def wait(self) -> None:
        """Blocks until pending saves are on disk. Raises CheckpointError if one fails."""
        self._guard(self._manager.wait_until_finished)
        _note_files(self._directory)

    def close_after_error(self) -> None:
        """Waits for pending saves, with a time-out in case other processes died."""

        def close() -> None:
            with contextlib.suppress(Exception):  # the caller already reports the failure
                self._manager.close()

        waiting = threading.Thread(target=close, daemon=True)
        waiting.start()
        waiting.join(_CLOSE_TIMEOUT_S)
        self._held.close()

    def close(self) -> None:
        with self._held:
            self._guard(self._manager.close)
            _note_files(self._directory)

    def progress(self, parse: Callable[[dict[str, Any]], T]) -> T | None:
        """The progress in the newest checkpoint, parsed by `parse`; None without a checkpoint.

        A damaged checkpoint is moved away, then DamagedCheckpoint is raised.
        """
        if self._manager.latest_step() is None:
            return None
        with self.reading():
            return parse(saved_progress(self._directory / str(self._manager.latest_step())))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Surrounds code that reads the newest checkpoint: if it fails, moves the checkpoint away.

        Raises DamagedCheckpoint then.
        """
        try:
            yield
        except (BadInput, CheckpointError) as error:
            self._set_aside(str(error))

    def restore(self, like: State) -> State:
        """The newest state, with the shapes, dtypes and shardings of `like`.

        A damaged checkpoint is moved away, then DamagedCheckpoint is raised.
        """
        with self.reading():
            return read_state(self._directory / str(self._manager.latest_step()), like)

    def _set_aside(self, why: str) -> NoReturn:
        """Moves the newest checkpoint away, so that the one before it is the newest, and raises.

        The only checkpoint stays: without any, a run would start from scratch over its own files.
        """
        folder = self._directory / str(self._manager.latest_step())
        alone = len(self._manager.all_steps()) == 1
        self._manager.close()
        self._held.close()
        if alone:
            raise CheckpointError(
                _damaged(folder, why, "there is no other: start a run in another folder")
            )
        aside = on_main(lambda: _move_aside(folder))
        raise DamagedCheckpoint(_damaged(folder, why, f"was moved to {aside}"))

    def _guard(self, action: Any) -> None:
        try:
            action()
        except Exception as error:
            match = re.search(r"([^:]+) \[os_error_code", str(error))  # the system's own message
            why = match[1].strip() if match else shorten(str(error), 150)
            raise CheckpointError(
                f"cannot save a checkpoint in {self._directory}: {why}. Earlier checkpoints are "
                "whole: make room, then go on with --resume."
            ) from error


class _Also(policies.PreservationPolicy):
    """Preserves the checkpoints whose index a function names."""

    def __init__(self, wanted: Callable[[int], bool]):
        self._wanted = wanted

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [self._wanted(checkpoint.step) for checkpoint in checkpoints]


def read_state(folder: epath.Path, like: State) -> State:
    """The state of one checkpoint, with the shapes, dtypes and shardings of `like`.

    Raises CheckpointError for a damaged checkpoint, and BadInput where its JSON is.
    """
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )
    saved = saved_sums(folder)
    try:
        restore = ocp.checkpoint_utils.construct_restore_args(abstract)
        reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        state = reader.restore(folder / "state", ocp.args.PyTreeRestore(abstract, restore))
    except jax.errors.JaxRuntimeError:
        raise  # out of device memory, say: the checkpoint is not at fault
    except Exception as error:
        raise CheckpointError(reason(error)) from error
    if wrong := sorted({name for name, _ in saved.items() ^ checksums(state).items()}):
        raise CheckpointError(
            f"{len(wrong)} arrays changed since they were saved, first {wrong[0]}"
        )
    return state


def _note_files(directory: epath.Path) -> None:
    """Writes the digests of a new checkpoint's files into it; not in a bucket, which has its own
    checksums and would have to send every byte back."""
    for folder in saved_in(directory) if is_local(directory) and is_main() else ():
        # It was one too many and is deleted, or the disk is full: audits say that they are missing.
        with contextlib.suppress(OSError):
            if not (folder / FILES).exists():
                write_json(
                    Path(folder / FILES), sealed({"files": folder_digests(Path(folder), FILES)})
                )


def changed_files(folder: epath.Path) -> list[str] | None:
    """The files of a checkpoint that are not as they were written, are missing or were added.

    None if it has no digests of its files: it lies in a bucket, an older version wrote it, or its
    run was killed then. Raises BadInput where the digests themselves are damaged.
    """
    path = folder / FILES
    if not path.exists():
        return None
    noted = check(_read_sealed(path)["files"], dict[str, str], path)
    return changed_names(noted, folder_digests(Path(folder), FILES))


def _damaged(folder: epath.Path, why: str, outcome: str) -> str:
    return f"checkpoint {folder} is damaged ({shorten(why, 150)}) and {outcome}"


def _move_aside(folder: epath.Path) -> epath.Path:
    """Moves a checkpoint out of its directory; returns its new path."""
    aside = folder.parent.with_name(f"damaged-{folder.parent.name}") / folder.name
    if aside.exists():
        aside.rmtree()
    _move(folder, aside)
    return aside


def _drop_damaged(directory: epath.Path) -> None:
    """Moves damaged checkpoints away and deletes scores that cannot be read.

    If all are damaged, all stay: without any, a run would start from scratch over its own files.
    """
    saved = saved_in(directory)
    flawed = {folder: why for folder in saved if (why := flaw(folder))}
    if flawed and len(flawed) == len(saved):
        raise CheckpointError(
            _damaged(
                saved[0], flawed[saved[0]], "there is no whole one: start a run in another folder"
            )
        )
    for folder, why in flawed.items():
        warn(_damaged(folder, why, f"was moved to {_move_aside(folder)}"))
    for path in directory.glob("*/metrics/metrics") if directory.exists() else ():
        try:
            check(_read_sealed(path), _Scored, path)
        except BadInput as error:
            # Only the score is lost: its checkpoint stays.
            warn(f"{error}; the checkpoint counts as one without a score")
            path.parent.rmtree()


class _Scored(msgspec.Struct):
    """A checkpoint's score."""

    score: float


def _score(metrics: Mapping[str, Any]) -> float:
    return metrics["score"]


_Nanoseconds = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]


class _Described(msgspec.Struct):
    """Orbax's metadata of a whole checkpoint."""

    item_handlers: dict[str, Any] | str | None = None
    metrics: dict[str, Any] | None = None
    performance_metrics: dict[str, Any] | None = None
    init_timestamp_nsecs: _Nanoseconds | None = None
    commit_timestamp_nsecs: _Nanoseconds | None = None
    custom_metadata: dict[str, Any] | None = None


def flaw(folder: epath.Path) -> str:
    """The damage of a checkpoint that shows without reading its arrays; "": none.

    Raises OSError where the checkpoint cannot be reached: it may still be whole.
    """
    try:
        for name in ("_CHECKPOINT_METADATA", "progress/metadata", "state/_METADATA"):
            if not (folder / name).exists():
                return f"{folder} cannot be read: it holds no {name}"
        path = folder / "_CHECKPOINT_METADATA"
        check(parse_object(path.read_bytes(), path), _Described, path)
        saved_progress(folder)
    except UserError as error:
        return str(error)
    return ""


def _read_sealed(path: epath.Path) -> dict[str, Any]:
    """The values in a sealed JSON file of a checkpoint. Raises BadInput if the seal is wrong."""
    values = parse_object(path.read_bytes(), path)
    if SEAL not in values:
        raise BadInput(f"{path}: it has no seal, so it is damaged or of an earlier version")
    if not is_sealed(values):
        raise BadInput(f"{path}: changed since it was saved: its seal does not match")
    return values


def saved_progress(folder: epath.Path) -> dict[str, Any]:
    """The values that a checkpoint keeps beside its arrays. Raises BadInput if damaged."""
    path = folder / "progress" / "metadata"
    if not path.exists():
        raise BadInput(f"{path} is missing: this is not a whole checkpoint of a run")
    progress = _read_sealed(path)
    if _CHECKSUMS not in progress:
        raise BadInput(f"{path} is another file of a checkpoint: it holds no {_CHECKSUMS}")
    return progress


def checkpoint_directory(run_dir: epath.PathLike, elsewhere: str) -> epath.Path:
    """Where a run keeps its checkpoints: in its directory, or `elsewhere` (`gs://bucket/path`).

    Raises CheckpointError for a bucket without the package that reads buckets.
    """
    if elsewhere.startswith("gs://") and not importlib.util.find_spec("gcsfs"):
        raise CheckpointError(f"to keep checkpoints in {elsewhere}, pip install 'r1s-jax[gcs]'")
    return _absolute(elsewhere or epath.Path(run_dir) / "checkpoints")


def run_of(path: Path) -> Path | None:
    """The directory of the run that a path or a checkpoint belongs to; None for other paths."""
    for run in (path, path.parent.parent):
        # A model's directory has a config.json too; checkpoints may lie elsewhere.
        is_run = (run / "checkpoints").is_dir() or (run / "versions.json").exists()
        if is_run and (run / "config.json").exists():
            return run
    return None


def newest_params(
    run: Path, directory: epath.Path, model: ModelConfig, dtype: Any
) -> tuple[epath.Path, Params]:
    """A run's newest whole checkpoint and its parameters (see read_params).

    Damaged checkpoints are skipped with a warning. Raises CheckpointError where all are damaged,
    where there is none yet, and where the checkpoints belong to another run.
    """
    check_owner(run, directory)
    errors: list[CheckpointError] = []
    for checkpoint in saved_in(directory):
        try:
            params = read_params(checkpoint, model, dtype)
        except CheckpointError as error:
            errors.append(error)
            continue
        for error in errors:
            warn(f"{error}. Using the checkpoint before it")
        return checkpoint, params
    raise errors[0] if errors else CheckpointError(f"{directory} holds no checkpoint yet")


def _absolute(path: epath.PathLike) -> epath.Path:
    """Orbax refuses relative paths; bucket paths are already absolute."""
    path = epath.Path(path)
    return path.resolve() if is_local(path) else path


def _move(source: epath.Path, target: epath.Path) -> None:
    """Moves a folder; in a bucket file by file, because buckets have no folders."""
    if is_local(source):
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
    and for one whose arrays changed since they were saved.
    """
    specs, folder = param_specs(model), _absolute(checkpoint)
    if why := flaw(folder):
        raise CheckpointError(why)
    _ignore_late_errors()
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
    _check_sums(checkpoint, params, saved_sums(folder))
    return jax.tree.map(lambda x: np.asarray(x).astype(dtype), params)


@cache
def _ignore_late_errors() -> None:
    """Hides follow-up errors: after one array fails, the others find Orbax's event loop closed."""
    hook = sys.unraisablehook
    late = "Event loop is closed"
    sys.unraisablehook = lambda error: None if late in str(error.exc_value) else hook(error)


def _stored_dtypes(folder: epath.Path, specs: Params) -> Params:
    """The dtype in which each parameter was saved: checksums are of these exact bits."""
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    with reading(folder, CheckpointError):
        described = reader.metadata(folder / "state").item_metadata
        if described is None:
            raise CheckpointError(f"{folder} cannot be read: files of its `state` are missing")
        tree = described.tree["params"]
        return jax.tree.map(
            lambda _, leaf: np.dtype(leaf.dtype),
            specs,
            tree,
            is_leaf=lambda x: isinstance(x, ParamSpec),
        )


def saved_sums(folder: epath.Path) -> dict[str, int]:
    """The checksums of a checkpoint's arrays."""
    sums = saved_progress(folder)[_CHECKSUMS]
    return check(sums, dict[str, int], folder / "progress" / "metadata", CheckpointError)


def _check_shapes(checkpoint: epath.PathLike, params: Params, specs: Params) -> None:
    named, _ = jax.tree_util.tree_flatten_with_path(params)
    leaves = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, ParamSpec))
    for (path, array), spec in zip(named, leaves, strict=True):
        if array.shape != spec.shape:
            name = jax.tree_util.keystr(path)
            raise CheckpointError(
                f"{checkpoint}: {name} has shape {array.shape}, its run's config says {spec.shape}"
            )


def _check_sums(checkpoint: epath.PathLike, params: Params, saved: dict[str, int]) -> None:
    named, _ = jax.tree_util.tree_flatten_with_path(params)
    sums = {f".params{jax.tree_util.keystr(path)}": host_checksum(leaf) for path, leaf in named}
    if wrong := [name for name, value in sums.items() if saved.get(name) != value]:
        raise CheckpointError(
            f"{checkpoint} is damaged: {len(wrong)} arrays are not as they were saved, first "
            f"{wrong[0]}; take another of the run's checkpoints"
        )
