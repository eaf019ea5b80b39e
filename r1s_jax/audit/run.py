"""`r1s audit RUN`: a run's files against their digests, then some of its steps executed again."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from r1s_jax.audit.execute import (
    AuditError,
    Executed,
    again,
    chosen,
    compared,
    executable,
    execute,
    from_the_beginning,
    other_facts,
)
from r1s_jax.audit.files import check_run
from r1s_jax.config import Config
from r1s_jax.io.errors import UserError
from r1s_jax.io.journal import rows_so_far
from r1s_jax.system.facts import facts
from r1s_jax.tracking.journal import learning_rows
from r1s_jax.tracking.record import RECORD, read_record, starts
from r1s_jax.tracking.run_dir import read_config

Report = dict[str, Any]


def audit_run(
    run: Path,
    steps: int,
    *,
    everything: bool = False,
    index: str = "",
    distance: bool = False,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Checks the files of a run, then executes `steps` of its steps again, or `everything`.

    `equal` of the report tells whether all that was compared is equal. Nothing is executed where
    files differ, or where this machine or program is another one, unless `distance` asks how far
    apart the results then are. Raises AuditError for a folder that is no run.
    """
    if not (run / "config.json").exists():
        raise AuditError(f"{run} is no run: it holds no config.json")
    progress("Comparing files")
    config, unreadable = _config(run)
    checked = check_run(run, config, index)
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
    wanted = everything or steps
    if not findings and (run / RECORD).exists():
        report["history"] = history(run)
    if wanted and config and not findings and (run / RECORD).exists():
        _execute(report, run, config, steps, everything, index, distance, seed, progress)
    elif wanted and findings:
        report["missing"].append("no step was executed: the files above are not the run's")
    unequal = [step for step in report["steps"] if not step["equal"]]
    report["equal"] = not findings and not unequal and not (report["other"] and wanted)
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
    steps: int,
    everything: bool,
    index: str,
    distance: bool,
    seed: int,
    progress: Callable[[str], None],
) -> None:
    rows = {row["step"]: row for row in learning_rows(run)}
    pieces = executable(run, config, list(rows.values()))
    if not everything:
        pieces = chosen(pieces, steps, seed)
    planned = sorted(s for piece in pieces for s in range(piece.first, piece.last + 1))
    report["other"] = _differences(run, config, planned or [1])
    if report["other"] and not distance:
        report["missing"].append(
            "no step was executed: on another machine, or by another version, bits may differ "
            "(--distance executes nevertheless, and tells how far apart the results are)"
        )
        return
    if everything:
        progress("Training the whole run again")
        report["steps"] = _all_again(run, config, index)
        return
    if len(planned) < steps:
        report["missing"].append(
            f"only {len(planned)} of {steps} steps can be executed from the checkpoints that are "
            "left: --all trains the whole run again (run.keep_for_audit=1 keeps every checkpoint)"
        )
    if not planned:
        return
    progress("Loading the run")
    with again(run, config, index) as machinery:
        done = execute(
            machinery, pieces, rows, lambda s: progress(f"Executing step {s}"), measure=distance
        )
        report["steps"] = [_described(step) for step in done]


def _differences(run: Path, config: Config, steps: Sequence[int]) -> list[str]:
    """How this machine and program differ from those of any of these steps; each once."""
    from r1s_jax.models.sharding import make_mesh

    here = facts(dict(make_mesh(config.mesh).shape), config.policy.compute_dtype)
    found = (text for step in steps for text in other_facts(run, step, here))
    return list(dict.fromkeys(found))


def _all_again(run: Path, config: Config, index: str) -> list[dict[str, Any]]:
    cold, learned = from_the_beginning(run, config, index)
    pairs = [
        *zip(rows_so_far(run / "cold_start.jsonl"), cold, strict=False),
        *zip(learning_rows(run), learned, strict=False),
    ]
    out = []
    for phase, (then, now) in zip(
        ["cold start"] * len(cold) + [""] * len(learned), pairs, strict=False
    ):
        out.append(_described(compared(then, now, 0.0)) | ({"phase": phase} if phase else {}))
    return out


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
            where = f"step {now['step'] + 1} of the {now['phase'].replace('_', ' ')}"
            lines.append(f"from {where} on bits may differ: other {', '.join(differ)}")
    return lines
