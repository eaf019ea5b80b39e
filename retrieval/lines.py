"""Streams the lines of large sources: files, URLs, folders and archives of .bz2 files."""

import bz2
import gzip
import io
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple, Protocol

import urllib3
from urllib3.util import parse_url

from r1s_jax.io.http import Connections, ServerError
from r1s_jax.retrieval.corpus import CorpusError

LONGEST_LINE = 2**26  # bytes; the longest Wikipedia page is a few million
_CHUNK = 2**20
_PAGES = "wiki_*.bz2"
_CONNECT_S, _READ_S = 10.0, 60.0

_BROKEN = (
    OSError,
    EOFError,
    zlib.error,
    tarfile.TarError,
    urllib3.exceptions.HTTPError,
    ServerError,
)


class Line(NamedTuple):
    """A line of a source, with its line end if it has one."""

    file: str
    number: int  # in the file, from 1
    data: bytes


class Source(Protocol):
    """One or more files of lines, in an order that never changes."""

    name: str
    total: int  # bytes as stored; 0 where they are not known

    def consumed(self) -> int:
        """Bytes read so far, as stored."""
        ...

    def files(self) -> Iterator[tuple[str, io.BufferedIOBase]]:
        """The name and the stream of each file."""
        ...


def open_source(reference: str) -> Source:
    """A file or http(s) URL of lines, gzipped if its name ends in `.gz`."""
    if reference.startswith(("http://", "https://")):
        return _Address(reference)
    return _File(Path(reference))


def open_archive(reference: str) -> Source:
    """A folder or a `.tar.bz2` of `wiki_*.bz2` files.

    Raises CorpusError for anything else, or for a folder without such files.
    """
    path = Path(reference)
    if path.is_dir():
        return _Folder(path)
    if not path.name.endswith((".tar.bz2", ".tar")):
        raise CorpusError(path, "expected a folder of wiki_*.bz2 files or a .tar.bz2 of them")
    return _Archive(path)


def read_lines(source: Source) -> Iterator[Line]:
    """The lines of a source, with constant memory.

    Raises:
        CorpusError: the source is cut or damaged, or a line is too long; the message names the
            file and the last line that could be read.
    """
    name, number = source.name, 0
    try:
        for name, stream in source.files():
            number = 0
            while data := stream.readline(LONGEST_LINE):
                number += 1
                if len(data) == LONGEST_LINE:
                    raise CorpusError(name, f"a line of more than {len(data):,} bytes", number)
                yield Line(name, number, data)
    except _BROKEN as error:
        reason = "cut or damaged after this line" if number > 0 else "cannot be read"
        reason += f" ({error or type(error).__name__})"
        raise CorpusError(name, reason, number if number > 0 else None) from error


class _File:
    """A local file."""

    def __init__(self, path: Path):
        """Raises OSError where there is none."""
        self._path, self.name, self.total = path, str(path), path.stat().st_size
        self.consumed: Callable[[], int] = int

    def files(self) -> Iterator[tuple[str, io.BufferedIOBase]]:
        with self._path.open("rb") as raw:
            self.consumed = raw.tell
            yield self.name, gzip.GzipFile(fileobj=raw) if self._path.suffix == ".gz" else raw


class _Address:
    """A file behind HTTP."""

    def __init__(self, url: str):
        self.name, self.total = url, 0
        self._gzipped = (parse_url(url).path or "").endswith(".gz")
        self.consumed: Callable[[], int] = int

    def files(self) -> Iterator[tuple[str, io.BufferedIOBase]]:
        with self._get() as response:
            # Otherwise the response closes itself at its end, while the reader still uses it.
            response.auto_close = False  # pyright: ignore[reportAttributeAccessIssue]  # missing in the base class
            raw = io.BufferedReader(response, _CHUNK)
            self.total = int(response.headers.get("Content-Length", 0))
            self.consumed = response.tell
            yield self.name, gzip.GzipFile(fileobj=raw) if self._gzipped else raw

    @contextmanager
    def _get(self) -> Iterator[urllib3.BaseHTTPResponse]:
        timeout = urllib3.Timeout(connect=_CONNECT_S, read=_READ_S)
        response = Connections().request(
            "GET",
            self.name,
            hops=5,
            headers={"Accept-Encoding": "identity"},
            timeout=timeout,
            decode_content=False,
            # Retries lost connections; does not wait for a server that asks for a later retry.
            retries=urllib3.Retry(3, respect_retry_after_header=False),
        )
        try:
            if response.status != 200:
                raise CorpusError(self.name, f"the server answers {response.status}")
            yield response
        finally:
            response.close()


class _Folder:
    """A folder of `wiki_*.bz2` files at any depth, in the order of their paths."""

    def __init__(self, path: Path):
        self.name, self._files = str(path), sorted(path.rglob(_PAGES))
        if not self._files:
            raise CorpusError(path, f"no {_PAGES} files")
        self.total = sum(file.stat().st_size for file in self._files)
        self.consumed: Callable[[], int] = int

    def files(self) -> Iterator[tuple[str, io.BufferedIOBase]]:
        before = 0
        for path in self._files:
            with path.open("rb") as raw:
                self.consumed = lambda raw=raw, before=before: before + raw.tell()
                yield str(path), bz2.BZ2File(raw)
            before += path.stat().st_size


class _Archive:
    """A tar file, compressed or not, of `wiki_*.bz2` files; read in one pass, in its own order."""

    def __init__(self, path: Path):
        self._path, self.name, self.total = path, str(path), path.stat().st_size
        self.consumed: Callable[[], int] = int

    def files(self) -> Iterator[tuple[str, io.BufferedIOBase]]:
        with self._path.open("rb") as raw, tarfile.open(fileobj=raw, mode="r|*") as archive:
            self.consumed = raw.tell
            for member in archive:
                if member.isfile() and fnmatch(Path(member.name).name, _PAGES):
                    stream = archive.extractfile(member)
                    assert stream is not None  # it is a file
                    yield f"{self.name}:{member.name}", bz2.BZ2File(stream)
