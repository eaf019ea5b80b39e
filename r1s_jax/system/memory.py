"""Pages of memory, which a CPU's programs take and give back all the time."""

import os
import platform
import sys
from pathlib import Path

_TUNABLE = "glibc.malloc.hugetlb"
_OFFERED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def take_huge_pages() -> None:
    """Starts this process anew, once, with a malloc that asks for pages of 2 MiB.

    XLA takes the temporary arrays of a program on a CPU from malloc at every call, and the kernel
    zeroes each of their pages again: of 4 KiB, 780,000 an update of SmolLM2-135M, a sixth of its
    time. Malloc reads what it is told only when a process begins (glibc 2.35's manual, "Memory
    Allocation Tunables"). Nothing happens where it cannot be told, where huge pages are given
    without asking or not at all, or where GLIBC_TUNABLES speaks of them already.
    """
    told = os.environ.get("GLIBC_TUNABLES", "")
    if _TUNABLE in told or not _can_be_told() or not _on_request():
        return
    os.environ["GLIBC_TUNABLES"] = f"{told}:{_TUNABLE}=1".lstrip(":")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _can_be_told() -> bool:
    library, version = platform.libc_ver()
    return library == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)


def _on_request() -> bool:
    try:
        return "[madvise]" in _OFFERED.read_text()
    except OSError:
        return False
