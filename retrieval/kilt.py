"""Corpora made from the dumps that R1-Searcher's own were made from, in their published forms.

Pages become numbered lines with constant memory. What is written so far stands in `OUT.partial`;
`OUT.journal` says up to which line of the source. The same call goes on from there after any stop,
and OUT, which appears only when it is whole, has the bytes of an uninterrupted run.
"""

import fcntl
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple

import msgspec

from r1s_jax.border.errors import BadInput, UserError
from r1s_jax.border.json import parse, read_object
from r1s_jax.border.schema import check
from r1s_jax.retrieval.corpus import CorpusError
from r1s_jax.retrieval.encoder import Progress
from r1s_jax.retrieval.lines import Line, Source, read_lines

_PASSAGE_WORDS = 100
_JOURNAL_BYTES = 2**24  # written between two saved journals, about a second's work
_REPORT_PAGES = 500
_REASONS = 10  # told of pages that were skipped

_SEPARATORS = re.compile(r"[\t\r\n]")


class Form(NamedTuple):
    """A published corpus: how a page becomes lines, and how its file is written."""

    name: str
    lines: Callable[[dict[str, Any]], list[str]]  # raises ValueError for a malformed page
    head: bytes = b""
    end: str = "\n"


Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class Summary(NamedTuple):
    """What a conversion did."""

    pages: Count  # that became passages
    passages: Count
    skipped: Count  # malformed pages
    reasons: tuple[str, ...]  # of the first that were skipped: file, line, what was wrong


class _Place(NamedTuple):
    """A line of the source, to find it again and to know it again."""

    file: str
    number: Count
    offset: Count
    checksum: Count

    @classmethod
    def of(cls, line: Line) -> "_Place":
        # A last line may have got its line end since.
        return cls(line.file, line.number, line.offset, zlib.crc32(line.data.rstrip(b"\r\n")))


class _State(NamedTuple):
    """Where a conversion stands; replaced as a whole, so that no interruption halves it."""

    summary: Summary = Summary(0, 0, 0, ())
    written: int = 0  # bytes of output
    last: _Place | None = None


class _Journal(msgspec.Struct):
    """What `OUT.journal` holds: a state, and a checksum over the rest of the row."""

    form: str
    summary: Summary
    written: Count
    last: _Place | None
    checksum: Count


def kilt_lines(page: dict[str, Any]) -> list[str]:
    """A page of the KILT knowledge source as `Title   text` lines of 100 words, without overlap.

    Raises ValueError for a page without a title or without text.
    """
    title, text = _fields(page, "wikipedia_title", "paragraphs")
    words = "".join(text).replace("BULLET::::", "").replace("Section::::", "").split()
    return [
        f"{title}   {' '.join(words[i : i + _PASSAGE_WORDS])}"
        for i in range(0, len(words), _PASSAGE_WORDS)
    ]


def abstract_line(page: dict[str, Any]) -> list[str]:
    """A page of the HotpotQA abstracts (2017) as `Title: T Text:  ...`, quoted as CSV needs it.

    The raw dump was not at hand: its form (`title`, and `text` as a list of sentences, each after
    the first beginning with its space) is inferred from HotpotQA and the published lines.
    """
    title, text = _fields(page, "title", "sentences")
    line = _SEPARATORS.sub(" ", f"Title: {title} Text:  {' '.join(text)}")
    return ['"' + line.replace('"', '""') + '"' if '"' in line else line]


def _fields(page: dict[str, Any], title_key: str, what: str) -> tuple[str, list[str]]:
    if not isinstance(page, dict):
        raise ValueError("not a JSON object")
    title, text = page.get(title_key), page.get("text")
    if not isinstance(title, str) or not title.strip():
        raise ValueError(f"no {title_key!r}")
    if not isinstance(text, list) or not all(isinstance(part, str) for part in text):
        raise ValueError(f"'text' is no list of {what}")
    if not any(part.strip() for part in text):
        raise ValueError(f"page {title!r} has no text")
    return _SEPARATORS.sub(" ", title), text


KILT = Form("kilt", kilt_lines)
# As a spreadsheet writes it: with a byte-order mark and Windows line ends.
ABSTRACTS = Form("abstracts", abstract_line, head=b"\xef\xbb\xbf", end="\r\n")


def convert(
    source: Source, out: str | Path, form: Form, *, progress: Progress | None = None
) -> Summary:
    """Writes the passages of a source of pages, or goes on writing them.

    Args:
        source: JSON lines, a page each (`lines.open_source`, `lines.open_archive`).
        out: the `.tsv` file to write.
        form: `KILT` or `ABSTRACTS`.
        progress: called with (done, total) in bytes of the source as stored.

    Malformed pages are skipped and counted.

    Raises:
        CorpusError: the source is cut or damaged, changed since the last call, or has no passages;
            the disk is full; another process is writing `out`. What was done is kept.
        FileExistsError: `out` is there.
    """
    out = Path(out)
    if out.suffix != ".tsv":
        raise CorpusError(out, "a corpus is written to a name that ends in .tsv")
    if out.exists():
        raise FileExistsError(f"{out} exists: delete it, or name another file")
    partial, journal = Path(f"{out}.partial"), Path(f"{out}.journal")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _open_locked(partial) as file:
            state = _load(journal, form, partial)
            file.truncate(state.written)
            summary = _convert(source, file, journal, state, form, progress)
            if not summary.passages:
                partial.unlink()
                journal.unlink()
                skipped = "".join(f"\n  {reason}" for reason in summary.reasons)
                raise CorpusError(out, f"no passages; {summary.skipped} pages skipped{skipped}")
            partial.rename(out)
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error}); what was saved is kept"
        raise CorpusError(partial, f"{reason}: mend this and run the same command again") from error
    journal.unlink(missing_ok=True)
    return summary


def _convert(
    source: Source,
    file: BinaryIO,
    journal: Path,
    state: _State,
    form: Form,
    progress: Progress | None,
) -> Summary:
    saved = state.written
    try:
        if not state.written:
            state = state._replace(written=file.write(form.head))
        for line in _lines_after(source, state.last):
            data, summary = _page(line, form, state.summary)
            state = _State(summary, state.written + file.write(data), _Place.of(line))
            if state.written - saved >= _JOURNAL_BYTES:
                _save(journal, form, state, file)
                saved = state.written
            if progress and (summary.pages + summary.skipped) % _REPORT_PAGES == 0:
                progress(source.consumed(), source.total)
        _save(journal, form, state, file)
    except OSError:
        raise  # the disk: an older journal is right about what is on it
    except BaseException as error:
        with suppress(OSError):
            _save(journal, form, state, file)
        if isinstance(error, CorpusError) and state.last:
            kept = f"{state.summary.pages:,} pages are kept"
            raise CorpusError(str(error), f"{kept}; the same command goes on from there") from error
        raise
    if progress:
        progress(source.total, source.total)
    return state.summary


class _NotJSON(UserError, ValueError):
    pass


def _page(line: Line, form: Form, summary: Summary) -> tuple[bytes, Summary]:
    """What a line adds to the output, and the summary with it."""
    if not line.data.strip():
        return b"", summary
    try:
        text = line.data.decode("utf-8-sig" if line.number == 1 else "utf-8")
        page = parse(text, "the page", _NotJSON)
        lines = form.lines(page)
        numbered = (f"{i}\t{text}{form.end}" for i, text in enumerate(lines, summary.passages))
        data = "".join(numbered).encode()
    except (ValueError, RecursionError) as error:
        if isinstance(error, _NotJSON | UnicodeDecodeError):
            if not line.data.endswith(b"\n"):
                raise CorpusError(
                    line.file, "cut in the middle of this line", line.number
                ) from None
            error = ValueError(f"not JSON in UTF-8: {error}")
        told = (*summary.reasons, f"{line.file}:{line.number}: {error}")[:_REASONS]
        return b"", summary._replace(skipped=summary.skipped + 1, reasons=told)
    return data, summary._replace(pages=summary.pages + 1, passages=summary.passages + len(lines))


def _lines_after(source: Source, last: _Place | None) -> Iterator[Line]:
    """The lines after `last`, which must stand where it stood."""
    if last is None:
        yield from read_lines(source)
        return
    lines = read_lines(source, last.file, last.number, last.offset)
    again = next(lines, None)
    if again is None or _Place.of(again).checksum != last.checksum:
        raise CorpusError(
            last.file,
            "not the line that was read before: the source has changed. Bring it back, or delete "
            "the .partial file to start anew",
            last.number,
        )
    yield from lines


@contextmanager
def _open_locked(path: Path) -> Iterator[BinaryIO]:
    """A file to append to, by one process at a time."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CorpusError(path, "another process is writing it") from error
        yield file


def _save(journal: Path, form: Form, state: _State, file: BinaryIO) -> None:
    """Puts what was written on the disk, then says so."""
    file.flush()
    os.fsync(file.fileno())
    beside = Path(f"{journal}.new")
    row = {"form": form.name, "summary": state.summary, "written": state.written}
    row["last"] = state.last
    beside.write_text(json.dumps(row | {"checksum": _checksum(row)}), "utf-8")
    beside.rename(journal)


def _checksum(row: dict[str, Any]) -> int:
    """Of the row of a journal without its own: one digit of it would cut the output elsewhere."""
    return zlib.crc32(json.dumps(row, sort_keys=True).encode())


def _load(journal: Path, form: Form, partial: Path) -> _State:
    """The saved state; a new one where there is none, or its output is not there."""
    if not journal.exists():
        return _State()
    try:
        row = read_object(journal, BadInput)
        known = check(row, _Journal, journal, BadInput)
    except BadInput as error:
        raise CorpusError(journal, f"not a journal ({error}): delete it to start anew") from error
    if known.checksum != _checksum({key: row[key] for key in row if key != "checksum"}):
        raise CorpusError(journal, "was damaged or changed: delete it to start anew")
    if known.form != form.name:
        reason = f"was begun as {known.form!r}, not {form.name!r}: delete it to start anew"
        raise CorpusError(journal, reason)
    state = _State(known.summary, known.written, known.last)
    return state if partial.stat().st_size >= state.written else _State()
