"""A comparison of settings: what its runs are, running them side by side, and their results."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import msgspec
import numpy as np
import psutil

from r1s_jax.config import Config, override
from r1s_jax.io.errors import ConfigError, UserError
from r1s_jax.io.json import read_object
from r1s_jax.io.schema import check
from r1s_jax.recipes import load_recipe
from r1s_jax.rollout.engine import NotFinite
from r1s_jax.system.console import console
from r1s_jax.system.files import write_json
from r1s_jax.system.locks import InUse, only_one
from r1s_jax.system.profiling import forget_compiled_programs
from r1s_jax.tracking.arms import Arm, as_markdown, plot_arms, run_result, table_of
from r1s_jax.tracking.health import UnhealthyRun
from r1s_jax.tracking.journal import read_json
from r1s_jax.tracking.record import note_moved
from r1s_jax.tracking.report import write_report
from r1s_jax.tracking.run_dir import check_data, open_run_dir
from r1s_jax.train import train

# Arms that agree in these sections, in _ROLLOUT and in `optimizer` without _OTHER_OPTIMIZER share
# their cold start. `eval` counts, since demonstrations of evaluation questions are left out.
_COLD_START_SECTIONS = ("seed", "policy", "environment", "protocol", "cold_start", "mesh", "eval")
_ROLLOUT = ("max_length", "max_prompt_length", "documents_per_query", "max_documents_length")
_OTHER_OPTIMIZER = ("learning_rate", "decay_to", "micro_batch_rows")


class Plan(NamedTuple):
    """One run: its folder and config, and those of its cold start, if it has one."""

    folder: Path
    config: Config
    cold_start: Config | None
    cold_folder: Path


def planned(recipe: str, overrides: Sequence[str], arm: Arm, seed: int, out: Path) -> Plan:
    """The plan of a run; made for all runs before the first begins, so that errors come early."""
    own = [*arm.overrides, f"seed={seed}"]
    try:
        config, base = load_recipe(recipe, [*overrides, *own]), load_recipe(recipe, overrides)
    except ConfigError as error:
        raise ConfigError(f"--arm {arm.name}: {error}") from error
    run = run_folder(out, arm.name, seed)
    name = run.relative_to(out)
    if not config.cold_start.steps:
        return Plan(run, _own_checkpoints(config, name), None, out)
    cold = _cold_start_config(config, base)
    text = json.dumps(dataclasses.asdict(cold), sort_keys=True, default=str)
    cold_name = Path("cold_starts", hashlib.sha256(text.encode()).hexdigest()[:12])
    folder = out / cold_name
    policy = dataclasses.replace(config.policy, model=str(folder.resolve()), architecture=None)
    config = override(dataclasses.replace(config, policy=policy), ["cold_start.steps=0"])
    cold = _own_checkpoints(cold, cold_name)
    return Plan(run, _own_checkpoints(config, name), cold, folder)


def _own_checkpoints(config: Config, name: Path) -> Config:
    """The config with the subfolder `name` of run.checkpoint_dir, if that is set."""
    if not (where := config.run.checkpoint_dir):
        return config
    run = dataclasses.replace(config.run, checkpoint_dir=f"{where.rstrip('/')}/{name.as_posix()}")
    return dataclasses.replace(config, run=run)


def _cold_start_config(config: Config, base: Config) -> Config:
    """The arm's values of all that the cold start depends on, the recipe's values of the rest."""
    rollout = {name: getattr(config.rollout, name) for name in _ROLLOUT}
    optimizer = {name: getattr(base.optimizer, name) for name in _OTHER_OPTIMIZER}
    return dataclasses.replace(
        base,
        rollout=dataclasses.replace(base.rollout, **rollout),
        optimizer=dataclasses.replace(config.optimizer, **optimizer),
        **{name: getattr(config, name) for name in _COLD_START_SECTIONS},
    )


class _PlanFile(TypedDict):
    """A comparison's `plan.json`."""

    recipe: str
    overrides: list[str]
    arms: dict[str, list[str]]


def check_same_lab(out: Path, recipe: str, overrides: list[str], arms: Sequence[Arm]) -> None:
    """Writes plan.json. Arms and seeds may be added to a directory; its arms must not change.

    Raises ConfigError for another recipe, other overrides or a changed arm.
    """
    file = out / "plan.json"
    plan = {"recipe": recipe, "overrides": overrides}
    stored = plan | {"arms": {}}
    if file.exists():
        stored = check(read_object(file, ConfigError), _PlanFile, file, ConfigError)
    now, before = {arm.name: list(arm.overrides) for arm in arms}, stored["arms"]
    changed = [name for name in now if name in before and before[name] != now[name]]
    if {key: stored[key] for key in plan} != plan or changed:
        part = f"arm {changed[0]}" if changed else "the recipe or its overrides"
        raise ConfigError(f"{out} holds another comparison ({part} differs): name another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, plan | {"arms": before | now})


def note_move(plan: Plan) -> None:
    """Updates the path of the cold start in a run's config.json, if the comparison was moved.

    The cold start is still the same: its name is a digest of all that it depends on.
    """
    file, now = plan.folder / "config.json", plan.config.policy.model
    if not (plan.cold_start and file.exists()):
        return
    stored = read_object(file, ConfigError)
    check(stored, _StoredConfig, file, ConfigError)
    before = stored["policy"]["model"]
    if before != now and Path(before).parts[-2:] == plan.cold_folder.parts[-2:]:
        stored["policy"]["model"] = now
        write_json(file, stored)
        note_moved(plan.folder)


class _StoredPolicy(TypedDict):
    model: str


class _StoredConfig(TypedDict):
    """The key of a run's config.json that is read again."""

    policy: _StoredPolicy


def is_done(plan: Plan) -> bool:
    """Whether a run is complete; raises ConfigError if its config or its data changed since."""
    if not (plan.folder / "summary.json").exists():
        return False
    open_run_dir(plan.folder, plan.config, resume=True)
    check_data(plan.folder, plan.config, accept_changed=False)
    return True


def run_all(
    plans: Sequence[Plan], begins: Callable[[Plan, int], None] = lambda plan, number: None
) -> dict[str, Any] | None:
    """Trains the runs that are not done; returns the summary of one that a signal stopped.

    Several processes may do this at once: each leaves out what another one works on, and waits for
    it in the end. `begins` is called with a run and its number.
    """
    waiting = dict(enumerate(plans, 1))
    while waiting:
        before = len(waiting)
        for number, plan in list(waiting.items()):
            with suppress(InUse), only_one(plan.folder.with_suffix(".turn"), "the run"):
                if not is_done(plan) and (stopped := _run(plan, partial(begins, plan, number))):
                    return stopped
                del waiting[number]
        if len(waiting) == before:
            time.sleep(1)
    return None


def _run(plan: Plan, begins: Callable[[], None]) -> dict[str, Any] | None:
    """Trains one run to its end; returns its summary if a signal stopped it, else None."""
    if plan.cold_start and (stopped := _cold_start(plan.cold_start, plan.cold_folder)):
        return stopped
    begins()
    forget_compiled_programs()
    try:
        summary = train(plan.config, plan.folder, resume=(plan.folder / "config.json").exists())
    except (UnhealthyRun, NotFinite) as error:
        write_json(plan.folder / "summary.json", {"stopped_unhealthy": str(error)})
        return None
    return summary if "stopped" in summary else None


def _cold_start(config: Config, folder: Path) -> dict[str, Any] | None:
    """Trains the cold start alone; returns its summary if a signal stopped it, else None.

    Raises InUse while another process trains it.
    """
    done = folder.with_suffix(".done")
    with only_one(folder.with_suffix(".turn"), "the cold start"):
        if not done.exists():
            resume, started = (folder / "config.json").exists(), time.monotonic()
            summary = train(config, folder, resume=resume, cold_start_only=True)
            if summary["stopped"] != "end of the cold start":
                return summary
            write_json(done, {"seconds": time.monotonic() - started})
    return None


def hours_left(plans: Sequence[Plan], jobs: int = 1) -> float | None:
    """An estimate from what is done so far; None before every process has trained a run and one
    more is done. The slowest runs, which compiled the programs of the others, do not count."""
    cold = {plan.cold_folder.with_suffix(".done") for plan in plans if plan.cold_start}
    runs = {plan.folder / "summary.json" for plan in plans}
    total = 0.0
    for files, not_counted in ((cold, 0), (runs, jobs)):
        done = [file for file in files if file.exists() and file.stat().st_size]
        seconds = sorted(s for file in done if (s := read_json(file, _Timed).get("seconds")))
        counted = seconds[: len(seconds) - not_counted]
        if files and not counted:
            return None
        total += sum(counted) / max(1, len(counted)) * (len(files) - len(done))
    return total / jobs / 3600


class _Timed(msgspec.Struct):
    seconds: float | None = None


class RunFailed(UserError, RuntimeError):
    """A process that trains runs of a comparison ended with an error."""


def side_by_side(plans: Sequence[Plan], jobs: int, out: Path) -> Generator[int]:
    """Trains the runs in `jobs` processes, each on its share of the cores.

    Yields the number of runs that are done, once a second.

    The first process begins alone. The others follow when it has finished a cold start or a run,
    each only if memory has room for one more of its size. Their output goes to `process-N.log`.
    They end with this process, and when the caller closes this generator. Raises RunFailed.
    """
    logs = [out / f"process-{i}.log" for i in range(1, jobs + 1)]
    cores = [set(part.tolist()) for part in np.array_split(_cores(), jobs)]
    processes = [_start(plans, logs[0], cores[0])]
    try:
        while any(process.is_alive() for process in processes):
            yield sum((plan.folder / "summary.json").exists() for plan in plans)
            time.sleep(1)
            if len(processes) < jobs and _room_for_another(plans, processes[0].pid):
                number = len(processes)
                processes.append(_start(plans, logs[number], cores[number]))
            _raise_failure(processes, logs)
        _raise_failure(processes, logs)
    finally:
        for process in processes:
            process.terminate()  # a run ends after its step, with a checkpoint
        for process in processes:
            process.join()


def _raise_failure(processes: Sequence[Any], logs: Sequence[Path]) -> None:
    for process, log in zip(processes, logs, strict=False):
        if process.exitcode:
            raise RunFailed(f"a run failed; {log} says why. The comparison can be resumed")


def _cores() -> list[int]:
    """The cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return sorted(affinity(0)) if affinity else list(range(os.cpu_count() or 1))


def _start(plans: Sequence[Plan], log: Path, cores: set[int]) -> Any:
    """Starts a process that trains runs; it inherits the cores of the thread that starts it."""
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(plans, log))
    pin = getattr(os, "sched_setaffinity", None)
    before = _cores()
    if pin and cores:
        pin(0, cores)
    try:
        process.start()
    finally:
        if pin:
            pin(0, before)
    return process


def _work(plans: Sequence[Plan], log: Path) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with log.open("a", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    run_all(plans, lambda plan, number: console.rule(f"{plan.folder.name} ({number})"))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # only started processes call this
    parent.join()
    os._exit(1)


def _room_for_another(plans: Sequence[Plan], pid: int) -> bool:
    """Whether memory has room for another process like `pid`, which must have finished a part."""
    parts = {plan.cold_folder.with_suffix(".done") for plan in plans}
    parts |= {plan.folder / "summary.json" for plan in plans}
    if not any(file.exists() for file in parts):
        return False
    try:
        size = psutil.Process(pid).memory_info().rss
    except psutil.NoSuchProcess:
        return False
    return psutil.virtual_memory().available > 1.5 * size


def run_folder(out: Path, arm: str, seed: int) -> Path:
    """The folder of a run of a comparison."""
    return out / "runs" / f"{arm}-{seed}"


def write_results(out: Path, arms: Sequence[Arm], seeds: int) -> list[dict[str, Any]]:
    """Writes lab.json, table.md, curves.png and report.html; returns the rows of the table."""
    folders = {a.name: [run_folder(out, a.name, seed) for seed in range(seeds)] for a in arms}
    results = {name: [run_result(folder) for folder in runs] for name, runs in folders.items()}
    rows = table_of(results)
    write_json(out / "lab.json", {"arms": rows, "runs": results})
    (out / "table.md").write_text(as_markdown(rows), "utf-8")
    plot_arms(folders, out / "curves.png")
    write_report([folder for runs in folders.values() for folder in runs], out / "report.html")
    return rows
