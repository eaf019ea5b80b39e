"""Files of rows that are written here: read while they grow, and gone on with."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1s_jax.io.errors import UserError
from r1s_jax.io.json import parse_object
from r1s_jax.io.schema import check


class DataError(UserError, ValueError):
    """A data file that cannot be used; the message names the file and the line."""


def parse_row(line: str | bytes, path: Path, number: int) -> dict[str, Any]:
    """The JSON object of line `number` of `path`, which a DataError names if it is none."""
    return parse_object(line, f"{path}, line {number}", DataError)


def whole_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a JSONL file that may be being written, with their line numbers.

    A last line without its end is left out. Raises DataError, naming the file and the line, for
    what is no JSON object.
    """
    # Bytes, not `splitlines`: it would also cut at U+2028 and its kin, which a model may write.
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
    """The rows of a JSONL file that is being written; an unfinished last line is cut off it.

    A file that is not there has none. Raises DataError as read_rows does.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
    with path.open("rb") as lines:
        numbered = enumerate(lines, start=1)
        return [parse_row(line, path, number) for number, line in numbered if line.strip()]
