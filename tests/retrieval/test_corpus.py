"""Corpora: forms of lines and files, and the messages for broken ones."""

import gzip
import json
import os
import re
from pathlib import Path

import pytest

from r1s_jax.retrieval.api import Passage, join_line, split_line
from r1s_jax.retrieval.corpus import (
    CorpusError,
    PassageStore,
    read_passages,
    shards_of,
    wiki_summaries,
)
from r1s_jax.retrieval.encoder import HashEncoder
from r1s_jax.retrieval.references import corpus_passages, write_corpus_index
from tests.full_disk import r1s_on_a_full_disk
from tests.makers import names, run_cli


@pytest.mark.parametrize(
    ("line", "title", "text"),
    [
        ("Ada Lovelace   was a mathematician.", "Ada Lovelace", "was a mathematician."),
        ("Title: Lucy Mair Text:  An anthropologist.", "Lucy Mair", "An anthropologist."),
        ('"Title: K Text:  He wrote ""Dune""."', "K", 'He wrote "Dune".'),
        ("Title: a film   about titles", "Title: a film", "about titles"),
        ("no title here", "", "no title here"),
    ],
)
def test_title_and_text_of_each_form(line, title, text):
    assert split_line(line) == (title, text)
    assert (Passage("0", line).title, Passage("0", line).text) == (title, text)


def test_joined_lines_split_again():
    assert split_line(join_line(" A \n title", "some\ttext   here")) == (
        "A title",
        "some text here",
    )


@pytest.mark.parametrize("name", ["c.tsv", "c.tsv.gz"])
def test_tsv_with_byte_order_mark_and_windows_line_ends(tmp_path, name):
    data = "\ufeff0\tA   one\r\n1\tB   two\u2028still two\r\nx\tC   three".encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert list(read_passages(tmp_path / name)) == [
        ("0", "A   one"),
        ("1", "B   two\u2028still two"),
        ("x", "C   three"),
    ]


def test_both_json_forms(tmp_path):
    rows = [
        {"id": 0, "title": "A", "text": "one\ntwo"},
        {"id": "1", "contents": '"B"\nthree'},
        {"id": "2", "contents": "no title"},
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert list(read_passages(tmp_path / "c.jsonl")) == [
        ("0", "A   one two"),
        ("1", "B   three"),
        ("2", "no title"),
    ]


def test_a_folder_of_files_is_read_in_their_order(tmp_path):
    for number in (10, 2, 0):
        rows = [{"_id": f"d{number}-{i}", "contents": f"T{number}\nText {i}."} for i in range(2)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"part{number}.jsonl").write_text(text)
    (tmp_path / "notes.md").write_text("no passages")
    ids = [f"d{number}-{i}" for number in (0, 2, 10) for i in range(2)]
    assert [passage.id for passage in corpus_passages([str(tmp_path)])] == ids
    twice = [str(tmp_path), str(tmp_path / "part0.jsonl")]
    assert [passage.id for passage in corpus_passages(twice)] == list("01234567")
    (tmp_path / "part11.jsonl").write_text('{"_id": "d0-1", "contents": "x"}')
    with pytest.raises(CorpusError, match=r"part11\.jsonl: id 'd0-1' came before.*one by one"):
        list(corpus_passages([str(tmp_path)]))


def test_a_passage_is_found_with_its_own_id(tmp_path):
    """Relevance judgements refer to this id."""
    (tmp_path / "c.tsv").write_text("Q42\tDouglas   a writer\nQ1\tUniverse   all there is\n")
    out = tmp_path / "i"
    write_corpus_index([str(tmp_path / "c.tsv")], HashEncoder(), out, kind="exact")
    stdout = run_cli("index", "search", str(out), "Universe", "--k", "1").stdout
    assert json.loads(stdout)["results"][0]["id"] == "Q1"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("c.tsv", b"0\tfine\nno tab\n", r"c\.tsv:2: not a passage"),
        ("c.tsv", b"0\ta\r1\tb\r", r"c\.tsv:1: .*must end in a line feed"),
        ("c.tsv", b"id\turl\n1\tx\n", r"c\.tsv:1: a table with the columns id, url"),
        ("c.tsv", b"id\ttext\ttitle\n1\tx\n", r"c\.tsv:2: .*2 columns, the header names 3"),
        ("c.tsv", b"0\tfine\n1\t\xff\n", r"c\.tsv:2: no UTF-8: byte 0xff"),
        ("c.tsv", b"0\ta\n1\tb\n0\tc\n", r"c\.tsv:3: id '0' came before"),
        ("c.tsv", b"1\ta\n0\tb\n1\tc\n", r"c\.tsv:3: id '1' came before"),
        ("c.tsv", b"x\ta\nx\tb\n", r"c\.tsv:2: id 'x' came before"),
        ("c.tsv", b"", "no passages"),
        ("c.jsonl", b'{"id": 0}\n', r"c\.jsonl:1: not a passage"),
        ("c.jsonl", b"[1]\n", r"c\.jsonl:1: not a passage"),
        (
            "c.jsonl",
            b'{"id": 0, "title": null, "text": "x"}\n',
            r"c\.jsonl:1: .* 'title' is missing",
        ),
        ("c.jsonl", b'{"id": 0, "contents": 1}\n', r"c\.jsonl:1: .* 'contents' is missing"),
        ("c.jsonl", b'{"id": null, "contents": "x"}\n', r"c\.jsonl:1: .* 'id' is missing"),
        ("c.jsonl", b'{"id": 0, "contents": "x"}\n{"id": 1, "cont', r"c\.jsonl:2: not a passage"),
        ("c.jsonl", b"[" * 100_000, r"c\.jsonl:1: not a passage"),
        ("c.csv", b"", "expected .tsv or .jsonl"),
    ],
)
def test_broken_files_are_named_with_the_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorpusError, match=message):
        list(read_passages(tmp_path / name))


def test_a_cut_gzip_is_named_with_the_line(tmp_path):
    lines = "".join(f"{i}\tTitle {i}   {os.urandom(20).hex()}\n" for i in range(1000))
    data = gzip.compress(lines.encode())
    for broken in (data[: len(data) // 2], data[:-4] + b"\0\0\0\0"):
        (tmp_path / "c.tsv.gz").write_bytes(broken)
        with pytest.raises(CorpusError, match=r"c\.tsv\.gz:\d+: cut or damaged after this line"):
            list(read_passages(tmp_path / "c.tsv.gz"))
    (tmp_path / "c.tsv.gz").write_bytes(b"no gzip at all")
    with pytest.raises(CorpusError, match=r"c\.tsv\.gz:0: cut or damaged"):
        list(read_passages(tmp_path / "c.tsv.gz"))


def test_ids_that_only_look_alike_are_different(tmp_path):
    (tmp_path / "c.tsv").write_text("0\ta\n00\tb\n1\tc\n٣\td\n")
    assert [id for id, _ in read_passages(tmp_path / "c.tsv")] == ["0", "00", "1", "٣"]


def test_any_text_is_an_id(tmp_path):
    ids = ["0", "1" * 5000, "²", "٣", "01", "1", "00"]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"id": i, "contents": "x"}) + "\n" for i in ids))
    assert [p.id for p in read_passages(path)] == ids
    for again in ids:
        path.write_text(
            "".join(json.dumps({"id": i, "contents": "x"}) + "\n" for i in [*ids, again])
        )
        with pytest.raises(CorpusError, match=":8: "):
            list(read_passages(path))


def test_files_of_any_name_have_an_order(tmp_path):
    names = ["part².jsonl", "part10.jsonl", "part2.jsonl", "٣.jsonl", "3.jsonl", "a.jsonl"]
    for name in names:
        (tmp_path / name).write_text("")
    assert len(shards_of(tmp_path)) == len(names)


def test_store_returns_what_was_written(tmp_path):
    passages = [Passage("a", "T   é"), Passage("b", ""), Passage("c", "a\ttab")]
    store = PassageStore.write(tmp_path, passages)
    assert len(store) == 3
    assert list(store) == passages == list(PassageStore(tmp_path))
    with pytest.raises(IndexError):
        store[-1]


def test_store_refuses_passages_that_it_cannot_return(tmp_path):
    with pytest.raises(CorpusError, match="no passages"):
        PassageStore.write(tmp_path, [])
    with pytest.raises(CorpusError, match="'b' does not fit on a line"):
        PassageStore.write(tmp_path, [Passage("a", ""), Passage("b", "two\nlines")])


def test_store_refuses_a_cut_file(tmp_path):
    PassageStore.write(tmp_path, [Passage("a", "one"), Passage("b", "two")])
    path = tmp_path / "passages.tsv"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CorpusError, match="does not fit"):
        PassageStore(tmp_path)


def test_a_full_disk_leaves_no_index(tmp_path):
    lines = "".join(f"{i}\tTitle {i}   {'word ' * 40}\n" for i in range(1000))
    (tmp_path / "c.tsv").write_text(lines)
    args = ("index", "build", str(tmp_path / "c.tsv"), "--out", str(tmp_path / "index"))
    done = r1s_on_a_full_disk(100_000, *args)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"passages\.tsv:\d+: cannot be written \(File too large\)", done.stderr)
    assert names(tmp_path) == ["c.tsv"]


def test_wiki_summaries(tmp_path):
    path = tmp_path / "summaries.json"
    path.write_text(json.dumps({"k": {"title": "A  b", "extract": "x\ny", "topic": "Arts"}}))
    assert list(wiki_summaries(path)) == [("0", "A b   x y")]
    for broken in ("{}", "[]", '{"k": {}}', "{"):
        path.write_text(broken)
        with pytest.raises(CorpusError, match=r"summaries\.json"):
            list(wiki_summaries(path))


@pytest.mark.skipif("R1S_DATA" not in os.environ, reason="R1S_DATA does not name the data folder")
@pytest.mark.parametrize(
    ("name", "count"),
    [("passages_kilt_100w.tsv.gz", 7000), ("passages_hotpotqa_abstract.tsv.gz", 7372)],
)
def test_published_corpora_are_read_whole(name, count):
    passages = list(read_passages(Path(os.environ["R1S_DATA"]) / name))
    assert len(passages) == count
    assert all(passage.title and passage.text for passage in passages)


def test_common_irregularities_are_read(tmp_path):
    """Blank lines, DPR's table with header and quotes, half an emoji in JSON."""
    (tmp_path / "a.tsv").write_text("0\tA   one\n\n1\tB   two\n\n")
    assert len(list(read_passages(tmp_path / "a.tsv"))) == 2
    (tmp_path / "dpr.tsv").write_text(
        'id\ttext\ttitle\n1\t"Aaron ( or ; ""Ahärôn"") is a prophet."\tAaron\n2\tPlain.\t50 Cent\n'
    )
    assert list(read_passages(tmp_path / "dpr.tsv")) == [
        ("1", 'Aaron   Aaron ( or ; "Ahärôn") is a prophet.'),
        ("2", "50 Cent   Plain."),
    ]
    (tmp_path / "a.jsonl").write_text('{"id": 0, "title": "A\\ud83d", "text": "b"}\n\n')
    assert list(read_passages(tmp_path / "a.jsonl")) == [("0", "A\N{REPLACEMENT CHARACTER}   b")]
