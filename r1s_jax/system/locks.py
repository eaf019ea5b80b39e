"""One process at a time on a folder or file that a command appends to.

The lock is the system's (flock), so it dies with its process; on a shared file system without such
locks the file beside it still names who took it last.
"""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from r1s_jax.io.errors import UserError


class InUse(UserError, RuntimeError):
    """Another process is working there."""


@contextmanager
def only_one(path: Path, what: str) -> Iterator[None]:
    """Holds `path` (a folder or a file, there or not) while the block runs.

    Raises InUse, naming the host and the process, where another one holds it.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.lock")
    lock = filelock.FileLock(beside, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise InUse(
            f"{path}: {what} is being written by {_holder(beside)}; wait for it, or stop it"
        ) from None
    told = beside.with_name(beside.name + ".json")
    try:
        holder = {"host": socket.gethostname(), "pid": os.getpid()}
        told.write_text(json.dumps(holder), "utf-8")
        yield
    finally:
        with suppress(OSError):
            told.unlink()
        lock.release()  # the file stays: whoever opened it just now must find it locked next time


def _holder(beside: Path) -> str:
    try:
        told = json.loads(beside.with_name(beside.name + ".json").read_bytes())
        return f"process {told['pid']} on {told['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
