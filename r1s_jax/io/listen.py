"""Serving HTTP to strangers: sockets, slow clients, and an end in good order.

Of the extra `serve`; every server of ours listens through this.
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

DRAIN_S = 30  # for what is in flight when a server is told to stop
_KEEP_ALIVE_S = 75
_STARTUP_S = 60
_REQUEST_S = 90  # from the connection, or the answer before, to a whole request
_LAST_S = 1.0  # the same once the server is told to stop


def bind(host: str, port: int) -> socket.socket:
    """A socket of a port (0: any that is free), not yet listening.

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
    """Serves until SIGTERM or SIGINT; requests in flight are answered first, within `drain_s`.

    `announce` is told the address once connections are taken, and `stopping` called when the
    signal comes; a second signal waits for nobody. Call it on the main thread.
    """
    server = _server(app, lambda: announce(address_of(bound)), drain_s)

    # uvicorn drains on these signals, then raises them again: here that is no reason to die.
    def stop(*_: object) -> None:
        stopping()
        server.force_exit = server.should_exit
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    server.run(sockets=[bound])


def serve_in_background(app: ASGIApp, bound: socket.socket) -> str:
    """Serves while this process lives; returns the address."""
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
        http=_Patient,
        timeout_graceful_shutdown=math.ceil(drain_s),
    )
    return _Server(config, listening)


class _Server(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config, listening: Callable[[], None]):
        super().__init__(config)
        self._listening = listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._listening()


class _Patient(H11Protocol):
    """Closes a connection whose request is not whole in time: slow clients hold no place."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._leaving = False
        self._expect_request(_REQUEST_S)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._slow.cancel()
        if self._leaving:
            self.transport.close()
        else:
            self._expect_request(_REQUEST_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._slow.cancel()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """The server is told to stop: a request that has begun to come has a moment left."""
        self._leaving = True
        # None until a first request, though uvicorn declares otherwise.
        if self.cycle is not None:  # pyright: ignore[reportUnnecessaryComparison]
            super().shutdown()
        if not self.transport.is_closing() and not self._whole():
            self._slow.cancel()
            self._expect_request(_LAST_S)

    def _expect_request(self, seconds: float) -> None:
        self._slow = self.loop.call_later(seconds, self._close_if_slow)

    def _whole(self) -> bool:
        return self.conn.their_state in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED)

    def _close_if_slow(self) -> None:
        if not self._whole() and not self.transport.is_closing():
            self.transport.close()
