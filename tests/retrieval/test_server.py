"""The server in its own process behind a real socket: contracts, load, limits and shutdown."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
import uvicorn

from r1s_jax.io.origins import Callers, callers
from r1s_jax.retrieval.api import Passage
from r1s_jax.retrieval.encoder import HashEncoder
from r1s_jax.retrieval.http import HttpRetriever, RemoteError
from r1s_jax.retrieval.index import Index, build_index, save_index
from r1s_jax.retrieval.server import Batcher, Limits, Refused, bind, make_app, serve_in_background
from tests.http_server import LocalServer

NAMES = [
    f"{a}{b}{c}" for a in "bdkmrt" for b in ("alo", "ure", "ini") for c in ("sta", "vor", "pel")
]


class ServerProcess:
    """`r1s index serve` on a port; killed at the end of the test if it still runs."""

    def __init__(self, index: Path, port: int = 0):
        command = [sys.executable, "-m", "r1s_jax.cli", "index", "serve", str(index)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=subprocess.PIPE, text=True, env=environment
        )
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1:"), "the server did not start"
        self.port = int(self.url.rpartition(":")[2])

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        text = urllib.request.urlopen(f"{self.url}/metrics").read().decode()
        return sum(float(x) for x in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.M))


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Index:
    lines = [f"{name.title()}   {name.title()} lives in {name}burg." for name in NAMES]
    lines.append("a line without a title")
    return build_index([Passage(str(i), line) for i, line in enumerate(lines)], HashEncoder())


@pytest.fixture(scope="module")
def folder(index, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("served") / "index"
    save_index(index, path)
    return path


@pytest.fixture(scope="module")
def server(folder):
    with ServerProcess(folder) as running:
        yield running


JSON = {"Content-Type": "application/json"}


def post(url: str, body: object, headers: dict[str, str] = JSON) -> tuple[int, dict]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_replies_follow_both_contracts_exactly(server, index):
    queries = [NAMES[3], "line without title"]
    hits = index.search(queries, 2)
    status, reply = post(f"{server.url}/queries", {"queries": queries, "k": 2})
    answers = [[f"{hit.id}\t{hit.line}" for hit in row] for row in hits]
    assert (status, reply) == (200, {"queries": queries, "answers": answers})

    name = NAMES[3].title()
    first = {"id": "3", "contents": f'"{name}"\n{name} lives in {NAMES[3]}burg.'}
    body = {"queries": queries, "topk": 2, "return_scores": True}
    status, reply = post(f"{server.url}/retrieve", body)
    assert status == 200 and reply.keys() == {"result"}
    assert reply["result"][0][0] == {"document": first, "score": hits[0][0].score}
    assert reply["result"][1][0]["document"]["contents"] == "a line without a title"
    assert [len(row) for row in reply["result"]] == [2, 2]
    status, bare = post(f"{server.url}/retrieve", {"queries": queries[:1]})
    assert status == 200 and bare["result"][0][0] == first and len(bare["result"][0]) == 3
    assert post(f"{server.url}/queries", {"queries": []}) == (200, {"queries": [], "answers": []})


@pytest.mark.parametrize("path", ["/queries", "/retrieve"])
def test_our_client_finds_the_same_as_the_index(server, index, path):
    hits = HttpRetriever(server.url + path).search(NAMES[:20], 3)
    expected = index.search(NAMES[:20], 3)
    assert [[(h.id, h.line) for h in row] for row in hits] == [
        [(h.id, h.line) for h in row] for row in expected
    ]
    if path == "/retrieve":
        assert [[h.score for h in row] for row in hits] == [
            [h.score for h in row] for row in expected
        ]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/queries", b"{", 400, "not JSON"),
        ("/queries", b"\xff", 400, "not JSON"),
        ("/queries", b"[" * 100_000, 400, "not JSON"),
        ("/queries", [1], 400, "expected"),
        ("/queries", {"queries": "a"}, 400, "expected"),
        ("/queries", {"queries": [1]}, 400, "expected"),
        ("/queries", {"queries": ["\ud800"]}, 400, "Unicode"),
        ("/queries", {"queries": ["a"], "k": 0}, 400, "'k' must be a whole number from 1 to 100"),
        ("/queries", {"queries": ["a"], "k": True}, 400, "'k' must"),
        ("/retrieve", {"queries": ["a"], "topk": 101}, 400, "'topk' must"),
        ("/retrieve", {"queries": ["a"], "return_scores": "yes"}, 400, "return_scores"),
        ("/queries", {"queries": ["a"] * 4097}, 413, "4097 queries; the most is 4096"),
        ("/queries", b" " * (2**22 + 1), 413, "more than 4,194,304 bytes"),
        ("/queries", {"queries": ["x" * 16_385]}, 413, "16,385 characters; the most is 16,384"),
        ("/queries", {"queries": ["a"] * 4096, "k": 11}, 413, "40,960 passages a request"),
        ("/nothing", {}, 404, "Not Found: POST /nothing; this server has POST /queries"),
        ("/healthz", {}, 405, "Method Not Allowed: POST /healthz; this server has"),
    ],
)
def test_wrong_requests_get_an_error(server, path, body, status, message):
    code, reply = post(server.url + path, body)
    assert code == status and message in reply["error"]


def test_health_and_metrics(server):
    health = json.load(urllib.request.urlopen(f"{server.url}/healthz"))
    assert health == {"status": "ok", "passages": len(NAMES) + 1}
    before = [server.metric(f"r1s_{name}_total") for name in ("requests", "queries", "errors")]
    post(f"{server.url}/queries", {"queries": ["a", "b"]})
    post(f"{server.url}/queries", {"queries": [1]})
    after = [server.metric(f"r1s_{name}_total") for name in ("requests", "queries", "errors")]
    assert [b - a for a, b in zip(before, after, strict=True)] == [2, 2, 0]
    assert server.metric("r1s_request_seconds_count") == after[0]
    assert server.metric("r1s_batch_queries_sum") == after[1]
    assert server.metric("r1s_waiting_queries") == 0


def search_until(url: str, stop: Callable[[int], bool], client: int, retries: int = 4) -> int:
    """Sends new queries and checks each answer until `stop`; returns their number."""
    retriever, done = HttpRetriever(url, retries=retries, timeout_s=60, connections=1), 0
    while not stop(done):
        name = NAMES[(client + done) % len(NAMES)]
        k = 1 + client % 2
        row = retriever.search([f"{name} {client} {done}"], k)[0]
        assert len(row) == k and row[0].title == name.title()
        done += 1
    return done


@pytest.mark.parametrize("seconds", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_64_clients_at_once_lose_nothing(server, seconds):
    before = server.metric("r1s_requests_total")
    end = time.monotonic() + seconds
    urls = [f"{server.url}/{path}" for path in ("queries", "retrieve")]
    with ThreadPoolExecutor(64) as threads:
        clients = [
            threads.submit(search_until, urls[i % 2], lambda _: time.monotonic() > end, i, 0)
            for i in range(64)
        ]
        done = [client.result() for client in clients]
    print(f"{sum(done) / seconds:.0f} requests a second")
    assert min(done) > 0 and server.metric("r1s_requests_total") - before == sum(done)
    assert server.metric('r1s_batch_queries_bucket{le="1.0"}') < server.metric(
        "r1s_batch_queries_count"
    ), "no two requests were ever searched together"


@pytest.mark.slow
def test_clients_outlive_a_killed_server(folder):
    with ServerProcess(folder) as first, ThreadPoolExecutor(8) as threads:
        restarted = threading.Event()
        url = f"{first.url}/queries"
        clients = [
            threads.submit(search_until, url, lambda n: restarted.is_set() and n > 50, i, 8)
            for i in range(8)
        ]
        while first.metric("r1s_requests_total") < 200:
            time.sleep(0.01)
        first.process.kill()
        first.process.wait()
        with pytest.raises(RemoteError):
            HttpRetriever(url, retries=0).search(["a"], 1)
        with ServerProcess(folder, first.port) as second:
            assert second.url == first.url
            restarted.set()
            assert all(client.result(60) > 50 for client in clients)
            assert second.metric("r1s_errors_total") == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_requests_in_flight_are_answered_before_shutdown(folder, number):
    words = [f"w{i:05}" for i in range(30_000)]
    queries = [" ".join(words[i : i + 20]) for i in range(0, len(words), 20)]
    with ServerProcess(folder) as running, ThreadPoolExecutor(1) as threads:
        reply = threads.submit(post, f"{running.url}/queries", {"queries": queries, "k": 1})
        while not running.metric("r1s_batch_queries_count"):
            time.sleep(0.01)
        running.process.send_signal(number)
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            while True:
                urllib.request.urlopen(f"{running.url}/healthz").close()
        assert not reply.done()
        status, body = reply.result(60)
        assert status == 200 and len(body["answers"]) == len(queries)
        assert running.process.wait(30) == 0


def test_half_a_request_does_not_delay_shutdown(folder):
    head = b"POST /queries HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    body = b'{"queries": ["a"]}'
    head += f"Content-Length: {len(body)}\r\n\r\n".encode()
    with ServerProcess(folder) as running:
        half, late = (socket.create_connection(("127.0.0.1", running.port)) for _ in range(2))
        half.sendall(head + body[:5])
        late.sendall(head)
        urllib.request.urlopen(f"{running.url}/healthz").close()
        started = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        late.sendall(body)  # in time
        assert late.recv(100).startswith(b"HTTP/1.1 200")
        assert running.process.wait(10) == 0 and time.monotonic() - started < 8
        half.close()
        late.close()


def test_only_allowed_pages_may_call_it(index):
    allowed = callers("127.0.0.1", ["http://localhost:5173"])
    url = serve_in_background(index, "127.0.0.1")
    body = {"queries": [NAMES[0]]}
    for headers, status in (
        ({}, 200),
        ({"Content-Type": "text/plain"}, 415),
        ({"Origin": "http://evil.example"}, 403),
        ({"Host": "evil.example"}, 403),
    ):
        assert post(f"{url}/queries", body, JSON | headers)[0] == status
    retriever = Gated(index)
    retriever.gate.set()
    with in_process(retriever, Limits(), allowed) as url:
        headers = JSON | {"Origin": "http://localhost:5173"}
        request = urllib.request.Request(f"{url}/queries", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as reply:
            assert reply.headers["Access-Control-Allow-Origin"] == "http://localhost:5173"


def test_a_used_port_is_reported_at_once(folder):
    with LocalServer(lambda *_: (200, {})) as other:
        port = str(other.server_address[1])
        command = [sys.executable, "-m", "r1s_jax.cli", "index", "serve", str(folder)]
        done = subprocess.run([*command, "--port", port], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in done.stderr


class Gated:
    """An index whose searches wait until `gate` is set, and fail for the query "bad"."""

    def __init__(self, index: Index):
        self._index, self.gate, self.asked = index, threading.Event(), []

    def __len__(self) -> int:
        return len(self._index)

    def search(self, queries, k):
        self.asked.append(list(queries))
        self.gate.wait()
        if "bad" in queries:
            raise ValueError("a bad query")
        return self._index.search(queries, k)

    def wait_for_query(self) -> None:
        while not self.asked:
            time.sleep(0.01)


@contextmanager
def in_process(retriever: Gated, limits: Limits, allowed: Callers | None = None):
    """The application on a thread of this process, so that tests can block the index."""
    app = make_app(retriever, limits, allowed)
    running = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    with bind("127.0.0.1", 0) as bound:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        while not running.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            retriever.gate.set()
            running.should_exit = True
            thread.join(10)


def test_a_failing_search_is_an_error_and_never_an_empty_result(index):
    retriever = Gated(index)
    retriever.gate.set()
    with in_process(retriever, Limits()) as url:
        status, reply = post(f"{url}/queries", {"queries": ["bad"]})
        assert status == 500 and "a bad query" in reply["error"]
        metrics = urllib.request.urlopen(f"{url}/metrics").read().decode()
        assert "r1s_errors_total 1.0" in metrics and 'status="500"} 1.0' in metrics


def test_a_full_queue_refuses_queries_until_there_is_room(index):
    retriever = Gated(index)
    with in_process(retriever, Limits(waiting=2)) as url, ThreadPoolExecutor(3) as threads:
        first = threads.submit(post, f"{url}/queries", {"queries": ["a"]})
        retriever.wait_for_query()
        second = threads.submit(post, f"{url}/queries", {"queries": ["b", "c"]})
        while b"r1s_waiting_queries 2.0" not in urllib.request.urlopen(f"{url}/metrics").read():
            time.sleep(0.01)
        status, reply = post(f"{url}/queries", {"queries": ["d"]})
        assert status == 503 and "more than 2 queries are waiting" in reply["error"]
        patient = threads.submit(HttpRetriever(f"{url}/queries").search, [NAMES[0]], 1)
        retriever.gate.set()
        assert [first.result()[0], second.result()[0]] == [200, 200]
        assert patient.result()[0][0].title == NAMES[0].title()


def test_batches_group_waiting_queries_by_k(index):
    sizes, retriever = [], Gated(index)
    batcher = Batcher(retriever, Limits(batch=4), sizes.append)
    batcher.submit(["first"], 1)
    retriever.wait_for_query()
    requests = [(NAMES[2 * i : 2 * i + 2], k) for i, k in enumerate((1, 2, 1, 1, 2))]
    jobs = [batcher.submit(*request) for request in [*requests, (NAMES[:9], 1)]]
    retriever.gate.set()
    batcher.close()
    assert sizes == [1, 4, 4, 4, 4, 3]  # the request of nine alternates with the others
    for (queries, k), job in zip([*requests, (NAMES[:9], 1)], jobs, strict=True):
        assert job.result() == index.search(queries, k)
    with pytest.raises(Refused, match="stopping"):
        batcher.submit(["late"], 1)


def test_a_large_request_delays_no_other(index):
    retriever = Gated(index)
    batcher = Batcher(retriever, Limits(batch=4, characters=40), lambda _: None)
    large = batcher.submit([f"large {i}" for i in range(40)], 1)
    retriever.wait_for_query()
    long = batcher.submit(["x" * 25] * 3, 1)
    small = batcher.submit(["small"], 1)
    retriever.gate.set()
    batcher.close()
    turns = ["".join(sorted({query[0] for query in queries})) for queries in retriever.asked]
    assert "s" in turns[2] and len(small.result()) == 1
    assert max(sum(map(len, queries)) for queries in retriever.asked) <= 40
    assert large.result() == index.search([f"large {i}" for i in range(40)], 1)
    assert long.result() == index.search(["x" * 25] * 3, 1)


def test_a_bad_request_does_not_fail_others_in_its_batch(index):
    retriever = Gated(index)
    batcher = Batcher(retriever, Limits(), lambda _: None)
    first = batcher.submit(["first"], 1)
    retriever.wait_for_query()
    jobs = [batcher.submit([query], 1) for query in ("good", "bad", "fine")]
    retriever.gate.set()
    batcher.close()
    assert ["good", "bad", "fine"] in retriever.asked
    assert [job.exception() is None for job in (first, *jobs)] == [True, True, False, True]


def test_a_request_that_fails_midway_fails_entirely(index):
    retriever = Gated(index)
    retriever.gate.set()
    batcher = Batcher(retriever, Limits(batch=2), lambda _: None)
    job = batcher.submit(["good", "fine", "bad", "good", "fine"], 1)
    assert "a bad query" in str(job.exception(10)) and batcher.waiting() == 0
    assert batcher.submit(["good"], 1).result(10)
    batcher.close()


def test_a_client_that_never_finishes_its_request_is_disconnected(index, monkeypatch):
    monkeypatch.setattr("r1s_jax.io.listen._REQUEST_S", 0.3)
    address = serve_in_background(index, "127.0.0.1")
    port = int(address.rpartition(":")[2])
    for sent in (
        b"",
        b"POST /queries HT",
        b"POST /queries HTTP/1.1\r\nContent-Length: 99\r\n\r\n{",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as slow:
            slow.sendall(sent)
            while slow.recv(4096):  # an error reply, if any, and then the end
                pass
    assert HttpRetriever(f"{address}/queries").search(["a"], 1)[0]
