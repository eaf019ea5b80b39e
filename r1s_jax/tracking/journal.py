"""Reads the files of steps and results in a run's folder, and checks them."""

from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec

from r1s_jax.io.journal import DataError, rows_so_far
from r1s_jax.io.json import read_object
from r1s_jax.io.schema import check


class Fired(TypedDict):
    """A health signal in a row (see tracking/health.py)."""

    signal: str
    level: str
    value: float
    advice: str


class StepRow(TypedDict):
    """The fields common to rows of metrics and traces; not all have `health`."""

    step: Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
    health: NotRequired[list[Fired]]


class _Planned(TypedDict, total=False):
    steps: Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


class PlannedConfig(TypedDict, total=False):
    """The fields of a run's config that a report computes with; others are only shown."""

    cold_start: _Planned
    stage1: _Planned
    stage2: _Planned


_NUMBER: Any = float | bool


class _LearningRow(StepRow):
    """The fields of a row of `metrics.jsonl` that are read by name; others are numbers too."""

    stage: str
    reward: float
    answer_f1: float
    searches: float
    searches_per_question: float
    sampled_tokens: float
    seconds_rollout: float
    digests: NotRequired[dict[str, str]]  # see tracking/digests.py
    seal: NotRequired[str]


def step_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, in the order of their steps; [] where there is no file.

    Raises DataError for a row without a step, and for a number too large for a float.
    """
    rows = rows_so_far(path, StepRow)
    for row in rows:
        for name, value in row.items():
            if isinstance(value, int):
                check(value, _NUMBER, f"{path}, step {row['step']}: {name}", DataError)
    return sorted(rows, key=lambda row: row["step"])


def learning_rows(run: Path) -> list[dict[str, Any]]:
    """The steps of reinforcement learning so far. Raises DataError for an invalid row."""
    path = run / "metrics.jsonl"
    rows = rows_so_far(path, _LearningRow)
    for row in rows:
        for name in row.keys() - {"stage", "health", "digests", "seal"}:
            check(row[name], _NUMBER, f"{path}, step {row['step']}: {name}", DataError)
    return rows


def read_json(path: Path, kind: Any = dict[str, Any]) -> dict[str, Any]:
    """The object in a file, checked to be a `kind`; {} where there is no file."""
    if not path.exists():
        return {}
    value = read_object(path, DataError)
    check(value, kind, path, DataError)
    return value
