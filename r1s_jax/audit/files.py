"""Compares the files of a run with their digests; nothing is executed."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from etils import epath

from r1s_jax.config import Config, CorpusConfig
from r1s_jax.data.digests import data_digests
from r1s_jax.io.errors import UserError
from r1s_jax.io.journal import DataError, parse_row, rows_so_far
from r1s_jax.io.seals import broken_seal, digest
from r1s_jax.models.checkpoint import changed_files, checkpoint_directory, saved_sums
from r1s_jax.models.checkpoint_owner import broken_mark, saved_in
from r1s_jax.models.checksums import state_digests
from r1s_jax.retrieval.index import check_whole, read_info
from r1s_jax.system.assets import resolve
from r1s_jax.system.files import file_digest
from r1s_jax.tracking.journal import StepRow, learning_rows
from r1s_jax.tracking.record import RECORD, expected_files, read_record, starts
from r1s_jax.tracking.run_dir import read_data


class Finding(NamedTuple):
    """Something that is not as the run left it."""

    file: str
    what: str


class Checked(NamedTuple):
    """What was compared, and what was found."""

    findings: list[Finding]
    checked: list[str]  # names of files and groups of files
    missing: list[str]  # what could not be checked, and why


def check_run(run: Path, config: Config | None, index: str = "") -> Checked:
    """Compares every file of a run that has a digest with it.

    `config` is the run's, None where it cannot be read; `index` replaces that of the config.
    """
    found: list[Finding] = []
    checked: list[str] = []
    missing: list[str] = []

    def note(name: str, look: Callable[[], Iterable[Finding]]) -> None:
        try:
            found.extend(look())
        except (UserError, OSError) as error:
            found.append(Finding(name, str(error)))
        checked.append(name)

    if not (run / RECORD).exists():
        missing.append(
            f"{run} holds no {RECORD}: it was made by a version without digests. Its checkpoints' "
            "own checksums can still be checked, and nothing can be executed"
        )
    else:
        note(RECORD, lambda: _sealed(run / RECORD, 0))
        note("files", lambda: _whole_files(run))
        note("metrics.jsonl", lambda: _journals(run))
        note("traces.jsonl", lambda: _traces(run))
    if config:
        note("checkpoints", lambda: _checkpoints(run, config, missing))
        note("data", lambda: _data(run, config, index))
    return Checked(found, checked, missing)


def _sealed(path: Path, unsealed: int) -> Iterator[Finding]:
    if path.exists() and (broken := broken_seal(path, unsealed)):
        yield Finding(path.name, broken)


def _whole_files(run: Path) -> Iterator[Finding]:
    for name, expected in expected_files(read_record(run)).items():
        if not (run / name).is_file():
            yield Finding(name, "it is gone")
        elif file_digest(run / name) != expected:
            yield Finding(name, "it is not as the run left it")


def _journals(run: Path) -> Iterator[Finding]:
    """The seals of both files of metrics, and that each step begins where the one before ended."""
    first = starts(read_record(run))[0]
    cold = first["phase"] == "cold_start"
    rows = len(rows_so_far(run / "cold_start.jsonl", StepRow))
    yield from _sealed(run / "cold_start.jsonl", first["step"] if cold else rows)
    yield from _sealed(run / "metrics.jsonl", 0 if cold else first["step"])
    before: dict[str, str] = {}
    for row in learning_rows(run):
        own = row.get("digests", {})
        for name in ("params", "optimizer"):
            if before and before.get(name) != own.get(f"{name}_before"):
                yield Finding("metrics.jsonl", f"step {row['step']} begins with other {name}")
        before = own


def _traces(run: Path) -> Iterator[Finding]:
    """The lines of every step against the digest in its row of metrics."""
    lines: dict[int, list[str]] = {}
    path = run / "traces.jsonl"
    for number, line in enumerate(path.open("rb") if path.exists() else (), start=1):
        if line.endswith(b"\n"):
            step = parse_row(line, path, number).get("step")
            if not isinstance(step, int):
                raise DataError(f"{path}, line {number} has no step")
            lines.setdefault(step, []).append(line.decode())
    for row in learning_rows(run):
        expected, own = row.get("digests", {}).get("traces"), lines.pop(row["step"], [])
        if expected and digest(*own) != expected:
            yield Finding("traces.jsonl", f"the lines of step {row['step']} are not as written")


def _checkpoints(run: Path, config: Config, missing: list[str]) -> Iterator[Finding]:
    """Every checkpoint: its files, its arrays' checksums and those in the rows of metrics."""
    where = checkpoint_directory(run, config.run.checkpoint_dir)
    rows = {row["step"]: row.get("digests", {}) for row in learning_rows(run)}
    if broken := broken_mark(where):
        yield Finding(f"{where.name}/run.json", broken)
    for folder in saved_in(where):
        name = f"{where.name}/{folder.name}"
        try:
            changed = changed_files(folder)
            if changed is None:
                missing.append(f"{name} has no digests of its files: only its arrays are checked")
            for file in changed or ():
                yield Finding(f"{name}/{file}", "it is not as it was written")
            yield from _same_state(folder, name, config, rows)
        except (UserError, OSError) as error:
            yield Finding(name, str(error))


def _same_state(
    folder: epath.Path, name: str, config: Config, rows: dict[int, dict[str, str]]
) -> Iterator[Finding]:
    step = int(folder.name) - config.cold_start.steps - 1
    after = rows.get(step, {})
    expected = after or {
        part: value
        for part in ("params", "optimizer")
        if (value := rows.get(step + 1, {}).get(f"{part}_before"))
    }
    for part, value in state_digests(saved_sums(folder)).items() if step >= 0 else ():
        if part in expected and expected[part] != value:
            yield Finding(name, f"its {part} are not those that metrics.jsonl names at {step}")


def _data(run: Path, config: Config, index: str) -> Iterator[Finding]:
    """The files of data, and every byte of the index, against the digests that the run noted."""
    environment = config.environment
    if not isinstance(environment, CorpusConfig):
        return
    if index:
        environment = replace(environment, index=index)
    noted = read_data(run)
    for place, (reference, now) in data_digests(environment).items():
        if noted.get(place) != now:
            yield Finding(reference, "it is not the data of the run")
    if environment.index:
        folder = resolve(environment.index)
        check_whole(folder, read_info(folder))
