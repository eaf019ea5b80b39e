"""Other indexes than one ScaNN: shards, a device mesh, BM25, hybrid, Milvus."""

import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from benchmarks.search import synthetic_vectors
from r1s_jax.retrieval.api import Passage
from r1s_jax.retrieval.encoder import HashEncoder
from r1s_jax.retrieval.hybrid import HybridSearcher
from r1s_jax.retrieval.index import (
    IndexFormatError,
    build_index,
    fuse,
    open_index,
    save_index,
)
from r1s_jax.retrieval.milvus import MilvusSearcher
from r1s_jax.retrieval.scann import ScannSearcher, scann_parameters, stored_vectors
from r1s_jax.retrieval.searchers import ExactSearcher, NotInstalled, recall, top_k
from tests.makers import with_devices

TEXTS = [
    "Dune   a novel by Frank Herbert",
    "Rome   the capital of Italy",
    "Oslo   the capital of Norway",
    "Ulysses   a novel by James Joyce",
]
PASSAGES = [Passage(str(i), line) for i, line in enumerate(TEXTS)]
ENCODER = HashEncoder(64)


def test_top_k_puts_nan_last_and_ties_in_order():
    ids = np.array([[3, 1, 2, 0]])
    order, scores = top_k(ids, np.array([[1.0, np.nan, 2.0, 1.0]]), 4)
    assert order.tolist() == [[2, 0, 3, 1]]
    assert np.isnan(scores[0, 3])
    assert top_k(ids, np.array([[1.0, np.nan, 2.0, 1.0]]), 1)[0].tolist() == [[2]]


def test_exact_search_by_blocks_equals_one_product(monkeypatch):
    vectors, queries = synthetic_vectors(1000, 16, 20)
    whole = ExactSearcher(vectors).search(queries, 7)
    monkeypatch.setattr("r1s_jax.retrieval.searchers._BLOCK_BYTES", 4 * 16 * 3)
    ids, scores = ExactSearcher(vectors).search(queries, 7)
    np.testing.assert_array_equal(ids, whole[0])
    np.testing.assert_allclose(scores, whole[1], rtol=1e-6)
    np.testing.assert_array_equal(ids, np.argsort(-(queries @ vectors.T), axis=1)[:, :7])


def test_shards_of_int8_are_merged_saved_and_opened(tmp_path):
    pytest.importorskip("scann")
    vectors, queries = synthetic_vectors(6000, 32, 100)
    parameters = scann_parameters(6000, leaves=20, leaves_searched=20, shards=3)
    parameters["vectors"] = "int8"
    ScannSearcher.write(tmp_path, vectors, parameters)
    assert sorted(p.name for p in (tmp_path / "scann").iterdir()) == ["0", "1", "2"]
    searcher = ScannSearcher.open(tmp_path, parameters)
    assert len(searcher) == 6000
    ids, scores = searcher.search(queries, 10)
    exact_ids, exact_scores = ExactSearcher(vectors).search(queries, 10)
    assert recall(ids, exact_ids) > 0.95
    # Scores of all shards are comparable: they are dot products, up to rounding.
    np.testing.assert_allclose(scores, (queries[:, None] * vectors[ids]).sum(-1), atol=0.01)
    np.testing.assert_allclose(scores[:, 0], exact_scores[:, 0], atol=0.01)
    np.testing.assert_allclose(stored_vectors(tmp_path, parameters), vectors, atol=0.01)
    assert len(searcher.search(queries[:1], 3000)[0][0]) == 3000


def test_a_query_finds_the_same_alone_and_in_a_batch():
    pytest.importorskip("scann")
    vectors, queries = synthetic_vectors(6000, 32, 64)
    searcher = ScannSearcher.build(vectors)
    together, _ = searcher.search(queries, 5)
    alone = np.concatenate([searcher.search(query[None], 5)[0] for query in queries])
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leaves": 0}, "leaves=0 must be from 1"),
        ({"reorder": 10**6}, "reorder=1000000"),
        ({"leaves": 10, "leaves_searched": 11}, "leaves_searched=11"),
        ({"shards": 100, "leaves": 200}, "100 passages of a shard"),
    ],
)
def test_scann_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        scann_parameters(10_000, **options)


def test_scann_parameters_of_large_corpora():
    assert scann_parameters(100_000)["vectors"] == "float32"
    assert scann_parameters(100_001)["vectors"] == "int8"
    kilt = scann_parameters(36_000_000)
    assert (kilt["shards"], kilt["leaves"], kilt["leaves_searched"]) == (8, 2121, 212)
    assert scann_parameters(1000, leaves=10) == {
        "scoring": "anisotropic_hashing",
        "reorder": 100,
        "vectors": "float32",
        "shards": 1,
        "leaves": 10,
        "leaves_searched": 1,
    }


_MESH = """
import numpy as np, jax
from benchmarks.search import synthetic_vectors
from r1s_jax.retrieval.encoder import BertEncoder
from r1s_jax.retrieval.searchers import ExactSearcher, MeshSearcher
assert jax.device_count() == 4
vectors, queries = synthetic_vectors(1001, 16, 70)  # divides neither by devices nor by batches
for k in (1, 5, 300):
    exact = ExactSearcher(vectors).search(queries, k)
    hits = MeshSearcher(vectors, jax.devices()).search(queries, k)
    np.testing.assert_array_equal(hits[0], exact[0])
    np.testing.assert_allclose(hits[1], exact[1], atol=1e-5)
"""


def test_a_mesh_of_devices_finds_the_same_as_blas():
    subprocess.run([sys.executable, "-c", _MESH], check=True, env=with_devices(4))


def test_bm25_finds_shared_words_and_nothing_else(tmp_path):
    pytest.importorskip("bm25s")
    index = build_index(PASSAGES, ENCODER, kind="bm25")
    save_index(index, tmp_path / "a")
    for opened in (index, open_index(tmp_path / "a", None)):
        hits = opened.search(["the capital of NORWAY?", "zebra", ""], 4)
        assert [hit.id for hit in hits[0]][:2] == ["2", "1"]
        assert hits[0][0].score > hits[0][1].score > 0
        assert hits[1:] == [[], []]


def test_a_hybrid_fuses_ranks(tmp_path):
    pytest.importorskip("bm25s")
    dense, words = (build_index(PASSAGES, ENCODER, kind=k) for k in ("exact", "bm25"))
    hybrid = fuse(dense, words)
    query = ["novel by Frank Herbert"]
    best = hybrid.search(query, 4)[0]
    assert best[0].id == "0"
    assert best[0].score == pytest.approx(2 / 61)  # first in both
    ranks = [[hit.id for hit in part.search(query, 4)[0]] for part in (dense, words)]
    for hit in best:
        parts = [1 / (61 + rank.index(hit.id)) for rank in ranks if hit.id in rank]
        assert hit.score == pytest.approx(sum(parts))
    save_index(hybrid, tmp_path / "a")
    opened = open_index(tmp_path / "a", ENCODER)
    assert isinstance(opened.searcher, HybridSearcher)
    assert opened.search(query, 3) == hybrid.search(query, 3)
    with pytest.raises(IndexFormatError, match="was built by encoder"):
        open_index(tmp_path / "a", HashEncoder(32))


def test_a_hybrid_of_other_passages_or_two_encoders_is_refused(tmp_path):
    index = build_index(PASSAGES, ENCODER, kind="exact")
    with pytest.raises(IndexFormatError, match="same passages"):
        fuse(index, build_index(PASSAGES[::-1], ENCODER, kind="exact"))
    two = fuse(index, build_index(PASSAGES, HashEncoder(32), kind="exact"))
    assert two.search(["Oslo Norway"], 1)[0][0].id == "2"
    with pytest.raises(ValueError, match="one encoder at most"):
        save_index(two, tmp_path / "a")


def test_milvus_lite_keeps_and_finds_vectors(tmp_path):
    pytest.importorskip("milvus_lite")
    vectors, queries = synthetic_vectors(1500, 16, 30)
    parameters = MilvusSearcher.write(tmp_path, vectors)
    (tmp_path / "moved").mkdir()
    (tmp_path / "milvus.db").rename(tmp_path / "moved" / "milvus.db")
    searcher = MilvusSearcher.open(tmp_path / "moved", parameters)
    ids, scores = searcher.search(queries, 5)
    assert recall(ids, ExactSearcher(vectors).search(queries, 5)[0]) > 0.9
    np.testing.assert_allclose(scores, (queries[:, None] * vectors[ids]).sum(-1), atol=1e-3)
    searcher.close()
    with pytest.raises(ValueError, match="has no collection r1s_other"):
        MilvusSearcher.open(tmp_path / "moved", parameters | {"collection": "r1s_other"})


@pytest.mark.parametrize(
    ("module", "extra"), [("bm25s", r"r1s-jax\[bm25\]"), ("pymilvus", r"r1s-jax\[milvus\]")]
)
def test_a_missing_library_names_its_extra(module, extra, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(NotInstalled, match=extra):
        if module == "bm25s":
            build_index(PASSAGES, ENCODER, kind="bm25")
        else:
            MilvusSearcher.write(Path(tmp_path), np.zeros((1, 2), np.float32))


@pytest.mark.parametrize(
    ("query", "id"),
    [("中国的首都", "0"), ("北京是哪个国家的首都", "0"), ("東京タワー", "1"), ("ประเทศไทย", "2"),
     (unicodedata.normalize("NFD", "Beyoncé"), "3")],
)  # fmt: skip
def test_words_are_found_in_scripts_without_spaces_and_in_any_normal_form(query, id):
    pytest.importorskip("bm25s")
    lines = ["北京   北京是中国的首都。", "東京   東京タワーは東京にある。",
             "ไทย   กรุงเทพเป็นเมืองหลวงของประเทศไทย",
             "Beyoncé   Beyoncé is a singer."]  # fmt: skip
    passages = [Passage(str(i), line) for i, line in enumerate(lines)]
    index = build_index(passages, HashEncoder(), kind="bm25")
    assert [hit.id for hit in index.search([query], 1)[0]] == [id]
