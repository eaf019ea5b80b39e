"""`r1s lab`: compares settings of a recipe, each over several seeds."""

import json
import os
import shlex
import time
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from r1s_jax.commands.options import Overrides, Recipe
from r1s_jax.io.errors import ConfigError, UserError

if TYPE_CHECKING:
    from r1s_jax.lab import Plan
    from r1s_jax.tracking.arms import Arm


class TooLong(UserError, RuntimeError):
    """A comparison would take more hours than it may."""


def lab(
    config: Recipe,
    overrides: Overrides = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(help='"NAME: section.field=value ...", once per arm.'),
    ] = None,
    arms: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="A file with an arm a line; # comments."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm: seeds 0, 1, ...")] = 3,
    out: Annotated[Path, typer.Option(help="Directory for all results.")] = Path("lab"),
    jobs: Annotated[
        int,
        typer.Option(
            min=1, help="Runs side by side, each on its share of the cores, as memory allows."
        ),
    ] = 1,
    hours: Annotated[
        float | None, typer.Option(min=0, help="Give up if the estimate is longer than this.")
    ] = None,
) -> None:
    """Compare settings: `r1s lab tiny_world --arm "base:" --arm "grpo: algorithm.estimator=..."`.

    Runs every arm on every seed; the arms of a seed share a cold start. After a few runs it says
    how long the whole will take. A stopped or killed comparison resumes when called again. Writes
    lab.json, table.md, curves.png and report.html to the directory, and prints the table, in which
    arms are compared with the first one. CONFIG's overrides apply to all arms.
    """
    from r1s_jax.lab import check_same_lab, note_move, planned, run_all, side_by_side, write_results
    from r1s_jax.system.chips import has_accelerator
    from r1s_jax.system.console import console
    from r1s_jax.tracking.arms import as_table

    if jobs > 1 and has_accelerator() and os.environ.get("JAX_PLATFORMS") != "cpu":
        raise ConfigError("--jobs is for CPUs: a run takes the whole of an accelerator")
    chosen = [_arm(text) for text in [*(_lines(arms) if arms else ()), *(arm or [])]]
    if len({a.name for a in chosen}) < len(chosen) or not chosen:
        raise ConfigError('name the arms, each differently: --arm "base:" --arm "NAME: CHANGES"')
    runs = [(a, seed) for seed in range(seeds) for a in chosen]
    plans = [planned(config, overrides or [], a, seed, out) for a, seed in runs]
    check_same_lab(out, config, overrides or [], chosen)
    for plan in plans:
        note_move(plan)
    watch = _Watch(plans, jobs, hours)
    if jobs == 1:
        stopped = run_all(plans, watch.begins)
    else:
        stopped = _side_by_side(side_by_side(plans, jobs, out), watch)
    if stopped:
        typer.echo(json.dumps(stopped | {"out": str(out)}))
        return
    watch.ended()
    rows = write_results(out, chosen, seeds)
    console.print(as_table(rows))
    typer.echo(json.dumps({"out": str(out), "arms": rows}))


class _Watch:
    """Says how long a comparison takes, and ends one that takes too long."""

    def __init__(self, plans: list["Plan"], jobs: int, hours: float | None):
        self._plans, self._jobs, self._most, self.runs = plans, jobs, hours, len(plans)
        self._started, self._estimate = time.monotonic(), None

    def begins(self, plan: "Plan", number: int) -> None:
        """Prints a run's name and number."""
        from r1s_jax.system.console import console

        self.estimate()
        console.rule(f"{plan.folder.name}: run {number} of {self.runs}")

    def estimate(self) -> float | None:
        """Hours left, as far as they can be told; printed the first time. Raises TooLong."""
        from r1s_jax.lab import hours_left
        from r1s_jax.system.console import console

        left = hours_left(self._plans, self._jobs)
        if left is not None and self._estimate is None:
            self._estimate = left + self._spent()
            console.print(f"Estimate: {left:.2f} hours more, {self._jobs} run(s) at a time")
            if self._most is not None and left > self._most:
                raise TooLong(
                    f"the comparison would take {left:.1f} hours more, and --hours is {self._most}:"
                    " take fewer arms, seeds or steps. What is done is kept"
                )
        return left

    def ended(self) -> None:
        """Prints how long it took, and what the estimate was."""
        from r1s_jax.system.console import console

        if self._estimate is not None:
            took, estimate = self._spent(), self._estimate
            console.print(f"Took {took:.2f} hours; the estimate was {estimate:.2f}")

    def _spent(self) -> float:
        return (time.monotonic() - self._started) / 3600


def _side_by_side(done: Generator[int], watch: _Watch) -> dict[str, Any] | None:
    """Shows the progress of runs side by side; returns a summary if a signal stopped them."""
    import signal
    from contextlib import closing

    from r1s_jax.system.console import make_progress

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with closing(done), make_progress() as progress:
            task = progress.add_task("runs", total=watch.runs, info="")
            for count in done:
                left = watch.estimate()
                info = "" if left is None else f"about {left:.1f} h left"
                progress.update(task, completed=count, info=info)
    except KeyboardInterrupt:
        return {"stopped": "a signal"}
    finally:
        signal.signal(signal.SIGTERM, before)
    return None


def _lines(file: Path) -> list[str]:
    """The arms in a file, one a line; empty lines and those that begin with # are left out."""
    from r1s_jax.io.json import decode

    lines = decode(file.read_bytes(), file, ConfigError).splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


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
