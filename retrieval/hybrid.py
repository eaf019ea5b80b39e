"""Two indexes over the same passages, fused by reciprocal rank (Cormack et al., 2009)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r1s_jax.io.errors import ConfigError
from r1s_jax.retrieval.searchers import Found, IndexKind, Ranker, top_k

_K = 60  # the paper's constant
_DEPTH = 100


class HybridSearcher:
    """Sums 1 / (60 + rank) over the rankings that have a passage among their first 100."""

    kind: IndexKind = "hybrid"

    def __init__(self, parts: Sequence[Ranker]):
        """Raises ValueError where the parts do not rank the same number of passages."""
        if len({len(part.searcher) for part in parts}) != 1:
            raise ConfigError("a hybrid needs indexes over the same passages")
        self.parts = parts

    @property
    def parameters(self) -> dict[str, Any]:
        return hybrid_parameters(
            [{"kind": p.searcher.kind} | p.searcher.parameters for p in self.parts]
        )

    def __len__(self) -> int:
        return len(self.parts[0].searcher)

    def search(self, queries: Sequence[str], k: int) -> Found:
        depth = min(max(k, _DEPTH), len(self))
        ranked = [part.rank(queries, depth) for part in self.parts]
        rows = [
            _fuse([(ids[i], scores[i]) for ids, scores in ranked], k) for i in range(len(queries))
        ]
        return np.stack([ids for ids, _ in rows]), np.stack([scores for _, scores in rows])

    def save(self, directory: Path) -> None:
        for i, part in enumerate(self.parts):
            folder = directory / "parts" / str(i)
            folder.mkdir(parents=True)
            part.searcher.save(folder)


def hybrid_parameters(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The parameters of a hybrid; `parts` are the parameters of its parts, each with its kind."""
    return {"parts": parts, "rrf": _K, "depth": _DEPTH}


def _fuse(rankings: list[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best ids and their sums; scores past the last hit are NaN."""
    ids = np.concatenate([ids[~np.isnan(scores)] for ids, scores in rankings])
    gains = [1 / (_K + 1 + np.arange((~np.isnan(scores)).sum())) for _, scores in rankings]
    hits, places = np.unique(ids, return_inverse=True)
    sums = np.bincount(places, np.concatenate(gains), minlength=len(hits))
    missing = max(0, k - len(hits))
    hits = np.pad(hits, (0, missing))
    sums = np.pad(sums, (0, missing), constant_values=np.nan)
    best, scores = top_k(hits[None], sums[None], k)
    return best[0], scores[0]
