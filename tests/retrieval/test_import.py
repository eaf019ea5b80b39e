"""Indexes built from existing vectors: accepted and refused files, and memory."""

import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest

from r1s_jax.retrieval.api import Passage
from r1s_jax.retrieval.encoder import HashEncoder
from r1s_jax.retrieval.flat import FlatVectors
from r1s_jax.retrieval.importing import import_index
from r1s_jax.retrieval.index import open_index, read_info
from r1s_jax.retrieval.plan import shards_within
from r1s_jax.retrieval.vectors import VectorError
from tests.makers import names
from tests.retrieval.test_build import stage

ENCODER = HashEncoder(32)
PASSAGES = [Passage(str(i), f"Town {i}   lies in land{i % 7} by river{i}") for i in range(300)]
VECTORS = ENCODER.encode([p.line for p in PASSAGES], kind="passage")
HEADER = struct.Struct("<4siqqqBiQ")


def flat(path, vectors=VECTORS, kind=b"IxFI", metric=0):
    """A file in FAISS' format, as checked by `test_files_of_faiss_itself`."""
    count, dims = vectors.shape
    head = HEADER.pack(kind, dims, count, 1 << 20, 1 << 20, 1, metric, vectors.size)
    path.write_bytes(head + vectors.astype("<f4").tobytes())
    return path


def imported(tmp_path, path, passages=PASSAGES, encoder=ENCODER, **options):
    return import_index(tmp_path / "a", FlatVectors(path), passages, encoder, stage, **options)


def test_files_of_faiss_itself(tmp_path):
    faiss = pytest.importorskip("faiss")
    for index in (faiss.IndexFlatIP(32), faiss.IndexFlatL2(32)):
        index.add(VECTORS)
        faiss.write_index(index, str(tmp_path / "f"))
        np.testing.assert_array_equal(FlatVectors(tmp_path / "f")[0:300], VECTORS)
    flat(tmp_path / "ours", kind=b"IxF2", metric=1)
    assert (tmp_path / "f").read_bytes() == (tmp_path / "ours").read_bytes()
    for name in ("HNSW8", "SQfp16", "PQ4x4", "IVF2,Flat", "IDMap,Flat"):
        index = faiss.index_factory(32, name, faiss.METRIC_INNER_PRODUCT)
        index.train(VECTORS)
        index.add_with_ids(VECTORS, np.arange(300)) if "IDMap" in name else index.add(VECTORS)
        faiss.write_index(index, str(tmp_path / "f"))
        with pytest.raises(VectorError, match=r"FAISS index of another kind .*reconstruct_n"):
            FlatVectors(tmp_path / "f")
    index = faiss.IndexFlat(32, faiss.METRIC_L1)
    faiss.write_index(index, str(tmp_path / "f"))
    with pytest.raises(VectorError, match="ranks by FAISS' metric 2"):
        FlatVectors(tmp_path / "f")


@pytest.mark.parametrize("kind", ["scann", "exact"])
def test_an_imported_index_is_searched_and_reports_progress(tmp_path, kind):
    if kind == "scann":
        pytest.importorskip("scann")
    said = []
    info = imported(tmp_path, flat(tmp_path / "f"), kind=kind, tell=said.append)
    assert info["recall"] == {"k": 10, "queries": 200, "recall": pytest.approx(1, abs=0.01)}
    assert (info["passages"], info["dims"], info["kind"]) == (300, 32, kind)
    assert info["compared"] == {"passages": 8, "cosine": 1.0, "text": "line"}
    assert "8 passages encoded again" in said[0] and info["bytes_per_vector"] >= 128
    hits = open_index(tmp_path / "a", ENCODER).search(["Town 77 by river77"], 3)[0]
    assert hits[0].line == PASSAGES[77].line
    info = read_info(tmp_path / "a")
    assert info["imported"]["form"] == "FAISS flat, inner product"
    assert names(tmp_path) == ["a", "f"]
    with pytest.raises(FileExistsError):
        imported(tmp_path, tmp_path / "f")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_numpy_file_is_read_too(tmp_path, dtype):
    np.save(tmp_path / "v.npy", VECTORS.astype(dtype))
    info = imported(tmp_path, tmp_path / "v.npy", kind="exact")
    assert info["recall"]["recall"] == 1 and info["compared"]["cosine"] > 0.999
    whole = (tmp_path / "v.npy").read_bytes()
    for broken in (whole[:-8], whole + b"12345678", whole[:40], b"\x93NUMPY"):
        (tmp_path / "v.npy").write_bytes(broken)
        with pytest.raises(VectorError, match=r"v\.npy"):
            FlatVectors(tmp_path / "v.npy")
    for other in (VECTORS[0], VECTORS.astype("f8"), np.asarray([["x"]], object), VECTORS[:0]):
        np.save(tmp_path / "v.npy", other, allow_pickle=True)
        with pytest.raises(VectorError, match=r"v\.npy"):
            FlatVectors(tmp_path / "v.npy")


def test_bare_numbers_are_read_by_the_encoders_dims(tmp_path):
    """FlashRAG stores its embeddings in this form."""
    path = tmp_path / "emb_e5.memmap"
    path.write_bytes(VECTORS.astype("<f4").tobytes())
    np.testing.assert_array_equal(FlatVectors(path, VECTORS.shape[1])[: len(VECTORS)], VECTORS)
    with pytest.raises(VectorError, match=r"not whole rows of 31 float32"):
        FlatVectors(path, 31)
    with pytest.raises(VectorError, match=r"begins with"):
        FlatVectors(path)
    (tmp_path / "v.pt").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(VectorError, match=r"PyTorch file.*numpy\.save"):
        FlatVectors(tmp_path / "v.pt", 32)
    with pytest.raises(VectorError, match=r"is a folder: name one file"):
        FlatVectors(tmp_path, 32)


def test_broken_files_are_refused_by_name(tmp_path):
    whole = flat(tmp_path / "f").read_bytes()
    damaged = {
        "is cut: 19": whole[:-19000],
        "bytes behind": whole + b"1234",
        "cut inside its header": whole[:30],
        "begins with b'IxXX'": b"IxXX" + whole[4:],
        "begins with b''": b"",
        "header is damaged": whole[:8] + struct.pack("<q", 299) + whole[16:],
        "metric 1": flat(tmp_path / "g", metric=1).read_bytes(),
        "or it is empty": flat(tmp_path / "g", VECTORS[:0]).read_bytes(),
    }
    for message, content in damaged.items():
        (tmp_path / "f").write_bytes(content)
        with pytest.raises(VectorError, match=message) as error:
            FlatVectors(tmp_path / "f")
        assert len(str(error.value)) < 400


def test_vectors_of_other_passages_are_refused(tmp_path):
    path = flat(tmp_path / "f")
    with pytest.raises(VectorError, match="32 dims, the encoder's have 64"):
        imported(tmp_path, path, encoder=HashEncoder(64))
    with pytest.raises(VectorError, match="300 vectors, but there are 299 passages"):
        imported(tmp_path, path, PASSAGES[:-1])
    with pytest.raises(VectorError, match="more passages than that"):
        imported(tmp_path, path, [*PASSAGES, Passage("x", "y")])
    with pytest.raises(VectorError, match=r"do not belong together.*--no-check"):
        imported(tmp_path, path, PASSAGES[::-1], kind="exact")
    broken = VECTORS.copy()
    broken[123, 4] = np.nan
    with pytest.raises(VectorError, match="vector 123 holds NaN"):
        imported(tmp_path, flat(tmp_path / "g", broken), kind="exact", check=False)
    with pytest.raises(VectorError, match=r"has length 2\.000"):
        imported(tmp_path, flat(tmp_path / "g", 2 * VECTORS, b"IxF2", 1), kind="exact")
    assert names(tmp_path) == ["f", "g"]
    info = imported(tmp_path, path, PASSAGES[::-1], kind="exact", check=False)
    assert info["compared"] is None


def test_the_encoded_text_of_passages_is_recognised(tmp_path):
    encoder = HashEncoder(32)
    encode = encoder.encode
    contents = [f'"{p.title}"\n{p.text}' for p in PASSAGES]
    seen = {text: vector for text, vector in zip(contents, VECTORS, strict=True)}
    encoder.encode = lambda texts, **kind: np.stack(
        [seen[t] if t in seen else -encode([t], **kind)[0] for t in texts]
    )
    info = imported(tmp_path, flat(tmp_path / "f"), encoder=encoder, kind="exact")
    assert info["compared"]["text"] == "contents"


def test_shards_follow_from_the_peak_memory():
    assert shards_within(4_000, 64) is None
    assert shards_within(20_000, 64) == 3
    assert shards_within(21_015_324, 768) == 7
    assert shards_within(100_000_000, 768) is None  # its leaves are small already


def test_the_command_prints_the_result_last(tmp_path):
    encoder = HashEncoder()
    flat(tmp_path / "f", encoder.encode([p.line for p in PASSAGES], kind="passage"))
    rows = [{"id": p.id, "contents": f'"{p.title}"\n{p.text}'} for p in PASSAGES]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "a"
    command = [sys.executable, "-m", "r1s_jax.cli", "index", "import", tmp_path / "f"]
    command += ["--passages", tmp_path / "p.jsonl", "--encoder", "hash", "--out", out]
    done = subprocess.run(
        [*map(str, command), "--kind", "exact"], capture_output=True, text=True, check=True
    )
    info = json.loads(done.stdout.splitlines()[-1])
    assert info["out"] == str(out) and info["recall"]["recall"] == 1 and info["seconds"] >= 0
    assert info["bytes_per_vector"] == pytest.approx(4 * 512, rel=0.01)


_GROWTH = """
import psutil, sys, threading, time
from contextlib import contextmanager
from pathlib import Path
from r1s_jax.retrieval.api import Passage
from r1s_jax.retrieval.encoder import HashEncoder
from r1s_jax.retrieval.flat import FlatVectors
from r1s_jax.retrieval.importing import import_index

@contextmanager
def stage(title):
    yield lambda done, total: None

def resident():
    return psutil.Process().memory_info().rss

def run(folder, name):
    vectors = FlatVectors(folder / name)
    passages = (Passage(str(i), f"Town {i}   by river {i}") for i in range(len(vectors)))
    return import_index(folder / (name + kind), vectors, passages, HashEncoder(64), stage,
                        kind=kind, check=False)

folder, kind = Path(sys.argv[1]), sys.argv[2]
run(folder, "small")  # libraries, threads
before, peak, ended = resident(), 0, False
def watch():
    global peak
    while not ended:
        peak = max(peak, resident())
        time.sleep(0.001)
watcher = threading.Thread(target=watch)
watcher.start()
info = run(folder, "large")
ended = True
watcher.join()
print(info["recall"]["recall"], peak - before)
"""


@pytest.mark.parametrize("kind", [pytest.param("scann", marks=pytest.mark.slow), "exact"])
def test_memory_stays_below_twice_the_index(tmp_path, kind):
    faiss = pytest.importorskip("faiss")
    if kind == "scann":
        pytest.importorskip("scann")
    rng = np.random.default_rng(0)
    for name, count in (("small", 5_000), ("large", 20_000)):
        rows = rng.standard_normal((count, 64), np.float32)
        index = faiss.IndexFlatIP(64)
        index.add(rows / np.linalg.norm(rows, axis=1, keepdims=True))
        faiss.write_index(index, str(tmp_path / name))
    command = [sys.executable, "-c", _GROWTH, str(tmp_path), kind]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    recall, grown = map(float, done.stdout.split())
    written = sum(p.stat().st_size for p in (tmp_path / f"large{kind}").rglob("*") if p.is_file())
    print(f"{kind}: recall@10 {recall}, grown by {grown / written:.2f} of {written:,.0f} bytes")
    assert recall >= 0.98
    assert grown < 2 * written
