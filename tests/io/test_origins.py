"""The requests of browsers that a server accepts."""

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")
from starlette.requests import Request

from r1s_jax.io.errors import ConfigError
from r1s_jax.io.origins import callers, why_refused

HERE = callers("127.0.0.1", [])
CHAT = callers("127.0.0.1", ["https://chat.example/", "http://localhost:5173"])
LAN = callers("192.168.1.5", [])
EVERYWHERE = callers("0.0.0.0", [])
ALL_PAGES = callers("127.0.0.1", ["*"])
EVIL = "http://evil.example"


def request(host: str | None, origin: str | None) -> Request:
    values = {"host": host, "origin": origin}
    headers = [(k.encode(), v.encode("latin-1")) for k, v in values.items() if v is not None]
    return Request({"type": "http", "headers": headers})


@pytest.mark.parametrize(
    ("allowed", "host", "origin"),
    [
        (HERE, "127.0.0.1:8000", None),
        (HERE, "localhost:8000", "http://localhost:8000"),
        (HERE, "LOCALHOST", "http://localhost"),
        (HERE, "app.localhost:8000", None),
        (HERE, "[::1]:8000", "http://[::1]:8000"),
        (HERE, "127.0.0.9", None),
        (HERE, "host.docker.internal:8000", None),
        (HERE, None, None),
        (CHAT, "127.0.0.1:8000", "https://chat.example"),
        (CHAT, "chat.example", "https://chat.example"),
        (CHAT, "localhost:8000", "http://localhost:5173"),
        (LAN, "192.168.1.5:8000", "http://192.168.1.5:8000"),
        (EVERYWHERE, "node-3.cluster:8000", "http://node-3.cluster:8000"),
        (EVERYWHERE, "10.0.0.7:8000", None),
        (ALL_PAGES, "localhost:8000", EVIL),
        (callers("::1", []), "[::1]:8000", None),
        (callers("127.0.0.1", ["null"]), "localhost:8000", "null"),
    ],
)
def test_its_own_pages_and_programs_pass(allowed, host, origin):
    assert why_refused(request(host, origin), allowed) == ""


@pytest.mark.parametrize(
    ("allowed", "host", "origin"),
    [
        (HERE, "evil.example:8000", None),
        (HERE, "evil.example:8000", "http://evil.example:8000"),  # its name resolves to us
        (HERE, "localhost.evil.example", None),
        (HERE, "127.0.0.1.evil.example", None),
        (HERE, "192.168.1.5:8000", None),
        (HERE, "", None),
        (HERE, "\xff", None),
        (HERE, "localhost:8000", EVIL),
        (HERE, "localhost:8000", "null"),
        (HERE, "localhost:8000", ""),
        (HERE, "localhost:8000", "http://localhost:5173"),
        (HERE, "localhost:8000", "http://evil.example?localhost:8000"),
        (HERE, "localhost:8000", "\xff" * 5000),
        (CHAT, "localhost:8000", EVIL),
        (CHAT, "localhost:8000", "http://chat.example"),
        (LAN, "10.0.0.7:8000", None),
        (EVERYWHERE, "node-3.cluster:8000", EVIL),
    ],
)
def test_others_are_refused_with_advice(allowed, host, origin):
    why = why_refused(request(host, origin), allowed)
    assert "--cors" in why and len(why) < 400


@pytest.mark.parametrize("text", ["localhost:3000", "http://", "http://a/path", "", "a b://c"])
def test_origins_in_other_forms_are_refused(text):
    with pytest.raises(ConfigError, match="--cors"):
        callers("127.0.0.1", [text])


def test_a_listening_name_stands_for_its_address(monkeypatch):
    addresses = [(None, None, None, "", ("10.0.0.7", 0))]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: addresses)
    for host in ("node-3:8000", "10.0.0.7:8000", "localhost:8000"):
        assert why_refused(request(host, None), callers("node-3", [])) == ""
    assert why_refused(request("10.0.0.8", None), callers("node-3", []))


def test_a_key_replaces_the_check_of_origins():
    assert not callers("127.0.0.1", [], key=True).checked
