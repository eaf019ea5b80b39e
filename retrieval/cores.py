"""Runs small NumPy computations in parallel, one core each.

OpenBLAS spreads every matrix product over all cores. For the small products of a query this costs
more than it saves, and the products of several threads run one after the other.
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
_lock = threading.RLock()  # reentrant: the GC may close an abandoned generator
_inside: list[Any] = []  # the active limit, once per open context


def on_all_cores(function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """`function` of each item, in order; each of its matrix products uses one thread.

    The result has the same bits, whatever core computes an item and however many others work, if
    nobody else sets the process's number of BLAS threads meanwhile.
    """
    with _one_thread_each():
        yield from _pool().map(function, items)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """One thread per BLAS product, in the whole process, from the first entry to the last exit."""
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
    """Limits an OpenMP BLAS, per thread; the limit of any other BLAS is process-wide.

    The pool's threads only work while the limit is wanted, so it is never lifted.
    """
    _blas().limit(limits=1, user_api="blas")
