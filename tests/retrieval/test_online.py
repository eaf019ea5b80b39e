"""Web search: a local server fakes the search API and the pages, hostile ones too."""

import threading

import pytest

from r1s_jax.retrieval import online
from r1s_jax.retrieval.encoder import HashEncoder
from r1s_jax.retrieval.http import RemoteError
from r1s_jax.retrieval.online import OnlineRetriever
from tests.http_server import LocalServer, drip

KEY = "secret-key-of-the-test"
ARTICLE = """<html><head><title>x</title><script>var menu = 1;</script></head><body>
<nav><a href="/">Home</a> <a href="/login">Log in</a></nav>
<article><h1>{title}</h1>{paragraphs}</article><footer>All rights reserved</footer></body></html>"""


def article(title: str, *paragraphs: str) -> bytes:
    body = "".join(f"<p>{p}</p>" for p in paragraphs)
    return ARTICLE.format(title=title, paragraphs=body).encode()


FILLER = "The river flows through many valleys and past old mills before it meets the sea. " * 12
TIMBUKTU = (
    "Timbuktu is a city in Mali, known for its ancient mosques and libraries of manuscripts. " * 5
)
PAGES = {
    "/timbuktu": (200, article("Timbuktu", FILLER, TIMBUKTU, FILLER)),
    "/river": (200, article("River", FILLER)),
    "/gone": (404, b"<html>gone</html>"),
    "/binary": (200, {"no": "text"}),
    "/empty": (200, b"<html><body></body></html>"),
}


class Web(LocalServer):
    """A fake search API that returns `links`, and a web server of `PAGES`."""

    def __init__(self, links=(), pages=None):
        super().__init__(self.reply)
        self.links, self.pages, self.asked = links, PAGES | (pages or {}), []

    def reply(self, path, body):
        if path == "/search":
            self.asked.append(body)
            results = [{"title": link.strip("/"), "link": self.page(link)} for link in self.links]
            return 200, {"organic": results}
        page = self.pages[path]
        return page() if callable(page) else page

    def page(self, link):
        # The tests trust the name localhost, not the address 127.0.0.1.
        return link if "://" in link else f"http://localhost:{self.server_address[1]}{link}"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", KEY)


def retriever_of(web, **options):
    options = {"endpoint": f"{web.url}/search", "trusted_hosts": {"localhost"}} | options
    return OnlineRetriever(HashEncoder(), **options)


def test_the_nearest_passages_of_the_pages_come_first():
    with Web(["/river", "/timbuktu", "/gone"]) as web:
        retriever = retriever_of(web, site="en.wikipedia.org")
        hits = retriever.search(["ancient mosques of Timbuktu"], 2)[0]
        assert web.asked == [{"q": "ancient mosques of Timbuktu site:en.wikipedia.org", "num": 10}]
        assert hits[0].title == "timbuktu" and "mosques" in hits[0].text
        assert hits[0].id.endswith("/timbuktu") and hits[0].score >= hits[1].score
        assert not any(menu in hit.text for hit in hits for menu in ("Log in", "menu", "rights"))
        assert all(len(hit.text.split()) <= 100 for hit in hits)
        requests = web.requests
        assert retriever.search(["ancient mosques of Timbuktu"], 2)[0] == hits
        assert web.requests == requests  # from the cache


def test_no_result_and_an_empty_page_give_no_documents():
    with Web([]) as web:
        assert retriever_of(web).search(["nothing"], 3) == [[]]
        web.links = ["/empty"]
        assert retriever_of(web).search(["nothing"], 3) == [[]]


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ("/gone", "status 404"),
        ("/binary", "application/json is not text"),
        ("file:///etc/passwd", "not a web page"),
        ("http://127.0.0.1:{port}/river", "127.0.0.1 is not a public address"),
        ("http://[::1]:{port}/river", r"::1.* is not a public address|refused"),
        ("http://169.254.169.254/latest", r"not a public address|timed out|unreachable|refused"),
        ("http://nowhere.invalid/", "resolve"),
    ],
)
def test_when_no_page_can_be_read_it_is_an_error(link, message):
    with Web() as web:
        web.links = [link.format(port=web.server_address[1])]
        with pytest.raises(RemoteError, match=rf"no page could be read: .*({message})"):
            retriever_of(web, timeout_s=1).search(["q"], 1)


def test_a_redirect_to_a_private_address_is_not_followed():
    secrets = []
    pages = {"/secret": lambda: secrets.append(1) or (200, article("Secret", FILLER))}
    with Web(["/hop"], pages) as web:
        target = f"http://127.0.0.1:{web.server_address[1]}/secret"
        web.pages["/hop"] = (302, b"", {"Location": target})
        with pytest.raises(RemoteError, match="not a public address"):
            retriever_of(web).search(["q"], 1)
        assert not secrets
        web.pages["/hop"] = (302, b"", {"Location": "/river"})
        assert retriever_of(web).search(["q"], 1)[0]


def test_slow_and_endless_pages_are_cut(monkeypatch):
    monkeypatch.setattr(online, "_CHUNK_BYTES", 1000)
    gate, opened = threading.Event(), []

    def slow():
        opened.append(gate.wait(timeout=60))
        return 200, b""

    pages = {
        "/slow": slow,
        "/long": (200, article("Long", *[FILLER] * 400)),
    }
    with Web(["/slow", "/river"], pages) as web:
        hits = retriever_of(web, timeout_s=1.0).search(["river"], 1)[0]
        assert hits[0].title == "river" and not opened
        gate.set()
        web.links = ["/long"]
        short = retriever_of(web, max_bytes=20_000).search(["river"], 100)[0]
        assert 0 < sum(len(hit.text) for hit in short) < 20_000
        cut = retriever_of(web, max_characters=500).search(["river"], 100)[0]
        assert sum(len(hit.text) for hit in cut) <= 500


def test_a_page_or_an_api_that_drips_times_out():
    listener, url = drip(30)
    with listener, Web() as web:
        web.links = [url.replace("127.0.0.1", "localhost") + "/page"]
        with pytest.raises(RemoteError, match=r"/page: not received within 0.5 s"):
            retriever_of(web, timeout_s=0.5).search(["q"], 1)
    listener, url = drip(30)
    with listener, pytest.raises(RemoteError, match=r"no whole answer within 0.5 s"):
        OnlineRetriever(HashEncoder(), endpoint=url, timeout_s=0.5).search(["q"], 1)


@pytest.mark.parametrize(
    "reply", [(403, {}), (200, b"<html>"), (200, [1]), (200, {"organic": [1]})]
)
def test_a_failing_api_is_an_error_that_hides_the_key(reply):
    with LocalServer(lambda *_: reply) as server:
        retriever = OnlineRetriever(HashEncoder(), endpoint=server.url)
        with pytest.raises(RemoteError) as error:
            retriever.search(["q"], 1)
        assert KEY not in str(error.value) and KEY not in repr(vars(retriever))


def test_without_a_key_it_says_what_to_do(monkeypatch):
    monkeypatch.delenv("SERPER_API_KEY")
    with pytest.raises(ValueError, match="SERPER_API_KEY"):
        OnlineRetriever(HashEncoder())
