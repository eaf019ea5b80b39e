"""Run directories, their checkpoints and journals, and comparisons of runs."""

import json
import shutil
from pathlib import Path
from typing import Any

from tests.fuzz.reader import Reader, digest, lines


def _run(folder: Path) -> None:
    from tests.makers import save_small_run

    save_small_run(folder / "run")


def _rows_of_run(folder: Path) -> None:
    """The files of a run that a report reads."""
    _run(folder)
    for name in ("checkpoints", "policy"):
        shutil.rmtree(folder / "run" / name)


def _resumable(folder: Path) -> None:
    """A run with two checkpoints of small arrays; a search and its documents are in flight."""
    from r1s_jax.config import override
    from r1s_jax.configs import tiny_world
    from r1s_jax.models.checkpoint import Checkpoints
    from r1s_jax.tracking.progress import Progress
    from r1s_jax.tracking.run_dir import open_run_dir

    run = open_run_dir(folder / "run", override(tiny_world.config(), []), resume=False)
    (run / "metrics.jsonl").touch()
    checkpoints = Checkpoints(run / "checkpoints", keep=3, run=run)
    for step in (1, 2):
        progress = Progress(phase="learning", step=step, before={"f1": 0.5}, carried=_carried(step))
        checkpoints.save(step, _state(step), progress.as_dict(), 0.25 * step)
    checkpoints.close()


def _carried(step: int) -> str | None:
    from r1s_jax.data.questions import Question
    from r1s_jax.learning.partial_rollouts import PartialRollouts
    from r1s_jax.rollout.broker import Search
    from r1s_jax.rollout.in_flight import InFlight

    question = Question(step, "Who is Bakori?", ("a smith",))
    origin = {"occurrence": 0, "step": step, "draw": 0, "start": 3}
    flights = [InFlight.begun(question, [1, 2, 3], sample=i, **origin) for i in range(2)]
    flights[0].note_first(Search(0, "Bakori", "found", ("Bakori   is a smith",), seconds=0.5))
    carried = PartialRollouts(None, None, None)
    carried.groups = [flights]
    return carried.state()


def _state(step: int) -> Any:
    import jax

    from r1s_jax.learning.learner import LearnerState

    weights = jax.random.normal(jax.random.key(step), (16, 8))
    return LearnerState({"w": weights, "norm": weights[0]}, {"mu": 2 * weights})


def _resume(folder: Path) -> Any:
    """Resumes a run; returns "sound", or the restored state if it differs from the saved one."""
    from r1s_jax.config import override
    from r1s_jax.configs import tiny_world
    from r1s_jax.learning.partial_rollouts import PartialRollouts
    from r1s_jax.models.checkpoint import Checkpoints, DamagedCheckpoint
    from r1s_jax.tracking.progress import Progress
    from r1s_jax.tracking.run_dir import open_run_dir

    run = open_run_dir(folder / "run", override(tiny_world.config(), []), resume=True)
    while True:
        checkpoints = Checkpoints(run / "checkpoints", keep=3, run=run)
        try:
            progress = checkpoints.progress(Progress.of)
            state, carried = checkpoints.restore(_state(0)), PartialRollouts(None, None, None)
            with checkpoints.reading():
                carried.restore(progress.carried)
            checkpoints.best()
            break
        except DamagedCheckpoint:
            continue
        finally:
            checkpoints.close_after_error()
    step = progress.step
    before = Progress(phase="learning", step=step, before={"f1": 0.5}, carried=_carried(step))
    sound = progress == before and digest(state) == digest(_state(step))
    return "sound" if sound else (state, progress)


def _journals(folder: Path) -> None:
    _rows_of_run(folder)
    spans = [["<answer>", False], ["Ada", True]]
    row = {"question": "Who?", "answers": ["Ada"], "f1": 0.5, "searches": 1, "spans": spans}
    (folder / "run" / "evaluation_before.jsonl").write_text(lines(row | {"id": 1}, row | {"id": 2}))


def _go_on(folder: Path) -> Any:
    """Reads the journals as a resumed run does, for its summary and model card."""
    from r1s_jax.models.export import _card
    from r1s_jax.protocol.solution import R1_SEARCHER
    from r1s_jax.tracking import health
    from r1s_jax.tracking.summary import _evaluated, _gain, _show_trajectories
    from r1s_jax.tracking.telemetry import Telemetry

    run = folder / "run"
    telemetry = Telemetry(run)
    telemetry.rewind(cold_start=100, learning=3)
    rows = telemetry.steps()
    fired = health.check(health.History(rows)) if rows else []
    before = _evaluated(run, "before")
    if before:
        _show_trajectories(before, before, R1_SEARCHER)
    files = [path.read_bytes() for path in sorted(run.glob("*.jsonl"))]
    after = [{"id": 1, "f1": 0.5}, {"id": 2, "f1": 1.0}]
    return fired, files, _gain(before, after), _card(run, R1_SEARCHER)


def _recorded(folder: Path) -> None:
    """A run whose files have digests and seals, as `r1s audit` reads them."""
    from r1s_jax.tracking.record import note_end, note_start
    from r1s_jax.tracking.telemetry import Telemetry

    _run(folder)
    run = folder / "run"
    rows = {name: (run / f"{name}.jsonl").read_text() for name in ("metrics", "traces")}
    cold = (run / "cold_start.jsonl").read_text().splitlines()
    for name in ("cold_start", *rows):
        (run / f"{name}.jsonl").unlink()
    note_start(run, "cold_start", 0, {"cores": 2})
    telemetry = Telemetry(run)
    for line in cold:
        telemetry.cold_start(json.loads(line))
    for row, trace in zip(*(text.splitlines() for text in rows.values()), strict=True):
        telemetry.trace(json.loads(trace))
        telemetry.step(json.loads(row) | {"digests": {"questions": "00"}})
    telemetry.close()
    note_end(run)


def _audit(folder: Path) -> str:
    """Compares the files of a run; what is found is the error that names the file."""
    from r1s_jax.audit.execute import Asked
    from r1s_jax.audit.run import audit_run
    from r1s_jax.io.journal import DataError

    if found := audit_run(folder / "run", Asked(0))["findings"]:
        raise DataError(f"{folder / 'run' / found[0]['file']}: {found[0]['what']}")
    return "sound"


def _lab(folder: Path) -> None:
    from r1s_jax.lab import check_same_lab, run_folder
    from r1s_jax.tracking.arms import Arm
    from r1s_jax.tracking.run_dir import open_run_dir

    arm = Arm("a", ())
    check_same_lab(folder / "lab", "tiny_world", [], [arm])
    run = run_folder(folder / "lab", "a", 0)
    open_run_dir(run, _plan(folder, arm).config, resume=False)
    row = {"step": 1, "answer_f1": 0.5, "answered": 1.0, "health": []}
    row |= {"seconds_rollout": 1.0, "seconds_update": 0.5}
    (run / "metrics.jsonl").write_text(lines(row, row | {"step": 2}))
    (run / "summary.json").write_text(json.dumps({"f1_before": 0.1, "f1_after": 0.9}))


def _plan(folder: Path, arm: Any) -> Any:
    from r1s_jax.lab import planned

    return planned("tiny_world", [], arm, 0, folder / "lab")


def _go_on_with_lab(folder: Path) -> Any:
    from r1s_jax.lab import check_same_lab, is_done, note_move, run_folder
    from r1s_jax.tracking.arms import Arm, as_markdown, plot_arms, run_result, table_of

    arm, out = Arm("a", ()), folder / "lab"
    plan, run = _plan(folder, arm), run_folder(out, "a", 0)
    check_same_lab(out, "tiny_world", [], [arm])
    note_move(plan)
    done = is_done(plan)
    plot_arms({"a": [run]}, out / "curves.png")
    return done, as_markdown(table_of({"a": [run_result(run)]}))


def _report(folder: Path) -> Any:
    from r1s_jax.tracking.report import _read_run
    from r1s_jax.tracking.trace_view import as_text

    data = _read_run(folder / "run", "run", "A", 5)
    return [as_text(trace).plain for trace in data.traces], data.rows, data.config, data.summary


def _page(folder: Path) -> Any:
    from r1s_jax.tracking.report import write_report

    write_report([folder / "run"], folder / "report.html")


def _load_run(folder: Path) -> Any:
    from r1s_jax.models.pretrained import load_pretrained

    return load_pretrained(str(folder / "run"))._replace(tokenizer=None)


def _deep(pattern: str) -> tuple[str, ...]:
    """Patterns of files in a folder and in three levels of subfolders."""
    return tuple(pattern + "/*" * depth for depth in range(4))


READERS = {
    "run": Reader(_rows_of_run, _report),
    "page": Reader(_rows_of_run, _page, weight=2),
    "checkpoint": Reader(_run, _load_run, sealed=_deep("checkpoints/*/*"), weight=2),
    "resume": Reader(_resumable, _resume, sealed=_deep("checkpoints/*/*"), weight=4),
    "audit": Reader(_recorded, _audit, sealed=_deep("*"), weight=4),
    "journals": Reader(_journals, _go_on, weight=6),
    "lab": Reader(_lab, _go_on_with_lab, weight=6),
}
