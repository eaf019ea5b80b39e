"""`r1s audit` and `r1s replay` on a run: what is equal, what is found, what is refused."""

import json
import random
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest

from r1s_jax.audit.execute import Asked, Piece, again, chosen, compared, executable
from r1s_jax.audit.files import check_run
from r1s_jax.audit.replay import Change, replay
from r1s_jax.audit.report import as_text
from r1s_jax.audit.run import audit_run
from r1s_jax.config import override
from r1s_jax.configs import tiny_world
from r1s_jax.io.errors import UserError
from r1s_jax.io.journal import rows_so_far
from r1s_jax.io.seals import sealed_line
from r1s_jax.recipes import load_recipe
from r1s_jax.rollout.sampler import trajectory_keys
from r1s_jax.tracking.record import note_start, read_record
from r1s_jax.tracking.run_dir import check_data, open_run_dir, read_config
from r1s_jax.tracking.telemetry import Telemetry
from r1s_jax.train import train
from tests.host_loop import HostLoop
from tests.makers import SHORT, run_cli, save_small_run

SETTINGS = [*SHORT, "cold_start.steps=20", "run.keep_for_audit=1", "stage2.steps=2"]
NOT_COMPARED = {"learning_curve.png"}  # and what TensorBoard shows


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run with partial rollouts, all of whose checkpoints are kept."""
    path = tmp_path_factory.mktemp("runs") / "made"
    train(override(tiny_world.config(), [*SETTINGS, "rollout.partial_rollouts=true"]), path)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run whose trajectories each belong to one step."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    train(override(tiny_world.config(), [*SETTINGS, "eval.questions=0"]), path)
    return path


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def names_of(run: Path) -> list[str]:
    config = read_config(run)
    return [finding.file for finding in check_run(run, config).findings]


def test_an_honest_run_is_equal_step_by_step(made):
    report = audit_run(made, Asked(10))
    assert report["equal"] and not report["findings"] and not report["other"]
    assert [step["step"] for step in report["steps"]] == [1, 2, 3, 4]
    assert all(step["equal"] and step["seconds"] > 0 for step in report["steps"])
    assert any("only 4 of 10" in line for line in report["missing"])
    result = run_cli("audit", str(made), "--steps", "0")
    assert result.exit_code == 0 and "nothing differs" in result.output


def audited_files(run: Path) -> list[Path]:
    found = (path for path in sorted(run.rglob("*")) if path.is_file())
    return [
        path
        for path in found
        if "tensorboard" not in path.parts
        and path.suffix != ".lock"
        and path.name not in NOT_COMPARED
    ]


def one_edit(data: bytes, rng: random.Random, digit: bool) -> bytes:
    """`data` with one bit, or one digit of its text, changed."""
    changed, digits = bytearray(data), [i for i, b in enumerate(data) if 48 <= b < 58]
    if digit and digits:
        at = rng.choice(digits)
        changed[at] = 48 + (data[at] - 48 + rng.randrange(1, 10)) % 10
    else:
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


@pytest.mark.parametrize("count", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_every_changed_bit_is_found_and_its_file_named(copy, count):
    rng, files = random.Random(count), audited_files(copy)
    assert {"config.json", "metrics.jsonl", "traces.jsonl", "summary.json", "run.json"} <= {
        path.name for path in files
    }
    for number in range(count):
        path = rng.choice(files)
        data = path.read_bytes()
        path.write_bytes(one_edit(data, rng, digit=number % 2 == 0 and path.suffix != ""))
        name = path.relative_to(copy).as_posix()
        try:
            found = names_of(copy)
        except (UserError, OSError):
            found = ["config.json"]  # which read_config read
        assert any(name == one or name.startswith(one + "/") for one in found), name
        path.write_bytes(data)
    assert names_of(copy) == []


def test_lines_that_go_or_change_places_are_found(copy):
    for name in ("metrics.jsonl", "cold_start.jsonl", "traces.jsonl", "record.jsonl"):
        text = (copy / name).read_text()
        lines = text.splitlines(keepends=True)
        for others in ([*lines[:1], *lines[2:]], [lines[1], lines[0], *lines[2:]], lines[1:]):
            (copy / name).write_text("".join(others))
            assert names_of(copy), (name, len(others))
        (copy / name).write_text(text)
    shutil.rmtree(copy / "checkpoints" / "22" / "metrics", ignore_errors=True)
    (copy / "checkpoints" / "22" / "state" / "_METADATA").unlink()
    assert "checkpoints/22/state/_METADATA" in names_of(copy)


def sealed_again(path: Path, rows: list[dict]) -> None:
    lines, seal = [], ""
    for row in rows:
        line, seal = sealed_line({k: v for k, v in row.items() if k != "seal"}, seal)
        lines.append(line)
    path.write_text("".join(lines))


def test_a_row_that_was_made_up_with_new_seals_is_found_by_executing(copy):
    """Whoever can run this program can seal a lie; executing the step shows it."""
    rows = rows_so_far(copy / "metrics.jsonl")
    rows[1]["answer_f1"] = 0.75
    sealed_again(copy / "metrics.jsonl", rows)
    events = [event for event in read_record(copy) if event["event"] != "end"]
    sealed_again(copy / "record.jsonl", events)
    result = run_cli("audit", str(copy), "--steps", "4", "--json")
    report = json.loads(result.output.splitlines()[-1])
    assert result.exit_code == 1 and not report["findings"] and not report["equal"]
    (wrong,) = [step for step in report["steps"] if not step["equal"]]
    assert wrong["step"] == 2 and not wrong["differs"]
    assert wrong["columns"]["answer_f1"][0] == 0.75
    assert "differs first in answer_f1" in as_text(report)


FACTS = [("processor", "another"), ("flags", {"XLA_FLAGS": "--xla_x"}), ("mesh", {"data": 2})]
FACTS += [("version", "0.9.0"), ("cores", 64)]


@pytest.mark.parametrize("fact", FACTS, ids=[name for name, _ in FACTS])
def test_another_machine_is_refused_by_name_or_compared_with_its_distance(copy, fact, request):
    name, value = fact
    events = read_record(copy)
    for event in events:
        if "facts" in event:
            event["facts"][name] = value
    sealed_again(copy / "record.jsonl", events)
    report = audit_run(copy, Asked(1))
    assert not report["equal"] and not report["steps"] and not report["findings"]
    assert len(report["other"]) == 1 and "4 steps were not executed" in report["missing"][-1]
    output = run_cli("audit", str(copy), "--steps", "1").output
    assert report["other"][0] in output and "--distance" in output
    if name == "processor":
        report = audit_run(copy, Asked(1, distance=True))
        assert report["steps"][0]["equal"] and report["steps"][0]["distance"] == 0.0


def test_other_parameters_are_told_apart_by_what_differs_first():
    then = {"step": 3, "digests": {"params_before": "a", "questions": "b", "params": "c"}}
    for name, meaning in (("questions", "order"), ("params", "arithmetic")):
        now = {"step": 3, "digests": then["digests"] | {name: "x", "optimizer": "y"}}
        step = compared(then, now, 1.0)
        assert step.differs == name and meaning in step.meaning
    assert compared(then, then | {"seconds_update": 9.0}, 1.0).equal
    assert compared(then | {"loss": float("nan")}, then | {"loss": float("nan")}, 1.0).equal


def test_steps_are_drawn_so_that_each_that_is_executed_counts():
    pieces = [Piece(Path(str(n)), n, n + 3) for n in (1, 5, 9)]  # pyright: ignore
    for steps in range(15):
        drawn = chosen(pieces, steps, seed=steps)
        assert sum(p.last - p.first + 1 for p in drawn) == min(steps, 12)
        assert all(p.first in (1, 5, 9) for p in drawn)
    assert chosen(pieces, 2, 0) != chosen(pieces, 2, 3)


def test_a_run_that_was_killed_and_went_on_elsewhere_says_from_where(copy):
    """The rows after its last checkpoint were written again; facts of both starts are there."""
    events = read_record(copy)
    second = json.loads(json.dumps(events[0]))
    second |= {"phase": "learning", "step": 2}
    second["facts"]["devices"] = {"cpu cpu": 4}
    second["files"] = events[0]["files"] | events[1]["files"]
    sealed_again(copy / "record.jsonl", [events[0], events[1], second, events[-1]])
    report = audit_run(copy, Asked(4))
    assert report["equal"] and [step["step"] for step in report["steps"]] == [1, 2]
    assert "2 steps were not executed" in report["missing"][0]
    assert report["history"] == ["from step 3 on bits may differ: other devices"]
    assert not report["findings"]
    first = executable(copy, read_config(copy), rows_so_far(copy / "metrics.jsonl"))[0]
    assert (first.first, first.last) == (1, 1)


def test_a_run_without_digests_says_what_can_still_be_checked(copy):
    (copy / "record.jsonl").unlink()
    report = audit_run(copy, Asked(2))
    assert "version without digests" in report["missing"][0] and not report["steps"]
    assert report["checked"] == ["checkpoints", "data"] and report["equal"]


def test_a_trajectory_is_replayed_token_for_token(made):
    """All of two steps, with partial rollouts; traces.jsonl has some of them."""
    traces = rows_so_far(made / "traces.jsonl")
    for step in (2, 4):
        own = [row for row in traces if row["step"] == step]
        asked = {str(row["question_id"]): row["question"] for row in own}
        told = [replay(made, step, text, sample) for text in asked.values() for sample in range(4)]
        known = [([list(span) for span in t.then.trace.spans], t.then.trace.reward) for t in told]
        assert all((row["spans"], row["reward"]) in known for row in own)
        assert len(told) >= 8 and all(not one.notes for one in told)


def test_what_is_not_changed_comes_out_the_same(whole):
    """The changed trajectory runs alone: with the temperature of the run it is the same."""
    for sample in (0, 3):
        told = replay(whole, 3, sample=sample, change=Change(temperature=1.0))
        assert told.now and told.now.tokens == told.then.tokens
        assert told.now.trace.reward == told.then.trace.reward
        assert told.same == told.then.trace.solution.text and not told.notes


def test_without_search_it_is_what_the_host_loop_samples_when_nothing_is_found(whole):
    class Nothing:
        def search(self, queries, k):
            return [[] for _ in queries]

    searched = 0
    config = read_config(whole)
    with again(whole, config) as machinery:
        folder = next(p for p in (whole / "checkpoints").iterdir() if p.name == "23")
        state = machinery.stand_at(folder)
        for sample in range(4):
            told = replay(whole, 3, sample=sample, change=Change(without_search=True))
            engine = machinery.run.engine_of(config.rollout)
            engine.broker.begin(Nothing())
            loop = HostLoop.of(engine, state.params)
            one = jnp.array([0])
            keys = trajectory_keys(config.seed, one + 2, one + told.question_id, one + sample, one)
            list(loop.run(engine.prompt_tokens(told.then.trace.question), keys[0]))
            assert told.now and loop.tokens == told.now.tokens
            searched += told.now.trace.searches > 0
    assert searched


def test_both_are_shown_side_by_side(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(whole.parent)  # paths are relative to here, not to where the run was begun
    passages = tmp_path / "passages.jsonl"
    passages.write_text('{"id": "1", "title": "Nobody", "text": "Nobody has trade baker."}\n')
    page = tmp_path / "pair.html"
    options = ["replay", whole.name, "--step", "3", "--sample", "1", "--documents", str(passages)]
    out = run_cli(*options, "--json").output
    told = json.loads(out.splitlines()[-1])
    assert told["change"] == "documents" and told["then"]["tokens"] and told["now"]["tokens"]
    assert run_cli(*options, "--html", str(page)).exit_code == 0
    text = page.read_text()
    assert "as it was" in text and "with --documents" in text
    shown = run_cli(*options).output
    assert "as it was" in shown and ("part after" in shown or "the same" in shown)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--step", "9"], "steps 1 to 4, not 9"),
        (["--step", "2", "--question", "no such"], "has no question 'no such'"),
        (["--step", "2", "--sample", "9"], "samples 0 to 3"),
        (["--step", "2", "--without-search", "--temperature", "0.5"], "one thing at a time"),
        (["--step", "2", "--prompt", "gone.txt"], "gone.txt does not exist"),
    ],
)
def test_bad_input_is_one_message(made, options, message):
    result = run_cli("replay", str(made), *options)
    assert isinstance(result.exception, UserError) and message in str(result.exception)


def test_a_checkpoint_that_is_gone_is_one_message(copy):
    for number in (21, 22):
        shutil.rmtree(copy / "checkpoints" / str(number))
    with pytest.raises(UserError, match=r"from before step 2 .* run.keep_for_audit=K"):
        replay(copy, 2)
    with pytest.raises(UserError, match="is no run"):
        audit_run(copy / "policy", Asked(1))


def test_changed_data_and_a_changed_index_are_found(index, tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "Who is Bakori?", "answer": "a smith"}\n' * 3)
    own = Path(shutil.copytree(index, tmp_path / "index"))
    changes = [f"environment.questions={questions}", f"environment.index={own}"]
    config = load_recipe("smollm2_135m", changes)
    run = open_run_dir(tmp_path / "run", config, resume=False)
    check_data(run, config, accept_changed=False)
    note_start(run, "learning", 0, {})
    nothing = ["checkpoints/run.json"]  # it made no checkpoint
    assert names_of(run) == nothing
    rng, files = random.Random(0), [p for p in sorted(own.rglob("*")) if p.is_file()]
    for path in [*files, questions] * 3:
        data = path.read_bytes()
        path.write_bytes(one_edit(data, rng, digit=False))
        found = [f"{f.file} {f.what}" for f in check_run(run, read_config(run)).findings]
        assert any(path.name in text or str(own) in text for text in found), path
        path.write_bytes(data)
    assert names_of(run) == nothing
    moved = own.rename(tmp_path / "moved")
    assert len(check_run(run, read_config(run), str(moved)).findings) == 1
    assert any(str(own) in name or name == "data" for name in names_of(run))


def test_an_exported_model_hands_on_where_it_comes_from(copy, tmp_path):
    out = tmp_path / "model"
    done = run_cli("export", str(copy), str(out), "--dtype", "float32", "--with-audit")
    assert done.exit_code == 0
    values = json.loads((out / "audit.json").read_text())
    assert len(values["steps"]) == 4 and values["steps"][3]["digests"]["params"]
    assert values["summary"]["steps"] == 4 and values["config"]["name"] == "tiny_world"
    assert run_cli("audit", str(out)).exit_code == 0
    rng = random.Random(1)
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        data = path.read_bytes()
        path.write_bytes(one_edit(data, rng, digit=path.name == "audit.json"))
        done = run_cli("audit", str(out))
        assert done.exit_code == 1, path
        assert path.name in done.output or path.name in str(done.exception), path
        path.write_bytes(data)
    (copy / "summary.json").write_text("{}")
    done = run_cli("export", str(copy), str(tmp_path / "b"), "--with-audit")
    assert "summary.json" in str(done.exception)


def test_a_run_that_an_older_version_began_is_checked_from_where_it_went_on(tmp_path):
    run = save_small_run(tmp_path / "run")
    (row, _) = rows_so_far(run / "metrics.jsonl")
    note_start(run, "learning", 2, {})
    telemetry = Telemetry(run)
    telemetry.rewind(cold_start=2, learning=2)
    telemetry.step(row | {"step": 3, "digests": {"questions": "00"}})
    telemetry.close()
    assert names_of(run) == []
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace('"step": 3', '"step": 4'))
    assert names_of(run) == ["metrics.jsonl"]
