"""`r1s audit RUN`: a run's files against their digests, then some of its steps executed again."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from r1s_jax.audit.execute import (
    Asked,
    AuditError,
    Executed,
    again,
    chosen,
    compared,
    executable,
    execute,
    from_the_beginning,
    other_facts,
    usable,
)
from r1s_jax.audit.files import check_run
from r1s_jax.config import Config
from r1s_jax.io.errors import ConfigError, UserError
from r1s_jax.io.journal import rows_so_far
from r1s_jax.models.sharding import make_mesh
from r1s_jax.system.facts import facts
from r1s_jax.tracking.journal import learning_rows
from r1s_jax.tracking.record import RECORD, read_record, starts
from r1s_jax.tracking.run_dir import read_config

Report = dict[str, Any]


def audit_run(
    run: Path,
    asked: Asked,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Checks the files of a run, then executes some of its steps again.

    `equal` of the report tells whether all that was compared is equal. Nothing is executed where
    files differ; steps of another machine or program only with `asked.distance`. Raises AuditError
    for a folder that is no run.
    """
    if not (run / "config.json").exists():
        raise AuditError(f"{run} is no run: it holds no config.json")
    run = run.resolve()  # it is executed from where it was begun
    progress("Comparing files")
    config, unreadable = _config(run)
    checked = check_run(run, config, asked.index)
    findings = [*unreadable, *(f._asdict() for f in checked.findings)]
    report: Report = {
        "run": str(run),
        "checked": checked.checked,
        "findings": findings,
        "missing": list(checked.missing),
        "history": [],
        "steps": [],
        "other": [],
    }
    wanted = asked.everything or asked.count
    if not findings and (run / RECORD).exists():
        report["history"] = history(run)
    if wanted and config and not findings and (run / RECORD).exists():
        _execute(report, run, config, asked, progress)
    elif wanted and findings:
        report["missing"].append("no step was executed: the files above are not the run's")
    unequal = [step for step in report["steps"] if not step["equal"]]
    refused = wanted and report["other"] and not report["steps"]
    report["equal"] = not (findings or unequal or refused)
    return report


def _config(run: Path) -> tuple[Config | None, list[dict[str, str]]]:
    try:
        return read_config(run), []
    except (UserError, OSError) as error:
        return None, [{"file": "config.json", "what": str(error)}]


def _execute(
    report: Report,
    run: Path,
    config: Config,
    asked: Asked,
    progress: Callable[[str], None],
) -> None:
    rows = {row["step"]: row for row in learning_rows(run)}
    pieces, missing = executable(run, config, list(rows.values())), report["missing"]
    events = starts(read_record(run))
    here = facts(_mesh(config), config.policy.compute_dtype)
    differs = {step: other_facts(events, step, here) for step in rows}
    if others := [step for step, lines in differs.items() if lines]:
        report["other"] = list(dict.fromkeys(line for step in others for line in differs[step]))
        if not asked.distance:
            pieces = [] if asked.everything else usable(pieces, lambda step: differs[step])
            missing.append(
                f"{len(others)} steps were not executed: on another machine, or by another "
                "version, bits may differ (--distance executes them nevertheless, and tells how "
                "far apart the results are)"
            )
            if not pieces:
                return
    if asked.everything:
        progress("Training the whole run again")
        report["steps"] = _all_again(run, config, asked.index)
        return
    pieces = chosen(pieces, asked.count, asked.seed)
    count = sum(piece.last - piece.first + 1 for piece in pieces)
    if count < asked.count and not report["other"]:
        missing.append(
            f"only {count} of {asked.count} steps can be executed from the checkpoints that are "
            "left: --all trains the whole run again (run.keep_for_audit=1 keeps every checkpoint)"
        )
    if not pieces:
        return
    progress("Loading the run")
    with again(run, config, asked.index) as machinery:
        done = execute(
            machinery,
            pieces,
            rows,
            lambda s: progress(f"Executing step {s}"),
            measure=asked.distance,
        )
        report["steps"] = [_described(step) for step in done]


def _mesh(config: Config) -> dict[str, int]:
    """The shape of the mesh here; {} where there are not the devices for it."""
    try:
        return dict(make_mesh(config.mesh).shape)
    except ConfigError:
        return {}


def _all_again(run: Path, config: Config, index: str) -> list[dict[str, Any]]:
    cold, learned = from_the_beginning(run, config, index)
    phases = [("cold start", rows_so_far(run / "cold_start.jsonl"), cold)]
    phases.append(("", learning_rows(run), learned))
    return [
        {**_described(compared(then, now, 0.0)), "phase": phase}
        for phase, before, after in phases
        for then, now in zip(before, after, strict=False)
    ]


def _described(step: Executed) -> dict[str, Any]:
    columns = {name: list(values) for name, values in step.columns.items()}
    return {
        "step": step.step,
        "equal": step.equal,
        "differs": step.differs,
        "meaning": "" if step.equal else step.meaning,
        "columns": columns,
        "seconds": step.seconds,
        "seconds_then": step.seconds_then,
        "compiled": step.compiled,
        **({} if step.distance is None else {"distance": step.distance}),
    }


def history(run: Path) -> list[str]:
    """Where a run went on on something else, a line each: bits may differ from that step on."""
    events = starts(read_record(run))
    lines = []
    for before, now in pairwise(events):
        differ = [
            name
            for name in sorted(before["facts"].keys() | now["facts"].keys())
            if before["facts"].get(name) != now["facts"].get(name)
        ]
        if differ:
            where = " of the cold start" if now["phase"] == "cold_start" else ""
            lines.append(
                f"from step {now['step'] + 1}{where} on bits may differ: other {', '.join(differ)}"
            )
    return lines
