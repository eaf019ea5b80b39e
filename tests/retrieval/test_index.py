"""Indexes: search, saving, and refused files."""

import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from r1s_jax.retrieval import scann as scann_module
from r1s_jax.retrieval.api import Passage
from r1s_jax.retrieval.corpus import CorpusError, read_passages
from r1s_jax.retrieval.encoder import HashEncoder
from r1s_jax.retrieval.index import (
    IndexFormatError,
    build_index,
    check_whole,
    open_index,
    read_info,
    save_index,
)
from r1s_jax.retrieval.scann import scann_parameters
from tests.makers import names

KINDS = [
    "exact",
    pytest.param(
        "scann",
        marks=pytest.mark.skipif(sys.platform != "linux", reason="ScaNN exists for Linux only"),
    ),
]
ENCODER = HashEncoder(128)


def _passages(count: int) -> list[Passage]:
    rng = np.random.default_rng(0)
    syllables = ["ka", "lo", "mi", "ru", "te", "vo", "zan", "dri", "pel", "sho"]
    words = ["".join(rng.choice(syllables, 3)) for _ in range(2000)]
    return [Passage(f"p{i}", f"T{i}   {' '.join(rng.choice(words, 8))}") for i in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_passage_finds_itself(kind):
    passages = _passages(40)
    calls = []
    index = build_index(passages, ENCODER, kind=kind, progress=lambda *c: calls.append(c))
    assert calls[-1] == (40, 40)
    hits = index.search([passage.line for passage in passages], 3)
    assert [row[0].id for row in hits] == [passage.id for passage in passages]
    assert all(len(row) == 3 and row[0].score >= row[1].score >= row[2].score for row in hits)
    best = hits[7][0]
    assert best.score == pytest.approx(1, abs=1e-5)
    assert (best.title, best.text) == (passages[7].title, passages[7].text)


@pytest.mark.parametrize("kind", KINDS)
def test_odd_sizes(kind):
    index = build_index(_passages(5), ENCODER, kind=kind)
    assert index.search([], 3) == []
    assert index.search(["a"], 0) == [[]]
    assert [len(row) for row in index.search(["kalo", ""], 100)] == [5, 5]
    assert len(build_index(_passages(1), ENCODER, kind=kind).search(["x"], 5)[0]) == 1
    with pytest.raises(CorpusError, match="no passages"):
        build_index([], ENCODER, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_moved_index_opens_and_finds_the_same(tmp_path, kind):
    index = build_index(_passages(50), ENCODER, kind=kind)
    queries = [passage.text for passage in _passages(10)]
    save_index(index, tmp_path / "new" / "a")
    (tmp_path / "new").rename(tmp_path / "moved")
    opened = open_index(tmp_path / "moved" / "a", ENCODER)
    assert opened.search(queries, 5) == index.search(queries, 5)
    assert list(opened.passages) == index.passages
    save_index(opened, tmp_path / "again")  # an opened index can be saved elsewhere
    assert (tmp_path / "again" / "passages.tsv").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_incomplete_and_foreign_folders_are_refused(tmp_path, kind):
    save_index(build_index(_passages(20), ENCODER, kind=kind), tmp_path / "a")
    with pytest.raises(IndexFormatError, match=r"hash-v1-128-3-5.*hash-v1-64-3-5"):
        open_index(tmp_path / "a", HashEncoder(64))
    files = [path for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) >= 4
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        if path.name != "index.json":  # its last byte is only a line break
            with pytest.raises(IndexFormatError, match=path.name):
                open_index(tmp_path / "a", ENCODER)
        path.unlink()
        with pytest.raises(IndexFormatError):
            open_index(tmp_path / "a", ENCODER)
        path.write_bytes(whole)
    open_index(tmp_path / "a", ENCODER)
    with pytest.raises(IndexFormatError, match="is not an index"):
        open_index(tmp_path / "nowhere", ENCODER)


def test_a_later_format_is_refused(tmp_path):
    save_index(build_index(_passages(3), ENCODER, kind="exact"), tmp_path / "a")
    path = tmp_path / "a" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(IndexFormatError, match="format 99"):
        open_index(tmp_path / "a", ENCODER)


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    index = build_index(_passages(3), ENCODER, kind="exact")

    def fail(directory):
        raise OSError("disk full")

    monkeypatch.setattr(index.searcher, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_index(index, tmp_path / "a")
    assert names(tmp_path) == []


def test_only_an_empty_folder_is_accepted_for_saving(tmp_path):
    index = build_index(_passages(3), ENCODER, kind="exact")
    (tmp_path / "a").mkdir()
    save_index(index, tmp_path / "a")
    with pytest.raises(FileExistsError, match="not empty"):
        save_index(index, tmp_path / "a")


def test_without_scann_the_message_names_the_other_kind(monkeypatch):
    monkeypatch.setitem(sys.modules, "scann", None)
    with pytest.raises(ImportError, match='kind="exact"'):
        build_index(_passages(3), ENCODER, kind="scann")


def test_importing_scann_does_not_replace_tensorflow(monkeypatch):
    pytest.importorskip("scann")
    monkeypatch.setitem(sys.modules, "tensorflow", json)  # stands for TensorFlow
    scann_module.scann()
    assert sys.modules["tensorflow"] is json


def test_scann_parameters_follow_the_size():
    assert scann_parameters(4_999) == {"scoring": "brute_force", "vectors": "float32"}
    assert "leaves" not in scann_parameters(100_000)
    assert scann_parameters(1_000_000)["leaves"] == 1000


# Random words form no clusters, so a search of a tenth of the leaves misses some neighbours.
@pytest.mark.parametrize(("tree_above", "least"), [(100_000, 0.85), (1000, 0.4)])
def test_approximate_search_recalls_the_hits_of_exact_search(
    monkeypatch, tmp_path, tree_above, least
):
    pytest.importorskip("scann")
    monkeypatch.setattr(scann_module, "_TREE_ABOVE", tree_above)
    passages = _passages(5_500)
    approximate = build_index(passages, ENCODER)
    assert ("leaves" in approximate.searcher.parameters) == (tree_above == 1000)
    save_index(approximate, tmp_path / "a")
    approximate = open_index(tmp_path / "a", ENCODER)
    exact = build_index(passages, ENCODER, kind="exact")
    queries = [" ".join(passage.text.split()[:4]) for passage in passages[:100]]
    assert _recall(approximate.search(queries, 5), exact.search(queries, 5)) > least
    # More hits than the leaves of the first search hold.
    for hits in approximate.search(queries[:20], 2_000):
        assert len({hit.id for hit in hits}) == 2_000


def _recall(hits, exact) -> float:
    pairs = zip(hits, exact, strict=True)
    return float(np.mean([len({h.id for h in a} & {h.id for h in b}) / len(b) for a, b in pairs]))


@pytest.mark.parametrize("kind", KINDS)
def test_several_threads_find_the_same_as_one(kind):
    index = build_index(_passages(300), ENCODER, kind=kind)
    queries = [passage.text for passage in index.passages[:64]]
    alone = [index.search([query], 3) for query in queries]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda query: index.search([query], 3), queries)) == alone


@pytest.mark.skipif("R1S_DATA" not in os.environ, reason="R1S_DATA does not name the data folder")
def test_real_passages_are_found_by_their_own_words():
    pytest.importorskip("scann")
    path = Path(os.environ["R1S_DATA"]) / "passages_kilt_100w.tsv.gz"
    passages = [passage for passage, _ in zip(read_passages(path), range(500), strict=False)]
    index = build_index(passages, HashEncoder())
    queries = [f"{p.title} {' '.join(p.text.split()[:12])}" for p in passages]
    hits = index.search(queries, 5)
    in_top_5 = [p.id in {hit.id for hit in row} for p, row in zip(passages, hits, strict=True)]
    assert np.mean(in_top_5) > 0.95


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_changed_vectors_are_never_searched(tmp_path, kind):
    """Zeroed vectors, vectors of another build and a flipped bit, all of the same size."""
    passages = [Passage(str(i), f"Town {i}   lies by river {i * 7}.") for i in range(300)]
    encoder = HashEncoder()
    for seed, name in enumerate(("a", "b")):
        shifted = [Passage(p.id, p.line + "x" * seed) for p in passages]
        save_index(build_index(shifted, encoder, kind=kind), tmp_path / name)
    files = [f for f in read_info(tmp_path / "a")["files"] if f != "passages.tsv"]
    big = max(files, key=lambda f: (tmp_path / "a" / f).stat().st_size)
    good = (tmp_path / "a" / big).read_bytes()
    other = (tmp_path / "b" / big).read_bytes()[: len(good)].ljust(len(good), b"\0")
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    for bad in (good[:200] + bytes(len(good) - 200), other, flipped):
        (tmp_path / "a" / big).write_bytes(bad)
        with pytest.raises(IndexFormatError, match=re.escape(f"{big} is not what was built")):
            open_index(tmp_path / "a", encoder)
        with pytest.raises(IndexFormatError, match="damaged"):
            check_whole(tmp_path / "a", read_info(tmp_path / "a"))
    (tmp_path / "a" / big).write_bytes(good)
    assert len(open_index(tmp_path / "a", encoder)) == 300
    check_whole(tmp_path / "a", read_info(tmp_path / "a"))
