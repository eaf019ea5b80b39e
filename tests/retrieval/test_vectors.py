"""Vector shards: written by several jobs, resumed, and refused where they do not match."""

import hashlib
import json

import numpy as np
import pytest

from r1s_jax.retrieval import vectors as vectors_module
from r1s_jax.retrieval.api import Passage
from r1s_jax.retrieval.corpus import CorpusError
from r1s_jax.retrieval.encoder import HashEncoder
from r1s_jax.retrieval.vectors import Corpus, VectorError, VectorShards, encode_shard

ENCODER = HashEncoder(32)
PASSAGES = [Passage(str(i), f"T{i}   word{i} and word{i + 1}") for i in range(103)]
CORPUS = Corpus(lambda: PASSAGES)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(vectors_module, "_CHUNK", 10)


def write_all(folder, shards=4):
    for i in range(shards):
        encode_shard(CORPUS, ENCODER, folder, shard=i, shards=shards)


class Interrupted(HashEncoder):
    """Raises KeyboardInterrupt after `calls` calls, like a killed job."""

    def __init__(self, calls: int):
        super().__init__(32)
        self.calls = calls

    def encode(self, texts, *, kind, progress=None):
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return super().encode(texts, kind=kind, progress=progress)


def test_shards_are_the_vectors_up_to_float16(tmp_path):
    write_all(tmp_path)
    shards = VectorShards(tmp_path)
    expected = ENCODER.encode([p.line for p in PASSAGES], kind="passage")
    assert shards.shape == (103, 32)
    np.testing.assert_allclose(shards[:], expected, atol=5e-4)
    for rows in (slice(20, 60), slice(25, 26), slice(0, 0), slice(100, 200)):
        np.testing.assert_array_equal(shards[rows], shards[:][rows])
    assert shards[3:5].dtype == np.float32


def test_a_stopped_shard_resumes(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        encode_shard(CORPUS, Interrupted(3), tmp_path)
    partial = tmp_path / "vectors-00000-of-00001.part"
    with pytest.raises(VectorError, match="missing or not finished"):
        VectorShards(tmp_path)
    with partial.open("ab") as file:
        file.write(b"half a row")  # the state after a kill during a write
    second, progress_calls = Interrupted(1000), []
    encode_shard(CORPUS, second, tmp_path, progress=lambda *done: progress_calls.append(done))
    assert 1000 - second.calls == 8  # three of eleven chunks existed
    assert progress_calls[0][0] == 40 and progress_calls[-1] == (103, 103)
    whole = ENCODER.encode([p.line for p in PASSAGES], kind="passage").astype(np.float16)
    np.testing.assert_array_equal(np.load(tmp_path / "vectors-00000-of-00001.npy"), whole)
    encode_shard(CORPUS, Interrupted(0), tmp_path)  # already complete
    assert not partial.exists()


def test_mismatches_are_named(tmp_path):
    write_all(tmp_path)
    other = Corpus(lambda: PASSAGES[::-1])
    with pytest.raises(VectorError, match="encoder is 'hash-v1-32-3-5', not 'hash-v1-32-2-5'"):
        encode_shard(CORPUS, HashEncoder(32, (2, 5)), tmp_path, shards=4)
    with pytest.raises(VectorError, match="dims is 32, not 16"):
        encode_shard(CORPUS, HashEncoder(16), tmp_path, shards=4)
    with pytest.raises(VectorError, match="corpus is"):
        encode_shard(other, ENCODER, tmp_path, shards=4)
    with pytest.raises(VectorError, match="shards is 4, not 5"):
        encode_shard(CORPUS, ENCODER, tmp_path, shards=5)
    shards = VectorShards(tmp_path)
    shards.check(corpus=CORPUS.fingerprint, encoder=ENCODER)
    with pytest.raises(VectorError, match="another corpus"):
        shards.check(corpus=other.fingerprint, encoder=ENCODER)
    with pytest.raises(VectorError, match="another encoder"):
        shards.check(corpus=CORPUS.fingerprint, encoder=HashEncoder(32, (2, 5)))
    with pytest.raises(VectorError, match="expected 1 to 4"):
        encode_shard(CORPUS, ENCODER, tmp_path, shard=4, shards=4)
    with pytest.raises(CorpusError, match="no passages"):
        Corpus(lambda: [])


def sign(path):
    path.with_suffix(".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())


def test_missing_damaged_and_nan_shards_are_named(tmp_path):
    with pytest.raises(VectorError, match="holds no vectors"):
        VectorShards(tmp_path)
    write_all(tmp_path)
    path = tmp_path / "vectors-00002-of-00004.npy"
    whole = path.read_bytes()
    for bad in (whole[:-1], whole[:-8] + bytes(8)):
        path.write_bytes(bad)
        with pytest.raises(VectorError, match=r"00002-of-00004\.npy is damaged"):
            VectorShards(tmp_path)
    path.write_bytes(whole[:-1])
    sign(path)
    with pytest.raises(VectorError, match=r"00002-of-00004\.npy cannot be read"):
        VectorShards(tmp_path)
    np.save(path, np.zeros((26, 31), np.float16))
    sign(path)
    with pytest.raises(VectorError, match="not rows of 32 float16"):
        VectorShards(tmp_path)
    rows = np.zeros((26, 32), np.float16)
    rows[17, 3] = np.nan
    np.save(path, rows)
    sign(path)
    with pytest.raises(VectorError, match=r"00002-of-00004\.npy: row 17 is not finite"):
        VectorShards(tmp_path)[:]
    path.with_suffix(".sha256").unlink()
    with pytest.raises(VectorError, match=r"00002-of-00004\.sha256 is missing.* again"):
        VectorShards(tmp_path)
    path.unlink()
    with pytest.raises(VectorError, match=r"00002-of-00004\.npy missing"):
        VectorShards(tmp_path)
    header = path.with_suffix(".json")
    header.write_text(header.read_text().replace('"format": 1', '"format": 0'))
    with pytest.raises(VectorError, match="made by another version"):
        VectorShards(tmp_path)


def test_the_fingerprint_is_that_of_the_stored_passages(tmp_path):
    from r1s_jax.retrieval.index import build_index, save_index

    save_index(build_index(PASSAGES, ENCODER, kind="exact"), tmp_path / "a")
    info = json.loads((tmp_path / "a" / "index.json").read_text())
    assert info["corpus"] == CORPUS.fingerprint
