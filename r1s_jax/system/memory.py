"""malloc settings for programs on a CPU, which allocate and free large arrays at every call."""

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from r1s_jax.system.chips import has_accelerator

_UNLIMITED = 2**36  # bytes; larger than any array
_MALLOC_SETTINGS = {
    "glibc.malloc.hugetlb": 1,  # pages of 2 MiB where the kernel gives them on request
    "glibc.malloc.mmap_threshold": _UNLIMITED,  # large arrays come from the heap too,
    "glibc.malloc.trim_threshold": _UNLIMITED,  # which never shrinks,
    "glibc.malloc.arena_max": 1,  # and is one for all threads
}


def keep_memory() -> None:
    """Restarts this process, once, with a malloc that keeps freed memory, in huge pages.

    On a CPU, XLA allocates the temporary arrays of a program with malloc at every call. By default
    the kernel gets them back after the call, and zeroes each page again: 780,000 pages of 4 KiB in
    an update of SmolLM2-135M, a fifth of its time. glibc reads its settings only when a process
    starts (its manual, "Memory Allocation Tunables") and ignores those that it does not know.
    Settings already in GLIBC_TUNABLES stay as they are. Does nothing for another malloc than
    glibc's, nor beside an accelerator, whose compiler's many threads would compete for one arena.
    """
    present = _tunables()
    missing = [f"{n}={v}" for n, v in _MALLOC_SETTINGS.items() if not any(n in t for t in present)]
    if not missing or platform.libc_ver()[0] != "glibc" or has_accelerator():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(present + missing)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def host_memory() -> int:
    """Bytes of memory that this host, or the container around this process, has."""
    limits = [psutil.virtual_memory().total]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroups v2 and v1
        with suppress(OSError, ValueError):
            limits.append(int((Path("/sys/fs/cgroup") / name).read_text("ascii")))
    return min(limits)


def release_memory() -> None:
    """Returns what malloc holds and nobody uses to the kernel; does nothing without glibc.

    A phase of a run has its own programs, whose arrays fit no hole that another phase's left.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def malloc_as_it_comes() -> Iterator[None]:
    """Child processes started in this context use default malloc settings."""
    before = os.environ.get("GLIBC_TUNABLES")
    if before is None:
        yield
        return
    ours = {f"{n}={v}" for n, v in _MALLOC_SETTINGS.items()}
    os.environ["GLIBC_TUNABLES"] = ":".join(part for part in _tunables() if part not in ours)
    try:
        yield
    finally:
        os.environ["GLIBC_TUNABLES"] = before


def _tunables() -> list[str]:
    return [part for part in os.environ.get("GLIBC_TUNABLES", "").split(":") if part]
