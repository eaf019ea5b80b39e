"""BM25 over the words of passages, by bm25s: no encoder, no vectors."""

import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from r1s_jax.retrieval.searchers import Found, IndexKind, NotInstalled

_WORD = re.compile(r"\w+")
# Han, kana, Thai, Lao, Burmese and Khmer letters and their marks.
_LETTERS = (
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
)
_UNSPACED = re.compile(f"[{_LETTERS}]")
_RUNS = re.compile(f"[{_LETTERS}]+|[^{_LETTERS}]+")
_K1, _B = 0.9, 0.4  # as in published baselines over Wikipedia passages (Lin et al., 2021)


class Bm25Searcher:
    """Scores passages by the words they share with the query; one that shares none is no hit."""

    kind: IndexKind = "bm25"

    def __init__(self, bm25: Any, parameters: dict[str, Any]):
        self._bm25, self.parameters = bm25, parameters

    @classmethod
    def build(cls, lines: Iterable[str]) -> "Bm25Searcher":
        ids: dict[str, int] = {}
        rows = [[ids.setdefault(word, len(ids)) for word in _words(line)] for line in lines]
        bm25 = bm25s().BM25(k1=_K1, b=_B)
        ids.setdefault("", len(ids))  # what the library looks up for an empty query
        bm25.index((rows, ids), create_empty_token=False, show_progress=False)
        return cls(bm25, {"k1": _K1, "b": _B})

    def __len__(self) -> int:
        return int(self._bm25.scores["num_docs"])

    def search(self, queries: Sequence[str], k: int) -> Found:
        words = [_words(query) for query in queries]
        # A query costs no more than a scan of its postings, so threads gain nothing.
        ids, scores = self._bm25.retrieve(words, k=k, show_progress=False, n_threads=0)
        ids, scores = ids.astype(np.int64), scores.astype(np.float32)
        return ids, np.where(scores > 0, scores, np.nan)

    def save(self, directory: Path) -> None:
        self._bm25.save(directory / "bm25", show_progress=False)

    @classmethod
    def open(cls, directory: Path, parameters: dict[str, Any]) -> "Bm25Searcher":
        load = partial(bm25s().BM25.load, mmap=True, show_progress=False)
        return cls(load(directory / "bm25"), parameters)


def _words(text: str) -> list[str]:
    """Lower-case words (NFC); scripts without spaces yield overlapping pairs of characters.

    Such pairs are the usual way to index them.
    """
    words = []
    for word in _WORD.findall(unicodedata.normalize("NFC", text.lower())):
        for part in _RUNS.findall(word):
            if _UNSPACED.match(part) and len(part) > 1:
                words += [part[i : i + 2] for i in range(len(part) - 1)]
            else:
                words.append(part)
    return words


def bm25s() -> ModuleType:
    """The module bm25s, with its log silenced; raises NotInstalled where it is missing."""
    try:
        import bm25s as library
    except ImportError as error:
        raise NotInstalled("bm25s is not installed: pip install 'r1s-jax[bm25]'") from error
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs each step
    return library
