"""Several processes as one run: joining, and exchanging values.

Every process runs the same program on the same values. These functions share the result of what one
process does alone (writing files, printing) or sees alone (a failed search), so that all processes
take the same branch: otherwise some would wait for the others for ever. With one process they need
no communication.
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

# After so long without a heartbeat a process counts as dead, and the others end too.
_HEARTBEAT_TIMEOUT_S = 20
_PROXY = re.compile(r"(grpc|https?|all)_proxy", re.IGNORECASE)
_VARIABLES = ("R1S_COORDINATOR", "R1S_PROCESSES", "R1S_PROCESS")


class ProcessError(UserError, RuntimeError):
    """Another process failed; the message is the same on all of them."""


def join() -> None:
    """Joins the processes of this run; must be called before JAX looks for devices.

    JAX finds the processes by itself on TPU VMs, GKE, Slurm and Open MPI; elsewhere they are set in
    R1S_COORDINATOR (host:port of process 0), R1S_PROCESSES and R1S_PROCESS (from 0). Raises
    ProcessError when they are set nowhere, or when they do not find each other.
    """
    values = [os.environ.get(name) for name in _VARIABLES]
    arguments: dict[str, Any] = {}
    if any(values):
        coordinator, count, index = values
        count, index = count or "", index or ""
        if not (coordinator and is_whole_number(count) and is_whole_number(index)):
            raise ProcessError(
                f"set all of {', '.join(_VARIABLES)}: host:port of process 0, "
                "number of processes, index of this one"
            )
        arguments = {
            "coordinator_address": coordinator,
            "num_processes": int(count),
            "process_id": int(index),
        }
    try:
        with _without_proxies():
            jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_S, **arguments)
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            f"the processes of this run did not find each other: {error}. On TPU VMs, GKE, Slurm "
            f"and Open MPI they do by themselves; elsewhere set {', '.join(_VARIABLES)}"
        ) from error


@contextlib.contextmanager
def _without_proxies() -> Iterator[None]:
    """Unsets proxy variables: gRPC would use http_proxy to reach the run's coordinator."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if _PROXY.fullmatch(name)}
    try:
        yield
    finally:
        os.environ |= hidden


def leave(status: int, *, all_know: bool = True) -> NoReturn:
    """Ends this process after an error.

    One of several processes skips JAX's shutdown, which waits for the others: they may be waiting
    for this one. Unless `all_know` of the error, another process may have died; this one then waits
    until JAX misses its heartbeat, reports it and ends this process.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        if not all_know:
            time.sleep(_HEARTBEAT_TIMEOUT_S + 15)
        os._exit(status)
    sys.exit(status)


def is_main() -> bool:
    """Whether this process writes files and prints messages."""
    return jax.process_index() == 0


def own_address() -> str:
    """The address at which other machines reach this one; 127.0.0.1 without a network.

    Nothing is sent: connecting a datagram socket only selects its local address.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.254.254.254", 1))
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]


def gather(value: T) -> list[T]:
    """The value of every process, in the order of their indices; `value` must pickle."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def on_main(action: Callable[[], T]) -> T:
    """Runs `action` on the main process; returns its result, or raises ProcessError, on all."""
    if jax.process_count() == 1:
        return action()
    result, error = _attempt(action) if is_main() else (None, "")
    result, failed = gather((result, error))[0]
    if failed:
        raise ProcessError(f"process 0: {failed}")
    return cast(T, result)  # it did not fail


def together(action: Callable[[], T]) -> T:
    """Runs `action` on every process; raises ProcessError on all when it fails on any.

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
    """Raises ProcessError on all where the `value` of a process differs from process 0's."""
    if jax.process_count() == 1:
        return
    for process, digest in enumerate(digests := gather(sha256(repr(value()).encode()).hexdigest())):
        if digest != digests[0]:
            raise ProcessError(
                f"process {process} has another {what} than process 0: start the same command with "
                "the same files on all of them"
            )


def to_host(tree: Any) -> Any:
    """Copies arrays on the mesh to whole NumPy arrays on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def _attempt(action: Callable[[], T]) -> tuple[T | None, str]:
    """The result of `action` and its error as text, because exceptions may not pickle."""
    try:
        return action(), ""
    except Exception as error:
        return None, str(error) or repr(error)
