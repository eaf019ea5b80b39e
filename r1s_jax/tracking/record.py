"""A run's `record.jsonl`: on what it began each time, and digests of the files that it leaves.

Its lines are sealed (io/seals.py). An event `start` has the facts on which bits depend; it
and the others have digests of whole files in the run's folder, by name.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from r1s_jax.io.journal import DataError, journal_rows, rows_so_far
from r1s_jax.io.seals import last_seal, sealed_line
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


class Event(TypedDict):
    """A line of `record.jsonl`."""

    event: str  # start, evaluated, end, moved
    phase: NotRequired[str]  # of a start: cold_start or learning
    step: NotRequired[int]  # of a start: the last step of the phase that was done
    facts: NotRequired[dict[str, Any]]
    files: dict[str, str]  # digests


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
    """The events `start`. Raises DataError where there is none, or one without its facts."""
    found = [dict(event) for event in events if event["event"] == "start"]
    if not found or any(not event.keys() >= {"facts", "phase", "step"} for event in found):
        raise DataError(f"{RECORD}: there is no start, or one without its facts, phase or step")
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
