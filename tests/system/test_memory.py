"""Huge pages: asked for once, only where asking helps, and then given."""

import os
import subprocess
import sys

import pytest

from r1s_jax.system import memory

PROGRAM = """
import sys
from r1s_jax.system.memory import take_huge_pages
take_huge_pages()
import os, numpy as np, ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
at = libc.malloc(2**26)
inside, flags = False, ""
for line in open("/proc/self/smaps"):
    if "-" in line.split(" ")[0]:
        low, high = (int(x, 16) for x in line.split(" ")[0].split("-"))
        inside = low <= at < high
    elif inside and line.startswith("VmFlags"):
        flags = line
print(os.environ["GLIBC_TUNABLES"], "hg" in flags.split(), sys.argv[1:])
"""


def run(**changes: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | changes
    words = [sys.executable, "-c", PROGRAM, "a b", "--c"]
    return subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(
    not (memory._can_be_told() and memory._on_request()), reason="huge pages are not on request"
)
def test_malloc_takes_them_and_the_command_line_stays():
    assert run() == "glibc.malloc.hugetlb=1 True ['a b', '--c']"
    other = "glibc.malloc.check=0"
    assert run(GLIBC_TUNABLES=other) == f"{other}:glibc.malloc.hugetlb=1 True ['a b', '--c']"
    refused = "glibc.malloc.hugetlb=0"
    assert run(GLIBC_TUNABLES=refused) == f"{refused} False ['a b', '--c']"


@pytest.mark.parametrize(
    ("libc", "offered"),
    [
        (("", ""), "always [madvise] never"),
        (("glibc", "2.34"), "always [madvise] never"),
        (("glibc", "2.36"), "[always] madvise never"),
        (("glibc", "2.36"), "always madvise [never]"),
        (("glibc", "2.36"), None),
    ],
)
def test_nothing_happens_where_asking_does_not_help(monkeypatch, tmp_path, libc, offered):
    path = tmp_path / "enabled"
    if offered is not None:
        path.write_text(offered)
    monkeypatch.setattr(memory, "_OFFERED", path)
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: libc)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(memory.os, "execv", lambda *words: pytest.fail("began anew"))
    memory.take_huge_pages()
    assert "GLIBC_TUNABLES" not in os.environ
