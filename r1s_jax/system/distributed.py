"""Several processes as one run: how they meet, and what they tell each other.

Every process runs the same program on the same values. What only one of them may do (writing
files, talking to people) or may find (a failed search) is settled here, so that all go the same
way: a process that went another would leave the others waiting for ever. With one process every
function here is the plain thing.
"""

import contextlib
import os
import pickle
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import Any, NoReturn, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from r1s_jax.io.errors import UserError
from r1s_jax.io.text import is_whole_number

T = TypeVar("T")

# A process that is not heard of for so long has died, and the others end as well.
_HEARTBEAT_TIMEOUT_S = 20
_PROXY = re.compile(r"(grpc|https?|all)_proxy", re.IGNORECASE)
_VARIABLES = ("R1S_COORDINATOR", "R1S_PROCESSES", "R1S_PROCESS")


class ProcessError(UserError, RuntimeError):
    """Another process failed; the message is the same on all of them."""


def join() -> None:
    """Joins the processes of this run; must come before anything asks JAX for its devices.

    Who they are is found in the environment of TPU VMs, GKE, Slurm or Open MPI; anywhere else,
    R1S_COORDINATOR (host:port of process 0), R1S_PROCESSES and R1S_PROCESS (from 0) tell.
    Raises ProcessError when neither does, or when they do not find each other.
    """
    given = [os.environ.get(name) for name in _VARIABLES]
    named: dict[str, Any] = {}
    if any(given):
        coordinator, count, index = given
        count, index = count or "", index or ""
        if not (coordinator and is_whole_number(count) and is_whole_number(index)):
            raise ProcessError(f"set all of {', '.join(_VARIABLES)}: host:port, how many, which")
        named = {
            "coordinator_address": coordinator,
            "num_processes": int(count),
            "process_id": int(index),
        }
    try:
        with _without_proxies():
            jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_S, **named)
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            f"the processes of this run did not find each other: {error}. On TPU VMs, GKE, Slurm "
            f"and Open MPI they do by themselves; elsewhere set {', '.join(_VARIABLES)}"
        ) from error


@contextlib.contextmanager
def _without_proxies() -> Iterator[None]:
    """Processes of one run talk straight: gRPC would go to their coordinator through http_proxy."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if _PROXY.fullmatch(name)}
    try:
        yield
    finally:
        os.environ |= hidden


def leave(status: int, *, all_know: bool = True) -> NoReturn:
    """Ends this process after an error.

    One of several goes without the usual farewell, which waits for the others: they may be waiting
    for this one. Unless `all_know` of the error, another process may have died, and JAX tells which
    (and ends this one) as soon as it has missed it for long enough.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        if not all_know:
            time.sleep(_HEARTBEAT_TIMEOUT_S + 15)
        os._exit(status)
    sys.exit(status)


def is_main() -> bool:
    """Whether this process writes the files and talks to people."""
    return jax.process_index() == 0


def own_address() -> str:
    """The address at which other machines reach this one; of a machine without a network, its own.

    Nothing is sent: a datagram socket that is connected knows which way it would go.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.254.254.254", 1))
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]


def gather(value: T) -> list[T]:
    """The value of every process, in their order; any that pickles."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def on_main(action: Callable[[], T]) -> T:
    """What `action` returns on the main process, everywhere; ProcessError when it fails there."""
    if jax.process_count() == 1:
        return action()
    result, error = _attempt(action) if is_main() else (None, "")
    result, failed = gather((result, error))[0]
    if failed:
        raise ProcessError(f"process 0: {failed}")
    return cast(T, result)  # it did not fail


def together(action: Callable[[], T]) -> T:
    """`action` on every process; ProcessError on all of them when it fails on any.

    `action` must not itself wait for other processes.
    """
    if jax.process_count() == 1:
        return action()
    result, error = _attempt(action)
    for process, failed in enumerate(gather(error)):
        if failed:
            raise ProcessError(f"process {process}: {failed}")
    return cast(T, result)  # it did not fail


def check_alike(what: str, value: Callable[[], Any]) -> None:
    """Raises ProcessError on all where a process has another value of something than the first."""
    if jax.process_count() == 1:
        return
    for process, digest in enumerate(digests := gather(sha256(repr(value()).encode()).hexdigest())):
        if digest != digests[0]:
            raise ProcessError(
                f"process {process} has another {what} than process 0: start the same command with "
                "the same files on all of them"
            )


def to_host(tree: Any) -> Any:
    """Arrays on the mesh as whole NumPy arrays, on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def _attempt(action: Callable[[], T]) -> tuple[T | None, str]:
    """What it returned, and what it failed with; exceptions themselves may not pickle."""
    try:
        return action(), ""
    except Exception as error:
        return None, str(error) or repr(error)
