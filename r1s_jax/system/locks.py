"""One process at a time on a folder or file that a command appends to.

The lock is the operating system's (flock) and ends with its process. A file beside it names the
holder, also on a shared file system without such locks.
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
    """Another process is writing to the same folder or file."""


@contextmanager
def only_one(path: Path, what: str) -> Iterator[None]:
    """Locks `path` (a folder or a file, which need not exist) while the block runs.

    Raises InUse, naming the host and the process, where another one holds it.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    holder_file = path.with_name(f".{path.name}.lock.json")
    try:
        lock.acquire()
    except filelock.Timeout:
        raise InUse(
            f"{path}: {what} is being written by {_holder(holder_file)}; wait for it, or stop it"
        ) from None
    try:
        holder = {"host": socket.gethostname(), "pid": os.getpid()}
        holder_file.write_text(json.dumps(holder), "utf-8")
        yield
    finally:
        with suppress(OSError):
            holder_file.unlink()
        lock.release()  # the file stays: another process may already have opened it to lock it


def _holder(holder_file: Path) -> str:
    try:
        holder = json.loads(holder_file.read_bytes())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
