"""Encoders measured, beside sentence-transformers where it is installed."""

from benchmarks import encode
from r1s_jax.retrieval.encoder import BertEncoder
from tests.retrieval.test_encoder import write_bert


def test_passages_are_counted_and_vectors_compared(tmp_path, monkeypatch):
    write_bert(tmp_path)
    encoder = BertEncoder(tmp_path)
    # In the place of sentence-transformers, which takes no model as small as this one.
    monkeypatch.setattr(
        encode, "_sentence_transformer", lambda _: lambda texts: encoder.encode(texts, kind="query")
    )
    told = encode.bench_encoder(tmp_path, encoder, ["a b c", "d e", "f"], turns=1)
    assert told["texts"] == 3 and told["passages_per_s"] > 0
    assert told["difference"] < 1e-4 and told["ratio"] > 0
