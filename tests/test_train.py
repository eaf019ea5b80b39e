"""Whole short runs of the tiny world: files, resuming, stopping, bad input."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from r1s_jax.config import override
from r1s_jax.configs import tiny_world
from r1s_jax.io.errors import ConfigError
from r1s_jax.io.journal import rows_so_far
from r1s_jax.models.checkpoint import CheckpointError
from r1s_jax.system.locks import InUse, only_one
from r1s_jax.tracking.metrics import without_times
from r1s_jax.tracking.progress import Progress
from r1s_jax.tracking.report import write_report
from r1s_jax.tracking.run_dir import open_run_dir
from r1s_jax.train import Run, train
from tests.makers import SHORT, run_cli, undocumented


def command(run_dir: Path, *options: str) -> list[str]:
    code = "import sys; from r1s_jax.cli import main; sys.argv[0] = 'r1s'; main()"
    args = ["train", "tiny_world", *SHORT, "--run-dir", str(run_dir), *options]
    return [sys.executable, "-c", code, *args]


def environment() -> dict[str, str]:
    return os.environ | {"JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    done = subprocess.run(command(path), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    last = json.loads(done.stdout.splitlines()[-1])
    measured = {
        f"{what}_{when}" for what in ("f1", "cover_em", "searches") for when in ("before", "after")
    }
    assert measured | {"f1_one_hop_after", "f1_two_hop_after", "seconds", "steps"} <= last.keys()
    assert last == json.loads((path / "summary.json").read_text())
    return path


def same_columns(rows: list[dict]) -> list[dict]:
    """The columns that must not depend on when a run was stopped."""
    rows = [without_times(row) for row in rows]
    for row in rows:
        for search in row.get("searches", []) if isinstance(row.get("searches"), list) else []:
            search.pop("seconds")
    return rows


def assert_same_run(a: Path, b: Path) -> None:
    for name in ("cold_start.jsonl", "metrics.jsonl", "traces.jsonl"):
        assert same_columns(rows_so_far(a / name)) == same_columns(rows_so_far(b / name)), name
    results = [json.loads((run / "summary.json").read_text()) for run in (a, b)]
    assert results[0]["f1_after"] == results[1]["f1_after"]


def test_a_run_leaves_its_files(whole):
    rows = rows_so_far(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["stage"] for row in rows] == ["stage1"] * 2 + ["stage2"] * 4
    named = {"reward", "format_valid", "searches_per_question", "searches_empty", "answer_f1"}
    named |= {"searches_failed", "entropy", "kl", "clip_fraction", "logprob_diff_mean", "loss"}
    named |= {"logprob_diff_max", "grad_norm", "response_length", "sampled_tokens_per_s"}
    named |= {"trained_tokens_per_s", "seconds_rollout", "seconds_reward", "seconds_update"}
    for row in rows:
        assert named <= row.keys() and not undocumented(row)
        assert row["logprob_diff_max"] < 1e-4, "training sees what sampling saw"
    assert [row["compilations"] for row in rows[2:]] == [0] * 4, "nothing is compiled again"
    for trace in rows_so_far(whole / "traces.jsonl"):
        assert trace["spans"] and {"question", "answers", "reward", "parts"} <= trace.keys()
        written = "".join(text for text, by_policy in trace["spans"] if by_policy)
        assert "".join(text for text, _ in trace["token_advantages"]) == written
        advantages = [advantage for _, advantage in trace["token_advantages"]]
        assert np.mean(advantages) == pytest.approx(trace["advantage"], rel=1e-3, abs=1e-6)
    assert (whole / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((whole / "tensorboard").iterdir())
    assert json.loads((whole / "config.json").read_text())["name"] == "tiny_world"
    assert "jax" in json.loads((whole / "versions.json").read_text())


@pytest.mark.parametrize(
    ("step", "before", "evaluations"), [(0, None, 1), (0, {"f1": 1.0}, 0), (2, {}, 0)]
)
def test_learning_begins_with_one_evaluation(tmp_path, monkeypatch, step, before, evaluations):
    run, seen = Run.__new__(Run), []
    run.dir, run.progress = tmp_path, Progress(phase="learning", step=step, before=before)
    monkeypatch.setattr(Run, "evaluate", lambda _, state: seen.append(state) or state)
    monkeypatch.setattr("r1s_jax.train.note_evaluation", lambda *_: {"f1": 0.5})
    run._evaluate_before("the state")
    assert len(seen) == evaluations and run.progress.before == (
        {"f1": 0.5} if evaluations else before
    )


@pytest.mark.slow
def test_the_cold_start_by_itself_and_then_the_rest_is_the_same_run(whole, tmp_path, monkeypatch):
    """Also after a kill between both, before the evaluation at which the second part starts."""
    config, path = override(tiny_world.config(), SHORT), tmp_path / "parts"
    assert train(config, path, cold_start_only=True)["stopped"] == "end of the cold start"
    assert not (path / "evaluation_before.jsonl").exists()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "evaluate", killed)
        train(config, path, resume=True)
    summary = train(config, path, resume=True)
    expected = json.loads((whole / "summary.json").read_text())
    for name in ("f1", "cover_em", "searches"):
        assert summary[f"{name}_before"] == expected[f"{name}_before"], name
    before = "evaluation_before.jsonl"
    assert rows_so_far(path / before) == rows_so_far(whole / before)
    assert_same_run(whole, path)


def test_a_run_is_reported(whole, tmp_path):
    write_report([whole], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "finished, step 6 of 6" in text and "No run has numbers of" not in text
    assert text.count('<details class="card trace"') == len(rows_so_far(whole / "traces.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize("attempt", [0, 1])
def test_stopped_then_killed_and_resumed_is_the_same_run(whole, tmp_path, attempt):
    """SIGTERM in the cold start, then SIGKILL at a random moment after the next checkpoint."""
    path, rng = tmp_path / "stopped", random.Random(attempt)
    checkpoints = path / "checkpoints"
    run = begin(command(path))
    wait_until((path / "cold_start.jsonl").exists, run)
    run.send_signal(signal.SIGTERM)
    out, _ = run.communicate(timeout=600)
    assert run.returncode == 0
    assert json.loads(out.splitlines()[-1])["stopped"] == "SIGTERM"
    saved = set(checkpoints.glob("[0-9]*"))
    assert saved
    run = begin(command(path, "--resume"))
    wait_until(lambda: set(checkpoints.glob("[0-9]*")) - saved, run)
    time.sleep(rng.uniform(0, 12))
    run.kill()
    run.wait()
    done = subprocess.run(
        command(path, "--resume"), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_run(whole, path)


def begin(words: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


def wait_until(happened: Callable[[], object], run: subprocess.Popen) -> None:
    while not happened():
        assert run.poll() is None, "the run ended before"
        time.sleep(0.05)


STREAMS = ["algorithm.credit=tips", "algorithm.teacher=gold", "algorithm.kl_coefficient=0.1"]
STREAMS += ["algorithm.kl_penalty=loss", "algorithm.kl_estimator=k2", "algorithm.loss=dppo"]
STREAMS += ["algorithm.echo_coefficient=0.1", "algorithm.llds_coefficient=0.2"]
STREAMS += ["algorithm.sequence_mask=0.5", "algorithm.search_price=0.1", "rollout.top_p=0.9"]


FORKS = ["rollout.forks=0.8", "rollout.fork=answer", "rollout.forks_per_trajectory=2"]
FORKS += ["rollout.fork_depth=2", "rollout.fork_draws=2", "rollout.top_p=0.9"]
FORKS += ["algorithm.credit=fork", "algorithm.forks_teach=true", "algorithm.search_price=0.3"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "streams", [[], STREAMS, FORKS], ids=["one stream", "all streams", "forks"]
)
def test_partial_rollouts_are_the_same_run_when_killed_and_resumed(tmp_path, streams):
    """A checkpoint holds the trajectories in flight, and a step never depends on time."""
    paths = tmp_path / "whole", tmp_path / "killed"
    carry = ["rollout.partial_rollouts=true", *streams]
    for path in paths:
        run = begin(command(path, *carry))
        if path is paths[1]:
            wait_until(lambda: len(rows_so_far(paths[1] / "metrics.jsonl")) >= 3, run)
            run.kill()
            run.wait()
            run = begin(command(path, *carry, "--resume"))
        out, _ = run.communicate(timeout=900)
        assert run.returncode == 0, out
    rows = rows_so_far(paths[0] / "metrics.jsonl")
    assert sum(row["partial_trajectories"] for row in rows) > 0
    assert max(row["token_age_mean"] for row in rows) > 0
    assert (sum(row.get("forks", 0) for row in rows) > 0) == (streams == FORKS)
    assert not undocumented(rows[-1])
    assert [row["decode_steps"] for row in rows] == [
        row["decode_steps"] for row in rows_so_far(paths[1] / "metrics.jsonl")
    ]
    assert_same_run(*paths)


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_the_steps_since_the_previous_one(whole, tmp_path):
    path = tmp_path / "damaged"
    shutil.copytree(whole, path)
    (path / "summary.json").unlink()
    newest = max((path / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    numbers = max(newest.rglob("*"), key=lambda p: p.stat().st_size)
    data = bytearray(numbers.read_bytes())
    data[len(data) // 2] ^= 1
    numbers.write_bytes(data)
    done = subprocess.run(
        command(path, "--resume", "--profile", "6"),
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((path / "profile").rglob("perfetto_trace.json.gz"))
    assert f"{newest} is damaged" in done.stderr.replace("\n", "")
    assert (path / "damaged-checkpoints" / newest.name).is_dir()
    assert_same_run(whole, path)


def test_another_config_is_refused_without_loss(whole):
    before = (whole / "metrics.jsonl").read_bytes()
    other = override(tiny_world.config(), [*SHORT, "seed=5", "optimizer.learning_rate=0.1"])
    with pytest.raises(ConfigError, match=r"another config: optimizer.learning_rate was .*seed"):
        train(other, whole, resume=True)
    with pytest.raises(ConfigError, match="already holds a run"):
        train(override(tiny_world.config(), SHORT), whole)
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_the_checkpoints_of_another_run_are_refused(whole, tmp_path):
    others = override(tiny_world.config(), [*SHORT, f"run.checkpoint_dir={whole / 'checkpoints'}"])
    with pytest.raises(CheckpointError, match=rf"belongs to the run in {whole}"):
        train(others, tmp_path / "run")


def test_a_failure_before_the_first_step_leaves_the_directory_usable(tmp_path):
    """After an unknown reward or a mesh that does not fit, a second try uses the directory."""
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="no reward 'nonsense'"):
        train(override(tiny_world.config(), [*SHORT, "stage2.reward=nonsense"]), run)
    assert not run.exists()
    wrong, right = (override(tiny_world.config(), [*SHORT, f"mesh.tensor={n}"]) for n in (3, 1))
    with pytest.raises(ValueError, match="devices"):
        train(wrong, run)
    assert json.loads((run / "config.json").read_text())["mesh"]["tensor"] == 3
    open_run_dir(run, right, resume=False)
    assert json.loads((run / "config.json").read_text())["mesh"]["tensor"] == 1
    (run / "config.json").rename(run / "config.json.partial")  # the state after a kill
    open_run_dir(run, right, resume=True)
    (run / "config.json").write_text("{")
    (run / "versions.json").rename(tmp_path / "versions.json")
    with pytest.raises(ConfigError, match="holds no run"):  # it may be a model's config.json
        open_run_dir(run, right, resume=False)
    assert (run / "config.json").read_text() == "{"
    (tmp_path / "versions.json").rename(run / "versions.json")
    (run / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"config\.json: no JSON"):
        open_run_dir(run, right, resume=True)


@pytest.mark.slow
def test_stage_1_ends_at_its_goal_and_groups_without_signal_are_replaced(tmp_path):
    short = [*SHORT, "stage1.steps=5", "stage2.steps=2", "stage1.until_format_valid=0.01"]
    short += ["algorithm.dynamic_sampling=1", "eval.questions=0", "algorithm.loss_average=token"]
    summary = train(override(tiny_world.config(), short), tmp_path / "run")
    rows = rows_so_far(tmp_path / "run" / "metrics.jsonl")
    ended = next(row["step"] for row in rows if row["format_valid"] >= 0.01)
    assert [row["stage"] for row in rows] == ["stage1"] * ended + ["stage2"] * 2
    assert ended < 5 and summary["steps"] == ended + 2
    # Sampled over trained trajectories: steps without enough signal sample a second batch.
    for row in rows:
        assert row["trained_tokens"] <= row["sampled_tokens"]
        assert row["groups_without_signal"] == 0 or row["trained_tokens"] < row["sampled_tokens"]


@pytest.mark.slow
def test_kl_to_the_reference(tmp_path):
    """With a KL coefficient there is a reference, and the KL is zero at first."""
    short = [*SHORT, "cold_start.steps=0", "stage1.steps=0", "stage2.steps=2", "eval.questions=0"]
    config = override(tiny_world.config(), [*short, "algorithm.kl_coefficient=0.1"])
    train(config, tmp_path / "kl")
    first, second = rows_so_far(tmp_path / "kl" / "metrics.jsonl")
    assert abs(first["kl"]) < 1e-6
    assert abs(second["kl"]) > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "changes"),
    [(20, ["stage2.steps=60"]), (10, ["stage2.steps=58", "rollout.partial_rollouts=true"])],
    ids=["20 kills", "10 kills, trajectories carried over"],
)
def test_kills_at_random_moments_change_nothing(tmp_path, kills, changes):
    """The launch script restarts the run after kills within twenty seconds of its start."""
    path, rng = tmp_path / "killed", random.Random(0)
    longer = [*SHORT, *changes]
    train(override(tiny_world.config(), longer), tmp_path / "whole")
    script = Path(__file__).parents[1] / "configs" / "launch" / "single_gpu.sh"
    bin_dir = Path(sys.executable).parent
    env = environment() | {"RECIPE": "tiny_world", "RUN_DIR": str(path)}
    env["PATH"] = f"{bin_dir}:{env['PATH']}"
    with (tmp_path / "log").open("w") as log:
        loop = subprocess.Popen(["bash", str(script), *longer], env=env, stdout=log, stderr=log)
        for _ in range(kills):
            while not (runs := trainings(loop.pid)) and loop.poll() is None:
                time.sleep(0.01)
            assert loop.poll() is None, f"the run ended before it was killed {kills} times"
            time.sleep(rng.uniform(0, 20))
            assert all(run.is_running() for run in runs), "it ended by itself"
            for run in runs:
                run.kill()
            psutil.wait_procs(runs)
        assert loop.wait(timeout=300) == 0, (tmp_path / "log").read_text()[-3000:]
    assert (tmp_path / "log").read_text().count("stopped with status 137") == kills
    assert_same_run(tmp_path / "whole", path)


def trainings(script: int) -> list[psutil.Process]:
    """The `r1s train` processes that a script started, without its other commands."""
    runs = []
    for process in psutil.Process(script).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "train" in process.cmdline():
                runs.append(process)
    return runs


@pytest.mark.slow
def test_memory_stays_level_over_many_steps(tmp_path):
    few = ["cold_start.steps=0", "stage1.steps=0", "stage2.steps=500", "eval.questions=0"]
    few += ["stage2.questions_per_step=4", "algorithm.samples_per_question=4"]
    few += ["environment.people=40", "run.checkpoint_every=25"]
    train(override(tiny_world.config(), few), tmp_path / "run")
    rows = rows_so_far(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 500
    assert rows[-1]["host_memory_gib"] < 1.05 * rows[49]["host_memory_gib"]
    assert sum(row["compilations"] for row in rows[2:]) == 0


CORPUS = ["policy.compute_dtype=float32", "environment.encoder=hash", "environment.prompt=base"]
CORPUS += ["cold_start.steps=0", "environment.demonstrations="]
CORPUS += ["stage1.steps=0", "stage2.steps=2", "stage2.questions_per_step=2", "eval.questions=2"]
CORPUS += ["algorithm.samples_per_question=2", "algorithm.updates_per_rollout=1"]
CORPUS += ["rollout.slots=4", "rollout.prefill_rows=2", "rollout.max_length=384"]
CORPUS += [
    "rollout.max_prompt_length=256",
    "rollout.max_turn_length=8",
    "rollout.retrieve_first=true",
]


@pytest.mark.slow
def test_questions_drawn_by_difficulty_survive_a_kill(model, index, tmp_path):
    """The rewards of questions, which decide what comes next, stand in the checkpoint."""
    questions = tmp_path / "q.jsonl"
    rows = [{"question": f"What is the trade of Bakor{i}?", "answer": "smith"} for i in range(12)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [*CORPUS, "environment.passages=", f"environment.index={index}", "stage2.steps=5"]
    options += [f"environment.questions={questions}", f"policy.model={model}", *STREAMS]
    options += ["environment.sampler=difficulty", "stage2.reward=words", "cold_start.steps=0"]
    paths = tmp_path / "whole", tmp_path / "killed"
    code = "import sys; from r1s_jax.cli import main; sys.argv[0] = 'r1s'; main()"
    for path in paths:
        words = [sys.executable, "-c", code, "train", "wiki_smollm2", *options]
        words += ["--run-dir", str(path)]
        run = begin(words)
        if path is paths[1]:
            wait_until(lambda: len(rows_so_far(paths[1] / "metrics.jsonl")) >= 3, run)
            run.kill()
            run.wait()
            run = begin([*words, "--resume"])
        out, _ = run.communicate(timeout=900)
        assert run.returncode == 0, out
    asked = [row["question"] for row in rows_so_far(paths[0] / "traces.jsonl")]
    assert len(set(asked)) > 3
    for name in ("metrics.jsonl", "traces.jsonl"):
        whole, killed = (same_columns(rows_so_far(path / name)) for path in paths)
        assert whole == killed


@pytest.mark.slow
def test_a_run_folder_is_complete_and_remembers_its_data(model, index, tmp_path, monkeypatch):
    """Resumes from another folder without its base model; changed data is refused."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "base")
    rows = [{"question": f"What is the trade of Bakor{i}?", "answer": "smith"} for i in range(12)]
    Path("q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = [*CORPUS, "environment.passages=", f"environment.index={index}"]
    shared += ["environment.questions=q.jsonl"]

    def train_it(*options, base="base", questions="q.jsonl"):
        changes = [*shared, f"policy.model={base}", f"environment.questions={questions}"]
        return run_cli("train", "wiki_smollm2", *changes, "--run-dir", "run", *options)

    assert (done := train_it()).exit_code == 0, done.output
    checkpoints = sorted(Path("run/checkpoints").glob("[0-9]*"))
    shutil.rmtree(checkpoints[-1])  # the state of a run stopped one step earlier
    absolute = {"base": tmp_path / "base", "questions": tmp_path / "q.jsonl"}
    Path("q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:8]))
    done = train_it("--resume", **absolute)
    assert done.exit_code == 1 and "q.jsonl changed since the run began" in str(done.exception)
    done = train_it("--resume", "--accept-changed-data", **absolute)
    assert done.exit_code == 0, done.output
    shutil.rmtree("base")
    shutil.rmtree(sorted(Path("run/checkpoints").glob("[0-9]*"))[-1])
    assert (done := train_it("--resume", **absolute)).exit_code == 0, done.output
    monkeypatch.chdir("/")
    for source in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "3"):
        out = tmp_path / f"exported-{source.name}"
        assert (done := run_cli("export", str(source), str(out))).exit_code == 0, done.output
        assert (out / "tokenizer.json").exists()


def test_a_run_folder_has_one_writer(tmp_path):
    config = override(tiny_world.config(), SHORT)
    with only_one(tmp_path / "run", "the run"), pytest.raises(InUse, match=r"process \d+ on \S+"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
