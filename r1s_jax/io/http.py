"""HTTP requests with one deadline over the whole request and a limit on the reply.

urllib3's timeouts apply to each read, and it sleeps as long as `Retry-After` says: a server that
sends a byte a second, or asks for a retry tomorrow, would hold a request for as long. So urllib3
makes each try, and this module the retries. Proxies are those that the environment names.
"""

import contextlib
import ipaddress
import logging
import math
import re
import socket
import threading
import time
from collections.abc import Generator, Mapping
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

# typeshed declares it for macOS only.
from urllib.request import (
    getproxies_environment,
    proxy_bypass_environment,  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
)

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util import parse_url

from r1s_jax.io.errors import UserError, reason

# urllib3 would log each failed try; the error reports the last one.
for _name in ("urllib3.connectionpool", "urllib3.connection"):
    logging.getLogger(_name).setLevel(logging.ERROR)
RETRY_STATUS = (429, 500, 502, 503, 504)
MOST_BYTES = 32 * 2**20
_CHUNK = 1 << 16
_PAUSE_S = 0.25  # before the first retry; doubles from try to try
_SHORTEST_S = 0.01  # a timeout must not be 0
_LENGTH = re.compile(r"[0-9]{1,18}")


class ServerError(UserError, RuntimeError):
    """A server that cannot be reached, is too slow, fails, or sends too long a reply."""


class _TryAgain(ServerError):
    """A failure worth a retry: an incomplete reply, or a server that is busy or failed."""

    pause_s = 0.0  # requested by the server


class _Watch(threading.local):
    """The deadline of this thread's request, and the timer that ends the request then."""

    deadline: float = math.inf
    timer: threading.Timer | None = None


_watch = _Watch()


class Deadline(HTTPConnection):
    """A connection that is shut down at the deadline, even while a read blocks.

    The deadline is that of the thread's `within`.
    """

    def connect(self) -> None:
        self.timeout = sooner(self.timeout)
        super().connect()
        _watch_over(self.sock)

    def request(self, *args: Any, **kwargs: Any) -> None:
        if self.sock is not None:
            _watch_over(self.sock)
        super().request(*args, **kwargs)


def _watch_over(sock: socket.socket) -> None:
    _stop_watching()
    if left() < math.inf:
        _watch.timer = threading.Timer(left(), _shut, [sock])
        _watch.timer.daemon = True
        _watch.timer.start()


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed already
        sock.shutdown(socket.SHUT_RDWR)  # a read that blocks returns


@contextlib.contextmanager
def within(seconds: float) -> Generator[None]:
    """Sets a deadline for the `Deadline` connections that this thread uses in the context.

    In nested contexts the earliest deadline holds.
    """
    before = _watch.deadline
    _watch.deadline = min(before, time.monotonic() + seconds)
    try:
        yield
    finally:
        _watch.deadline = before
        _stop_watching()


def left() -> float:
    """Seconds until the deadline of this thread's `within`; infinite outside of one."""
    return max(_SHORTEST_S, _watch.deadline - time.monotonic())


def sooner(timeout: Any) -> Any:
    """A timeout of urllib3, at most the time until the deadline."""
    seconds = min(timeout, left()) if isinstance(timeout, int | float) else left()
    return seconds if seconds < math.inf else timeout


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


class Connections:
    """Connections to servers, direct or through the proxy that `proxy_of` returns.

    Any number of threads may use them at once.
    """

    def __init__(self, plain: type = _Plain, secure: type = _Secure, **options: Any):
        """`plain` and `secure` are classes of connections; `options` go to PoolManager."""
        self._pools: dict[str, Any] = {
            scheme: type(pool.__name__, (pool,), {"ConnectionCls": connection})
            for scheme, pool, connection in (
                ("http", urllib3.HTTPConnectionPool, plain),
                ("https", urllib3.HTTPSConnectionPool, secure),
            )
        }
        self._options, self._lock = options, threading.Lock()
        self._managers: dict[str, urllib3.PoolManager] = {}

    def request(
        self, method: str, url: str, *, hops: int = 0, **options: Any
    ) -> urllib3.BaseHTTPResponse:
        """The reply, its body unread.

        Follows up to `hops` redirects. Methods other than GET follow only redirects that keep
        method and body, and send no headers to another host or from https to http. Makes no retry
        unless `options` has `retries`. Raises urllib3's HTTPError, OSError, and ServerError as
        `proxy_of` does.
        """
        options = {"retries": False, "preload_content": False, "redirect": False} | options
        while True:
            response = self._manager(url).request(method, url, **options)
            place = response.get_redirect_location()
            same = method == "GET" or response.status in (307, 308)
            if not (hops and place and same):
                return response
            response.close()
            try:
                hops, here, url = hops - 1, urlsplit(url), urljoin(url, place)
                there = urlsplit(url)
            except ValueError:
                raise urllib3.exceptions.LocationParseError(place) from None
            weaker = (here.scheme, there.scheme) == ("https", "http")
            if method != "GET" and (weaker or there.hostname != here.hostname):
                options["headers"] = {}

    def _manager(self, url: str) -> urllib3.PoolManager:
        proxy = proxy_of(url)
        with self._lock:
            if proxy not in self._managers:
                manager = urllib3.PoolManager(**self._options)
                if proxy:
                    manager = urllib3.ProxyManager(proxy, **self._options, **_proxy_headers(proxy))
                manager.pool_classes_by_scheme = self._pools
                self._managers[proxy] = manager
            return self._managers[proxy]


def proxy_of(url: str) -> str:
    """The proxy that http_proxy, https_proxy, all_proxy and no_proxy name for an address, or "".

    This machine and addresses of private networks are reached without a proxy in any case. Raises
    ServerError for a proxy that is not http:// or https://.
    """
    parts, proxies = urlsplit(url), getproxies_environment()
    proxy = proxies.get(parts.scheme) or proxies.get("all", "")
    excepted = proxies.get("no", "").replace("*.", ".")
    host = parts.hostname or ""
    if not proxy or is_inside(host) or _in_networks(host, excepted.split(",")):
        return ""
    if proxy_bypass_environment(parts.netloc.rpartition("@")[2], proxies | {"no": excepted}):
        return ""
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    if not proxy.startswith(("http://", "https://")):
        raise ServerError(
            f"the environment names the proxy {without_credentials(proxy)} for {host}: expected "
            "http:// or https://; change it, or name the host in no_proxy"
        )
    return proxy


def is_inside(host: str) -> bool:
    """Whether a host is this machine by name, or an address that is not on the internet."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    with contextlib.suppress(ValueError):
        return not ipaddress.ip_address(host).is_global
    return False


def _in_networks(host: str, names: list[str]) -> bool:
    """Whether a host is an address in one of the networks among `names`, as in 192.0.2.0/24."""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        for name in filter(lambda name: "/" in name, names):
            with contextlib.suppress(ValueError):
                if address in ipaddress.ip_network(name.strip(), strict=False):
                    return True
    return False


def _proxy_headers(proxy: str) -> dict[str, Any]:
    auth = parse_url(proxy).auth
    if not auth:
        return {}
    return {"proxy_headers": urllib3.make_headers(proxy_basic_auth=unquote(auth))}


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
        """`timeout_s` covers a request and its retries, after lost connections, 429 and 5xx."""
        self._timeout_s, self._retries = timeout_s, retries
        self._headers = dict(headers or {})
        self._connections = Connections(maxsize=connections)

    def post(self, url: str, body: Any, most_bytes: int = MOST_BYTES) -> bytes:
        """The bytes of a reply with status 200.

        Raises ServerError, naming the server without its credentials, for any other outcome; at
        once where the server asks for a retry after the deadline.
        """
        where, seconds = without_credentials(url), min(self._timeout_s, left())
        with within(seconds):
            for tried in range(self._retries + 1):
                try:
                    return self._ask(url, where, body, most_bytes)
                except (urllib3.exceptions.HTTPError, OSError, _TryAgain) as error:
                    requested_s = getattr(error, "pause_s", 0.0)
                    pause = max(_PAUSE_S * 2**tried, requested_s)
                    again = isinstance(error, _TryAgain)
                    message = str(error) if again else f"{where}: {_reason(error)}"
                    if is_late():
                        message = f"{where}: no whole answer within {seconds:g} s"
                    elif requested_s >= left():
                        message += f"; it asks for a retry in {requested_s:g} s, which is too late"
                    if is_late() or tried == self._retries or pause >= left():
                        raise ServerError(message) from None
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _ask(self, url: str, where: str, body: Any, most_bytes: int) -> bytes:
        """One try."""
        response = self._connections.request(
            "POST",
            url,
            hops=1,
            json=body,
            headers=self._headers | _own_headers(url),
            timeout=urllib3.Timeout(connect=left(), read=left()),
        )
        length = response.headers.get("content-length", "")
        announced = int(length) if _LENGTH.fullmatch(length) else 0
        too_long = ServerError(f"{where}: the reply is over {most_bytes >> 20} MiB")
        try:
            if announced > most_bytes:
                raise too_long
            data = bytearray()
            while chunk := response.read1(_CHUNK):
                data += chunk
                if len(data) > most_bytes:
                    raise too_long
            if is_late():
                raise TimeoutError
            if response.status != 200:
                raise _status_error(response, where, bytes(data[:150]))
            if announced > len(data) and not response.headers.get("content-encoding"):
                raise _TryAgain(f"{where}: the reply broke off after {len(data)} bytes")
        except BaseException:
            response.close()
            raise
        response.release_conn()
        return bytes(data)


def _own_headers(url: str) -> dict[str, str]:
    auth = parse_url(url).auth
    return urllib3.make_headers(basic_auth=unquote(auth)) if auth else {}


def _status_error(response: urllib3.BaseHTTPResponse, where: str, start: bytes) -> ServerError:
    """The error for a reply of another status than 200; `start` begins its body."""
    detail = repr(start)
    if place := response.get_redirect_location():
        detail = f"it redirects to {without_credentials(place)}: use that address"
    text = f"{where}: status {response.status}: {detail}"
    if response.status not in RETRY_STATUS:
        return ServerError(text)
    error = _TryAgain(text)
    retry_after = response.headers.get("retry-after", "")
    with contextlib.suppress(urllib3.exceptions.HTTPError, ValueError, OverflowError):
        error.pause_s = urllib3.Retry().parse_retry_after(retry_after)
    return error


def _reason(error: Exception) -> str:
    """The cause of an error of urllib3, whose own text repeats the pool and the address."""
    return reason(getattr(error, "reason", None) or error)


def without_credentials(url: str) -> str:
    """The address for messages and files, with user, password and query masked."""
    parts = parse_url(url)
    hidden = parts._replace(auth="***" if parts.auth else None)
    return hidden._replace(query="***" if parts.query else None).url
