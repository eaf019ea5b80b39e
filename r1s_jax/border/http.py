"""Asking a server of others: one deadline over the whole request, and a limit on the reply.

urllib3's own timeouts are for each read: a server that sends a byte a second would outlast them.
"""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from r1s_jax.border.errors import UserError, reason

# Each try that fails would be told on the terminal; the last one is, in the error.
for _name in ("urllib3.connectionpool", "urllib3.connection"):
    logging.getLogger(_name).setLevel(logging.ERROR)
RETRY_STATUS = (429, 500, 502, 503, 504)
MOST_BYTES = 32 * 2**20
_CHUNK = 1 << 16
_PAUSE_S = 0.25  # before a request is made again


class ServerError(UserError, RuntimeError):
    """A server that cannot be reached, is too slow, fails, or says too much."""


class _BrokeOff(ServerError):
    """A reply whose end is missing."""


class _Watch(threading.local):
    """The deadline of the request that this thread makes, and what ends it then."""

    deadline: float = 0.0
    timer: threading.Timer | None = None


_watch = _Watch()


class Deadline:
    """A connection that is shut down when the deadline has passed, whatever it waits for.

    The deadline is that of the `within` which the asking thread is in.
    """

    def getresponse(self) -> Any:
        _stop_watching()
        left = max(0.01, _watch.deadline - time.monotonic())
        _watch.timer = threading.Timer(left, _shut, [self.sock])
        _watch.timer.daemon = True
        _watch.timer.start()
        return super().getresponse()


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed already
        sock.shutdown(socket.SHUT_RDWR)  # a read that blocks returns


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """One deadline over all that a `Deadline` connection of this thread does inside."""
    _watch.deadline = time.monotonic() + seconds
    try:
        yield
    finally:
        _stop_watching()


def is_late() -> bool:
    """Whether the deadline of this thread's `within` has passed."""
    return time.monotonic() >= _watch.deadline


def _stop_watching() -> None:
    if _watch.timer:
        _watch.timer.cancel()
        _watch.timer = None


class _Plain(Deadline, HTTPConnection):
    pass


class _Secure(Deadline, HTTPSConnection):
    pass


class _PlainPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Plain


class _SecurePool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _Secure


class Client:
    """Posts JSON to servers; any number of threads may use it at once."""

    def __init__(
        self,
        *,
        timeout_s: float,
        retries: int,
        connections: int = 1,
        headers: Mapping[str, str] | None = None,
    ):
        """`timeout_s` is for a whole request with its retries: of lost connections, 429 and 5xx."""
        self._timeout_s, self._retries = timeout_s, retries
        self._pool = urllib3.PoolManager(
            maxsize=connections,
            headers=headers,
            retries=urllib3.Retry(
                retries,
                backoff_factor=_PAUSE_S,
                status_forcelist=RETRY_STATUS,
                allowed_methods=None,  # what is asked changes nothing: POST may be sent again
                redirect=0,
            ),
        )
        self._pool.pool_classes_by_scheme = {"http": _PlainPool, "https": _SecurePool}

    def post(self, url: str, body: Any, most_bytes: int = MOST_BYTES) -> bytes:
        """The bytes of a reply with status 200.

        Raises ServerError, naming the server without its credentials, for anything else.
        """
        where = without_credentials(url)
        with within(self._timeout_s):
            try:
                return self._ask_again(url, where, body, most_bytes)
            except (urllib3.exceptions.HTTPError, OSError) as error:
                late = f"no whole answer within {self._timeout_s:g} s"
                raise ServerError(f"{where}: {late if is_late() else _reason(error)}") from None

    def _ask_again(self, url: str, where: str, body: Any, most_bytes: int) -> bytes:
        """What urllib3 does not try again: a reply that breaks off after its head had come."""
        for left in reversed(range(self._retries + 1)):
            try:
                return self._ask(url, where, body, most_bytes)
            except (urllib3.exceptions.ProtocolError, _BrokeOff):
                if not left or is_late():
                    raise
                time.sleep(_PAUSE_S)
        raise AssertionError("the last try returns or raises")

    def _ask(self, url: str, where: str, body: Any, most_bytes: int) -> bytes:
        response = self._pool.request(
            "POST",
            url,
            json=body,
            preload_content=False,
            timeout=urllib3.Timeout(connect=self._timeout_s, read=self._timeout_s),
        )
        length = response.headers.get("content-length", "")
        announced = int(length) if length.isdigit() else 0
        too_long = ServerError(f"{where}: the reply is over {most_bytes >> 20} MiB")
        try:
            if announced > most_bytes:
                raise too_long
            data = bytearray()
            while chunk := response.read1(_CHUNK):
                data += chunk
                if len(data) > most_bytes:
                    raise too_long
            if response.status != 200:
                raise ServerError(f"{where}: status {response.status}: {bytes(data[:150])!r}")
            if is_late():
                raise TimeoutError
            if announced > len(data) and not response.headers.get("content-encoding"):
                raise _BrokeOff(f"{where}: the reply broke off after {len(data)} bytes")
        except BaseException:
            response.close()
            raise
        response.release_conn()
        return bytes(data)


def _reason(error: Exception) -> str:
    """What is at the bottom of an error that names its pool and its address again and again."""
    return reason(getattr(error, "reason", None) or error)


def without_credentials(url: str) -> str:
    """The address for messages and files: who asked, and with which key, is nobody's business."""
    parts = urllib3.util.parse_url(url)
    hidden = parts._replace(auth="***" if parts.auth else None)
    return hidden._replace(query="***" if parts.query else None).url
