import dataclasses
import importlib.util
import json
import struct
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from r1s_jax.configs import tiny_world
from r1s_jax.io.journal import DataError, rows_so_far
from r1s_jax.tracking.run_dir import open_run_dir
from r1s_jax.tracking.telemetry import Telemetry


def test_rows_are_read_unchanged_whatever_a_policy_wrote(tmp_path):
    """Some characters end a line in Python but not in JSON lines."""
    texts = ["\u2028 \u2029 \x85 \x0b \x0c \x1c \r\n \x00", "🙂"]
    telemetry = Telemetry(tmp_path)
    for step, text in enumerate(texts, start=1):
        telemetry.trace({"step": step, "text": text})
    with (tmp_path / "traces.jsonl").open("a") as file:
        file.write('{"step": 3')  # cut short by a crash
    assert [row["text"] for row in rows_so_far(tmp_path / "traces.jsonl")] == texts
    telemetry.rewind(cold_start=0, learning=1)
    assert [row["step"] for row in rows_so_far(tmp_path / "traces.jsonl")] == [1]
    telemetry.close()


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n{\n")
    with pytest.raises(DataError, match=r"metrics.jsonl, line 2: "):
        rows_so_far(path)


def events(folder: Path) -> Iterator[Event]:
    """The events that TensorBoard reads, file by file in the order of their names."""
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            yield Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    """The points of a curve as TensorBoard draws them: a restart removes later steps."""
    drawn: list[tuple[int, float]] = []
    for event in events(folder):
        if event.HasField("session_log"):
            drawn = [(step, value) for step, value in drawn if step < event.step]
        drawn += [(event.step, v.simple_value) for v in event.summary.value if v.tag == tag]
    return drawn


def begin_twice(run: Path, config=None) -> None:
    """Steps 1-3 of both phases, a kill, and a restart from step 2 of learning."""
    for again in (False, True):
        telemetry = Telemetry(run, config)
        telemetry.rewind(cold_start=3 * again, learning=again)
        for step in (2, 3) if again else (1, 2, 3):
            if not again:
                telemetry.cold_start({"step": step, "loss": float(step)})
            telemetry.step({"step": step, "reward": step + 0.5 * again, "stage": "stage1"})
        telemetry.close()


def test_tensorboard_has_each_step_once_after_a_kill(tmp_path, monkeypatch):
    """Also after the clock was set back by more than a writer's thread can wait."""
    now = time.time()
    clock = iter([now, *[now - 30 * 86_400] * 100])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    begin_twice(tmp_path)
    board = tmp_path / "tensorboard"
    assert points(board / "rl", "rl/reward") == [(1, 1.0), (2, 2.5), (3, 3.5)]
    assert points(board / "cold_start", "cold_start/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert len(list((board / "rl").iterdir())) == 2
    if importlib.util.find_spec("tensorboard"):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        accumulator = EventAccumulator(str(board / "rl"))
        accumulator.Reload()
        assert [(e.step, e.value) for e in accumulator.Scalars("rl/reward")] == [
            (1, 1.0),
            (2, 2.5),
            (3, 3.5),
        ]


def wandb_run(tmp_path: Path) -> tuple[Path, object]:
    config = tiny_world.config()
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, wandb_project="p"))
    return open_run_dir(tmp_path / "run", config, resume=False), config


def test_a_resumed_run_is_one_run_of_wandb_on_one_axis(tmp_path, monkeypatch):
    calls: list[dict] = []

    class Recorder:
        def log(self, values, step):
            calls.append({"step": step} | values)

        def finish(self):
            pass

    def init(**options):
        calls.append(options)
        return Recorder()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    run, config = wandb_run(tmp_path)
    begin_twice(run, config)
    inits = [call for call in calls if "project" in call]
    assert len(inits) == 2 and {call["resume"] for call in inits} == {"allow"}
    assert inits[0]["id"] == inits[1]["id"] == json.loads((run / "versions.json").read_text())["id"]
    cold = config.cold_start.steps
    logged = [call for call in calls if "project" not in call]
    assert [c["step"] for c in logged if "cold_start/loss" in c] == [1, 2, 3]
    assert [c["step"] - cold for c in logged if "rl/reward" in c] == [1, 2, 3, 2, 3]


def test_wandb_itself_takes_it(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run, config = wandb_run(tmp_path)
    begin_twice(run, config)
    assert wandb.run is None
    names = {path.name.rpartition("-")[2] for path in (run / "wandb").glob("offline-run-*")}
    assert names == {json.loads((run / "versions.json").read_text())["id"]}


STEP = {"step": 1, "stage": "stage1", "reward": 0.5, "answer_f1": 0.5, "searches": 2}
STEP |= {"searches_per_question": 1.0, "sampled_tokens": 9, "seconds_rollout": 0.1, "health": []}


@pytest.mark.parametrize(
    "change", [{"step": "1"}, {"step": -1}, {"stage": 3}, {"entropy": "low"}, {"reward": None}]
)
def test_a_journal_with_a_row_of_another_kind_is_named(tmp_path, change):
    telemetry = Telemetry(tmp_path)
    telemetry.step(STEP)
    (row,) = telemetry.steps()
    assert row == STEP | {"seal": row["seal"]}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(STEP | change) + "\n")
    with pytest.raises(DataError, match=r"metrics.jsonl, (line|step) 1: \w+: Expected"):
        telemetry.rewind(cold_start=0, learning=1)
        telemetry.steps()
    telemetry.close()


@pytest.mark.parametrize("name", ["cold_start.jsonl", "traces.jsonl"])
def test_a_row_without_its_step_is_named(tmp_path, name):
    (tmp_path / name).write_text('{"loss": 1}\n')
    with pytest.raises(DataError, match=rf"{name}, line 1: .*`step`"):
        Telemetry(tmp_path).rewind(cold_start=1, learning=1)
