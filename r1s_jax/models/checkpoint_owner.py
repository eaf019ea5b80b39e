"""Whose a folder of checkpoints is: one run's, and one process's at a time."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
from etils import epath

from r1s_jax.io.errors import UserError
from r1s_jax.io.json import parse_object, read_object
from r1s_jax.io.schema import check
from r1s_jax.io.text import is_whole_number
from r1s_jax.system.locks import only_one

_MARK = "run.json"
RUN_FORMAT = 1  # of a run's folder, in `versions.json`; those of earlier versions have none


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that could not be written or read."""


class _Mark(msgspec.Struct):
    """In a folder of checkpoints: whose they are."""

    run: str  # its identity
    folder: str  # where that run was, for people


class Versions(msgspec.Struct):
    """What `versions.json` says of a run's start, as far as it is read again."""

    id: str  # tells the run from all others, wherever its folder is
    folder: str  # that it was started in


def read_versions(run: Path) -> Versions:
    """What tells a run from others, and where it was started.

    Raises CheckpointError where `versions.json` is missing, damaged or of an earlier version.
    """
    file = run / "versions.json"
    if not file.exists():
        raise CheckpointError(f"{run} holds no versions.json: it is not the whole folder of a run")
    told = read_object(file, CheckpointError)
    if told.get("format") != RUN_FORMAT:
        raise CheckpointError(
            f"{file}: the run was made by an earlier version, which this one does not read: start "
            "a new run"
        )
    return check(told, Versions, file, CheckpointError)


def check_owner(run: Path, directory: epath.Path) -> None:
    """Raises CheckpointError where the checkpoints in `directory` are another run's."""
    mark = _mark_in(directory)
    if mark and mark.run != read_versions(run).id:
        raise _not_ours(directory, mark)


@contextmanager
def held_for(run: Path, directory: epath.Path) -> Iterator[None]:
    """Keeps `directory` for the run in the folder `run` while the block runs, and marks it.

    Raises CheckpointError where it holds the checkpoints of another run, InUse where another
    process writes there. A bucket has no locks: there a mark alone makes it another's.
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
            mark = {"run": identity, "folder": str(run.resolve())}
            partial.write_bytes(json.dumps(mark).encode())
            partial.replace(directory / _MARK)
        yield


def saved_in(directory: epath.Path) -> list[epath.Path]:
    """The checkpoints of a folder, the newest first; none where there is no folder."""
    inside = directory.iterdir() if directory.exists() else ()
    found = [path for path in inside if is_whole_number(path.name)]
    return sorted(found, key=lambda p: int(p.name), reverse=True)


def is_local(path: epath.Path) -> bool:
    """Whether it lies in a file system, and in no bucket."""
    return "://" not in str(path)


def _mark_in(directory: epath.Path) -> _Mark | None:
    file = directory / _MARK
    if not file.exists():
        return None
    told = parse_object(file.read_bytes(), file, CheckpointError)
    return check(told, _Mark, file, CheckpointError)


def _not_ours(directory: epath.Path, mark: _Mark | None) -> CheckpointError:
    whose = f"belongs to the run in {mark.folder}" if mark else "holds checkpoints of another run"
    return CheckpointError(
        f"{directory} {whose}: give this run a run.checkpoint_dir of its own, or delete that folder"
    )
