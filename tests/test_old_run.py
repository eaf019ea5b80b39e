"""A run that an earlier version left (0.1.0, killed in its last step) is as good as a new one.

`fixtures/old_run.tar.gz` holds it, with the metrics and the summary that the earlier version ended
with where nothing stopped it.
"""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from r1s_jax.data.rows import rows_so_far
from tests.makers import run_cli
from tests.test_train import without_times

ARCHIVE = Path(__file__).parent / "fixtures" / "old_run.tar.gz"
CHANGES = [
    "policy.architecture.d_model=32",
    "policy.architecture.d_ff=64",
    "policy.architecture.num_layers=1",
    "policy.architecture.num_heads=2",
    "policy.architecture.num_kv_heads=1",
    "policy.architecture.head_dim=16",
    "cold_start.steps=120",
    "cold_start.cooldown_steps=10",
    "cold_start.batch_size=8",
    "cold_start.checkpoint_every=1000",
    "stage1.steps=2",
    "stage2.steps=2",
    "stage1.questions_per_step=4",
    "stage2.questions_per_step=4",
    "algorithm.samples_per_question=4",
    "algorithm.updates_per_rollout=2",
    "algorithm.kl_coefficient=0.05",
    "optimizer.learning_rate=3e-3",
    "eval.questions=8",
    "rollout.slots=16",
    "run.traces_per_step=2",
    "environment.people=20",
    "environment.cold_start_people=20",
    "environment.eval_people=20",
]


@pytest.fixture
def old(tmp_path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_it_is_evaluated_exported_and_reported(old, index):
    run = old / "run"
    questions, out = str(run / "held_out.jsonl"), old / "answers.jsonl"
    options = ("--model", str(run), "--index", str(index), "--out", str(out), "rollout.slots=8")
    assert run_cli("eval", "run", questions, *options).exit_code == 0
    assert len(rows_so_far(out)) == 8
    assert run_cli("export", str(run), str(old / "exported")).exit_code == 0
    assert (old / "exported" / "model.safetensors").exists()
    assert run_cli("report", str(run), "--out", str(old / "report.html")).exit_code == 0
    assert "cold start" in (old / "report.html").read_text().lower()
    assert "Question:" in run_cli("traces", str(run), "--limit", "2").output


@pytest.mark.slow
def test_it_resumes_to_the_end_that_it_would_have_had(old):
    run = old / "run"
    assert not (run / "checkpoints" / "125").exists()
    arguments = ["train", "tiny_world", *CHANGES, "--run-dir", str(run), "--resume"]
    done = run_cli(*arguments)
    assert done.exit_code == 0, done.output
    found = without_times(rows_so_far(run / "metrics.jsonl"))
    expected = without_times(rows_so_far(old / "expected_metrics.jsonl"))
    assert len(found) == len(expected) == 4
    for row, wanted in zip(found, expected, strict=True):
        assert row.keys() >= wanted.keys()
        row["searches_bad_query"] += row.pop("searches_long_query", 0)  # were counted as one
        for name, value in wanted.items():
            if isinstance(value, float):
                np.testing.assert_allclose(row[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
            else:
                assert row[name] == value, name
    before = json.loads((old / "expected_summary.json").read_text())
    after = json.loads((run / "summary.json").read_text())
    assert after.keys() == before.keys()
    assert after["searches_after"] == pytest.approx(before["searches_after"], abs=0.2)
