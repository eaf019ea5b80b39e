"""Headers of files of answers: digests of model and questions, compared before rows are added.

Digests, because the content behind a path or a name may change.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r1s_jax.data.questions import Question
from r1s_jax.data.results import FORMAT, header_path, read_header
from r1s_jax.io.errors import shorten
from r1s_jax.io.journal import DataError, journal_rows
from r1s_jax.io.json import differences
from r1s_jax.models.checkpoint import CheckpointError
from r1s_jax.models.identity import policy_digest
from r1s_jax.models.pretrained import (
    Pretrained,
    choose_dialect,
    dialect_at,
    load_pretrained,
)
from r1s_jax.presets import Settings, decisive
from r1s_jax.system.dtype import default_dtype

# Keys that are mere names: the header has digests of their content.
_NAMES = ("run.model", "run.questions", "source.folder")


def describe(
    model: str,
    file: str,
    questions: Sequence[Question],
    settings: Settings,
    source: dict[str, Any],
    **others: Any,
) -> dict[str, Any]:
    """The header of the answers of `model` to the `questions` of `file`, without a model's digest.

    `source` describes the index; `others` are settings of the run besides `settings`.
    """
    config, trained = settings.config(), dialect_at(model)
    dialect = choose_dialect(trained, config.protocol).as_dict()
    if trained and trained.name != dialect["dialect"]:
        dialect["trained_in"] = trained.name
    file_name = Path(file).name if Path(file).exists() else file
    run = {"model": model, "questions": file_name, "seed": config.seed, **others}
    header = {
        "format": FORMAT,
        "run": run | {"rollout": decisive(config.rollout)},
        "questions": {"count": len(questions), "sha256": _digest_of(questions)},
        "source": source,
        "dtype": default_dtype().name,
        "dialect": dialect,
    }
    return json.loads(json.dumps(header))  # in the form in which it is read again


def load_described(
    out: Path, reference: str, described: dict[str, Any], before: dict[str, Any] | None
) -> Pretrained:
    """Loads the model that answers, and adds its digest to the header `described`.

    For a run this is the checkpoint that the header `before` names, else the newest. Raises
    DataError if that checkpoint is gone, or if `before` names other weights.
    """
    checkpoint = before["model"].get("checkpoint") if before else None
    try:
        policy = load_pretrained(reference, default_dtype(), checkpoint)
    except CheckpointError as error:
        if checkpoint is None:
            raise
        raise DataError(
            f"{out} was begun with checkpoint {checkpoint} of {reference}: {error}. Choose another "
            "file with --out"
        ) from error
    number = {} if policy.checkpoint is None else {"checkpoint": policy.checkpoint}
    described["model"] = {"sha256": policy_digest(policy)} | number
    if before:
        refuse_other(out, before, described, "model")
    return policy


def begun(
    out: Path, described: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The rows of a file and its header; the header is None if there are no rows.

    Removes a last line that a crash cut off. Compares the header with `described`, except for the
    model. Raises DataError for rows without a header, a damaged header, or a different one.
    """
    if not out.exists() or not out.stat().st_size:
        return [], None
    header, file = read_header(out), header_path(out)
    if header is None or not header.keys() >= {"model", "questions", "run", "source"}:
        raise DataError(
            f"{out} holds rows, and {file.name} does not say which model and questions they are "
            "of: choose another file with --out"
        )
    if not (rows := journal_rows(out)):  # a new header overwrites nothing of value
        return [], None
    refuse_other(out, header, described, *(name for name in described if name != "model"))
    return rows, header


def refuse_other(out: Path, before: dict[str, Any], now: dict[str, Any], *sections: str) -> None:
    """Raises DataError, naming the differences, if two headers differ in these sections."""
    # dialect.frame comes from the model's chat template: None until the model is loaded.
    differ = [
        f"{place} was {_shortened(old)}, now {_shortened(new)}"
        for name in sections
        for place, old, new in differences(before.get(name), now.get(name), name)
        if place not in _NAMES and not (place == "dialect.frame" and new is None)
    ]
    if not differ:
        return
    names = {"model.sha256": "another model", "questions.sha256": "other questions"}
    others = [names[place] for place in names if any(d.startswith(place) for d in differ)]
    message = "; ".join(differ)
    if others:
        message = f"of {' and '.join(others)} ({message})"
    raise DataError(
        f"{out} was written by another run: {shorten(message, 200)}. Choose another file with "
        f"--out, or the settings of {header_path(out).name}"
    )


def _shortened(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] if len(text) == 64 else shorten(text, 40)


def _digest_of(questions: Sequence[Question]) -> str:
    """A digest of the questions and their right answers, whatever the form of the file."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(json.dumps(dataclasses.astuple(question)).encode() + b"\n")
    return digest.hexdigest()
