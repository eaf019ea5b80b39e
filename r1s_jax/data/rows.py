"""Files of rows: read whole, read while they are written, and journals that are gone on with."""

import gzip
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from r1s_jax.border.errors import UserError, shorten
from r1s_jax.border.json import parse_object
from r1s_jax.retrieval.corpus import CorpusError
from r1s_jax.retrieval.tables import is_table, table_rows


class DataError(UserError, ValueError):
    """A data file that cannot be used; the message names the file and the line."""


def read_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a JSONL file (`.gz` too) with their line numbers; blank lines skipped.

    So are the rows of a Parquet file, of a folder that `datasets` saved, and of
    `datasets:ORG/NAME[:SPLIT]`. Raises DataError, naming the file and the line, for what is no JSON
    object, and for a table that cannot be read.
    """
    if is_table(path):
        try:
            yield from table_rows(str(path))
        except CorpusError as error:
            raise DataError(str(error)) from error
        return
    path, first = Path(path), True
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
        for number, line in _numbered(lines, path):
            if not line.strip():
                continue
            if first and line.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
                raise DataError(
                    f"{path}, line {number}: a JSON array; JSON lines are wanted, one object a "
                    f"line: jq -c '.[]' {path.name} > {path.stem}.jsonl"
                )
            first = False
            yield number, parse_row(line, path, number)


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


def rows_so_far(path: Path) -> list[dict[str, Any]]:
    """The rows of whole_rows without their numbers; [] where there is no file yet."""
    return [row for _, row in whole_rows(path)] if path.exists() else []


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
    return [row for _, row in read_rows(path)]


def _numbered(lines: Iterable[bytes], path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbers the lines from 1; what cannot be unpacked becomes a DataError as well."""
    number = 0
    try:
        for number, line in enumerate(lines, start=1):
            yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}, after line {number}: {error}") from error


def gold_answers(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The right answers of a row, under `answer` or FlashRAG's `golden_answers`.

    MuSiQue's `answer_aliases` are right as well. Raises ValueError where there is none.
    """
    answer = row.get("answer", row.get("golden_answers"))
    answers = answer if isinstance(answer, list) else [answer]
    if not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise ValueError(
            "`answer` must be a text, or a list of texts, none of them empty; the keys here are "
            f"{shorten(', '.join(map(str, row)), 100)}"
        )
    aliases = row.get("answer_aliases") or []
    if not isinstance(aliases, list) or not all(isinstance(a, str) for a in aliases):
        raise ValueError("`answer_aliases` must be a list of texts")
    return tuple(dict.fromkeys([*answers, *(a for a in aliases if a.strip())]))
