"""The deadline of a whole request, redirects, and proxies."""

import gc
import re
import threading
import time

import pytest

from r1s_jax.io.http import Client, ServerError, left, proxy_of, within
from r1s_jax.protocol.solution import Solution
from r1s_jax.retrieval.encoder import HashEncoder
from r1s_jax.retrieval.http import HttpRetriever, RemoteError
from r1s_jax.retrieval.lines import open_source, read_lines
from r1s_jax.retrieval.online import OnlineRetriever
from r1s_jax.rewards.http import RewardServerError
from r1s_jax.rewards.registry import batch_reward
from r1s_jax.system.chat_api import ChatEndpoint, ask_all
from tests.http_server import LocalProxy, LocalServer

LATER = {"Retry-After": "3600"}
TOMORROW = {"Retry-After": "Fri, 31 Dec 2999 23:59:59 GMT"}


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """Removes the proxies of the environment."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("SERPER_API_KEY", "key")


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("headers", [LATER, TOMORROW, {"Retry-After": "9" * 5000}])
def test_a_long_retry_after_is_an_error_at_once(status, headers):
    with LocalServer(lambda *_: (status, {}, headers)) as server:
        begin = time.monotonic()
        with pytest.raises(ServerError, match=rf"status {status}"):
            Client(timeout_s=2, retries=1).post(server.url, {})
        assert time.monotonic() - begin < 2


@pytest.mark.parametrize("retry_after", ["1", "soon", "-5", ""])
def test_a_short_retry_after_is_obeyed_and_an_invalid_one_ignored(retry_after):
    replies = iter([(503, {}, {"Retry-After": retry_after}), (200, {})])
    with LocalServer(lambda *_: next(replies)) as server:
        begin = time.monotonic()
        assert Client(timeout_s=20, retries=1).post(server.url, {}) == b"{}"
        assert (time.monotonic() - begin >= 1) == (retry_after == "1")


def test_no_client_sleeps_for_a_long_retry_after(tmp_path):
    """A retriever, a reward server, a search API and its pages, and a corpus."""
    before, begin = threading.active_count(), time.monotonic()

    def answer(path, body):
        if path != "/search":
            return 503, {}, LATER
        return 200, {"organic": [{"title": "a", "link": f"http://localhost:{port}/page"}]}

    with LocalServer(answer) as server:
        port = server.server_address[1]
        with pytest.raises(RemoteError, match="retry in 3600 s"):
            HttpRetriever(f"{server.url}/queries").search(["a"], 1)
        with pytest.raises(RewardServerError, match="retry in 3600 s"):
            batch_reward(f"{server.url}/reward")(["q"], [Solution.of_text("a")], [["a"]])
        options = {"endpoint": f"{server.url}/search", "trusted_hosts": {"localhost"}}
        with pytest.raises(RemoteError, match="status 503"):
            OnlineRetriever(HashEncoder(), **options).search(["a"], 1)
        with pytest.raises(ValueError, match="the server answers 503"):
            list(read_lines(open_source(f"{server.url}/corpus.jsonl")))
    assert time.monotonic() - begin < 20
    gc.collect()  # a connection of the search API is in a reference cycle
    while threading.active_count() > before and time.monotonic() - begin < 25:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_a_judge_with_a_long_retry_after_ends_at_the_deadline():
    pytest.importorskip("openai", reason="the extra `judge` is not installed")
    later = {"retry-after-ms": "60000", "Retry-After": "60"}
    with LocalServer(lambda *_: (429, {}, later)) as server:
        endpoint, begin = ChatEndpoint(server.url, "m", timeout_s=0.5, retries=1), time.monotonic()
        assert "no whole answer within 1 s" in ask_all(endpoint, {"a": "hello"}, print)
        assert time.monotonic() - begin < 20


def test_the_earlier_deadline_holds():
    with within(60):
        with within(3600):
            assert left() < 61
        with within(1):
            assert left() <= 1
        assert left() > 50


@pytest.mark.parametrize("status", [307, 308])
@pytest.mark.parametrize("place", ["/queries/", "{url}/queries/"])
def test_a_redirect_that_keeps_the_method_is_followed_with_the_body(status, place):
    def answer(path, body):
        if path == "/queries":
            return status, {}, {"Location": place.format(url=server.url)}
        assert path == "/queries/"
        return 200, {"answers": [[f"1\tfound {query}"] for query in body["queries"]]}

    with LocalServer(answer) as server:
        hits = HttpRetriever(f"{server.url}/queries", retries=0).search(["a"], 1)
    assert hits[0][0].line == "found a"


@pytest.mark.parametrize(
    ("status", "place"), [(302, "/there"), (301, "/there"), (307, "/queries"), (308, "http://[x")]
)
def test_other_redirects_are_errors_that_name_the_target(status, place):
    with LocalServer(lambda *_: (status, {}, {"Location": place})) as server:
        with pytest.raises(RemoteError, match=re.escape(place)):
            HttpRetriever(f"{server.url}/queries", retries=0).search(["a"], 1)
        assert server.requests <= 2


def test_a_redirect_to_another_host_omits_the_key():
    seen = []

    def answer(path, body):
        return 307, {}, {"Location": f"http://localhost:{other.server_address[1]}/"}

    with LocalServer(lambda *_: (200, {})) as other, LocalServer(answer) as server:
        handler = other.RequestHandlerClass.do_POST

        class Noting(other.RequestHandlerClass):
            def do_POST(self):
                seen.append(dict(self.headers))
                handler(self)

        other.RequestHandlerClass = Noting
        client = Client(timeout_s=20, retries=0, headers={"X-API-KEY": "secret"})
        client.post(server.url, {})
        client.post(other.url, {})
    assert [headers.get("X-API-KEY") for headers in seen] == [None, "secret"]


def test_proxies_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("http_proxy", "me:secret@proxy:3128")
    monkeypatch.setenv("https_proxy", "socks5://me:secret@proxy")
    monkeypatch.setenv("no_proxy", "intra.net,*.corp,93.184.0.0/16")
    assert proxy_of("http://example.org/a") == "http://me:secret@proxy:3128"
    inside = ["localhost:80", "a.localhost", "127.0.0.1", "[::1]:9", "10.1.2.3", "192.168.0.9"]
    for host in [*inside, "intra.net", "a.intra.net:80", "a.corp", "93.184.1.1"]:
        assert proxy_of(f"http://{host}/a") == "", host
    with pytest.raises(ServerError, match=r"expected http:// or https://") as error:
        proxy_of("https://example.org")
    assert "secret" not in str(error.value)
    monkeypatch.setenv("no_proxy", "*")
    assert proxy_of("http://example.org/a") == ""


def test_only_remote_hosts_are_reached_through_the_proxy(monkeypatch):
    """Only the proxy can resolve the host names."""
    text = "Timbuktu is a city in Mali, known for its ancient mosques and its libraries. " * 20

    def answer(path, body):
        if path == "/search":
            return 200, {"organic": [{"title": "Mali", "link": "http://pages.example/old"}]}
        if path == "/queries":
            return 200, {"answers": [["1\tfound"]]}
        if path == "/old":
            return 302, b"", {"Location": "http://mali.example/page"}
        if path == "/c.jsonl":
            return 200, b"one\ntwo\n"
        return 200, f"<html><body><article><p>{text}</p></article></body></html>".encode()

    names = ["api.example", "pages.example", "mali.example", "engine.example", "dumps.example"]
    with LocalServer(answer) as server, LocalProxy(dict.fromkeys(names, server)) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("https_proxy", proxy.url)
        web = OnlineRetriever(HashEncoder(), endpoint="http://api.example/search")
        assert web.search(["mosques of Timbuktu"], 1)[0][0].title == "Mali"
        assert HttpRetriever("http://engine.example/queries").search(["a"], 1)[0][0].line == "found"
        lines = read_lines(open_source("http://dumps.example/c.jsonl"))
        assert [line.data for line in lines] == [b"one\n", b"two\n"]
        assert [url.split("/")[2] for url in proxy.seen] == names
        with pytest.raises(RemoteError, match=r"502"):
            HttpRetriever("https://engine.example/queries", retries=0).search(["a"], 1)
        assert proxy.seen[-1] == "engine.example:443"
        seen = len(proxy.seen)
        assert HttpRetriever(f"{server.url}/queries").search(["a"], 1)[0][0].line == "found"
        assert len(proxy.seen) == seen
        monkeypatch.setenv("no_proxy", "engine.example")
        with pytest.raises(RemoteError, match=r"resolve"):
            HttpRetriever("http://engine.example/queries", retries=0).search(["a"], 1)


def test_a_remote_judge_is_reached_through_the_proxy(monkeypatch):
    pytest.importorskip("openai", reason="the extra `judge` is not installed")
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "1"}}
    reply = {"id": "x", "object": "chat.completion", "choices": [choice]}
    said = {}
    with (
        LocalServer(lambda *_: (200, reply)) as server,
        LocalProxy({"judge.example": server}) as proxy,
    ):
        monkeypatch.setenv("http_proxy", proxy.url)
        for url in ("http://judge.example/v1", f"{server.url}/v1"):
            endpoint = ChatEndpoint(url, "m", timeout_s=20, retries=0)
            assert not ask_all(endpoint, {url: "hello"}, said.__setitem__)
        assert said == dict.fromkeys(said, "1") and len(said) == 2
        assert proxy.seen == ["http://judge.example/v1/chat/completions"]
