"""Parallel small computations: bit-equal to sequential ones, with thread limits restored after."""

import gc
import threading
import time

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from r1s_jax.retrieval import cores


def threads_of_blas() -> set[int]:
    pools = cores._blas().info()
    return {pool["num_threads"] for pool in pools if pool["user_api"] == "blas"}


@pytest.fixture(autouse=True)
def with_a_blas_of_openmp():
    """Loads faiss' BLAS over OpenMP, whose limit is per thread; NumPy's BLAS may be one, too."""
    pytest.importorskip("faiss")
    # A search that another test left at work holds the limit, which these tests set themselves.
    deadline = time.monotonic() + 60
    while cores._inside and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.1)
    assert not cores._inside
    for cached in (cores._blas, cores._pool):
        cached.cache_clear()


@pytest.fixture
def operands() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(5 + i, 384)).astype(np.float32) for i in range(24)]


def by_one_thread(operands: list[np.ndarray], w: np.ndarray) -> list[np.ndarray]:
    """On some processors OpenBLAS gives other bits with two threads."""
    with threadpool_limits(1, "blas"):
        return [x @ w for x in operands]


def test_each_result_equals_the_sequential_one(operands):
    w = np.random.default_rng(1).normal(size=(384, 1536)).astype(np.float32)
    alone = by_one_thread(operands, w)
    for threads in (1, 2):
        with threadpool_limits(threads, "blas"):
            together = list(cores.on_all_cores(lambda x: x @ w, operands))
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_last_caller_lifts_the_limit():
    with threadpool_limits(2, "blas"):
        first = cores.on_all_cores(lambda _: threads_of_blas(), range(2))
        second = cores.on_all_cores(lambda _: threads_of_blas(), range(2))
        assert next(first) == next(second) == {1}
        first.close()
        assert threads_of_blas() == {1}, "the second is still at work"
        second.close()
        assert threads_of_blas() == {2}


def test_an_error_reaches_the_caller_and_lifts_the_limit():
    with threadpool_limits(2, "blas"):
        with pytest.raises(ZeroDivisionError):
            list(cores.on_all_cores(lambda x: 1 // x, [1, 0]))
        assert threads_of_blas() == {2}


def test_many_threads_may_call(operands):
    w = np.random.default_rng(1).normal(size=(384, 96)).astype(np.float32)
    expected, wrong = by_one_thread(operands, w), []

    def ask() -> None:
        for _ in range(20):
            got = list(cores.on_all_cores(lambda x: x @ w, operands))
            wrong.extend(i for i, g in enumerate(got) if not np.array_equal(g, expected[i]))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not cores._inside
