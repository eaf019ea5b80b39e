"""Files that appear whole or not at all, even if the process that writes them is killed."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write: becomes `path` when the block ends, is deleted when it raises."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, parts: Iterable[str]) -> None:
    """Writes the joined parts in UTF-8, replacing `path`."""
    with whole_file(path) as file:
        file.writelines(part.encode() for part in parts)


def write_json(path: Path, value: Any) -> None:
    """Writes one JSON value for people to read: indented, not escaped to ASCII."""
    write_text(path, [json.dumps(value, indent=2, ensure_ascii=False), "\n"])


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON lines."""
    write_text(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digests(folder: Path, without: str) -> dict[str, str]:
    """SHA-256 of every file below a folder by its path in it, but of those named `without`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != without)
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def changed_names(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The files whose digests differ, that are gone, or that are new."""
    return sorted({name for name, _ in before.items() ^ now.items()})


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill: becomes `path` when the block ends, is deleted when it raises."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
