"""Which web pages may use a server, so that no other page can use it through a visitor's browser.

Needs the extra `serve`. A page of another site can send requests to a server on the visitor's own
machine. If the site's name resolves to that machine (DNS rebinding), the page can also read the
replies. Browsers send the site of the page (`Origin`) and the name of the server (`Host`): a server
that needs no key checks both.
"""

import ipaddress
import re
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from r1s_jax.io.errors import ConfigError, shorten

ANY = "*"
# The last two are containers' names for the loopback interface of their host.
_LOOPBACK = {"localhost", "host.docker.internal", "host.containers.internal"}
_EVERYWHERE = {"", "0.0.0.0", "::"}
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([^/\s@?#]+)")


class Callers(NamedTuple):
    """Who may use a server from a browser."""

    hosts: frozenset[str] | None = frozenset()  # names besides loopback's; None: any
    origins: tuple[str, ...] = ()  # of pages besides the server's own
    checked: bool = True  # False where every caller has to send a key


def callers(host: str, origins: Sequence[str], *, key: bool = False) -> Callers:
    """The callers of a server that listens on `host`, with a key or without.

    A server that listens on all interfaces may be called by any name. Raises ConfigError for an
    origin that no browser sends.
    """
    pages = tuple(_read_origin(origin) for origin in origins)
    if host in _EVERYWHERE or ANY in pages:
        return Callers(None, pages, not key)
    names = {_name(match[1]) for match in map(_ORIGIN.fullmatch, pages) if match}
    with suppress(OSError):  # reported when the server cannot listen on it
        names |= {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    return Callers(frozenset({host.lower(), *names}), pages, not key)


def _read_origin(text: str) -> str:
    origin = text.strip().lower().removesuffix("/")
    if origin not in (ANY, "null") and not _ORIGIN.fullmatch(origin):
        raise ConfigError(
            f"--cors {shorten(text, 80)!r}: expected the origin of a page as browsers send it, "
            "http://HOST:PORT or https://HOST, or * for every page"
        )
    return origin


def guarded(app: ASGIApp, allowed: Callers, refuse: Callable[[str], Response]) -> ASGIApp:
    """`app` behind the check of callers; answers CORS preflight requests of allowed origins.

    `refuse` makes the reply (403) to a refused request, in the server's own form.
    """
    guard: ASGIApp = _Guard(app, allowed, refuse) if allowed.checked else app
    if not allowed.origins:
        return guard
    return CORSMiddleware(
        guard,
        allow_origins=allowed.origins,
        allow_methods=("GET", "POST"),
        allow_headers=(ANY,),
        expose_headers=("Retry-After", "WWW-Authenticate"),
        allow_private_network=True,
    )


class _Guard:
    def __init__(self, app: ASGIApp, allowed: Callers, refuse: Callable[[str], Response]):
        self._app, self._allowed, self._refuse = app, allowed, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and (why := why_refused(Request(scope), self._allowed)):
            app = self._refuse(why)
        await app(scope, receive, send)


def why_refused(request: Request, allowed: Callers) -> str:
    """Why the host or origin of a request is refused, and what to do; "" if it is allowed."""
    host, origin = request.headers.get("host"), request.headers.get("origin")
    if host is not None and not _may_be_called(_name(host), allowed):
        return (
            f"this server is not called {shorten(host, 80)!r}: call it localhost, name it with "
            "--host, or name the calling page with --cors"
        )
    if origin is None or ANY in allowed.origins or origin.lower() in allowed.origins:
        return ""
    own = _ORIGIN.fullmatch(origin.lower())
    if own and host is not None and own[1] == host.lower():
        return ""
    return (
        f"pages of {shorten(origin, 80)!r} may not use this server: start it with --cors ORIGIN "
        "to allow them"
    )


def _may_be_called(name: str, allowed: Callers) -> bool:
    if allowed.hosts is None or name in allowed.hosts or name in _LOOPBACK:
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name.endswith(".localhost")


def _name(host: str) -> str:
    """The name or address in `HOST`, `HOST:PORT` or `[ADDRESS]:PORT`."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].removesuffix(".")
