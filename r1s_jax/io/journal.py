"""JSONL files that this program writes: read while they grow, and continued later."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1s_jax.io.errors import UserError
from r1s_jax.io.json import parse_object
from r1s_jax.io.schema import check


class DataError(UserError, ValueError):
    """A data file that cannot be used; the message names the file and the line."""


def parse_row(line: str | bytes, path: Path, number: int) -> dict[str, Any]:
    """The JSON object of a line; DataError, naming `path` and line `number`, if it is none."""
    return parse_object(line, f"{path}, line {number}", DataError)


def whole_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a JSONL file, with their line numbers; the file may still be growing.

    An incomplete last line is left out. Raises DataError, naming the file and the line, for a line
    that is no JSON object.
    """
    # Bytes: `str.splitlines` would also cut at U+2028 and the like, which a model may write.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.endswith(b"\n") and line.strip():
                yield number, parse_row(line, path, number)


def rows_so_far(path: Path, kind: Any = dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of whole_rows, each checked to be a `kind`; [] where there is no file yet."""
    rows: list[dict[str, Any]] = []
    for number, row in whole_rows(path) if path.exists() else ():
        check(row, kind, f"{path}, line {number}", DataError)
        rows.append(row)
    return rows


def journal_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file to append to; [] where there is no file.

    Truncates the file before an incomplete last line. Raises DataError as `whole_rows` does.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        with path.open("r+b") as file:
            file.truncate(end)
    with path.open("rb") as lines:
        numbered = enumerate(lines, start=1)
        return [parse_row(line, path, number) for number, line in numbered if line.strip()]
