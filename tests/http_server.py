"""A real local HTTP server for tests, whose replies a function computes."""

import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

# (path, JSON body or None) -> (status, body[, headers]); other bodies than bytes are sent as JSON.
Answer = Callable[[str, Any], tuple]


class LocalServer(ThreadingHTTPServer):
    """Serves `answer` on a free port of 127.0.0.1 inside a `with` block; counts requests."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, answer: Answer):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.lock, self.requests = answer, threading.Lock(), 0

    def __enter__(self) -> "LocalServer":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()
        self.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: Any) -> None:
        with self.server.lock:
            self.server.requests += 1
        status, reply, *headers = self.server.answer(self.path, body)
        raw = isinstance(reply, bytes)
        data = reply if raw else json.dumps(reply).encode()
        try:
            self.send_response(status)
            # With `Retry-After: 0`, the retries of a client do not slow the test down.
            self.send_header("retry-after-ms", "1")
            self.send_header("Content-Type", "text/html" if raw else "application/json")
            self.send_header("Content-Length", str(len(data)))
            for name, value in (headers[0] if headers else {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
        except ConnectionError:
            pass  # the client hung up

    def log_message(self, *args: object) -> None:
        pass


class LocalProxy(ThreadingHTTPServer):
    """An HTTP proxy on a free port that maps some host names to `LocalServer`s.

    `seen` lists all requests: addresses, and host:port of tunnels, which it refuses.
    """

    daemon_threads = True

    def __init__(self, hosts: dict[str, LocalServer]):
        super().__init__(("127.0.0.1", 0), _ProxyHandler)
        self.hosts, self.seen = hosts, []

    __enter__, __exit__, url = LocalServer.__enter__, LocalServer.__exit__, LocalServer.url


class _ProxyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._pass_on()

    do_POST = do_GET

    def do_CONNECT(self) -> None:
        self.server.seen.append(self.path)
        self.send_error(502)

    def _pass_on(self) -> None:
        self.server.seen.append(self.path)
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if parts.hostname not in self.server.hosts:
            return self.send_error(502)
        there = HTTPConnection(*self.server.hosts[parts.hostname].server_address)
        there.request(self.command, parts.path, body, dict(self.headers))
        reply = there.getresponse()
        data = reply.read()
        self.send_response(reply.status)
        for name in ("Content-Type", "Location"):
            if value := reply.headers.get(name):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


def drip(seconds: float):
    """A server that sends its reply a byte at a time, for a given time."""

    def serve(listener):
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n")
            end = time.monotonic() + seconds
            for byte in itertools.cycle(b"X-A: b\r\n"):
                connection.sendall(bytes([byte]))
                time.sleep(0.02)
                if time.monotonic() > end:
                    return

    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, args=(listener,), daemon=True).start()
    return listener, f"http://127.0.0.1:{listener.getsockname()[1]}"


def breaking(*replies: bytes):
    """A server that sends the next of `replies` to each connection and hangs up."""

    def serve(listener):
        with contextlib.suppress(OSError):
            for reply in replies:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(reply)

    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, args=(listener,), daemon=True).start()
    return listener, f"http://127.0.0.1:{listener.getsockname()[1]}"
