"""Files that are there whole or not at all, whatever ends the process that writes them."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_text(path: Path, parts: Iterable[str]) -> None:
    """Writes the joined parts, in UTF-8, in the place of whatever `path` held."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(parts)
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Writes one JSON value for people to read: indented, other scripts as they are."""
    write_text(path, [json.dumps(value, indent=2, ensure_ascii=False), "\n"])


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes JSON lines."""
    write_text(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
