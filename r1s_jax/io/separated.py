"""Reads tables in CSV and TSV files from outside."""

import ast
import csv
import io
import json
import re
from collections.abc import Iterator
from typing import Any, cast

from r1s_jax.io.errors import BadInput, UserError, Where, reason
from r1s_jax.io.json import decode

_DELIMITERS = ("\t", ",", ";")
_LONGEST_LIST = 10_000  # characters
# NumPy prints lists without commas, which Python reads as one concatenated text.
_NO_COMMAS = re.compile(r"""['"]\s+['"]""")

Cell = str | list[str]


def parse_table(
    data: bytes, where: Where, error: type[UserError] = BadInput
) -> Iterator[tuple[int, dict[str, Cell]]]:
    """The rows of a table, numbered from 1: the cells that are not empty, by column name.

    The first line has the names, which are returned in lower case. The delimiter is the first of
    tab, comma and semicolon that occurs in it. A cell with a list of texts in JSON or Python syntax
    is returned as a list. DPR's files have no line of names: each row is a question, a tab, and a
    list of answers. Raises `error` for anything else.
    """
    text = decode(data, where, error)
    top = text.lstrip().partition("\n")[0]
    delimiter = next((mark for mark in _DELIMITERS if mark in top), ",")
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    number = 0
    try:
        for cells in lines:
            if not any(cell.strip() for cell in cells):
                continue
            if not names:
                if not (delimiter == "\t" and len(cells) == 2 and _is_list(cells[1])):
                    names = _names(cells, where, error)
                    continue
                names = ["question", "answers"]
            number += 1
            place = f"{where}, row {number}"
            if len(cells) > len(names):
                raise error(f"{place}: {len(cells)} cells for {len(names)} names of columns")
            named = zip(names, cells, strict=False)
            yield number, {n: _cell(c, place, error) for n, c in named if n and c.strip()}
    except csv.Error as wrong:
        raise error(f"{where}, line {lines.line_num}: no table: {reason(wrong)}") from None


def _names(cells: list[str], where: Where, error: type[UserError]) -> list[str]:
    names = [cell.strip().lower() for cell in cells]
    twice = next((name for i, name in enumerate(names) if name and name in names[:i]), None)
    if twice:
        raise error(f"{where}: two columns are named {twice[:60]!r}")
    return names


def _is_list(cell: str) -> bool:
    return cell.strip().startswith("[") and cell.strip().endswith("]")


def _cell(cell: str, place: str, error: type[UserError]) -> Cell:
    if not _is_list(cell) or len(cell) > _LONGEST_LIST:
        return cell
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(cell.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if not isinstance(value, list):
            continue
        items = cast("list[Any]", value)
        if not all(isinstance(item, str) for item in items):
            continue
        if read is ast.literal_eval and _NO_COMMAS.search(cell):
            raise error(f"{place}: a list without commas between its texts; write it as JSON")
        return items
    return cell
