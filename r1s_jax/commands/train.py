"""`r1s train`, `r1s sft` and `r1s configs`: from a recipe to a trained policy."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from r1s_jax.commands.options import Overrides, Recipe
from r1s_jax.io.errors import ConfigError

RunDir = Annotated[
    Path | None, typer.Option(help="Directory of the run. [default: runs/NAME-TIME]")
]
Resume = Annotated[bool, typer.Option("--resume", help="Resume the run in --run-dir.")]
Distributed = Annotated[
    bool,
    typer.Option(
        "--distributed",
        help="One of several processes (a pod): detected on TPU VMs, GKE and Slurm, else set by "
        "R1S_COORDINATOR=HOST:PORT R1S_PROCESSES=N R1S_PROCESS=I.",
    ),
]


def train(
    config: Recipe,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    resume: Resume = False,
    distributed: Distributed = False,
    profile: Annotated[
        str, typer.Option(metavar="N:M", help="Trace these steps for Perfetto and TensorBoard.")
    ] = "",
    accept_changed_data: Annotated[
        bool, typer.Option("--accept-changed-data", help="Resume even if a data file changed.")
    ] = False,
) -> None:
    """Train a policy to search: cold start (if the recipe has one), stage 1, stage 2.

    Writes metrics.jsonl, traces.jsonl, TensorBoard scalars, checkpoints and summary.json to the
    run directory; the last line printed is the summary as JSON. Ctrl-C stops after the step with
    a checkpoint, from which --resume continues.
    """
    options = {"profile": profile, "accept_changed_data": accept_changed_data}
    _train(config, overrides, run_dir, resume, distributed, **options)


def sft(
    config: Recipe,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    resume: Resume = False,
    distributed: Distributed = False,
) -> None:
    """Run only the supervised cold start of a recipe; `r1s train --resume` continues."""
    _train(config, overrides, run_dir, resume, distributed, cold_start_only=True)


def configs(
    copy: Annotated[
        str, typer.Option(metavar="NAME", help="Write this recipe to FILE, to start from.")
    ] = "",
    file: Annotated[
        Path | None, typer.Argument(help="With --copy: a .py file, which must not exist.")
    ] = None,
) -> None:
    """List the recipes, one per line; or copy one to a file of your own for `r1s train FILE`."""
    from r1s_jax.recipes import copy_recipe, titles

    if copy or file:
        if not (copy and file):
            raise ConfigError("--copy takes a recipe and a file: --copy tiny_world my_recipe.py")
        typer.echo(str(copy_recipe(copy, file)))
        return
    for name, title in titles().items():
        typer.echo(f"{name:20} {title}")


def _train(
    name: str,
    overrides: list[str] | None,
    run_dir: Path | None,
    resume: bool,
    distributed: bool,
    **options: Any,
) -> None:
    from r1s_jax.recipes import load_recipe, recipe_name
    from r1s_jax.system.distributed import is_main, join
    from r1s_jax.train import train

    if resume and run_dir is None:
        raise ConfigError("--resume needs --run-dir: the run to resume")
    if distributed and run_dir is None:
        raise ConfigError("--distributed needs --run-dir: a directory that every process sees")
    config = load_recipe(name, overrides or [])
    if distributed:
        join()
    run_dir = run_dir or Path("runs", f"{recipe_name(name)}-{time.strftime('%Y%m%d-%H%M%S')}")
    summary = train(config, run_dir, resume, **options)
    if is_main():
        typer.echo(json.dumps(summary))
