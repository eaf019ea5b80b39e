"""Vector search measured on this machine, beside FAISS where it is installed.

Every index is built in one process and searched in another, whose growth is the memory of the
index. All engines are measured in two rounds, and the better figure counts: load on the machine can
only slow them down.
"""

import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from jaxtyping import Float

from r1s_jax.io.errors import ConfigError
from r1s_jax.retrieval.build import sample_queries
from r1s_jax.retrieval.corpus import PassageStore
from r1s_jax.retrieval.index import read_info
from r1s_jax.retrieval.references import index_encoder
from r1s_jax.retrieval.scann import ScannSearcher, scann, scann_parameters, stored_vectors
from r1s_jax.retrieval.searchers import ExactSearcher, Found, oracle, recall

Say = Callable[[str], None]

_K, _BATCH, _ROUNDS = 5, 64, 2
_QUERIES = 1000
_SECONDS = 3.0  # duration of each measurement of speed
_PER_CLUSTER = 100
_SPREAD = 0.7  # the length of the noise around a centre, of length 1
_FAISS = ("faiss_flat", "faiss_ivfpq", "faiss_hnsw")


def bench_synthetic(count: int, dims: int, say: Say, queries: int = _QUERIES) -> dict[str, Any]:
    """Measures ScaNN on vectors drawn from a mixture of Gaussians with a fixed seed."""
    vectors, query_vectors = synthetic_vectors(count, dims, queries)
    with tempfile.TemporaryDirectory() as work:
        return _bench(Path(work), vectors, query_vectors, None, say) | {"data": "synthetic"}


def bench_index(directory: Path, say: Say) -> dict[str, Any]:
    """Measures a saved index on its stored vectors (int8, if it stores int8).

    The queries are made from its own passages. Raises ConfigError for an index without vectors in
    its folder.
    """
    encoder, info = index_encoder(directory), read_info(directory)
    if encoder is None:
        raise ConfigError(f"{directory} has no vectors to measure")
    queries = encoder.encode(sample_queries(PassageStore(directory), _QUERIES), kind="query")
    if info["kind"] == "scann":
        vectors = stored_vectors(directory, info["parameters"])
    elif info["kind"] == "exact":
        vectors = np.load(directory / "vectors.npy")
    else:
        raise ConfigError(
            f"{directory} is of kind {info['kind']}: only scann and exact are measured"
        )
    with tempfile.TemporaryDirectory() as work:
        result = _bench(Path(work), vectors, queries, directory, say)
    result["engines"][info["kind"]]["build_seconds"] = info.get("seconds")
    return result | {"data": str(directory), "recall_when_built": info.get("recall")}


def synthetic_vectors(
    count: int, dims: int, queries: int
) -> tuple[Float[np.ndarray, "count dims"], Float[np.ndarray, "queries dims"]]:
    """Unit vectors of a mixture of Gaussians, 100 per centre, and queries near random vectors."""
    rng = np.random.default_rng(0)
    centres = _unit(rng.standard_normal((max(1, count // _PER_CLUSTER), dims), dtype=np.float32))

    def near(points: np.ndarray) -> np.ndarray:
        noise = rng.standard_normal(points.shape, dtype=np.float32)
        return _unit(points + noise * np.float32(_SPREAD / math.sqrt(dims)))

    vectors = np.empty((count, dims), np.float32)
    for start in range(0, count, 1 << 16):
        rows = vectors[start : start + (1 << 16)]
        rows[:] = near(centres[rng.integers(len(centres), size=len(rows))])
    return vectors, near(vectors[rng.integers(count, size=queries)])


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _bench(
    work: Path, vectors: np.ndarray, queries: np.ndarray, ours: Path | None, say: Say
) -> dict[str, Any]:
    """Builds and searches every engine; `ours` is a built index, or None to build ScaNN."""
    count, dims = vectors.shape
    np.save(work / "vectors.npy", vectors)
    np.save(work / "queries.npy", queries.astype(np.float32))
    nearest = oracle(vectors).search(queries, min(_K, count))[0]
    del vectors
    name = read_info(ours)["kind"] if ours else "scann"
    faiss = _FAISS if importlib.util.find_spec("faiss") else ()
    engines: dict[str, dict[str, Any]] = {engine: {} for engine in (name, *faiss)}
    for engine, best in engines.items():
        if engine != name or not ours:
            say(f"{engine}: building")
            best |= _in_subprocess("build", work, engine, ours)
            say(f"{engine}: {best['build_seconds']:.1f} s")
    for round in range(_ROUNDS):
        for engine, best in engines.items():
            measured = _in_subprocess("search", work, engine, ours)
            say(f"{engine}, round {round + 1} of {_ROUNDS}: {json.dumps(measured)}")
            better = {n: (min if n.endswith("ms") else max) for n in measured if n != "bytes"}
            best |= {n: pick(measured[n], best.get(n, measured[n])) for n, pick in better.items()}
            best["bytes_per_vector"] = measured["bytes"] / count
            best["recall"] = recall(np.load(work / f"{engine}.ids.npy"), nearest)
    size = {"vectors": count, "dims": dims, "queries": len(queries), "k": _K, "batch": _BATCH}
    result = size | {"cores": os.cpu_count(), "engines": engines}
    return result | ({"over_faiss_flat": _ratios(engines, name)} if faiss else {})


def _ratios(engines: dict[str, dict[str, Any]], name: str) -> dict[str, float]:
    ours, flat = engines[name], engines["faiss_flat"]
    return {n: ours[n] / flat[n] for n in ("single_per_s", "batch_per_s", "bytes_per_vector")}


def _in_subprocess(job: str, work: Path, engine: str, ours: Path | None) -> dict[str, float]:
    """Runs `_build` or `_search` in a fresh process, which prints the result as its last line."""
    command = [sys.executable, "-m", "benchmarks.search", job, str(work), engine]
    command += [str(ours)] if ours else []
    # By default the threads of FAISS spin while they wait, which slows it on busy cores.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment)
    if done.returncode:
        raise RuntimeError(f"{engine} cannot {job}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _build(work: Path, engine: str) -> dict[str, float]:
    vectors, began = np.load(work / "vectors.npy", mmap_mode="r"), time.perf_counter()
    if engine == "scann":
        parameters = scann_parameters(len(vectors))
        ScannSearcher.write(work, vectors, parameters)
        (work / "scann.json").write_text(json.dumps(parameters), "utf-8")
    else:
        import faiss

        index = faiss.index_factory(
            vectors.shape[1], _faiss_recipe(engine, vectors), faiss.METRIC_INNER_PRODUCT
        )
        data = np.asarray(vectors)
        index.train(data[:: max(1, len(data) // 250_000)])
        index.add(data)
        faiss.write_index(index, str(work / engine))
    return {"build_seconds": time.perf_counter() - began}


def _faiss_recipe(engine: str, vectors: np.ndarray) -> str:
    count, dims = vectors.shape
    codes = f"PQ{dims // 2}x4fs" if dims % 2 == 0 else f"PQ{dims}x4fs"
    return {
        "faiss_flat": "Flat",
        "faiss_hnsw": "HNSW32",
        # Equivalent to ScaNN's tree with 4-bit codes and int8 vectors to rescore the best hits.
        "faiss_ivfpq": f"IVF{max(1, math.isqrt(count))},{codes},Refine(SQ8)",
    }[engine]


def _search(work: Path, engine: str, ours: Path | None) -> dict[str, float]:
    queries = np.load(work / "queries.npy")
    open_index = _open_faiss(work, engine) if engine in _FAISS else _open_ours(work, engine, ours)
    process = psutil.Process()
    before = process.memory_info().rss
    search = open_index()
    ids = [search(queries[i : i + _BATCH])[0] for i in range(0, len(queries), _BATCH)]
    np.save(work / f"{engine}.ids.npy", np.concatenate(ids))
    grown = process.memory_info().rss - before
    seconds = np.asarray(_timed(search, queries, 1))
    batches = _timed(search, queries, _BATCH)
    return {
        "bytes": grown,
        "single_per_s": len(seconds) / seconds.sum(),
        "batch_per_s": _BATCH * len(batches) / sum(batches),
        "p50_ms": 1e3 * float(np.percentile(seconds, 50)),
        "p99_ms": 1e3 * float(np.percentile(seconds, 99)),
    }


def _timed(search: Callable[[np.ndarray], Found], queries: np.ndarray, rows: int) -> list[float]:
    """Seconds of each call with `rows` queries, repeated for about `_SECONDS`."""
    seconds: list[float] = []
    end = time.perf_counter() + _SECONDS
    for turn in itertools.count():
        at = np.arange(turn * rows, (turn + 1) * rows) % len(queries)
        batch, began = queries[at], time.perf_counter()
        search(batch)
        seconds.append(time.perf_counter() - began)
        if time.perf_counter() > end:
            return seconds
    raise AssertionError("counting ends at no number")


def _open_ours(work: Path, engine: str, ours: Path | None) -> Callable[[], Callable]:
    """A function that opens the index; imports libraries first, so that they are not counted."""
    folder = ours or work
    parameters = (
        read_info(ours)["parameters"] if ours else json.loads((work / "scann.json").read_bytes())
    )
    if engine == "scann":
        scann()

    def open_index() -> Callable[[np.ndarray], Found]:
        searcher = {"scann": ScannSearcher, "exact": ExactSearcher}[engine].open(folder, parameters)
        return lambda queries: searcher.search(queries, min(_K, len(searcher)))

    return open_index


def _open_faiss(work: Path, engine: str) -> Callable[[], Callable]:
    import faiss

    def open_index() -> Callable[[np.ndarray], Found]:
        index: Any = faiss.read_index(str(work / engine))
        if engine == "faiss_ivfpq":
            lists = faiss.extract_index_ivf(index)
            lists.nprobe, index.k_factor = max(1, lists.nlist // 10), 20
        if engine == "faiss_hnsw":
            index.hnsw.efSearch = 64
        return lambda queries: index.search(queries, min(_K, index.ntotal))[::-1]

    return open_index


if __name__ == "__main__":
    job, work, engine, *ours = sys.argv[1:]
    if job == "build":
        print(json.dumps(_build(Path(work), engine)))
    else:
        print(json.dumps(_search(Path(work), engine, Path(ours[0]) if ours else None)))
