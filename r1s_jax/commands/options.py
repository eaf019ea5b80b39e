"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Model = Annotated[str, typer.Option(help="Path, hf:org/name or wheel:name==version.")]
MaxLength = Annotated[int, typer.Option(min=16, help="Tokens of a trajectory.")]
Prompt = Annotated[
    Path | None, typer.Option(help="Template with {question}, for models trained on their own.")
]

# Where documents come from: an index here, or a search engine.
SearchedIndex = Annotated[Path | None, typer.Option(help="Directory of a built index.")]
SearchUrl = Annotated[
    str, typer.Option(help="Or a search engine: http://.../queries or http://.../retrieve.")
]

# A recipe and what differs from it.
Recipe = Annotated[str, typer.Argument(metavar="CONFIG", help="Recipe: one of `r1s configs`.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the recipe, as section.field=value (stage2.steps=40, seed=1)."),
]
