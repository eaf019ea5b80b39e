"""Audits whatever a path holds, and tells the result in words."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from r1s_jax.audit.answers import audit_answers
from r1s_jax.audit.execute import Asked, AuditError
from r1s_jax.audit.model import AUDIT, audit_model
from r1s_jax.audit.run import audit_run


def audit_path(
    path: Path, asked: Asked, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """The report on a run, a file of answers or an exported model."""
    if path.is_file():
        return audit_answers(path, asked, progress)
    if (path / AUDIT).exists():
        return audit_model(path)
    if not path.exists():
        raise AuditError(f"{path} does not exist")
    return audit_run(path, asked, progress)


def as_text(report: Mapping[str, Any]) -> str:
    """A report for people."""
    name = next(report[key] for key in ("run", "file", "model") if key in report)
    compared = ", ".join(report.get("checked", [])) or "its files"
    lines = [f"{name}: compared {compared}"]
    lines += [f"  {f['file']}: {f['what']}" for f in report["findings"]]
    lines += [f"  {line}" for line in report.get("history", [])]
    if report.get("other"):
        lines += ["  this is another machine or program:"]
        lines += [f"    {line}" for line in report["other"]]
    for step in report.get("steps", []):
        where = f"{step.get('phase', '')} step {step['step']}".strip()
        lines.append(f"  {where}: {_outcome(step)}")
    for row in report.get("rows", []):
        outcome = "equal" if row["equal"] else f"differs in {', '.join(row['differs'])}"
        lines.append(f"  answer to {row['id']!r}, sample {row['sample']}: {outcome}")
    lines += [f"  {line}" for line in report["missing"]]
    executed = [*report.get("steps", []), *report.get("rows", [])]
    equal = sum(one["equal"] for one in executed)
    counted = f"{equal} of {len(executed)} executed again are equal"
    verdict = "nothing differs" if report["equal"] else "NOT as it says"
    if not report["equal"] and report.get("other") and not report["findings"]:
        verdict = "another machine or program"
    return "\n".join([*lines, f"{counted}, {len(report['findings'])} files changed: {verdict}"])


def _outcome(step: Mapping[str, Any]) -> str:
    if step["equal"]:
        compiling = " with compiling" if step["compiled"] else ""
        return f"equal ({step['seconds']:.1f} s{compiling}, then {step['seconds_then']:.1f} s)"
    name = step["differs"] or ", ".join(step["columns"])
    text = f"differs first in {name}: {step['meaning']}"
    if "distance" in step:
        text += f"; parameters are {step['distance']:.2g} of the update's length apart"
    changes = [
        f"{column} {then} -> {now}" for column, (then, now) in list(step["columns"].items())[:3]
    ]
    return text + (f" ({'; '.join(changes)})" if changes else "")
