"""The directory of a run: what it is a run of, and how it is told to stop."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from r1s_jax.config import Config, CorpusConfig
from r1s_jax.data.digests import data_digests
from r1s_jax.data.questions import Question
from r1s_jax.io.errors import ConfigError
from r1s_jax.io.http import without_credentials
from r1s_jax.io.json import differences, read_object
from r1s_jax.io.schema import check
from r1s_jax.models.checkpoint_owner import RUN_FORMAT, read_versions
from r1s_jax.system.distributed import gather
from r1s_jax.system.files import write_json, write_rows

# What a run's first steps leave; before them nothing would be lost.
_BEGUN = ("cold_start.jsonl", "metrics.jsonl", "checkpoints/[0-9]*")
# What is in the directory of a run that was killed while it wrote the two files of its start.
_STARTING = {"versions.json", "versions.json.partial", "config.json.partial"}
_PACKAGES = ("r1s-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "scann", "numpy")


def open_run_dir(path: Path, config: Config, resume: bool) -> Path:
    """Makes the directory and writes `config.json` and `versions.json`, or checks them on resume.

    Where a run ended before its first step, nothing would be lost: another may begin. Raises
    ConfigError for a directory that is in use when not resuming, or one that holds a run of another
    config (naming the fields that differ).
    """
    described = as_written(config)
    # A model's directory has a config.json too.
    known, versions = path / "config.json", path / "versions.json"
    ours = known.exists() and versions.exists()
    if ours and any(any(path.glob(name)) for name in _BEGUN):
        if not resume:
            raise ConfigError(f"{path} already holds a run: add --resume, or choose another")
        base = Path(read_versions(path).folder)
        differ = [
            f"{place} was {old!r}, now {new!r}"
            for place, old, new in differences(read_object(known, ConfigError), described)
            if not _same_place(old, new, base)
        ]
        if differ:
            raise ConfigError(f"{path} is a run of another config: {'; '.join(differ)}")
        return path
    if not ours and path.exists() and not (path.is_dir() and _names(path) <= _STARTING):
        raise ConfigError(f"{path} is not empty and holds no run: choose another directory")
    path.mkdir(parents=True, exist_ok=True)
    # What a run that never took a step found of its model and its data binds no other.
    shutil.rmtree(path / "policy", ignore_errors=True)
    (path / "data.json").unlink(missing_ok=True)
    # That of a run which ended before its first step goes on: a place for checkpoints may have it.
    identity = read_versions(path).id if versions.exists() else uuid.uuid4().hex
    write_json(versions, {"format": RUN_FORMAT, "id": identity, **_versions()})
    write_json(known, described)
    return path


def write_held_out(path: Path, questions: Sequence[Question]) -> None:
    """The questions of the evaluation, so that `r1s eval run` can ask them of any model."""
    write_rows(
        path / "held_out.jsonl",
        ({"id": q.id, "question": q.question, "answer": q.answers} for q in questions),
    )


def _names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def as_written(config: Config) -> dict[str, Any]:
    """A config as a run's folder, its report and other services see it: without credentials."""

    def hidden(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: hidden(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [hidden(item) for item in value]
        url = isinstance(value, str) and value.startswith(("http://", "https://"))
        return without_credentials(value) if url else value

    return json.loads(json.dumps(hidden(dataclasses.asdict(config))))


def check_data(path: Path, config: Config, accept_changed: bool) -> None:
    """Writes `data.json`, or compares it with what the run's files of data are now.

    Raises ConfigError, naming what changed, unless that is accepted: a stream of questions that is
    restored over others would go on somewhere else, and other questions would be held out.
    """
    if not isinstance(config.environment, CorpusConfig):
        return
    data, file = data_digests(config.environment), path / "data.json"
    if file.exists():
        before = check(read_object(file, ConfigError), dict[str, str], file, ConfigError)
        changed = [
            reference for place, (reference, digest) in data.items() if before.get(place) != digest
        ]
        if changed and not accept_changed:
            raise ConfigError(
                f"{path}: {', '.join(changed)} changed since the run began: restore it, begin a "
                "new run, or go on with --accept-changed-data"
            )
    write_json(file, {place: digest for place, (_, digest) in data.items()})


# Ctrl-C and `kill`; then what schedulers send before they kill (Slurm's --signal, Grid Engine's
# -notify) and what a terminal sends that goes away: what ignores those (nohup) goes on doing so.
_ASKED = (signal.SIGINT, signal.SIGTERM)
_WARNED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class StopRequest:
    """Turns SIGINT, SIGTERM, SIGUSR1, SIGUSR2 and SIGHUP into a request to stop after the step.

    A second SIGINT stops at once.
    """

    def __init__(self) -> None:
        self.requested = ""  # what all processes know of; a signal alone does not change it
        self._asked = ""
        self._terminals = [stream for stream in (1, 2) if os.isatty(stream)]

    def agree(self) -> str:
        """What any process was asked, so that all of them stop after the same step."""
        self.requested = next(filter(None, gather(self.requested or self._asked)), "")
        return self.requested

    def __enter__(self) -> "StopRequest":
        heard = [s for s in _WARNED if signal.getsignal(s) is not signal.SIG_IGN]
        self._previous = {s: signal.signal(s, self._note) for s in (*_ASKED, *heard)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = signal.Signals(number).name
        for stream in (s for s in self._terminals if not os.isatty(s)):
            # It has gone: writing to it would end the run before its save.
            with open(os.devnull, "w", encoding="utf-8") as nowhere:
                os.dup2(nowhere.fileno(), stream)


def _versions() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "folder": str(Path.cwd()),
        "devices": [str(d) for d in jax.devices()],
        **{name: importlib.metadata.version(name) for name in _PACKAGES if _installed(name)},
    }


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _same_place(old: Any, new: Any, base: Path) -> bool:
    """Whether both name one file or folder, one of them by a path from the folder `base`."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = zip(old, new, strict=True)
        return all(a == b or _same_place(a, b, base) for a, b in pairs)
    if not (isinstance(old, str) and isinstance(new, str) and old and new):
        return False
    if "://" in old + new or "\0" in old + new + str(base):
        return False
    return (base / old).resolve() == Path(new).resolve()
