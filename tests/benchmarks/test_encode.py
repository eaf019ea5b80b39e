"""Encoders measured, beside sentence-transformers where it is installed."""

from benchmarks import encode
from r1s_jax.retrieval.encoder import BertEncoder
from tests.retrieval.test_encoder import write_bert


def test_passages_are_counted_and_vectors_compared(tmp_path, monkeypatch):
    write_bert(tmp_path)
    encoder = BertEncoder(tmp_path)
    # Replaces sentence-transformers, which does not load a model as small as this one.
    monkeypatch.setattr(
        encode, "_sentence_transformer", lambda _: lambda texts: encoder.encode(texts, kind="query")
    )
    result = encode.bench_encoder(tmp_path, encoder, ["a b c", "d e", "f"], turns=1)
    assert result["texts"] == 3 and result["passages_per_s"] > 0
    assert result["difference"] < 1e-4 and result["ratio"] > 0
