"""The lines of large sources, read as a stream from any place: files, addresses, folders of bz2."""

import bz2
import gzip
import io
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import urllib3

from r1s_jax.border.http import Connections, ServerError
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
    """A line of a source, its line end included where it has one."""

    file: str
    number: int  # in the file, from 1
    offset: int  # of its first byte in the file, once decompressed
    data: bytes


class Source(Protocol):
    """One or more files of lines, in an order that never changes."""

    name: str
    total: int  # bytes as stored; 0 where they are not known

    def consumed(self) -> int:
        """Bytes read so far, as stored."""
        ...

    def files(self, first: str, offset: int) -> Iterator[tuple[str, BinaryIO]]:
        """(name, stream) from the file `first` ("": the very first), which starts at `offset`."""
        ...


def open_source(reference: str) -> Source:
    """A file or an http(s) address of lines, gzipped where its name ends in `.gz`."""
    if reference.startswith(("http://", "https://")):
        return _Address(reference)
    return _File(Path(reference))


def open_archive(reference: str) -> Source:
    """A folder or a `.tar.bz2` of `wiki_*.bz2` files.

    Raises CorpusError where it is neither, or there are no such files in the folder.
    """
    path = Path(reference)
    if path.is_dir():
        return _Folder(path)
    if not path.name.endswith((".tar.bz2", ".tar")):
        raise CorpusError(path, "expected a folder of wiki_*.bz2 files or a .tar.bz2 of them")
    return _Archive(path)


def read_lines(source: Source, file: str = "", number: int = 1, offset: int = 0) -> Iterator[Line]:
    """The lines of a source from one of them on (by default from the first), with constant memory.

    Raises:
        CorpusError: the source is cut or damaged, or a line is too long; the message names the
            file and the last line that could be read.
    """
    name = file or source.name
    number -= 1
    try:
        for name, stream in source.files(file, offset):
            while data := stream.readline(LONGEST_LINE):
                number += 1
                if len(data) == LONGEST_LINE:
                    raise CorpusError(name, f"a line of more than {len(data):,} bytes", number)
                yield Line(name, number, offset, data)
                offset += len(data)
            number, offset = 0, 0
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

    def files(self, first: str, offset: int) -> Iterator[tuple[str, BinaryIO]]:
        with self._path.open("rb") as raw:
            self.consumed = raw.tell
            if self._path.suffix == ".gz":
                yield self.name, _skip(gzip.GzipFile(fileobj=raw), offset)
            else:
                raw.seek(offset)
                yield self.name, raw


class _Address:
    """A file behind HTTP. Going on asks for the rest of it; where that is refused, for all."""

    def __init__(self, url: str):
        self.name, self.total = url, 0
        self._gzipped = (urllib3.util.parse_url(url).path or "").endswith(".gz")
        self.consumed: Callable[[], int] = int

    def files(self, first: str, offset: int) -> Iterator[tuple[str, BinaryIO]]:
        with self._get(0 if self._gzipped else offset) as (start, response):
            response.auto_close = False  # at its end the response would close itself under us
            raw = io.BufferedReader(response, _CHUNK)
            self.total = start + int(response.headers.get("Content-Length", -start))
            self.consumed = lambda: start + response.tell()
            stream = gzip.GzipFile(fileobj=raw) if self._gzipped else raw
            yield self.name, _skip(stream, offset - start)

    @contextmanager
    def _get(self, offset: int) -> Iterator[tuple[int, urllib3.HTTPResponse]]:
        """The response, and the byte of the file with which it starts: `offset` or 0."""
        timeout = urllib3.Timeout(connect=_CONNECT_S, read=_READ_S)
        headers = {"Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        response = Connections().request(
            "GET",
            self.name,
            hops=5,
            headers=headers,
            timeout=timeout,
            decode_content=False,
            # Of lost connections: a server that asks to come back later is not waited for.
            retries=urllib3.Retry(3, respect_retry_after_header=False),
        )
        try:
            if response.status not in (200, 206):
                raise CorpusError(self.name, f"the server answers {response.status}")
            yield offset if response.status == 206 else 0, response
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

    def files(self, first: str, offset: int) -> Iterator[tuple[str, BinaryIO]]:
        before, found = 0, not first
        for path in self._files:
            found = found or str(path) == first
            if found:
                with path.open("rb") as raw:
                    self.consumed = lambda raw=raw, before=before: before + raw.tell()
                    yield str(path), _skip(bz2.BZ2File(raw), offset)
                offset = 0
            before += path.stat().st_size
        if not found:
            raise CorpusError(self.name, f"no file {first!r} to go on from")


class _Archive:
    """A tar file of `wiki_*.bz2` files, compressed or not, in its own order; read once through."""

    def __init__(self, path: Path):
        self._path, self.name, self.total = path, str(path), path.stat().st_size
        self.consumed: Callable[[], int] = int

    def files(self, first: str, offset: int) -> Iterator[tuple[str, BinaryIO]]:
        found = not first
        with self._path.open("rb") as raw, tarfile.open(fileobj=raw, mode="r|*") as archive:
            self.consumed = raw.tell
            for member in archive:
                name = f"{self.name}:{member.name}"
                found = found or name == first
                base = Path(member.name).name
                if found and member.isfile() and fnmatch(base, _PAGES):
                    yield name, _skip(bz2.BZ2File(archive.extractfile(member)), offset)
                    offset = 0
        if not found:
            raise CorpusError(self.name, f"no file {first!r} to go on from")


def _skip(stream: BinaryIO, offset: int) -> BinaryIO:
    """The stream, `offset` bytes further on; raises EOFError where it ends before."""
    while offset:
        chunk = stream.read(min(offset, _CHUNK))
        if not chunk:
            raise EOFError("shorter than it was")
        offset -= len(chunk)
    return stream
