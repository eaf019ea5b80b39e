"""A folder of checkpoints belongs to one run, and to one process at a time."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
from etils import epath

from r1s_jax.io.errors import UserError
from r1s_jax.io.json import parse_object, read_object
from r1s_jax.io.schema import check
from r1s_jax.io.seals import is_sealed, sealed
from r1s_jax.io.text import is_whole_number
from r1s_jax.system.locks import only_one

_MARK = "run.json"
RUN_FORMAT = 1  # of a run's folder, in its `versions.json`; earlier versions wrote no format


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that could not be written or read."""


class _Mark(msgspec.Struct):
    """The file in a folder of checkpoints that names their run."""

    run: str  # its identity
    folder: str  # the run's folder when it was written, for messages


class Versions(msgspec.Struct):
    """The fields of a run's `versions.json` that are read again."""

    id: str  # tells the run from all others, wherever its folder is
    folder: str  # in which the run was started


def read_versions(run: Path) -> Versions:
    """A run's identity and the folder in which it was started.

    Raises CheckpointError where `versions.json` is missing, damaged or of an earlier version.
    """
    file = run / "versions.json"
    if not file.exists():
        raise CheckpointError(f"{run} holds no versions.json: it is not the whole folder of a run")
    values = read_object(file, CheckpointError)
    if values.get("format") != RUN_FORMAT:
        raise CheckpointError(
            f"{file}: the run was made by an earlier version, which this one does not read: start "
            "a new run"
        )
    return check(values, Versions, file, CheckpointError)


def broken_mark(directory: epath.Path) -> str:
    """What is wrong with the mark in a folder of checkpoints; "": nothing is.

    Marks of 0.2.0 have no seal.
    """
    file = directory / _MARK
    if not file.exists():
        return "it is gone"
    values = parse_object(file.read_bytes(), file, CheckpointError)
    whole = is_sealed(values) or values.keys() == {"run", "folder"}
    return "" if whole else "it is not as it was written"


def check_owner(run: Path, directory: epath.Path) -> None:
    """Raises CheckpointError where the checkpoints in `directory` belong to another run."""
    mark = _mark_in(directory)
    if mark and mark.run != read_versions(run).id:
        raise _not_ours(directory, mark)


@contextmanager
def held_for(run: Path, directory: epath.Path) -> Iterator[None]:
    """Reserves `directory` for the run in the folder `run` while the block runs, and marks it.

    Raises CheckpointError where it holds the checkpoints of another run, InUse where another
    process writes there. Buckets have no locks: there, another run's mark suffices to refuse.
    """
    local, identity = is_local(directory), read_versions(run).id
    with ExitStack() as held:
        if local:
            held.enter_context(only_one(Path(directory), "this folder of checkpoints"))
        mark, used = _mark_in(directory), bool(saved_in(directory))
        ours = mark.run == identity if mark else not used
        if not ours and (used or not local):
            raise _not_ours(directory, mark)
        if not (mark and ours):
            directory.mkdir(parents=True, exist_ok=True)
            partial = directory / f"{_MARK}.partial"
            mark = sealed({"run": identity, "folder": str(run.resolve())})
            partial.write_bytes(json.dumps(mark).encode())
            partial.replace(directory / _MARK)
        yield


def saved_in(directory: epath.Path) -> list[epath.Path]:
    """The checkpoints of a folder, newest first; an empty list if the folder does not exist."""
    inside = directory.iterdir() if directory.exists() else ()
    checkpoints = [path for path in inside if is_whole_number(path.name)]
    return sorted(checkpoints, key=lambda p: int(p.name), reverse=True)


def is_local(path: epath.Path) -> bool:
    """Whether `path` is in a file system and not in a bucket."""
    return "://" not in str(path)


def _mark_in(directory: epath.Path) -> _Mark | None:
    file = directory / _MARK
    if not file.exists():
        return None
    values = parse_object(file.read_bytes(), file, CheckpointError)
    return check(values, _Mark, file, CheckpointError)


def _not_ours(directory: epath.Path, mark: _Mark | None) -> CheckpointError:
    whose = f"belongs to the run in {mark.folder}" if mark else "holds checkpoints of another run"
    return CheckpointError(
        f"{directory} {whose}: give this run a run.checkpoint_dir of its own, or delete that folder"
    )
