"""The directory of a run: what it is a run of, and how it is told to stop."""

import dataclasses
import importlib.metadata
import json
import platform
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from r1s_jax.border.errors import ConfigError
from r1s_jax.config import Config
from r1s_jax.data.questions import Question
from r1s_jax.system.distributed import gather
from r1s_jax.system.files import write_json, write_rows

# What a run's first steps leave; before them nothing would be lost.
_BEGUN = ("cold_start.jsonl", "metrics.jsonl", "checkpoints/*")
# What is in the directory of a run that was killed while it wrote the two files of its start.
_STARTING = {"versions.json", "versions.json.partial", "config.json.partial"}
_PACKAGES = ("r1s-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "scann", "numpy")


def open_run_dir(path: Path, config: Config, resume: bool) -> Path:
    """Makes the directory and writes `config.json` and `versions.json`, or checks them on resume.

    Where a run ended before its first step, nothing would be lost: another may begin. Raises
    ConfigError for a directory that is in use when not resuming, or one that holds a run of another
    config (naming the fields that differ).
    """
    described = json.loads(json.dumps(dataclasses.asdict(config)))
    # A model's directory has a config.json too.
    known, versions = path / "config.json", path / "versions.json"
    ours = known.exists() and versions.exists()
    if ours and any(any(path.glob(name)) for name in _BEGUN):
        if not resume:
            raise ConfigError(f"{path} already holds a run: add --resume, or choose another")
        differ = _differences(_read_config(known), described)
        if differ:
            raise ConfigError(f"{path} is a run of another config: {'; '.join(differ)}")
        return path
    if not ours and path.exists() and not (path.is_dir() and _names(path) <= _STARTING):
        raise ConfigError(f"{path} is not empty and holds no run: choose another directory")
    path.mkdir(parents=True, exist_ok=True)
    write_json(versions, _versions())
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


def _read_config(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}") from error


class StopRequest:
    """Turns SIGINT and SIGTERM into a request to stop at the end of the step.

    A second SIGINT stops at once.
    """

    def __init__(self) -> None:
        self.requested = ""

    def agree(self) -> str:
        """What any process was asked, so that all of them stop after the same step."""
        self.requested = next(filter(None, gather(self.requested)), "")
        return self.requested

    def __enter__(self) -> "StopRequest":
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name


def _versions() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "devices": [str(d) for d in jax.devices()],
        **{name: importlib.metadata.version(name) for name in _PACKAGES if _installed(name)},
    }


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        join = f"{path}." if path else ""
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{join}{k}")]
    return [] if old == new else [f"{path} was {old!r}, now {new!r}"]
