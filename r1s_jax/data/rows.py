"""Rows of data files, in the forms in which data sets are published."""

import gzip
import io
import itertools
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from r1s_jax.io.errors import shorten
from r1s_jax.io.journal import DataError, parse_row
from r1s_jax.io.json import parse, parse_items, parse_object
from r1s_jax.io.separated import parse_table
from r1s_jax.retrieval.corpus import CorpusError
from r1s_jax.retrieval.tables import is_table, table_rows

_MARKS = b"\xef\xbb\xbf \t\r\n"  # a BOM and white space: may precede the first value of a file


def read_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of the JSON objects of a JSONL file (`.gz` too); blank lines are skipped.

    The number is that of the line, from 1. Other files count their rows from 1: the items of a JSON
    array or of a JSON object's list `data` (SQuAD: its questions), and the rows of a CSV, TSV or
    Parquet file, of a folder that `datasets` saved, and of `datasets:ORG/NAME[:SPLIT]`. Raises
    DataError, naming the file and the line, for anything but a JSON object, and for a table that
    cannot be read.
    """
    return ((number, row) for _, number, row in _rows(path))


def placed_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of read_rows, each with its place for messages: `FILE, line 3`."""
    return ((f"{path}, {kind} {number}", row) for kind, number, row in _rows(path))


def _rows(path: str | Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(what the number counts, the number, the row)."""
    if is_table(path):
        try:
            yield from (("row", number, row) for number, row in table_rows(str(path)))
        except CorpusError as error:
            raise DataError(str(error)) from error
        return
    path = Path(path)
    kind = Path(path.stem if path.suffix == ".gz" else path).suffix.lower()
    if kind in (".csv", ".tsv"):
        yield from (("row", *row) for row in parse_table(_unpacked(path), path, DataError))
        return
    if kind == ".json" and (rows := _object_rows(_unpacked(path), path)) is not None:
        yield from (("item", number, row) for number, row in enumerate(rows, start=1))
        return
    with _opened(path) as lines:
        numbered = ((n, line) for n, line in _numbered(lines, path) if line.strip())
        for number, line in numbered:
            if not line.lstrip(_MARKS).startswith(b"["):
                numbered = itertools.chain([(number, line)], numbered)
                break
            rest = (more for _, more in _numbered(lines, path))
            yield from _items(b"".join([b"\n" * (number - 1), line, *rest]), path)
        yield from (("line", n, parse_row(line, path, n)) for n, line in numbered)


def _opened(path: Path) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _unpacked(path: Path) -> bytes:
    with _opened(path) as lines:
        return b"".join(line for _, line in _numbered(lines, path))


def _object_rows(data: bytes, path: Path) -> list[dict[str, Any]] | None:
    """The rows of a file that is one JSON object; None for any other file, such as JSON lines.

    The rows are the objects of its list `data` (SQuAD: the questions of the articles); without that
    list the object itself is the only row.
    """
    if not data.lstrip(_MARKS).startswith(b"{"):
        return None
    try:
        whole = parse_object(data, path, DataError)
    except DataError:
        try:
            parse(data.lstrip(_MARKS).partition(b"\n")[0], path, DataError)
        except DataError:
            pass
        else:
            return None
        raise
    rows = whole.get("data")
    if not isinstance(rows, list):
        return [whole] if b"\n" in data.strip() else None
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected JSON objects in the list `data`")
    return [row for article in rows for row in _article_rows(article)]


def _article_rows(article: dict[str, Any]) -> list[dict[str, Any]]:
    """The questions of an article of SQuAD; any other row unchanged."""
    paragraphs = article.get("paragraphs")
    pages = [p for p in paragraphs if isinstance(p, dict)] if isinstance(paragraphs, list) else []
    groups = [page["qas"] for page in pages if isinstance(page.get("qas"), list)]
    if not groups:
        return [article]
    return [row for questions in groups for row in questions if isinstance(row, dict)]


def _items(data: bytes, path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """The objects of a JSON array, counted from 1."""
    for number, item in enumerate(parse_items(data, path, DataError), start=1):
        if not isinstance(item, dict):
            kind = type(item).__name__
            raise DataError(f"{path}, item {number}: expected a JSON object, found {kind}")
        yield "item", number, item


def _numbered(lines: Iterable[bytes], path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbers the lines from 1; raises DataError for data that cannot be decompressed."""
    number = 0
    try:
        for number, line in enumerate(lines, start=1):
            yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}, after line {number}: {error}") from error


# Keys of the right answers; the first that a row has counts. Their sources, in this order: this
# project, HotpotQA, 2Wiki, MuSiQue, TriviaQA and NQ-open; FlashRAG; DPR and SQuAD; PopQA; verl and
# Search-R1.
_ANSWER_KEYS = ("answer", "golden_answers", "answers", "possible_answers", "reward_model")
FORMS = "`question` (or `problem`, or verl's `prompt`) and one of " + ", ".join(
    f"`{k}`" for k in _ANSWER_KEYS
)


def keys_found(row: Mapping[str, Any]) -> str:
    """For messages: the keys of a row, and the keys that are understood."""
    return f"the keys here are {shorten(', '.join(map(str, row)), 100)}; wanted are {FORMS}"


def gold_answers(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The right answers of a row in any published form (see _ANSWER_KEYS).

    A text, a list of texts, SQuAD's object with `text` or a list of such, TriviaQA's object with
    `value` and `aliases`, PopQA's list written as a text, verl's `ground_truth.target`. MuSiQue's
    `answer_aliases` are right as well. Raises ValueError if there is none.
    """
    key = next((key for key in _ANSWER_KEYS if row.get(key) is not None), "answer")
    answers = _answers_of(key, row.get(key))
    if not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise ValueError(
            f"`{key}` must be a text, or a list of texts, none of them empty; {keys_found(row)}"
        )
    aliases = row.get("answer_aliases") or []
    if not isinstance(aliases, list) or not all(isinstance(a, str) for a in aliases):
        raise ValueError("`answer_aliases` must be a list of texts")
    return tuple(dict.fromkeys([*answers, *(a for a in aliases if a.strip())]))


def _answers_of(key: str, value: Any) -> list[Any]:
    """The value under one of _ANSWER_KEYS as a list, whose items are not yet checked."""
    if key == "reward_model":
        truth = value.get("ground_truth") if isinstance(value, dict) else None
        value = truth.get("target") if isinstance(truth, dict) else None
    if key == "possible_answers" and isinstance(value, str):
        value = parse(value, "`possible_answers`")
    if key == "answer" and isinstance(value, dict):
        aliases = value.get("aliases")
        if not (aliases is None or isinstance(aliases, list)):
            return []
        return [value.get("value"), *(a for a in aliases or [] if a)]
    if isinstance(value, dict) and "text" in value:
        value = value["text"]
    values = value if isinstance(value, list) else [value]
    return [v.get("text") if isinstance(v, dict) else v for v in values]


def answerable(row: Mapping[str, Any]) -> bool:
    """Whether a row's question has an answer; MuSiQue and SQuAD 2 mark some as unanswerable."""
    if row.get("answerable") is False or row.get("is_impossible") is True:
        return False
    answers = row.get("answers")
    return not (isinstance(answers, dict) and answers.get("text") == [])
