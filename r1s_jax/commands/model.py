"""`r1s ask`, `r1s compile` and `r1s export`: commands on one model."""

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
    question: Annotated[str, typer.Argument(help="Question to answer.")],
    model: Model,
    changes: Changes = None,
    index: SearchedIndex = None,
    retriever: SearchUrl = "",
    online: Online = False,
    site: Site = WIKIPEDIA,
) -> None:
    """Answer one question; stream thoughts, searches and documents in colour."""
    from r1s_jax import presets
    from r1s_jax.presets import Settings
    from r1s_jax.retrieval.references import open_search_engine
    from r1s_jax.serving.ask import ask as stream_answer

    settings = Settings(presets.asking, changes or ())
    settings.config()  # reports wrong settings before anything is loaded
    engine, _ = open_search_engine(index, retriever, site if online else None)
    stream_answer(question, model, engine, settings)


def compile_(
    config: Recipe,
    overrides: Overrides = None,
    topology: Annotated[
        str, typer.Option(help="v5e:8x8, v5p:2x2x4, v6e:4x8, h100:8, ...: chips and their shape.")
    ] = "v5e:2x4",
    phase: Annotated[str, typer.Option(help="rollout, update or all.")] = "all",
    fit: Annotated[
        bool,
        typer.Option("--fit", help="Find the cheapest slots, micro_batch_rows and remat."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compile a recipe for a pod that you do not have: does it fit, what would a step cost?

    Uses the real TPU compiler (`pip install libtpu`); nothing is run or downloaded. Exit status 1
    when it does not fit. With --fit (minutes), the last line has the settings to add to the recipe.
    """
    from r1s_jax.aot import compile_report
    from r1s_jax.aot import fit as fitting
    from r1s_jax.recipes import load_recipe

    recipe = load_recipe(config, overrides or [])
    run = fitting.fit_recipe if fit else compile_report.compile_recipe
    report = run(recipe, topology, phase, progress=lambda line: typer.echo(line, err=True))
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
    with_audit: Annotated[
        bool,
        typer.Option("--with-audit", help="Add audit.json: how it was made, for `r1s audit`."),
    ] = False,
) -> None:
    """Write a trained model in Hugging Face form: safetensors, tokenizer, configs, model card."""
    from r1s_jax.audit.model import export_audit
    from r1s_jax.models.export import export as export_model

    folder = export_model(source, out, dtype)
    if with_audit:
        export_audit(source, folder)
    typer.echo(str(folder))
