"""Memory that a CPU's programs take and give back all the time."""

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from r1s_jax.system.chips import has_accelerator

_UNLIMITED = 2**36  # bytes; more than one array takes
_ASKED_OF_MALLOC = {
    "glibc.malloc.hugetlb": 1,  # pages of 2 MiB where the kernel gives them on request
    "glibc.malloc.mmap_threshold": _UNLIMITED,  # large arrays come from the heap too,
    "glibc.malloc.trim_threshold": _UNLIMITED,  # which never shrinks,
    "glibc.malloc.arena_max": 1,  # and is one for all threads
}


def keep_memory() -> None:
    """Starts this process anew, once, with a malloc that keeps what is freed, in huge pages.

    XLA takes the temporary arrays of a program on a CPU from malloc at every call. As malloc comes,
    they go back to the kernel after it, which zeroes each page again: 780,000 of 4 KiB an update of
    SmolLM2-135M, a fifth of its time. Malloc reads what it is told only when a process begins
    (glibc's manual, "Memory Allocation Tunables"; what a version does not know it ignores). What
    GLIBC_TUNABLES speaks of already stays as it is. Nothing happens where malloc is another, nor
    beside an accelerator, whose compiler's many threads would wait for each other in one arena.
    """
    told = _told()
    asked = [f"{n}={v}" for n, v in _ASKED_OF_MALLOC.items() if not any(n in t for t in told)]
    if not asked or platform.libc_ver()[0] != "glibc" or has_accelerator():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(told + asked)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@contextmanager
def malloc_as_it_comes() -> Iterator[None]:
    """Child processes started in this context use default malloc settings."""
    told, ours = os.environ.get("GLIBC_TUNABLES"), {f"{n}={v}" for n, v in _ASKED_OF_MALLOC.items()}
    if told is None:
        yield
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(part for part in _told() if part not in ours)
    try:
        yield
    finally:
        os.environ["GLIBC_TUNABLES"] = told


def _told() -> list[str]:
    return [part for part in os.environ.get("GLIBC_TUNABLES", "").split(":") if part]
