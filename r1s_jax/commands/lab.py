"""`r1s lab`: settings of a recipe compared, each over several seeds."""

import dataclasses
import hashlib
import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from r1s_jax.border.errors import ConfigError
from r1s_jax.commands.options import Overrides, Recipe

if TYPE_CHECKING:
    from r1s_jax.config import Config
    from r1s_jax.tracking.arms import Arm

# Sections that the cold start depends on: arms that share them share it.
_OF_COLD_START = ("seed", "policy", "environment", "protocol", "cold_start", "mesh")
_NOT_OF_COLD_START = ("learning_rate", "decay_to", "micro_rows")  # of the optimizer


def lab(
    config: Recipe,
    overrides: Overrides = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(help='"NAME: section.field=value ...", as often as there are arms.'),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm: seeds 0, 1, ...")] = 3,
    out: Annotated[Path, typer.Option(help="Directory of all that comes of it.")] = Path("lab"),
) -> None:
    """Compare settings: `r1s lab tiny_world --arm "base:" --arm "grpo: algorithm.estimator=...".

    Runs every arm on every seed, one after the other; arms of a seed begin from one cold start.
    Called again after a stop or a kill it goes on. Writes lab.json, table.md, curves.png and
    report.html to the directory, and prints the table. CONFIG's overrides are for all arms.
    """
    from r1s_jax.system.console import console
    from r1s_jax.tracking.arms import as_table

    arms = [_arm(text) for text in arm or []]
    if len({a.name for a in arms}) < len(arms) or not arms:
        raise ConfigError('name the arms, each differently: --arm "base:" --arm "NAME: CHANGES"')
    runs = [(a, seed) for seed in range(seeds) for a in arms]
    planned = {(a, seed): _planned(config, overrides, a, seed) for a, seed in runs}
    _check_same_lab(out, config, overrides or [], arms)
    started, made = time.monotonic(), 0
    for number, ((a, seed), recipe) in enumerate(planned.items()):
        if _is_done(out, a, seed):
            continue
        left = (time.monotonic() - started) / made * (len(planned) - number) if made else 0
        told = f", about {left / 60:.0f} min left" if made else ""
        console.rule(f"{a.name}, seed {seed}: run {number + 1} of {len(planned)}{told}")
        if stopped := _run(recipe, out, a, seed):
            typer.echo(json.dumps(stopped | {"out": str(out)}))
            return
        made += 1
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


def _planned(recipe: str, overrides: list[str] | None, arm: "Arm", seed: int) -> "Config":
    """The config of a run, found wrong before the first begins."""
    from r1s_jax.recipes import load_recipe

    try:
        return load_recipe(recipe, [*(overrides or []), *arm.overrides, f"seed={seed}"])
    except ConfigError as error:
        raise ConfigError(f"--arm {arm.name}: {error}") from error


def _check_same_lab(out: Path, recipe: str, overrides: list[str], arms: list["Arm"]) -> None:
    """Arms and seeds may be added to a directory, but none may change its meaning."""
    from r1s_jax.border.json import read_object
    from r1s_jax.system.files import write_json

    file = out / "plan.json"
    plan = {"recipe": recipe, "overrides": overrides}
    known = read_object(file, ConfigError) if file.exists() else plan | {"arms": {}}
    told = {arm.name: list(arm.overrides) for arm in arms}
    before = known.get("arms", {})
    changed = [name for name in told if name in before and before[name] != told[name]]
    if {key: known.get(key) for key in plan} != plan or changed:
        what = f"arm {changed[0]}" if changed else "the recipe or its overrides"
        raise ConfigError(f"{out} holds another comparison ({what} differs): name another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, plan | {"arms": before | told})


def _is_done(out: Path, arm: "Arm", seed: int) -> bool:
    return (run_folder(out, arm.name, seed) / "summary.json").exists()


def _run(config: "Config", out: Path, arm: "Arm", seed: int) -> dict[str, Any] | None:
    """One run to its end; what stopped it before, where a signal did."""
    from r1s_jax.config import override
    from r1s_jax.system.files import write_json
    from r1s_jax.tracking.health import UnhealthyRun
    from r1s_jax.train import train

    folder = run_folder(out, arm.name, seed)
    if config.cold_start.steps:
        cold, stopped = _cold_start(config, out)
        if stopped:
            return stopped
        policy = dataclasses.replace(config.policy, model=str(cold.resolve()), architecture=None)
        config = override(dataclasses.replace(config, policy=policy), ["cold_start.steps=0"])
    try:
        summary = train(config, folder, resume=(folder / "config.json").exists())
    except UnhealthyRun as error:
        write_json(folder / "summary.json", {"stopped_unhealthy": str(error)})
        return None
    return summary if "stopped" in summary else None


def _cold_start(config: "Config", out: Path) -> tuple[Path, dict[str, Any] | None]:
    """A run that holds the cold start alone, shared by all whose cold start would be the same."""
    from r1s_jax.config import override
    from r1s_jax.train import train

    whole = dataclasses.asdict(config)
    told = {name: whole[name] for name in _OF_COLD_START}
    told["max_length"] = config.rollout.max_length
    told |= {k: v for k, v in whole["optimizer"].items() if k not in _NOT_OF_COLD_START}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
    folder = out / "cold_starts" / digest[:12]
    done = folder.with_suffix(".done")
    if done.exists():
        return folder, None
    config = override(config, ["eval.questions=0"])
    summary = train(config, folder, resume=(folder / "config.json").exists(), cold_start_only=True)
    if summary["stopped"] != "end of the cold start":
        return folder, summary
    done.touch()
    return folder, None


def run_folder(out: Path, arm: str, seed: int) -> Path:
    """Where a run of a comparison lies."""
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
