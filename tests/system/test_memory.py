"""Malloc settings: freed memory is kept in huge pages, and nothing else changes."""

import os
import platform
import subprocess
import sys

import pytest

from r1s_jax.system import chips, memory
from r1s_jax.system.chips import has_accelerator

PROGRAM = """
import sys
from r1s_jax.system.memory import keep_memory
keep_memory()
import os, ctypes, threading
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def use():
    at = libc.malloc(2**26)
    libc.memset(at, 1, 2**26)
    libc.free(at)

before = held()
thread = threading.Thread(target=use)
thread.start()
thread.join()
print(os.environ["GLIBC_TUNABLES"], held() - before > 2**25, sys.argv[1:])
"""
ALL = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=68719476736:"
    "glibc.malloc.trim_threshold=68719476736:glibc.malloc.arena_max=1"
)
glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or has_accelerator(),
    reason="malloc is not glibc's, or there is an accelerator",
)


def run(**changes: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | changes
    words = [sys.executable, "-c", PROGRAM, "a b", "--c"]
    return subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout.strip()


@glibc
def test_freed_memory_is_kept_and_the_command_line_unchanged():
    assert run() == f"{ALL} True ['a b', '--c']"


@glibc
def test_settings_of_the_environment_are_kept():
    other = "glibc.malloc.check=0"
    assert run(GLIBC_TUNABLES=other) == f"{other}:{ALL} True ['a b', '--c']"
    refused = ":".join(f"{name}=0" for name in memory._MALLOC_SETTINGS if "threshold" not in name)
    thresholds = "glibc.malloc.mmap_threshold=131072:glibc.malloc.trim_threshold=131072"
    tunables = f"{refused}:{thresholds}"
    assert run(GLIBC_TUNABLES=tunables) == f"{tunables} False ['a b', '--c']"


def test_child_processes_get_default_malloc_settings(monkeypatch):
    for before in ("glibc.malloc.check=0", ""):
        monkeypatch.setenv("GLIBC_TUNABLES", f"{before}:{ALL}".lstrip(":"))
        with memory.malloc_as_it_comes():
            assert os.environ["GLIBC_TUNABLES"] == before
        assert os.environ["GLIBC_TUNABLES"] == f"{before}:{ALL}".lstrip(":")


@pytest.mark.parametrize(
    ("libc", "device"), [("", None), ("glibc", "accel0"), ("glibc", "vfio/0"), ("glibc", "nvidia0")]
)
def test_another_malloc_or_an_accelerator_changes_nothing(monkeypatch, tmp_path, libc, device):
    if device:
        (tmp_path / device).parent.mkdir(exist_ok=True)
        (tmp_path / device).touch()
    for kind in ("_TPU_DEVICES", "_GPU_DEVICES"):
        here = tuple(p.replace("/dev", str(tmp_path), 1) for p in getattr(chips, kind))
        monkeypatch.setattr(chips, kind, here)
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: (libc, "2.36"))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(memory.os, "execv", lambda *words: pytest.fail("began anew"))
    memory.keep_memory()
    assert "GLIBC_TUNABLES" not in os.environ
