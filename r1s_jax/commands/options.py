"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Model = Annotated[str, typer.Option(help="Path, hf:org/name or wheel:name==version.")]

# Where documents come from: an index here, a search engine, or the live web.
SearchedIndex = Annotated[Path | None, typer.Option(help="Directory of a built index.")]
SearchUrl = Annotated[
    str, typer.Option(help="Or a search engine: http://.../queries or http://.../retrieve.")
]
Online = Annotated[
    bool, typer.Option("--online", help="Or the live web, by serper.dev (SERPER_API_KEY).")
]
Site = Annotated[str, typer.Option(help="With --online, only this site; empty: any.")]
WIKIPEDIA = "en.wikipedia.org"

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

# What differs from a command's preset (presets.py).
Changes = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings, as section.field=value (rollout.max_length=2048, search.timeout_s=5, "
        "protocol.dialect=search_r1)."
    ),
]
