"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from r1s_jax.border.errors import ConfigError
from r1s_jax.border.json import decode

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Model = Annotated[str, typer.Option(help="Path, hf:org/name or wheel:name==version.")]
_DRAFTS = "Guess so many next tokens from the text: the same, in fewer passes."
Drafts = Annotated[int, typer.Option(min=0, max=64, help=_DRAFTS)]
AskDrafts = Annotated[
    int | None,
    typer.Option(min=0, max=64, help=_DRAFTS + " [default: 4; on a CPU, where it does not pay, 0]"),
]
MaxLength = Annotated[int, typer.Option(min=16, help="Tokens of a trajectory.")]
Prompt = Annotated[
    Path | None, typer.Option(help="Template with {question}, for models trained on their own.")
]

# How a policy is asked; one that was trained here brings all of it along.
DialectOption = Annotated[
    str,
    typer.Option(
        "--dialect",
        help="r1_searcher, search_r1 or tool_call, for a model that names none. "
        "[default: its own, else r1_searcher]",
    ),
]
ThinkingOption = Annotated[
    str, typer.Option("--thinking", help="template, on or off. [default: its own, else template]")
]
ForceDialect = Annotated[
    bool,
    typer.Option("--force-dialect", help="Ask in a --dialect that the model was not trained in."),
]

# Where documents come from: an index here, or a search engine.
SearchedIndex = Annotated[Path | None, typer.Option(help="Directory of a built index.")]
SearchUrl = Annotated[
    str, typer.Option(help="Or a search engine: http://.../queries or http://.../retrieve.")
]

CorsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--cors",
        metavar="ORIGIN",
        help="Pages of another site that may use it: http://HOST:PORT, or * for all. Repeatable.",
    ),
]

# A recipe and what differs from it.
Recipe = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG", help="Recipe: one of `r1s configs`, or a file of your own with config()."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the recipe, as section.field=value (stage2.steps=40, seed=1)."),
]


def read_prompt(file: Path | None) -> str | None:
    """The text of a prompt's file; None where none is named. Raises ConfigError for no UTF-8."""
    return decode(file.read_bytes(), file, ConfigError) if file else None
