"""Describes a saved index and its costs; measures its memory in a separate process."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from r1s_jax.retrieval.bm25 import bm25s
from r1s_jax.retrieval.build import sample_queries
from r1s_jax.retrieval.corpus import PassageStore
from r1s_jax.retrieval.index import (
    IndexFormatError,
    check_files,
    check_whole,
    open_searcher,
    read_info,
)
from r1s_jax.retrieval.plan import cost
from r1s_jax.retrieval.scann import scann
from r1s_jax.retrieval.searchers import Searcher

_SEARCHES = 200


def index_info(directory: Path, *, whole: bool = False) -> dict[str, Any]:
    """The contents of `index.json`, and bytes: on disk, in memory (measured and predicted).

    Raises IndexFormatError for an incomplete or damaged index; `whole` checks every byte.
    """
    info = read_info(directory)
    check_files(directory, info)
    if whole:
        check_whole(directory, info)
    hidden = ("files", "corpus_sample", "digests")
    shown = {name: value for name, value in info.items() if name not in hidden}
    scann_parameters = info["parameters"].get("parts", [info["parameters"]])[0]
    planned = cost(info["kind"], info["passages"], info["dims"] or 0, scann_parameters)
    return shown | {
        "disk_bytes": sum(info["files"].values()),
        "memory_bytes": _measure_in_subprocess(directory),
        "planned_memory_bytes": round(planned.memory),
    }


def _measure_in_subprocess(directory: Path) -> int:
    command = [sys.executable, "-m", "r1s_jax.retrieval.info", str(directory)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment)
    if done.returncode:
        raise IndexFormatError(f"{directory} cannot be opened: {done.stderr[-500:]}")
    return int(done.stdout.split()[-1])


def _measure(directory: Path) -> int:
    """Bytes by which this process grows on opening an index's searcher and searching."""
    info, process = read_info(directory), psutil.Process()
    if info["kind"] in ("scann", "hybrid"):
        scann()
    if info["kind"] in ("bm25", "hybrid"):
        bm25s()
    passages = PassageStore(directory)
    queries = sample_queries(passages, _SEARCHES)
    before = process.memory_info().rss
    searcher = open_searcher(directory, info, None, passages)
    for part in _parts(searcher):
        _search(part, queries, info["dims"])
    return max(0, process.memory_info().rss - before)


def _parts(searcher: Searcher) -> list[Searcher]:
    return [part.searcher for part in getattr(searcher, "parts", [])] or [searcher]


def _search(searcher: Searcher, queries: list[str], dims: int | None) -> None:
    """Searches texts or, as they touch as much memory as encoded queries, random vectors."""
    inputs: Any = queries
    if searcher.kind != "bm25":
        vectors = np.random.default_rng(0).standard_normal((len(queries), dims or 1), np.float32)
        inputs = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for i in range(len(queries)):
        searcher.search(inputs[i : i + 1], min(5, len(searcher)))


if __name__ == "__main__":
    print(_measure(Path(sys.argv[1])))
