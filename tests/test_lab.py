"""`r1s lab`: refused input, and runs that a kill must not change."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
from scipy.stats import ttest_rel

from r1s_jax.config import CorpusConfig
from r1s_jax.configs import wiki_smollm2
from r1s_jax.io.errors import ConfigError
from r1s_jax.lab import Plan, hours_left, is_done, note_move, planned, run_folder
from r1s_jax.tracking.arms import Arm, as_markdown, holm, table_of
from r1s_jax.tracking.run_dir import check_data, open_run_dir
from tests.makers import SHORT, run_cli

ROOT = Path(__file__).parents[1]
ARMS = ["--arm", "a:", "--arm", "b: optimizer.learning_rate=1e-3"]
TINY = [*SHORT, "stage1.steps=0", "stage2.steps=3"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name the arms"),
        (["--arm", "a:", "--arm", "a: seed=1"], "differently"),
        (["--arm", "no colon"], "NAME: CHANGES"),
        (["--arm", "../x: seed=1"], "NAME: CHANGES"),
        (["--arm", "a: nonsense.field=1"], "--arm a"),
        (["--arm", "a: 'open"], "quotation"),
    ],
)
def test_bad_input_is_one_message_before_any_run(tmp_path, arguments, words):
    done = run_cli("lab", "tiny_world", *arguments, "--out", str(tmp_path / "lab"))
    assert done.exit_code and words in str(done.exception)
    assert not (tmp_path / "lab").exists()


def test_runs_side_by_side_need_cores(monkeypatch, tmp_path):
    monkeypatch.setattr("r1s_jax.system.chips.has_accelerator", lambda: True)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    done = run_cli("lab", "tiny_world", "--arm", "a:", "--jobs", "2", "--out", str(tmp_path / "x"))
    assert "--jobs is for CPUs" in str(done.exception)


def test_a_directory_holds_one_comparison(tmp_path):
    (tmp_path / "plan.json").write_text(
        json.dumps({"recipe": "tiny_world", "overrides": [], "arms": {"a": ["seed=1"]}})
    )
    for changed in (["--arm", "a:"], ["stage2.steps=1", "--arm", "a: seed=1"]):
        done = run_cli("lab", "tiny_world", *changed, "--out", str(tmp_path))
        assert done.exit_code and "another comparison" in str(done.exception)


def test_arms_with_equal_cold_start_settings_share_one(tmp_path):
    def folder(*changes: str, seed: int = 0) -> Path:
        return planned("tiny_world", TINY, Arm("x", changes), seed, tmp_path).cold_folder

    for changes in ("algorithm.loss=gspo", "optimizer.learning_rate=1", "rollout.slots=32"):
        assert folder(changes) == folder()
    for changes in ("eval.questions=7", "rollout.max_documents_length=40", "optimizer.b2=0.9"):
        assert folder(changes) != folder()
    assert folder(seed=1) != folder()
    plan = planned("tiny_world", TINY, Arm("x", ("algorithm.loss=gspo",)), 0, tmp_path)
    # The first arm makes the shared cold start; that arm may be killed and then left out.
    assert plan.cold_start.algorithm.loss == "clip" and plan.config.algorithm.loss == "gspo"
    assert plan.cold_start.eval == plan.config.eval and not plan.config.cold_start.steps


def test_each_run_has_its_own_checkpoints(tmp_path):
    elsewhere = [*TINY, "run.checkpoint_dir=gs://bucket/lab/"]
    plans = [
        planned("tiny_world", elsewhere, Arm(name, ()), seed, tmp_path)
        for name, seed in (("a", 0), ("b", 0), ("a", 1))
    ]
    places = [plan.config.run.checkpoint_dir for plan in plans]
    assert places == [f"gs://bucket/lab/runs/{name}" for name in ("a-0", "b-0", "a-1")]
    cold = [plan.cold_start.run.checkpoint_dir for plan in plans]
    assert cold == [f"gs://bucket/lab/cold_starts/{plan.cold_folder.name}" for plan in plans]
    assert cold[0] == cold[1] != cold[2]


def test_a_comparison_resumes_after_its_folder_was_moved(tmp_path):
    def begin(out: Path, *changes: str):
        plan = planned("tiny_world", [*TINY, *changes], Arm("x", ()), 0, out)
        note_move(plan)
        return open_run_dir(run_folder(out, "x", 0), plan.config, resume=True)

    (begin(tmp_path / "lab") / "metrics.jsonl").touch()
    (tmp_path / "lab").rename(tmp_path / "moved")
    begin(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"policy\.model was"):  # would need another cold start
        begin(tmp_path / "moved", "eval.questions=7")


@pytest.mark.parametrize(
    "plan", ["[]", '{"recipe": "tiny_world"}', '{"recipe": "t", "overrides": [], "arms": {"a": 1}}']
)
def test_a_damaged_plan_is_named(tmp_path, plan):
    (tmp_path / "plan.json").write_text(plan)
    done = run_cli("lab", "tiny_world", "--arm", "a:", "--out", str(tmp_path))
    assert isinstance(done.exception, ConfigError) and "plan.json: " in str(done.exception)


def test_a_run_of_an_edited_recipe_is_refused(tmp_path):
    arm, out = Arm("x", ()), tmp_path / "lab"
    plan = planned("tiny_world", TINY, arm, 0, out)
    folder = run_folder(out, "x", 0)
    assert not is_done(plan)
    open_run_dir(folder, plan.config, resume=False)
    for name in ("metrics.jsonl", "summary.json"):
        (folder / name).write_text("{}")
    assert is_done(plan)
    edited = planned("tiny_world", [*TINY, "algorithm.clip=0.1"], arm, 0, out)
    with pytest.raises(ConfigError, match=r"algorithm.clip was 0.2, now 0.1"):
        is_done(edited)


def without_times(folder: Path) -> dict:
    table = json.loads((folder / "lab.json").read_text())
    for row in [*table["arms"], *(run for runs in table["runs"].values() for run in runs)]:
        row.pop("seconds_to_good")
    return table


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_kill_in_the_middle_changes_nothing(tmp_path, jobs):
    command = [sys.executable, "-m", "r1s_jax.cli", "lab", "tiny_world", *TINY, *ARMS]
    command += ["--seeds", "2", "--jobs", jobs, "--out"]
    whole = subprocess.run([*command, str(tmp_path / "whole")], capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr[-2000:]
    last = json.loads(whole.stdout.splitlines()[-1])
    assert [row["arm"] for row in last["arms"]] == ["a", "b"]
    assert len(list((tmp_path / "whole/cold_starts").glob("*.done"))) == 2  # one per seed

    process = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL)
    metrics = tmp_path / "killed/runs/b-0/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = subprocess.run([*command, str(tmp_path / "killed")], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-2000:]
    assert without_times(tmp_path / "killed") == without_times(tmp_path / "whole")
    for name in ("table.md", "curves.png", "report.html"):
        assert (tmp_path / "killed" / name).stat().st_size > 100


def test_an_arms_file_and_a_budget(tmp_path, monkeypatch):
    arms = tmp_path / "arms.txt"
    arms.write_text("# two arms\na:\n\nb: optimizer.learning_rate=1e-3\n", "utf-8")
    plans = [
        planned("tiny_world", TINY, Arm(name, ()), seed, tmp_path / "lab")
        for seed in range(2)
        for name in ("a", "b")
    ]
    assert hours_left(plans) is None
    for plan, seconds in zip(plans, (5400, 3600, 1800), strict=False):
        plan.folder.mkdir(parents=True)
        (plan.folder / "summary.json").write_text(json.dumps({"seconds": seconds}))
    assert hours_left(plans) is None  # no cold start is done
    plans[0].cold_folder.parent.mkdir()
    plans[0].cold_folder.with_suffix(".done").write_text('{"seconds": 360}')
    assert hours_left(plans) == pytest.approx(0.75 + 0.1)  # without the slowest
    assert hours_left(plans, jobs=2) == pytest.approx((0.5 + 0.1) / 2)
    assert hours_left(plans, jobs=3) is None
    monkeypatch.setattr("r1s_jax.lab.is_done", lambda plan: False)
    monkeypatch.setattr("r1s_jax.lab._cold_start", lambda config, folder: None)
    arguments = ["lab", "tiny_world", *TINY, "--arms", str(arms), "--seeds", "2"]
    done = run_cli(*arguments, "--out", str(tmp_path / "lab"), "--hours", "0.5")
    assert "would take 0.8 hours more, and --hours is 0.5" in str(done.exception)


def test_arms_are_compared_with_the_first_one_and_p_is_corrected():
    def runs(*f1):
        empty = dict.fromkeys(("searches_after", "searched_needed_after"))
        empty |= {"searched_memorised_after": None, "f1_before": 0.0, "signals": {}}
        empty |= {"steps_to_good": None, "seconds_to_good": None, "stopped": None}
        empty |= {"collapsed": False, "answered": 1.0, "searches_after": 0.0}
        return [empty | {"f1_after": value} for value in f1]

    base, better = np.array([0.5, 0.6, 0.4]), np.array([0.8, 0.8, 0.7])
    rows = table_of({"base": runs(*base), "better": runs(*better), "same": runs(*base)})
    expected = ttest_rel(better, base).pvalue
    assert rows[1]["gain"] == pytest.approx(np.mean(better - base))
    assert rows[1]["p"] == pytest.approx(expected)
    assert rows[1]["p_holm"] == pytest.approx(2 * expected)
    assert rows[0]["gain"] is None and rows[2]["p"] == rows[2]["p_holm"] == 1.0
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert "gain (p, Holm)" in as_markdown(rows)
    page = run_path(str(ROOT / "docs" / "make_worlds.py"))["tables"]({"one": rows, "two": rows})
    line = next(text for text in page.splitlines() if text.startswith("| better"))
    assert f"| +0.27 | {4 * expected:.2g} | 0.00 | 1.00 | 0/3 |" in line  # of four arms
    worse = [rows[0], rows[1] | {"gain": -0.001}]
    assert "| +0.00 |" in run_path(str(ROOT / "docs" / "make_worlds.py"))["tables"]({"one": worse})


def test_arms_over_different_data_are_not_compared(tmp_path):
    """A finished run counts only while its questions are unchanged."""
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question": "Who?", "answer": "A"}\n')
    environment = CorpusConfig(questions=(str(questions),), retriever="http://x/queries")
    folder = run_folder(tmp_path, "base", 0)
    plan = Plan(folder, replace(wiki_smollm2.config(), environment=environment), None, tmp_path)
    open_run_dir(folder, plan.config, resume=False)
    check_data(folder, plan.config, accept_changed=False)
    (folder / "metrics.jsonl").touch()
    assert not is_done(plan)
    (folder / "summary.json").write_text("{}")
    assert is_done(plan)
    questions.write_text('{"question": "Where?", "answer": "A"}\n')
    with pytest.raises(ConfigError, match=r"q\.jsonl changed since the run began"):
        is_done(plan)
