"""Makes R1-Searcher's two corpora from their dumps, in their published forms.

Pages become numbered lines with constant memory. The corpus appears only once it is complete; a
stopped conversion starts over.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from r1s_jax.io.errors import UserError
from r1s_jax.io.json import parse
from r1s_jax.retrieval.corpus import CorpusError
from r1s_jax.retrieval.encoder import Progress
from r1s_jax.retrieval.lines import Line, Source, read_lines
from r1s_jax.system.files import whole_file
from r1s_jax.system.locks import only_one

_PASSAGE_WORDS = 100
_REPORT_PAGES = 500
_REASONS = 10  # reported for skipped pages

_SEPARATORS = re.compile(r"[\t\r\n]")


class Form(NamedTuple):
    """A published corpus: how a page becomes lines, and how its file is written."""

    lines: Callable[[dict[str, Any]], list[str]]  # raises ValueError for a malformed page
    head: bytes = b""
    end: str = "\n"


class Summary(NamedTuple):
    """What a conversion did."""

    pages: int = 0  # converted
    passages: int = 0
    skipped: int = 0  # malformed pages
    reasons: tuple[str, ...] = ()  # of the first skipped pages: file, line, fault


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
    """A page of the HotpotQA abstracts (2017) as `Title: T Text:  ...`, quoted as in CSV.

    Not checked against the raw dump: its form (`title`, and `text` as a list of sentences, all but
    the first beginning with a space) is inferred from HotpotQA and the published lines.
    """
    title, text = _fields(page, "title", "sentences")
    line = _SEPARATORS.sub(" ", f"Title: {title} Text:  {' '.join(text)}")
    return ['"' + line.replace('"', '""') + '"' if '"' in line else line]


def _fields(page: dict[str, Any], title_key: str, unit: str) -> tuple[str, list[str]]:
    if not isinstance(page, dict):
        raise ValueError("not a JSON object")
    title, text = page.get(title_key), page.get("text")
    if not isinstance(title, str) or not title.strip():
        raise ValueError(f"no {title_key!r}")
    if not isinstance(text, list) or not all(isinstance(part, str) for part in text):
        raise ValueError(f"'text' is not a list of {unit}")
    if not any(part.strip() for part in text):
        raise ValueError(f"page {title!r} has no text")
    return _SEPARATORS.sub(" ", title), text


KILT = Form(kilt_lines)
# As a spreadsheet writes a file: with a byte-order mark and Windows line ends.
ABSTRACTS = Form(abstract_line, head=b"\xef\xbb\xbf", end="\r\n")


def convert(
    source: Source, out: str | Path, form: Form, *, progress: Progress | None = None
) -> Summary:
    """Converts a source of pages to a corpus file.

    Args:
        source: JSON lines, a page each (`lines.open_source`, `lines.open_archive`).
        out: the `.tsv` file to write.
        form: `KILT` or `ABSTRACTS`.
        progress: called with (done, total) in bytes of the source as stored.

    Malformed pages are skipped and counted.

    Raises:
        CorpusError: the source is cut or damaged, or has no passages; the disk is full.
        FileExistsError: `out` is there.
        InUse: another process is writing `out`.
    """
    out = Path(out)
    if out.suffix != ".tsv":
        raise CorpusError(out, "a corpus is written to a name that ends in .tsv")
    if out.exists():
        raise FileExistsError(f"{out} exists: delete it, or name another file")
    try:
        with only_one(out, "the corpus"), whole_file(out) as file:
            summary = _convert(source, file, form, progress)
            if not summary.passages:
                skipped = "".join(f"\n  {reason}" for reason in summary.reasons)
                raise CorpusError(out, f"no passages; {summary.skipped} pages skipped{skipped}")
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error})"
        raise CorpusError(out, f"{reason}: fix this and run the same command again") from error
    return summary


def _convert(source: Source, file: BinaryIO, form: Form, progress: Progress | None) -> Summary:
    summary = Summary()
    file.write(form.head)
    for line in read_lines(source):
        data, summary = _page(line, form, summary)
        file.write(data)
        if progress and (summary.pages + summary.skipped) % _REPORT_PAGES == 0:
            progress(source.consumed(), source.total)
    if progress:
        progress(source.total, source.total)
    return summary


class _NotJSON(UserError, ValueError):
    pass


def _page(line: Line, form: Form, summary: Summary) -> tuple[bytes, Summary]:
    """The output bytes of one line of the source, and the updated summary."""
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
        reasons = (*summary.reasons, f"{line.file}:{line.number}: {error}")[:_REASONS]
        return b"", summary._replace(skipped=summary.skipped + 1, reasons=reasons)
    return data, summary._replace(pages=summary.pages + 1, passages=summary.passages + len(lines))
