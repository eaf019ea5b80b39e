"""Small NumPy computations side by side, one core each.

OpenBLAS gives every product of matrices all cores: for the small ones of a query that costs more
than it saves, and of several threads that ask, one is served at a time.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

A = TypeVar("A")
B = TypeVar("B")
_lock = threading.RLock()  # of a thread that has it: a generator given up may be closed by the GC
_inside: list[Any] = []  # the limit, once for each thread that is in it


def on_all_cores(function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """`function` of each item, in order; its products of matrices take one thread each.

    Which core computes an item, and how many others do, changes no bit of the result.
    """
    with _one_thread_each():
        yield from _pool().map(function, items)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """The limit is the process's: the first to enter sets it, the last to leave lifts it."""
    with _lock:
        limit = _inside[0] if _inside else _blas().limit(limits=1, user_api="blas")
        _inside.append(limit)
    try:
        yield
    finally:
        with _lock:
            if len(_inside) == 1:
                limit.restore_original_limits()
            _inside.pop()


@lru_cache(1)
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


@lru_cache(1)
def _pool() -> ThreadPoolExecutor:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ThreadPoolExecutor(cores, thread_name_prefix="encode", initializer=_limit_this_thread)


def _limit_this_thread() -> None:
    """For a BLAS of OpenMP, whose limit is each thread's own; of the others it is set already.

    A thread begins within the limit and does nothing outside it: this one is never lifted.
    """
    _blas().limit(limits=1, user_api="blas")
