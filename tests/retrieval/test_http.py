"""The HTTP retriever against a real server, in both contracts, healthy and failing."""

import math
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from r1s_jax.io.http import Client, ServerError
from r1s_jax.retrieval.api import Hit
from r1s_jax.retrieval.http import HttpRetriever, RemoteError
from tests.http_server import LocalServer, breaking, drip


def lines(query, k):
    return [f"{i}\tTitle {query}   text {i}" for i in range(k)]


def scored(query, i):
    document = {"id": str(i), "contents": f'"Title {query}"\ntext {i}'}
    return {"document": document, "score": 1 / (i + 1)}


def answer(path, body):
    if path == "/queries":
        answers = [lines(query, body["k"]) for query in body["queries"]]
        return 200, {"queries": body["queries"], "answers": answers}
    assert path == "/retrieve" and body["return_scores"] is True
    rows = [[scored(query, i) for i in range(body["topk"])] for query in body["queries"]]
    return 200, {"result": rows}


@pytest.mark.parametrize("path", ["/queries", "/retrieve"])
def test_both_contracts_return_the_same_hits(path):
    with LocalServer(answer) as server:
        hits = HttpRetriever(server.url + path).search(["a", "b"], 2)
    assert [[hit.line for hit in row] for row in hits] == [
        ["Title a   text 0", "Title a   text 1"],
        ["Title b   text 0", "Title b   text 1"],
    ]
    assert hits[0][1].id == "1" and (hits[0][1].title, hits[0][1].text) == ("Title a", "text 1")
    assert math.isnan(hits[0][1].score) if path == "/queries" else hits[0][1].score == 0.5


def test_repeated_queries_come_from_the_cache():
    with LocalServer(answer) as server:
        retriever = HttpRetriever(server.url + "/queries")
        first = retriever.search(["a", "b", "a"], 2)
        assert first[0] == first[2]
        assert [row[0].line for row in retriever.search(["b", "a"], 2)] == [
            first[1][0].line,
            first[0][0].line,
        ]
        assert server.requests == 1
        assert len(retriever.search(["a"], 3)[0]) == 3
        assert server.requests == 2


def test_the_cache_is_bounded_in_bytes():
    text = "x" * 1_000_000

    def answer(path, body):
        return 200, {"answers": [[text if query == "long" else query] for query in body["queries"]]}

    with LocalServer(answer) as server:
        retriever = HttpRetriever(server.url + "/queries", cached_bytes=100_000)
        assert len(retriever.search(["long"], 1)[0][0].line) == len(text)
        for i in range(1000):
            retriever._cache.put(f"q{i}", 1, [Hit("", 0.0, "y" * 1000)])
        cached = [i for i in range(1000) if retriever._cache.get(f"q{i}", 1)]
        assert 50 < len(cached) < 100 and cached[-1] == 999
        assert not retriever._cache.get("long", 1)


def test_a_busy_server_is_retried():
    busy = iter([503, 429, 500])
    with LocalServer(lambda p, b: (s, {}) if (s := next(busy, 0)) else answer(p, b)) as server:
        hits = HttpRetriever(server.url + "/queries").search(["a"], 1)
        assert hits[0][0].line == "Title a   text 0" and server.requests == 4


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((500, {}), "status 500"),
        ((404, {"detail": "no"}), "status 404"),
        ((302, {}), "status 302"),
        ((200, b"<html>hello</html>"), "not a reply of the contract /queries"),
        ((200, {"answers": [[1]]}), r"answers\[0\]\[0\]: Expected `str`"),
        ((200, {"answers": [["a"], ["b"]]}), "2 answers to 1 queries"),
        ((200, {"answers": None}), "not a reply"),
        ((200, {"answers": ["Dune is"]}), "not a reply.*Expected `array`, got `str`"),
        ((200, {"answers": [{"Dune": "is"}]}), "not a reply"),
        ((200, {"answers": {"a": ["b"]}}), "not a reply"),
        ((200, [1]), "not a reply"),
    ],
)
def test_a_failing_server_is_an_error_and_never_an_empty_result(reply, message):
    with LocalServer(lambda *_: reply) as server:
        retriever = HttpRetriever(server.url + "/queries", retries=1)
        with pytest.raises(RemoteError, match=message):
            retriever.search(["a"], 1)


def test_a_server_that_is_slow_or_gone_is_an_error():
    with LocalServer(lambda *_: time.sleep(2) or (200, {})) as server:
        retriever = HttpRetriever(server.url + "/retrieve", timeout_s=0.1, retries=0)
        with pytest.raises(RemoteError, match=r"no whole answer within 0.1 s"):
            retriever.search(["a"], 1)
    with pytest.raises(RemoteError, match=r"refused|NewConnection"):
        HttpRetriever(server.url + "/retrieve", retries=0).search(["a"], 1)


def test_many_threads_search_at_once():
    with LocalServer(answer) as server:
        retriever = HttpRetriever(server.url + "/queries", connections=4)
        with ThreadPoolExecutor(16) as threads:
            rows = list(threads.map(lambda i: retriever.search([f"q{i}"], 1), range(200)))
    assert [row[0][0].title for row in rows] == [f"Title q{i}" for i in range(200)]


def test_a_url_of_neither_contract_is_refused():
    with pytest.raises(ValueError, match="ends in /queries"):
        HttpRetriever("http://localhost:8000/")


def test_a_server_that_drips_does_not_outlast_the_deadline():
    listener, url = drip(30)
    with listener:
        retriever = HttpRetriever(url + "/queries", timeout_s=0.5, retries=0)
        begin = time.monotonic()
        with pytest.raises(RemoteError, match=r"no whole answer within 0.5 s"):
            retriever.search(["a"], 1)
        assert time.monotonic() - begin < 20


def test_an_incomplete_reply_is_retried():
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
    # The connection ends before the body, in the middle of it, and after it.
    listener, url = breaking(head % 9, head % 9 + b'{"a"', head % 9 + b'{"a": 1} ')
    with listener:
        assert Client(timeout_s=20, retries=2).post(url, {}) == b'{"a": 1} '
    listener, url = breaking(head % 9 + b'{"a"', head % 9 + b'{"a"')
    with listener, pytest.raises(ServerError, match=r"IncompleteRead|broke off"):
        Client(timeout_s=20, retries=1).post(url, {})


def test_a_reply_without_end_is_refused():
    with (
        LocalServer(lambda *_: (200, b"[" + b"1," * 10**6)) as server,
        pytest.raises(ServerError, match=r"the reply is over 1 MiB"),
    ):
        Client(timeout_s=20, retries=0).post(server.url + "/queries", {}, most_bytes=2**20)


def test_documents_in_other_forms_are_read():
    """Titles with quotes, separate title and text, no score, as in replies of real servers."""
    documents = [
        {"document": {"id": 7, "contents": '""Heroes" (album)"\nA song.'}, "score": None},
        {"document": {"title": "1984", "text": "A novel."}, "score": 0.5},
        {"contents": '"12 Years a Slave"\nA film.'},
    ]
    with LocalServer(lambda *_: (200, {"result": [documents]})) as server:
        hits = HttpRetriever(server.url + "/retrieve").search(["a"], 3)[0]
    assert [hit.line for hit in hits] == [
        '"Heroes" (album)   A song.',
        "1984   A novel.",
        "12 Years a Slave   A film.",
    ]
    assert hits[0].id == "7" and math.isnan(hits[0].score) and hits[1].score == 0.5


def test_credentials_stay_out_of_messages():
    with pytest.raises(RemoteError) as error:
        HttpRetriever("http://me:secret@127.0.0.1:9/queries?key=hidden", retries=0).search(["a"], 1)
    assert "secret" not in str(error.value) and "hidden" not in str(error.value)
