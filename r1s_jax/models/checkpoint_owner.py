"""Whose a folder of checkpoints is: one run's, and one process's at a time."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
from etils import epath

from r1s_jax.border.errors import UserError
from r1s_jax.border.json import parse_object, read_object
from r1s_jax.border.schema import check
from r1s_jax.system.locks import only_one

_MARK = "run.json"


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that could not be written or read."""


class _Mark(msgspec.Struct):
    """In a folder of checkpoints: whose they are."""

    run: str  # its identity
    folder: str  # where that run was, for people


class _Versions(msgspec.Struct):
    id: str = ""


def identity_of(run: Path) -> str:
    """What tells a run from all others, wherever its folder is; "" for those of early versions.

    Raises CheckpointError for a `versions.json` that is damaged.
    """
    file = run / "versions.json"
    told = read_object(file, CheckpointError) if file.exists() else {}
    return check(told, _Versions, file, CheckpointError).id


def check_owner(run: Path, directory: epath.Path) -> None:
    """Raises CheckpointError where the checkpoints in `directory` are another run's."""
    mark = _mark_in(directory)
    if mark and mark.run != identity_of(run):
        raise _not_ours(directory, mark)


@contextmanager
def held_for(run: Path, directory: epath.Path) -> Iterator[None]:
    """Keeps `directory` for the run in the folder `run` while the block runs, and marks it.

    Raises CheckpointError where it holds the checkpoints of another run, InUse where another
    process writes there. A bucket has no locks: there a mark alone makes it another's.
    """
    local, identity = is_local(directory), identity_of(run)
    with ExitStack() as held:
        if local:
            held.enter_context(only_one(Path(directory), "this folder of checkpoints"))
        mark, begun = _mark_in(directory), bool(saved_in(directory))
        inside = local and run.resolve() in Path(directory).parents
        ours = mark.run == identity if mark else inside or not begun
        if not ours and (begun or not local):
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
    found = (
        [p for p in directory.iterdir() if p.name.isascii() and p.name.isdecimal()]
        if directory.exists()
        else []
    )
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
