"""`r1s export --with-audit` and `r1s audit MODEL`: an exported model with where it comes from."""

from pathlib import Path
from typing import Any

from r1s_jax.audit.execute import AuditError
from r1s_jax.audit.files import check_run
from r1s_jax.io.errors import BadInput
from r1s_jax.io.json import read_object
from r1s_jax.io.schema import check
from r1s_jax.io.seals import is_sealed, sealed
from r1s_jax.models.checkpoint import run_of
from r1s_jax.system.files import changed_names, file_digest, folder_digests, write_json
from r1s_jax.tracking.journal import learning_rows
from r1s_jax.tracking.record import RECORD, read_record
from r1s_jax.tracking.run_dir import read_config

AUDIT = "audit.json"
# The results that an exported model hands on, as they stand in its run.
_HANDED_ON = ("summary.json", "evaluation_before.jsonl", "evaluation_after.jsonl", "held_out.jsonl")


def export_audit(source: str, model: Path) -> Path:
    """Writes `audit.json` into an exported model: digests of its files, and what its run recorded.

    Raises AuditError where `source` is no run with a record, or where files of the run changed.
    """
    run = run_of(Path(source))
    if run is None or not (run / RECORD).exists():
        raise AuditError(
            f"--with-audit: {source} is no run with a {RECORD}, so nothing is known of how it "
            "was made"
        )
    config = read_config(run)
    if found := check_run(run, config).findings:
        raise AuditError(f"--with-audit: {found[0].file} of {run}: {found[0].what}")
    config_values = read_object(run / "config.json")
    values = {
        "checkpoint": Path(source).name if Path(source) != run else "",
        "config": config_values,
        "record": read_record(run),
        "steps": [
            {"step": row["step"], "digests": row.get("digests", {})} for row in learning_rows(run)
        ],
        "results": {name: file_digest(run / name) for name in _HANDED_ON if (run / name).is_file()},
        "summary": read_object(run / "summary.json") if (run / "summary.json").exists() else {},
        "files": folder_digests(model, AUDIT),
    }
    write_json(model / AUDIT, sealed(values))
    return model / AUDIT


def audit_model(model: Path) -> dict[str, Any]:
    """Checks the files of an exported model against its `audit.json`."""
    values = read_object(model / AUDIT)
    findings = []
    if not is_sealed(values):
        findings.append({"file": AUDIT, "what": "it is not as it was written"})
    noted = check(values.get("files"), dict[str, str], model / AUDIT, BadInput)
    now = folder_digests(model, AUDIT)
    for name in changed_names(noted, now):
        what = "it is gone" if name not in now else "it is not as it was exported"
        findings.append({"file": name, "what": what})
    return {"model": str(model), "findings": findings, "missing": [], "equal": not findings}
