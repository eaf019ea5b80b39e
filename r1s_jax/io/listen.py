"""Listening for HTTP: sockets, limits for slow clients, and graceful shutdown.

Needs the extra `serve`. Every server of this package listens through this module.
"""

import math
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

DRAIN_S = 30  # for requests in flight when a server stops
_KEEP_ALIVE_S = 75
_STARTUP_S = 60
_REQUEST_S = 90  # from the connection, or the reply before, to a complete request
_LAST_S = 1.0  # the same limit while the server stops


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to a port (0: any free one), not yet listening.

    Raises OSError that says what to do where the port is taken or the host is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}:{port}: {error.strerror}. Choose another --port or --host"
        ) from error
    return bound


def address_of(bound: socket.socket) -> str:
    """http://HOST:PORT of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(
    app: ASGIApp,
    bound: socket.socket,
    announce: Callable[[str], None],
    stopping: Callable[[], None] = lambda: None,
    drain_s: float = DRAIN_S,
) -> None:
    """Serves until SIGTERM or SIGINT, then answers requests in flight within `drain_s` seconds.

    Calls `announce` with the address once connections are accepted, and `stopping` when the signal
    arrives; a second signal stops at once. Call it on the main thread.
    """
    server = _server(app, lambda: announce(address_of(bound)), drain_s)

    # uvicorn drains on these signals, then raises them again, which would kill this process.
    def stop(*_: object) -> None:
        stopping()
        server.force_exit = server.should_exit
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    server.run(sockets=[bound])


def serve_in_background(app: ASGIApp, bound: socket.socket) -> str:
    """Serves on a thread until this process ends; returns the address."""
    up = threading.Event()
    server = _server(app, up.set)
    threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True).start()
    if not up.wait(_STARTUP_S):
        raise OSError(f"nothing listens on {address_of(bound)} after {_STARTUP_S} s")
    return address_of(bound)


def _server(app: ASGIApp, listening: Callable[[], None], drain_s: float = DRAIN_S) -> "_Server":
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        http=_TimedProtocol,
        timeout_graceful_shutdown=math.ceil(drain_s),
    )
    return _Server(config, listening)


class _Server(uvicorn.Server):
    """Calls `listening` once it accepts connections."""

    def __init__(self, config: uvicorn.Config, listening: Callable[[], None]):
        super().__init__(config)
        self._listening = listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._listening()


class _TimedProtocol(H11Protocol):
    """Closes a connection whose request is not complete in time, so that slow clients hold none."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._stopping = False
        self._expect_request(_REQUEST_S)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._slow.cancel()
        if self._stopping:
            self.transport.close()
        else:
            self._expect_request(_REQUEST_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._slow.cancel()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Called when the server stops: an incomplete request has `_LAST_S` seconds left."""
        self._stopping = True
        # None until a first request, though uvicorn declares otherwise.
        if self.cycle is not None:  # pyright: ignore[reportUnnecessaryComparison]
            super().shutdown()
        if not self.transport.is_closing() and not self._complete():
            self._slow.cancel()
            self._expect_request(_LAST_S)

    def _expect_request(self, seconds: float) -> None:
        self._slow = self.loop.call_later(seconds, self._close_if_slow)

    def _complete(self) -> bool:
        return self.conn.their_state in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED)

    def _close_if_slow(self) -> None:
        if not self._complete() and not self.transport.is_closing():
            self.transport.close()
