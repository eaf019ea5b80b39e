"""`r1s ask`, `r1s compile` and `r1s export`: what is done with one model."""

import json
from pathlib import Path
from typing import Annotated

import typer

from r1s_jax.commands.options import (
    WIKIPEDIA,
    AsJson,
    Changes,
    Model,
    Online,
    Overrides,
    Recipe,
    SearchedIndex,
    SearchUrl,
    Site,
)


def ask(
    question: Annotated[str, typer.Argument(help="What to answer.")],
    model: Model,
    changes: Changes = None,
    index: SearchedIndex = None,
    retriever: SearchUrl = "",
    online: Online = False,
    site: Site = WIKIPEDIA,
) -> None:
    """Answer one question, streaming what the model writes, searches and is given, in colour."""
    from r1s_jax import presets
    from r1s_jax.presets import Settings
    from r1s_jax.retrieval.references import open_search_engine
    from r1s_jax.serving.ask import ask as stream_answer

    settings = Settings(presets.asking, changes or ())
    settings.config()  # a wrong one is said before anything is loaded
    found, _ = open_search_engine(index, retriever, site if online else None)
    stream_answer(question, model, found, settings)


def compile_(
    config: Recipe,
    overrides: Overrides = None,
    topology: Annotated[
        str, typer.Option(help="v5e:8x8, v5p:2x2x4, v6e:4x8, h100:8, ...: chips and their shape.")
    ] = "v5e:2x4",
    phase: Annotated[str, typer.Option(help="rollout, update or all.")] = "all",
    fit: Annotated[
        bool,
        typer.Option("--fit", help="Try slots, micro_batch_rows and remat: which are cheapest?"),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compile a recipe for a pod that is not here: does it fit, and what would a step cost?

    Uses the real TPU compiler (`pip install libtpu`); nothing is run or downloaded. Exit status 1
    when it does not fit. With --fit (minutes), the last line is what to add to the recipe.
    """
    from r1s_jax.aot import compile_report
    from r1s_jax.aot import fit as fitting
    from r1s_jax.recipes import load_recipe

    recipe = load_recipe(config, overrides or [])
    run = fitting.fit_recipe if fit else compile_report.compile_recipe
    report = run(recipe, topology, phase, progress=lambda what: typer.echo(what, err=True))
    as_text = fitting.as_text if fit else compile_report.as_text
    typer.echo(json.dumps(report) if as_json else as_text(report))
    if not report["fits"]:
        if not fit:
            typer.secho(compile_report.advice(report), fg="red", err=True)
        raise typer.Exit(1)


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
