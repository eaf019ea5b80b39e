"""Health signals on the columns of real runs in fixtures/health_runs.json.

Five healthy runs of the recipe `tiny_world` (seeds 0 to 4), and runs that fail because of their
learning rate: twenty times the recipe's from the start, rising to twenty times over the run, and
five times with the loss `cispo`.
"""

import json
from pathlib import Path

import pytest

from r1s_jax.tracking.health import History, check

COLUMNS = json.loads((Path(__file__).parents[1] / "fixtures" / "health_runs.json").read_text())
RUNS = {
    name: [
        {key: values[i] for key, values in columns.items() if values[i] is not None}
        for i in range(len(columns["stage"]))
    ]
    for name, columns in COLUMNS.items()
}
HEALTHY = [name for name in RUNS if name.startswith("healthy")]


def first_steps(rows: list[dict]) -> dict[str, int]:
    """The step after which each signal first fired."""
    history, first = History(), {}
    for step, row in enumerate(rows, start=1):
        for fired in check(history.add(row)):
            first.setdefault(fired["signal"], step)
    return first


def fell(rows: list[dict]) -> int:
    """The first step whose F1 is below half of the best F1 so far."""
    best = 0.0
    for step, row in enumerate(rows, start=1):
        best = max(best, row["answer_f1"])
        if row["answer_f1"] < best / 2:
            return step
    raise AssertionError("it never fell")


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_runs_fire_no_signal(name):
    assert len(RUNS[name]) == 34 and RUNS[name][-1]["answer_f1"] > 0.9
    assert first_steps(RUNS[name]) == {}


def test_there_are_five_healthy_runs():
    assert len(HEALTHY) == 5


@pytest.mark.parametrize("name", ["rising20", "lr5_cispo"])
def test_a_signal_fires_three_steps_before_half_of_f1_is_lost(name):
    first = first_steps(RUNS[name])
    assert min(first.values()) <= fell(RUNS[name]) - 3, first


def test_a_failed_first_update_fires_before_the_next_rollout():
    assert fell(RUNS["lr20"]) == 2
    assert first_steps(RUNS["lr20"])["ratio_drift"] == 1
