"""Corpora from dumps: the published bytes, from any source, also after failures."""

import bz2
import gzip
import json
import os
import re
import subprocess
import sys
import tarfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from r1s_jax.retrieval.corpus import CorpusError, read_passages
from r1s_jax.retrieval.kilt import ABSTRACTS, KILT, convert, kilt_lines
from r1s_jax.retrieval.lines import open_archive, open_source
from r1s_jax.system.locks import InUse, only_one
from tests.full_disk import r1s_on_a_full_disk
from tests.makers import names

needs_data = pytest.mark.skipif(
    "R1S_DATA" not in os.environ, reason="R1S_DATA does not name the data folder"
)


def sample(name: str) -> Path:
    return Path(os.environ["R1S_DATA"]) / "kilt_sample" / name


def pages(count: int, words: int = 230) -> bytes:
    """A source of `count` KILT pages."""
    rows = []
    for i in range(count):
        text = [f"Page {i}\n", "Section::::Fïrst.\n", "BULLET::::- an item\n", "wörd " * words]
        rows.append(json.dumps({"wikipedia_title": f"Page {i}", "text": text}) + "\n")
    return "".join(rows).encode()


def r1s(*args: str) -> list[str]:
    return [sys.executable, "-m", "r1s_jax.cli", *args]


class FileServer(ThreadingHTTPServer):
    """Serves one file; with `cut`, hangs up after `cut` bytes."""

    daemon_threads = True

    def __init__(self, data: bytes, cut: int | None = None):
        super().__init__(("127.0.0.1", 0), _FileHandler)
        self.data, self.cut = data, cut
        Thread(target=self.serve_forever, daemon=True).start()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"

    def __exit__(self, *exc: object) -> None:
        self.shutdown()
        self.server_close()


class _FileHandler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.data)))
        self.end_headers()
        self.wfile.write(self.server.data[: self.server.cut])

    def log_message(self, *args: object) -> None:
        pass


@needs_data
def test_the_published_split_comes_out_byte_for_byte(tmp_path):
    source, out = sample("kilt_knowledgesource_100.jsonl.gz"), tmp_path / "kilt.tsv"
    done = subprocess.run(r1s("corpus", "kilt", str(source), str(out)), capture_output=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["skipped"] == 0 and summary["passages"] == len(list(read_passages(out)))
    whole, _, cut = sample("kilt_100w_expected.tsv").read_bytes().rpartition(b"\n")
    assert whole.count(b"\n") == 91
    assert out.read_bytes().startswith(whole + b"\n" + cut)
    assert names(tmp_path) == ["kilt.tsv"]


def test_a_page_is_cut_after_every_hundredth_word():
    words = [f"w{i}" for i in range(250)]
    text = ["T\n", "Section::::A.:B.\n", "BULLET::::- x\u00a0y\n", " ".join(words[:245]), "\n"]
    lines = kilt_lines({"wikipedia_title": "T", "text": text})
    start = ["T", "A.:B.", "-", "x", "y"]
    assert [line.split("   ")[0] for line in lines] == ["T"] * 3
    assert [word for line in lines for word in line.split("   ")[1].split(" ")] == (
        start + words[:245]
    )
    assert [len(line.split("   ")[1].split(" ")) for line in lines] == [100, 100, 50]
    assert len(kilt_lines({"wikipedia_title": "T", "text": [" ".join(words[:100])]})) == 1


class Stop(KeyboardInterrupt):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(source, output) of 3,000 pages."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "s.jsonl").write_bytes(pages(3000))
    summary = convert(open_source(str(folder / "s.jsonl")), folder / "out.tsv", KILT)
    assert summary == (3000, 9000, 0, ())
    return (folder / "s.jsonl").read_bytes(), (folder / "out.tsv").read_bytes()


@pytest.mark.parametrize("name", ["s.jsonl", "s.jsonl.gz"])
def test_a_stopped_conversion_leaves_nothing_and_can_be_rerun(tmp_path, whole, name):
    source, out = tmp_path / name, tmp_path / "out.tsv"
    source.write_bytes(gzip.compress(whole[0], 1) if name.endswith("gz") else whole[0])
    calls = []

    def stop(done: int, total: int) -> None:
        assert done <= total
        calls.append(done)
        if len(calls) == 3:
            raise Stop

    with pytest.raises(Stop):
        convert(open_source(str(source)), out, KILT, progress=stop)
    assert names(tmp_path) == [name] and calls == sorted(calls)
    Path(f"{out}.partial").write_text("of a killed one")
    convert(open_source(str(source)), out, KILT)
    assert out.read_bytes() == whole[1] and names(tmp_path) == ["out.tsv", name]


@pytest.mark.parametrize("name", ["s.jsonl", "s.jsonl.gz?download=1"])
def test_a_source_behind_http_is_read_too(tmp_path, whole, name):
    calls = []
    with FileServer(gzip.compress(whole[0], 1) if ".gz" in name else whole[0]) as server:
        source = open_source(server.url(name))
        convert(source, tmp_path / "out.tsv", KILT, progress=lambda *at: calls.append(at))
        assert calls[-1] == (len(server.data), len(server.data)) and calls == sorted(calls)
    assert (tmp_path / "out.tsv").read_bytes() == whole[1]


def test_half_an_emoji_is_replaced(tmp_path):
    (tmp_path / "s.jsonl").write_bytes(b'{"wikipedia_title": "A", "text": ["\\ud800"]}\n')
    convert(open_source(str(tmp_path / "s.jsonl")), tmp_path / "o.tsv", KILT)
    assert (tmp_path / "o.tsv").read_text() == "0\tA   \N{REPLACEMENT CHARACTER}\n"


def test_malformed_pages_are_skipped_and_counted(tmp_path):
    good = {"wikipedia_title": "A\tB", "text": ["one"]}
    bad = [
        b"{not json}",
        b"\xff\xfe",
        b"[1]",
        b'{"text": ["no title"]}',
        b'{"wikipedia_title": " ", "text": ["x"]}',
        b'{"wikipedia_title": "A"}',
        b'{"wikipedia_title": "A", "text": "one"}',
        b'{"wikipedia_title": "A", "text": [1]}',
        b'{"wikipedia_title": "A", "text": []}',
        b'{"wikipedia_title": 3, "text": ["x"]}',
        b"[" * 100_000,
    ]
    row = json.dumps(good).encode()
    (tmp_path / "s.jsonl").write_bytes(b"\n".join([b"\xef\xbb\xbf" + row, *bad, b"", row]))
    summary = convert(open_source(str(tmp_path / "s.jsonl")), tmp_path / "o.tsv", KILT)
    assert (summary.pages, summary.passages, summary.skipped) == (2, 2, len(bad))
    assert (tmp_path / "o.tsv").read_text() == "0\tA B   one\n1\tA B   one\n"
    assert [re.search(r"s\.jsonl:(\d+): ", x)[1] for x in summary.reasons] == [
        str(n) for n in range(2, 12)
    ]
    said = ["not JSON", "not JSON", "object", "'wikipedia_title'", "'wikipedia_title'", "list"]
    said += ["list", "list", "no text", "'wikipedia_title'"]
    assert all(word in reason for word, reason in zip(said, summary.reasons, strict=True))


def cut_sources(data: bytes) -> dict[str, bytes]:
    return {"s.jsonl": data[:-100], "s.jsonl.gz": gzip.compress(data, 1)[:-2000]}


@pytest.mark.parametrize("name", ["s.jsonl", "s.jsonl.gz"])
def test_a_cut_source_is_named_by_its_line(tmp_path, whole, name):
    source, out = tmp_path / name, tmp_path / "out.tsv"
    source.write_bytes(cut_sources(whole[0])[name])
    with pytest.raises(CorpusError, match=rf"{name}:\d+: cut ") as error:
        convert(open_source(str(source)), out, KILT)
    assert int(re.search(r":(\d+): cut", str(error.value))[1]) > 2000
    assert names(tmp_path) == [name]


def test_a_lost_connection_is_named(tmp_path, whole):
    out = tmp_path / "out.tsv"
    with FileServer(whole[0], cut=1_000_000) as server:
        with pytest.raises(CorpusError, match=r"s\.jsonl:\d+: cut "):
            convert(open_source(server.url("s.jsonl")), out, KILT)
        server.cut = None
        convert(open_source(server.url("s.jsonl")), out, KILT)
    assert out.read_bytes() == whole[1]
    with pytest.raises(CorpusError, match="cannot be read"):
        convert(open_source(server.url("s.jsonl")), tmp_path / "other.tsv", KILT)


def test_a_full_disk_is_named(tmp_path):
    (tmp_path / "s.jsonl").write_bytes(pages(24_000))
    out = tmp_path / "out.tsv"
    args = ("corpus", "kilt", str(tmp_path / "s.jsonl"), str(out))
    done = r1s_on_a_full_disk(20 * 2**20, *args)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"out\.tsv: cannot be written", done.stderr), done.stderr
    assert names(tmp_path) == ["s.jsonl"]


def test_bad_sources_and_outputs_are_refused(tmp_path, whole):
    source, out = tmp_path / "s.jsonl", tmp_path / "out.tsv"
    with pytest.raises(FileNotFoundError):
        open_source(str(source))
    source.write_bytes(b"")
    with pytest.raises(CorpusError, match="no passages"):
        convert(open_source(str(source)), out, KILT)
    source.write_bytes(b"{}\n" * 3)
    with pytest.raises(CorpusError, match=r"3 pages skipped.*s\.jsonl:1: no 'wikipedia_title'"):
        convert(open_source(str(source)), out, KILT)
    assert names(tmp_path) == ["s.jsonl"]
    with pytest.raises(CorpusError, match=r"ends in \.tsv"):
        convert(open_source(str(source)), tmp_path / "out.txt", KILT)
    with only_one(out, "the corpus"), pytest.raises(InUse, match=r"out\.tsv: the corpus is being"):
        convert(open_source(str(source)), out, KILT)
    out.write_text("precious")
    with pytest.raises(FileExistsError, match="exists"):
        convert(open_source(str(source)), out, KILT)
    assert out.read_text() == "precious"


def raw_abstracts(published: bytes) -> list[dict]:
    """The dump rows of published lines: without quotes, split into sentences."""
    rows = []
    for line in published.decode("utf-8-sig").splitlines():
        id, _, text = line.partition("\t")
        if text.startswith('"'):
            text = text[1:-1].replace('""', '"')
        title, _, body = text.removeprefix("Title: ").partition(" Text:  ")
        first, *others = body.split("  ")
        rows.append({"id": id, "title": title, "text": [first, *(" " + s for s in others)]})
    return rows


@pytest.fixture
def dump(tmp_path):
    """A folder like HotpotQA's dump, and the expected corpus."""
    published = sample("wiki_abstracts_100.tsv").read_bytes()
    lines = [json.dumps(row) + "\n" for row in raw_abstracts(published)]
    # A thousand pages in four files.
    parts = {
        "AA/wiki_00": lines[:40],
        "AA/wiki_01": lines[40:],
        "AB/wiki_00": lines * 9,
        "AB/x": [],
    }
    for name, part in parts.items():
        (tmp_path / "dump" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "dump" / f"{name}.bz2").write_bytes(bz2.compress("".join(part).encode()))
    with tarfile.open(tmp_path / "dump.tar.bz2", "w:bz2") as archive:
        archive.add(tmp_path / "dump", "dump")
    return tmp_path, published


@needs_data
@pytest.mark.parametrize("name", ["dump", "dump.tar.bz2"])
def test_published_abstracts_come_out_byte_for_byte(dump, name):
    folder, published = dump
    summary = convert(open_archive(str(folder / name)), folder / "whole.tsv", ABSTRACTS)
    assert summary == (1000, 1000, 0, ())
    data = (folder / "whole.tsv").read_bytes()
    if name == "dump":  # an archive's members have their own order
        assert data.startswith(published)
    lines = {line.partition(b"\t")[2] for line in data.splitlines()}
    assert lines == {line.partition(b"\t")[2] for line in published.splitlines()}
    assert [p.line for p in read_passages(folder / "whole.tsv")][99:101]


@needs_data
def test_a_damaged_dump_is_named(dump):
    folder, _ = dump
    file = folder / "dump" / "AB" / "wiki_00.bz2"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(CorpusError, match=r"AB/wiki_00\.bz2: cannot be read"):
        convert(open_archive(str(folder / "dump")), folder / "out.tsv", ABSTRACTS)
    archive = folder / "dump.tar.bz2"
    archive.write_bytes(archive.read_bytes()[:3000])
    with pytest.raises(CorpusError, match=r"dump\.tar\.bz2"):
        convert(open_archive(str(archive)), folder / "other.tsv", ABSTRACTS)
    (folder / "none").mkdir()
    for wrong in ("none", "dump/AA/wiki_00.bz2"):
        with pytest.raises(CorpusError, match=r"wiki_\*\.bz2"):
            open_archive(str(folder / wrong))
