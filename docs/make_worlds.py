"""Prints the tables of docs/worlds.md: `python docs/make_worlds.py docs/labs/*.json`.

Each file is the `lab.json` of one comparison, under the comparison's name. p is corrected over the
arms of all the comparisons together (Holm), as the page says.
"""

import json
import sys
from pathlib import Path
from typing import Any

from r1s_jax.tracking.arms import holm

HEAD = "| arm | F1 (95 %) | gain | p (Holm) | searches | answered | collapsed |"


def tables(labs: dict[str, list[dict[str, Any]]]) -> str:
    """A table for each comparison, by name, from its rows in lab.json."""
    corrected = iter(holm([row["p"] for rows in labs.values() for row in rows]))
    lines = []
    for name, rows in labs.items():
        lines += [f"### {name}", "", HEAD, "| --- | --- | --- | --- | --- | --- | --- |"]
        lines += [_line(row, next(corrected)) for row in rows]
        lines += [""]
    return "\n".join(lines)


def _line(row: dict[str, Any], p: float | None) -> str:
    low, high = row["f1_after_interval"] or (row["f1_after"], row["f1_after"])
    cells = [
        row["arm"],
        f"{row['f1_after']:.2f} ({low:.2f} to {high:.2f})",
        "" if row["gain"] is None else f"{round(row['gain'], 2) + 0.0:+.2f}",  # never -0.00
        "" if p is None else f"{p:.2g}",
        f"{row['searches_after']:.2f}",
        f"{row['answered']:.2f}",
        f"{row['collapsed']}/{row['seeds']}",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    files = {Path(lab).stem: Path(lab) for lab in sys.argv[1:]}
    print(tables({n: json.loads(f.read_text("utf-8"))["arms"] for n, f in files.items()}))
