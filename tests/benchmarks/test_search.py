"""Indexes measured, beside FAISS where it is installed."""

import json

import pytest

from benchmarks.search import bench_synthetic
from tests.benchmarks import run


@pytest.mark.slow
def test_every_engine_is_measured():
    pytest.importorskip("scann")
    result = bench_synthetic(300, 8, lambda _: None, queries=20)
    engines = result["engines"]
    assert {"scann"} <= engines.keys() <= {"scann", "faiss_flat", "faiss_ivfpq", "faiss_hnsw"}
    for figures in engines.values():
        assert figures["p50_ms"] <= figures["p99_ms"] and figures["batch_per_s"] > 0
    assert engines["scann"]["recall"] == 1
    assert ("over_faiss_flat" in result) == ("faiss_flat" in engines)


@pytest.mark.slow
def test_keys_of_an_index(index):
    done = run("search", index, "--json")
    assert done.exit_code == 0, done.output
    keys = "batch cores data dims engines k queries recall_when_built vectors"
    assert set(keys.split()) <= json.loads(done.stdout.splitlines()[-1]).keys()
