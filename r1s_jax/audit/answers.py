"""`r1s audit FILE`: a file of answers against its header, then some of its rows answered again."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from r1s_jax import presets
from r1s_jax.audit.execute import Asked, AuditError, facts_apart
from r1s_jax.data.questions import Question
from r1s_jax.data.results import VERDICTS, header_path, read_header, sample_of
from r1s_jax.data.rows import gold_answers
from r1s_jax.eval.header import refuse_other
from r1s_jax.eval.run import EvalRun, answer_some
from r1s_jax.io.errors import UserError
from r1s_jax.io.journal import rows_so_far
from r1s_jax.io.seals import is_sealed
from r1s_jax.models.identity import policy_digest
from r1s_jax.models.pretrained import Pretrained, load_pretrained
from r1s_jax.presets import Settings
from r1s_jax.retrieval.api import Retriever
from r1s_jax.retrieval.references import open_search_engine
from r1s_jax.system.facts import facts
from r1s_jax.system.files import file_digest

# Keys of a row that say when it was made, who judged it, or what only the file of questions knows.
_NOT_COMPARED = ("seconds", *VERDICTS, "supporting_recall", "hops", "scores")


def audit_answers(
    file: Path,
    asked: Asked,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Checks a file of answers, then answers some of its questions again.

    The report has the form of that of `audit_run`, with `rows` in place of `steps`. Raises
    AuditError for a file without a header of `r1s eval run`.
    """
    progress("Comparing files")
    header = read_header(file)
    if not header or "made_by" not in header:
        raise AuditError(
            f"{file}: its header has no digests: `r1s eval run` of an older version, or another "
            "program, wrote it"
        )
    findings, missing = list(_static(file, header)), list[str]()
    report: dict[str, Any] = {"file": str(file), "findings": findings, "missing": missing}
    report |= {"rows": [], "other": facts_apart(header["made_by"].get("facts", {}), facts())}
    if (asked.count or asked.everything) and not findings:
        if report["other"] and not asked.distance:
            missing.append("no row was answered again: see --distance")
        else:
            stored = rows_so_far(file)
            chosen = _chosen(header, stored, asked)
            report["rows"] = _again(header, stored, chosen, asked.index, findings, progress)
    unequal = any(not row["equal"] for row in report["rows"])
    refused = (asked.count or asked.everything) and report["other"] and not report["rows"]
    report["equal"] = not (findings or unequal or refused)
    return report


def _static(file: Path, header: Mapping[str, Any]) -> list[dict[str, str]]:
    found = []
    if not is_sealed(header):
        found.append({"file": header_path(file).name, "what": "it is not as it was written"})
    if file_digest(file) != header["made_by"].get("answers"):
        what = "it is not as it was written (or its evaluation was killed: run it to its end)"
        found.append({"file": file.name, "what": what})
    return found


def _chosen(header: Mapping[str, Any], stored: list[dict[str, Any]], asked: Asked) -> list[int]:
    """Numbers of questions whose rows are all there."""
    count = len(stored) // header["run"].get("samples", 1)
    order = np.random.default_rng(asked.seed).permutation(count).tolist()
    return sorted(order if asked.everything else order[: asked.count])


def _again(
    header: Mapping[str, Any],
    stored: list[dict[str, Any]],
    chosen: list[int],
    index: str,
    findings: list[dict[str, str]],
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    settings = Settings(presets.evaluation, header["made_by"].get("changes", []))
    of, samples = header["run"], header["run"].get("samples", 1)
    run = EvalRun(of["questions"], of["model"], settings, of.get("mode", "search"), samples)
    progress("Loading the model")
    try:
        policy, retriever = _model(header), _retriever(header, index)
    except (UserError, OSError) as error:
        findings.append({"file": of["model"], "what": str(error)})
        return []
    questions = [_question(stored[i * samples], i) for i in chosen]
    out = []
    answered = answer_some(run, policy, questions, len(stored) // samples, retriever)
    for done, (i, rows) in enumerate(zip(chosen, answered, strict=True), start=1):
        progress(f"Answered {done} of {len(chosen)} again")
        for then, now in zip(stored[i * samples :], rows, strict=False):
            differs = sorted(
                key
                for key in then.keys() | now.keys()
                if key not in _NOT_COMPARED and then.get(key) != now.get(key)
            )
            row = {"id": then["id"], "sample": sample_of(then), "differs": differs}
            out.append(row | {"equal": not differs})
    return out


def _question(row: Mapping[str, Any], number: int) -> Question:
    named = isinstance(row["id"], str)
    source = row["id"] if named else ""
    number = number if named else row["id"]
    return Question(number, row["question"], gold_answers(row), source_id=source)


def _model(header: Mapping[str, Any]) -> Pretrained:
    checkpoint = header["model"].get("checkpoint")
    policy = load_pretrained(header["run"]["model"], np.dtype(header["dtype"]), checkpoint)
    if policy_digest(policy) != header["model"]["sha256"]:
        raise AuditError("it is another model than the one that answered")
    return policy


def _retriever(header: Mapping[str, Any], index: str) -> Retriever | None:
    """The search engine of the answers, which an index of the same content may replace."""
    source = header.get("source", {})
    if header["run"].get("mode") == "direct":
        return None
    if url := source.get("retriever", ""):
        if source.get("corpus", "").startswith("the web"):
            raise AuditError("the answers were made with the live web, which answers otherwise now")
        if index:
            raise AuditError("--index: the answers were made with a search server")
        return open_search_engine(None, url)[0]
    folder = Path(index or source.get("folder", ""))
    retriever, now = open_search_engine(folder)
    refuse_other(folder, {"source": source}, {"source": now}, "source")
    return retriever
