"""A run's `record.jsonl`: on what it began each time, and digests of the files that it leaves.

Its lines are sealed (io/sealed_lines.py). An event `start` has the facts on which bits depend; it
and the others have digests of whole files in the run's folder, by name.
"""

import importlib.metadata
import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import jax

from r1s_jax import __version__
from r1s_jax.io.journal import DataError, journal_rows, rows_so_far
from r1s_jax.io.sealed_lines import digest, last_seal, sealed_line
from r1s_jax.system.dtype import machine
from r1s_jax.system.files import file_digest

RECORD = "record.jsonl"
# Files that exist when a run starts and do not change until it starts again.
_AT_START = (
    "config.json",
    "versions.json",
    "data.json",
    "held_out.jsonl",
    "evaluation_before.jsonl",
)
_AT_END = (
    "cold_start.jsonl",
    "metrics.jsonl",
    "traces.jsonl",
    "evaluation_after.jsonl",
    "summary.json",
)
_PACKAGES = ("jax", "jaxlib", "numpy", "transformers", "tokenizers", "scann")
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION")


class Event(TypedDict):
    """A line of `record.jsonl`."""

    event: str  # start, evaluated, end, moved
    phase: NotRequired[str]  # of a start: cold_start or learning
    step: NotRequired[int]  # of a start: the last step of the phase that was done
    facts: NotRequired[dict[str, Any]]
    files: dict[str, str]  # digests


def facts(mesh: Mapping[str, int] | None = None, dtype: str = "") -> dict[str, Any]:
    """All that decides, besides a run's settings and data, whether two machines compute alike."""
    devices = Counter(f"{d.platform} {d.device_kind}" for d in jax.devices())
    return {
        "version": __version__,
        "code": code_digest(),
        **{name: v for name in _PACKAGES if (v := _version(name))},
        "python": platform.python_version(),
        "processor": machine(),
        "cores": _cores(),
        "flags": {name: os.environ[name] for name in _FLAGS if os.environ.get(name)},
        "devices": dict(sorted(devices.items())),
        "processes": jax.process_count(),
        "mesh": dict(mesh or {}),
        "dtype": dtype,
    }


def code_digest() -> str:
    """A digest of the package's Python files."""
    root = Path(__file__).parents[1]
    paths = (Path(at, name) for at, _, names in os.walk(root, followlinks=True) for name in names)
    files = sorted(path for path in paths if path.suffix == ".py")
    return digest(
        *(part for f in files for part in (f.relative_to(root).as_posix(), f.read_bytes()))
    )


def note_start(run: Path, phase: str, step: int, known: Mapping[str, Any]) -> None:
    """Adds the event of a start or a resume after `step` steps of `phase`; `known` are facts."""
    policy = sorted(
        p.relative_to(run).as_posix() for p in (run / "policy").rglob("*") if p.is_file()
    )
    _add(run, "start", [*_AT_START, *policy], phase=phase, step=step, facts=dict(known))


def note_evaluated(run: Path) -> None:
    """Adds the event that the policy was evaluated before reinforcement learning."""
    _add(run, "evaluated", ["evaluation_before.jsonl"])


def note_end(run: Path) -> None:
    """Adds the event of a run's end."""
    _add(run, "end", _AT_END)


def note_moved(run: Path) -> None:
    """Adds the event that the path of a model in a run's config changed with a folder."""
    if (run / RECORD).exists():
        _add(run, "moved", ["config.json"])


def _add(run: Path, event: str, names: Iterable[str], **more: Any) -> None:
    files = {name: file_digest(run / name) for name in names if (run / name).is_file()}
    before = last_seal(journal_rows(run / RECORD))
    line, _ = sealed_line({"event": event, **more, "files": files}, before)
    with (run / RECORD).open("a", encoding="utf-8") as file:
        file.write(line)


def read_record(run: Path) -> list[dict[str, Any]]:
    """The events of a run; [] where it has no record. Raises DataError for a damaged line."""
    return rows_so_far(run / RECORD, Event)


def starts(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The events `start`. Raises DataError for one without its facts."""
    found = [dict(event) for event in events if event["event"] == "start"]
    if any(not event.keys() >= {"facts", "phase", "step"} for event in found):
        raise DataError(f"{RECORD}: a start has no facts, phase or step")
    return found


def expected_files(events: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The digest that each recorded file must have now: what came before the last start counts
    only where a file is not written during a run."""
    files: dict[str, str] = {}
    for event in events:
        if event["event"] == "start":
            files = {}
        files |= event["files"]
    return files


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
