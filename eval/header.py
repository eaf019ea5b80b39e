"""What a file of answers is of, by content: kept in its header, compared before rows are added.

A path, the name of a run or of a file of questions says nothing of what lies there now.
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
    default_dtype,
    dialect_at,
    load_pretrained,
)
from r1s_jax.presets import Settings, decisive

# Names of what the header knows by its content.
_NAMES = ("run.model", "run.questions", "source.folder")


def describe(
    model: str,
    file: str,
    questions: Sequence[Question],
    settings: Settings,
    source: dict[str, Any],
    **others: Any,
) -> dict[str, Any]:
    """The header of a file in which `model` answers the `questions` of `file`, before it is loaded.

    `source` describes the index; `others` are settings of the run besides `settings`.
    """
    config, known = settings.config(), dialect_at(model)
    spoken = choose_dialect(known, config.protocol).as_dict()
    if known and known.name != spoken["dialect"]:
        spoken["trained_in"] = known.name
    named = Path(file).name if Path(file).exists() else file
    run = {"model": model, "questions": named, "seed": config.seed, **others}
    header = {
        "format": FORMAT,
        "run": run | {"rollout": decisive(config.rollout)},
        "questions": {"count": len(questions), "sha256": _digest_of(questions)},
        "source": source,
        "dtype": default_dtype().name,
        "dialect": spoken,
    }
    return json.loads(json.dumps(header))  # as it will be read


def load_described(
    out: Path, reference: str, described: dict[str, Any], before: dict[str, Any] | None
) -> Pretrained:
    """The model that answers; `described` is told which it is.

    Of a run that is the checkpoint that the header `before` names, else the newest. Raises
    DataError where that checkpoint is gone, or where `before` names other weights.
    """
    wanted = before["model"].get("checkpoint") if before else None
    try:
        policy = load_pretrained(reference, default_dtype(), wanted)
    except CheckpointError as error:
        if wanted is None:
            raise
        raise DataError(
            f"{out} was begun with checkpoint {wanted} of {reference}: {error}. Choose another "
            "file with --out"
        ) from error
    told: dict[str, Any] = {"sha256": policy_digest(policy)}
    if policy.checkpoint is not None:
        told["checkpoint"] = policy.checkpoint
    described["model"] = told
    if before:
        refuse_other(out, before, described, "model")
    return policy


def begun(
    out: Path, described: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The rows that a file holds, and its header where there are any.

    A line cut off by a crash is taken away. All but the model is compared with `described`. Raises
    DataError for a file without a header, with a damaged one, or with that of something else.
    """
    if not out.exists() or not out.stat().st_size:
        return [], None
    header, file = read_header(out), header_path(out)
    if header is None or not header.keys() >= {"model", "questions", "run", "source"}:
        raise DataError(
            f"{out} holds rows, and {file.name} does not say which model and questions they are "
            "of: choose another file with --out"
        )
    if not (rows := journal_rows(out)):  # nor would anything be lost
        return [], None
    refuse_other(out, header, described, *(name for name in described if name != "model"))
    return rows, header


def refuse_other(out: Path, before: dict[str, Any], now: dict[str, Any], *sections: str) -> None:
    """Raises DataError that names what differs between two headers in these sections."""
    # The words around a prompt are the model's: they are known once it is loaded.
    differ = [
        f"{place} was {_told(old)}, now {_told(new)}"
        for name in sections
        for place, old, new in differences(before.get(name), now.get(name), name)
        if place not in _NAMES and not (place == "dialect.frame" and new is None)
    ]
    if not differ:
        return
    names = {"model.sha256": "another model", "questions.sha256": "other questions"}
    what = [names[place] for place in names if any(d.startswith(place) for d in differ)]
    told = f"of {' and '.join(what)} ({'; '.join(differ)})" if what else "; ".join(differ)
    raise DataError(
        f"{out} was written by another run: {shorten(told, 200)}. Choose another file with --out, "
        f"or give what {header_path(out).name} names"
    )


def _told(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] if len(text) == 64 else shorten(text, 40)


def _digest_of(questions: Sequence[Question]) -> str:
    """Of what is asked and what counts as right, whatever the form of the file."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(json.dumps(dataclasses.astuple(question)).encode() + b"\n")
    return digest.hexdigest()
