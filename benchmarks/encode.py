"""Passages encoded per second, beside sentence-transformers where it is installed."""

import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r1s_jax.retrieval.encoder import Encoder
from r1s_jax.retrieval.references import corpus_passages, encoder_folder, load_encoder


def bench_encode(corpus: Sequence[str], encoder: str, count: int) -> dict[str, Any]:
    """Speed of an encoder over the first `count` passages of a corpus."""
    texts = [passage.line for passage in itertools.islice(corpus_passages(corpus), count)]
    return bench_encoder(encoder_folder(encoder), load_encoder(encoder), texts)


def bench_encoder(
    folder: Path, encoder: Encoder, texts: Sequence[str], turns: int = 3
) -> dict[str, Any]:
    """Passages per second, beside sentence-transformers on the same folder where it is installed.

    Both encode the same texts in alternating turns, with the same number of threads, in float32;
    the best turn counts. `difference` is the largest between components of the two sets of vectors.
    """
    peer = _sentence_transformer(folder)
    ours, theirs, vectors, others = [], [], None, None
    encoder.encode(texts, kind="passage")  # compiles
    for _ in range(turns):
        begin = time.perf_counter()
        vectors = encoder.encode(texts, kind="passage")
        ours.append(time.perf_counter() - begin)
        if peer:
            begin = time.perf_counter()
            others = peer(texts)
            theirs.append(time.perf_counter() - begin)
    result = {"texts": len(texts), "passages_per_s": len(texts) / min(ours)}
    if peer:
        result["sentence_transformers_per_s"] = len(texts) / min(theirs)
        result["ratio"] = min(theirs) / min(ours)
        result["difference"] = float(np.abs(vectors - others).max())
    return result


def _sentence_transformer(folder: Path) -> Callable[[Sequence[str]], np.ndarray] | None:
    try:
        import torch
        from sentence_transformers import SentenceTransformer
    except ImportError:
        return None
    torch.set_num_threads(os.cpu_count() or 1)
    model = SentenceTransformer(str(folder), device="cpu")
    return lambda texts: model.encode(
        list(texts), batch_size=32, normalize_embeddings=True, show_progress_bar=False
    )
