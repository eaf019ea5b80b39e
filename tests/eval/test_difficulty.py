"""Questions selected by difficulty: classes, ratios, and a selection that is killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from r1s_jax.config import override
from r1s_jax.configs import tiny_world
from r1s_jax.data.question_forms import parse_question
from r1s_jax.eval import difficulty as eval_difficulty
from r1s_jax.eval.difficulty import Selection, _row, difficulty, mixed
from r1s_jax.eval.difficulty import select as select_questions
from r1s_jax.io.errors import ConfigError
from r1s_jax.io.journal import DataError
from r1s_jax.train import train
from tests.makers import save_other_weights, save_small_model


def test_the_classes_are_the_published_ones():
    assert [difficulty(n) for n in (1, 9, 10, 20, 21, None)] == [
        *("easy", "easy", "medium", "medium", "hard", "hard")
    ]


def rows(easy: int, medium: int, hard: int) -> list[dict]:
    names = ["easy"] * easy + ["medium"] * medium + ["hard"] * hard
    return [{"idx": i, "difficulty": name} for i, name in enumerate(names)]


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        ((0, 1, 1), (0, 4, 4)),
        ((0, 1, 0), (0, 4, 0)),
        ((1, 2, 3), (2, 4, 6)),
        ((0, 1, 2), (0, 3, 6)),
    ],
)
def test_a_selection_keeps_the_ratio_of_classes(ratio, expected):
    chosen = mixed(rows(9, 4, 6), ratio, seed=0)
    names = [row["difficulty"] for row in chosen]
    assert tuple(map(names.count, ("easy", "medium", "hard"))) == expected
    assert [row["idx"] for row in chosen] == sorted(row["idx"] for row in chosen)
    assert mixed(rows(9, 4, 6), ratio, seed=0) == chosen


def test_an_empty_class_is_named():
    with pytest.raises(DataError, match=r"no medium question among 9 \(3 easy, 0 medium, 6 hard\)"):
        mixed(rows(3, 0, 6), (0, 1, 1), seed=0)
    with pytest.raises(ConfigError, match="rollouts=19"):
        Selection("q", "m", rollouts=19)
    with pytest.raises(ConfigError, match="easy:medium:hard"):
        Selection("q", "m", ratio=(0, 0, 0))


def test_a_question_keeps_its_id():
    answers = [SimpleNamespace(answer="Paris" if i == 11 else None) for i in range(20)]
    rolled, selection = SimpleNamespace(solutions=answers), Selection("q", "m", rollouts=20)
    row = {"_id": "5a8b57f2", "question": "Where?", "answer": "Paris"}
    measured = _row(rolled, 0, parse_question(row)[1], selection)
    assert measured["first_solved"] == 12 and measured["difficulty"] == "medium"
    assert parse_question(measured)[1].source_id == "5a8b57f2"
    nameless = _row(rolled, 0, parse_question(row | {"_id": 3})[1], selection)
    assert parse_question(nameless)[1].source_id == "" and "_id" not in nameless


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Fifty questions, their index, and a policy that answers some of them."""
    folder = tmp_path_factory.mktemp("world")
    few = ["cold_start.steps=120", "cold_start.cooldown_steps=20", "eval.questions=0"]
    train(override(tiny_world.config(), few), folder / "model", cold_start_only=True)
    for arguments in (
        ["data", "tiny-world", str(folder / "files")],
        ["index", "build", str(folder / "files/passages.tsv"), "--out", str(folder / "index")],
    ):
        assert run(*arguments).wait() == 0
    return folder


def run(*arguments: str) -> subprocess.Popen:
    code = "import sys; from r1s_jax.cli import main; sys.argv[0] = 'r1s'; main()"
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=env, stdout=subprocess.PIPE, text=True
    )


def select(world: Path, out: Path) -> subprocess.Popen:
    arguments = ["--model", str(world / "model"), "--index", str(world / "index")]
    arguments += ["rollout.max_length=192", "--ratio", "1:0:1", "--out", str(out)]
    return run("data", "select", str(world / "files/questions.jsonl"), *arguments)


@pytest.mark.slow
def test_a_resumed_selection_equals_an_uninterrupted_one(world, tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    process = select(world, cut)
    measured = tmp_path / "cut.jsonl.measured.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (measured.exists() and measured.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows_so_far = measured.read_bytes()
    assert 0 < rows_so_far.count(b"\n") < 50
    measured.write_bytes(rows_so_far + b'{"idx": 9, "quest')  # the state after a crash
    printed = [json.loads(select(world, path).communicate()[0]) for path in (cut, whole)]
    assert whole.read_bytes() == cut.read_bytes()
    everything = (tmp_path / "whole.jsonl.measured.jsonl").read_bytes()
    assert measured.read_bytes() == everything and everything.count(b"\n") == 50
    assert printed[0] | {"file": ""} == printed[1] | {"file": ""}
    assert sum(printed[0][name] for name in ("easy", "medium", "hard")) == 50
    assert printed[0]["easy"] and printed[0]["hard"], "a policy that solves some and not others"
    assert (tmp_path / "whole.jsonl.png").read_bytes().startswith(b"\x89PNG")
    for row in map(json.loads, everything.splitlines()):
        assert (row["first_solved"] is None) == (row["solved"] == 0)
        assert row["difficulty"] == difficulty(row["first_solved"])


@pytest.fixture
def measured(tmp_path, monkeypatch) -> tuple[Selection, Path]:
    """A question with the row and header of a finished measurement."""
    file, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    file.write_text('{"question": "Who?", "answer": "A"}\n')
    selection = Selection(str(file), str(save_small_model(tmp_path / "m")), ratio=(0, 0, 1))
    row = {"idx": 0, "question": "Who?", "answer": "A", "first_solved": None, "solved": 0}
    journal = tmp_path / "a.jsonl.measured.jsonl"

    def nothing_may_be(*_):
        raise AssertionError("measured")

    monkeypatch.setattr(eval_difficulty, "_measure", nothing_may_be)
    with pytest.raises(AssertionError, match="measured"):  # writes the header before any row
        select_questions(selection, None, {"corpus": "c"}, out)
    journal.write_text(json.dumps(row | {"difficulty": "hard"}) + "\n")
    return selection, out


def test_measured_questions_are_not_measured_again(measured):
    selection, out = measured
    assert select_questions(selection, None, {"corpus": "c"}, out)["chosen"] == 1
    with pytest.raises(DataError, match=r"q\.jsonl: no easy question among 1"):
        select_questions(replace(selection, ratio=(1, 0, 0)), None, {"corpus": "c"}, out)


def test_a_changed_selection_is_refused_after_the_first_measurement(measured):
    selection, out = measured
    journal = out.with_name("a.jsonl.measured.jsonl")
    header = journal.with_name("a.jsonl.measured.jsonl.header.json")
    before = header.read_text(), journal.read_text()
    with pytest.raises(DataError, match=r"source\.corpus was c, now d"):
        select_questions(selection, None, {"corpus": "d"}, out)
    with pytest.raises(DataError, match=r"run\.rollouts was 20, now 21"):
        select_questions(replace(selection, rollouts=21), None, {"corpus": "c"}, out)
    Path(selection.questions).write_text('{"question": "Who?", "answer": "B"}\n')
    with pytest.raises(DataError, match="other questions"):
        select_questions(selection, None, {"corpus": "c"}, out)
    Path(selection.questions).write_text('{"question": "Who?", "answer": "A"}\n')
    save_other_weights(Path(selection.model))
    with pytest.raises(DataError, match=r"other model .*Choose another file with --out"):
        select_questions(selection, None, {"corpus": "c"}, out)
    assert before == (header.read_text(), journal.read_text()) and not out.exists()
