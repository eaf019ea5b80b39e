"""`r1s lab`: compares settings of a recipe, each over several seeds."""

import dataclasses
import hashlib
import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypedDict

import typer

from r1s_jax.commands.options import Overrides, Recipe
from r1s_jax.io.errors import ConfigError

if TYPE_CHECKING:
    from r1s_jax.config import Config
    from r1s_jax.tracking.arms import Arm

# Arms that agree in these sections, in _ROLLOUT and in `optimizer` without _OTHER_OPTIMIZER share
# their cold start. `eval` counts, since demonstrations of evaluation questions are left out.
_COLD_START_SECTIONS = ("seed", "policy", "environment", "protocol", "cold_start", "mesh", "eval")
_ROLLOUT = ("max_length", "max_prompt_length", "documents_per_query", "max_documents_length")
_OTHER_OPTIMIZER = ("learning_rate", "decay_to", "micro_batch_rows")


def lab(
    config: Recipe,
    overrides: Overrides = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(help='"NAME: section.field=value ...", once per arm.'),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm: seeds 0, 1, ...")] = 3,
    out: Annotated[Path, typer.Option(help="Directory for all results.")] = Path("lab"),
) -> None:
    """Compare settings: `r1s lab tiny_world --arm "base:" --arm "grpo: algorithm.estimator=..."`.

    Runs every arm on every seed, one after the other; the arms of a seed share a cold start. A
    stopped or killed comparison resumes when called again. Writes lab.json, table.md,
    curves.png and report.html to the directory, and prints the table. CONFIG's overrides apply to
    all arms.
    """
    from r1s_jax.system.console import console
    from r1s_jax.tracking.arms import as_table

    arms = [_arm(text) for text in arm or []]
    if len({a.name for a in arms}) < len(arms) or not arms:
        raise ConfigError('name the arms, each differently: --arm "base:" --arm "NAME: CHANGES"')
    runs = [(a, seed) for seed in range(seeds) for a in arms]
    planned = {(a, seed): _planned(config, overrides, a, seed, out) for a, seed in runs}
    _check_same_lab(out, config, overrides or [], arms)
    started, finished = time.monotonic(), 0
    for (a, seed), plan in planned.items():
        _note_move(run_folder(out, a.name, seed), plan)
    for number, ((a, seed), plan) in enumerate(planned.items()):
        if _is_done(out, a, seed, plan):
            continue
        remaining = ""
        if finished:
            seconds = (time.monotonic() - started) / finished * (len(planned) - number)
            remaining = f", about {seconds / 60:.0f} min left"
        console.rule(f"{a.name}, seed {seed}: run {number + 1} of {len(planned)}{remaining}")
        if stopped := _run(plan, run_folder(out, a.name, seed)):
            typer.echo(json.dumps(stopped | {"out": str(out)}))
            return
        finished += 1
    rows = _write_results(out, arms, seeds)
    console.print(as_table(rows))
    typer.echo(json.dumps({"out": str(out), "arms": rows}))


def _arm(text: str) -> "Arm":
    from r1s_jax.tracking.arms import Arm

    name, colon, changes = text.partition(":")
    name = name.strip()
    if not colon or not name or not all(c.isalnum() or c in "-_+." for c in name):
        raise ConfigError(f"--arm {text!r}: expected NAME: CHANGES, NAME of letters, digits, -_+.")
    try:
        return Arm(name, tuple(shlex.split(changes)))
    except ValueError as error:
        raise ConfigError(f"--arm {text!r}: {error}") from error


class _Plan(NamedTuple):
    """One run: its config, and the config and folder of its cold start, if it has one."""

    config: "Config"
    cold_start: "Config | None"
    cold_folder: Path


def _planned(recipe: str, overrides: list[str] | None, arm: "Arm", seed: int, out: Path) -> _Plan:
    """The plan of a run; made for all runs before the first begins, so that errors come early."""
    from r1s_jax.config import override
    from r1s_jax.recipes import load_recipe

    shared, own = overrides or [], [*arm.overrides, f"seed={seed}"]
    try:
        config, base = load_recipe(recipe, [*shared, *own]), load_recipe(recipe, shared)
    except ConfigError as error:
        raise ConfigError(f"--arm {arm.name}: {error}") from error
    name = run_folder(out, arm.name, seed).relative_to(out)
    if not config.cold_start.steps:
        return _Plan(_own_checkpoints(config, name), None, out)
    cold = _cold_start_config(config, base)
    text = json.dumps(dataclasses.asdict(cold), sort_keys=True, default=str)
    cold_name = Path("cold_starts", hashlib.sha256(text.encode()).hexdigest()[:12])
    folder = out / cold_name
    policy = dataclasses.replace(config.policy, model=str(folder.resolve()), architecture=None)
    config = override(dataclasses.replace(config, policy=policy), ["cold_start.steps=0"])
    return _Plan(_own_checkpoints(config, name), _own_checkpoints(cold, cold_name), folder)


def _own_checkpoints(config: "Config", name: Path) -> "Config":
    """The config with the subfolder `name` of run.checkpoint_dir, if that is set."""
    if not (where := config.run.checkpoint_dir):
        return config
    run = dataclasses.replace(config.run, checkpoint_dir=f"{where.rstrip('/')}/{name.as_posix()}")
    return dataclasses.replace(config, run=run)


def _cold_start_config(config: "Config", base: "Config") -> "Config":
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


def _check_same_lab(out: Path, recipe: str, overrides: list[str], arms: list["Arm"]) -> None:
    """Writes plan.json. Arms and seeds may be added to a directory; its arms must not change.

    Raises ConfigError for another recipe, other overrides or a changed arm.
    """
    from r1s_jax.io.json import read_object
    from r1s_jax.io.schema import check
    from r1s_jax.system.files import write_json

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


def _note_move(folder: Path, plan: _Plan) -> None:
    """Updates the path of the cold start in a run's config.json, if the comparison was moved.

    The cold start is still the same: its name is a digest of all that it depends on.
    """
    from r1s_jax.io.json import read_object
    from r1s_jax.io.schema import check
    from r1s_jax.system.files import write_json

    file, now = folder / "config.json", plan.config.policy.model
    if not (plan.cold_start and file.exists()):
        return
    stored = read_object(file, ConfigError)
    check(stored, _StoredConfig, file, ConfigError)
    before = stored["policy"]["model"]
    if before != now and Path(before).parts[-2:] == plan.cold_folder.parts[-2:]:
        stored["policy"]["model"] = now
        write_json(file, stored)


class _StoredPolicy(TypedDict):
    model: str


class _StoredConfig(TypedDict):
    """The key of a run's config.json that is read again."""

    policy: _StoredPolicy


def _is_done(out: Path, arm: "Arm", seed: int, plan: _Plan) -> bool:
    """Whether a run is complete; raises ConfigError if its config or its data changed since."""
    from r1s_jax.tracking.run_dir import check_data, open_run_dir

    folder = run_folder(out, arm.name, seed)
    if not (folder / "summary.json").exists():
        return False
    open_run_dir(folder, plan.config, resume=True)
    check_data(folder, plan.config, accept_changed=False)
    return True


def _run(plan: _Plan, folder: Path) -> dict[str, Any] | None:
    """Trains one run to its end; returns its summary if a signal stopped it, else None."""
    from r1s_jax.rollout.engine import NotFinite
    from r1s_jax.system.files import write_json
    from r1s_jax.system.profiling import forget_compiled_programs
    from r1s_jax.tracking.health import UnhealthyRun
    from r1s_jax.train import train

    if plan.cold_start and (stopped := _cold_start(plan.cold_start, plan.cold_folder)):
        return stopped
    forget_compiled_programs()  # of earlier runs
    try:
        summary = train(plan.config, folder, resume=(folder / "config.json").exists())
    except (UnhealthyRun, NotFinite) as error:
        write_json(folder / "summary.json", {"stopped_unhealthy": str(error)})
        return None
    return summary if "stopped" in summary else None


def _cold_start(config: "Config", folder: Path) -> dict[str, Any] | None:
    """Trains the cold start alone; returns its summary if a signal stopped it, else None."""
    from r1s_jax.train import train

    done = folder.with_suffix(".done")
    if not done.exists():
        resume = (folder / "config.json").exists()
        summary = train(config, folder, resume=resume, cold_start_only=True)
        if summary["stopped"] != "end of the cold start":
            return summary
        done.touch()
    return None


def run_folder(out: Path, arm: str, seed: int) -> Path:
    """The folder of a run of a comparison."""
    return out / "runs" / f"{arm}-{seed}"


def _write_results(out: Path, arms: list["Arm"], seeds: int) -> list[dict[str, Any]]:
    from r1s_jax.system.files import write_json
    from r1s_jax.tracking.arms import as_markdown, plot_arms, run_result, table_of
    from r1s_jax.tracking.report import write_report

    folders = {a.name: [run_folder(out, a.name, seed) for seed in range(seeds)] for a in arms}
    results = {name: [run_result(folder) for folder in runs] for name, runs in folders.items()}
    rows = table_of(results)
    write_json(out / "lab.json", {"arms": rows, "runs": results})
    (out / "table.md").write_text(as_markdown(rows), "utf-8")
    plot_arms(folders, out / "curves.png")
    write_report([folder for runs in folders.values() for folder in runs], out / "report.html")
    return rows
