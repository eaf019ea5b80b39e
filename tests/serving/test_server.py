"""The chat API over real sockets, with OpenAI's own client."""

import asyncio
import dataclasses
import http.client
import itertools
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from urllib.parse import urlsplit

import numpy as np
import openai
import pytest

from r1s_jax.data.tiny_world import TRADES
from r1s_jax.io import listen
from r1s_jax.io.errors import ConfigError
from r1s_jax.io.origins import callers
from r1s_jax.serving.completion import Limits
from r1s_jax.serving.loop import ServingLoop
from r1s_jax.serving.server import Service, check_key, make_app
from tests.fakes import GatedRetriever, RaisingRetriever, WebRetriever
from tests.makers import ROLLOUT, scripted_policy

CONFIG = dataclasses.replace(ROLLOUT, slots=4, prefill_rows=2, max_prompt_length=95)
ASK = [{"role": "user", "content": "What is the trade of Bakori?"}]
CHAT = "/v1/chat/completions"
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@contextmanager
def serving(retriever, *, waiting: int = 64, retrieve_first: bool = False, **how):
    config = dataclasses.replace(CONFIG, retrieve_first=retrieve_first)
    serving_loop = ServingLoop(
        scripted_policy(), retriever, config, waiting=waiting, compute_dtype=np.dtype("float32")
    )
    service = Service(serving_loop, "tiny", **how)
    try:
        yield (
            listen.serve_in_background(make_app(service), listen.bind("127.0.0.1", 0)),
            serving_loop,
        )
    finally:
        serving_loop.close()


@pytest.fixture(scope="module")
def served():
    with serving(WebRetriever()) as (url, serving_loop):
        yield url, serving_loop


@pytest.fixture(scope="module")
def url(served):
    return served[0]


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)


def streamed(chunks) -> tuple[dict, list]:
    """The reassembled answers of a stream, and its last usage."""
    answers, usage = {}, None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            a = answers.setdefault(
                choice.index, {"content": "", "thoughts": "", "searches": {}, "annotations": []}
            )
            more = choice.delta.model_extra
            a["content"] += choice.delta.content or ""
            a["thoughts"] += more.get("reasoning_content", "")
            a["annotations"] += more.get("annotations", [])
            for search in more.get("searches", []):
                a["searches"][search.pop("index")] = search
            a["finish"] = choice.finish_reason or a.get("finish")
    return answers, usage


def post(url: str, body, headers: dict | None = None):
    """(status, reply, headers) of a request, valid or not."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"Content-Type": "application/json"} | (headers or {})
    request = urllib.request.Request(url + CHAT, data, sent)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.loads(reply.read()), reply.headers
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), error.headers


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as reply:
        return reply.read().decode()


def until(condition) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came to be")


def test_the_openai_client_gets_answer_thoughts_and_searches(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    whole = client.chat.completions.create(model="tiny", messages=ASK, seed=3)
    message, (choice,) = whole.choices[0].message, whole.choices
    assert choice.finish_reason == "stop" and message.role == "assistant"
    assert message.content in TRADES[3:9]
    assert message.reasoning_content in ("teacher", "birthplace", "trade")
    (search,) = message.searches
    assert search["query"] in TRADES[:3] and search["status"] == "found"
    assert search["documents"][1] == {
        "id": f"https://pages/{search['query']}/2",
        "title": search["query"],
        "text": "the 2",
        "url": f"https://pages/{search['query']}/2",
    }
    cited = [note.url_citation for note in message.annotations]
    assert [note.url for note in cited] == [d["url"] for d in search["documents"]]
    assert {(note.start_index, note.end_index) for note in cited} == {(0, len(message.content))}
    usage = whole.usage
    assert usage.completion_tokens == 8
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_stream_equals_the_whole_answer(client):
    for seed in range(5):
        how = {"model": "tiny", "messages": ASK, "seed": seed, "n": 3}
        whole = client.chat.completions.create(**how)
        answers, usage = streamed(
            client.chat.completions.create(
                **how, stream=True, stream_options={"include_usage": True}
            )
        )
        assert usage == whole.usage
        for choice in whole.choices:
            a, message = answers[choice.index], choice.message
            assert (a["content"], a["thoughts"]) == (message.content, message.reasoning_content)
            assert [a["searches"][i] for i in sorted(a["searches"])] == message.searches
            assert a["annotations"] == [note.model_dump() for note in message.annotations]
            assert a["finish"] == choice.finish_reason
    assert len({(c.message.content, c.message.reasoning_content) for c in whole.choices}) > 1


def test_equal_requests_get_equal_answers_in_any_company(url):
    async_client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)

    async def ask(seed: int):
        how = {"temperature": 0} if seed % 4 == 0 else {"seed": seed}
        done = await async_client.chat.completions.create(model="tiny", messages=ASK, **how)
        return done.choices[0].message.model_dump()

    async def both():
        together = await asyncio.gather(*map(ask, range(16)))
        return together, [await ask(seed) for seed in range(16)]

    together, alone = asyncio.run(both())
    assert together == alone


def test_limits_and_stops(client):
    def ask(**how):
        done = client.chat.completions.create(model="tiny", messages=ASK, temperature=0, **how)
        return done.choices[0].finish_reason, done.choices[0].message, done.usage

    _, whole, _ = ask()
    almost = client.chat.completions.create(model="tiny", messages=ASK, temperature=1e-9)
    assert almost.choices[0].message.content == whole.content
    finish, message, usage = ask(max_tokens=6)
    assert (finish, usage.completion_tokens) == ("length", 6) and message.searches == whole.searches
    stop = whole.content[1:]
    finish, message, usage = ask(stop=[stop, "never"])
    assert (finish, message.content) == ("stop", whole.content[0])
    assert usage.completion_tokens == 7  # includes tokens after the stop text
    answers, _ = streamed(
        client.chat.completions.create(
            model="tiny", messages=ASK, temperature=0, stop=stop, stream=True
        )
    )
    assert answers[0]["content"] == whole.content[0]


def test_messages_of_several_turns_form_one_prompt(served, client):
    earlier = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is the trade?"}]},
        {"role": "assistant", "content": "smith"},
    ]
    done = client.chat.completions.create(model="tiny", messages=[*earlier, *ASK], temperature=0)
    alone = client.chat.completions.create(model="tiny", messages=ASK, temperature=0)
    assert done.choices[0].message.content == alone.choices[0].message.content
    assert done.usage.prompt_tokens > alone.usage.prompt_tokens


WRONG = [
    (b"{", 400, "no JSON"),
    (b"[1]", 400, "object"),
    (b'{"messages": [{"role": "user", "content": "\xff"}]}', 400, "UTF-8"),
    (b"[" * 100_000, 400, "deep"),
    ({}, 400, "messages"),
    ({"messages": []}, 400, "at least one"),
    ({"messages": "x"}, 400, "messages"),
    ({"messages": [{"role": "user"}]}, 400, "content"),
    ({"messages": [{"role": "user", "content": ""}]}, 400, "expected a question"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "role"),
    ({"messages": [*ASK, {"role": "assistant", "content": "x"}]}, 400, "last one"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "only text"),
    ({"messages": [{"role": "user", "content": "Bakori " * 200}]}, 400, "tokens"),
    ({"messages": ASK, "temperature": "hot"}, 400, "temperature"),
    ({"messages": ASK, "temperature": 3}, 400, "temperature"),
    ({"messages": ASK, "top_p": -1}, 400, "top_p"),
    ({"messages": ASK, "max_tokens": 0}, 400, "max_tokens"),
    ({"messages": ASK, "n": 1000}, 400, "n must"),
    ({"messages": ASK, "seed": 2**70}, 400, "seed"),
    ({"messages": ASK, "stop": list("abcde")}, 400, "stop"),
    ({"messages": ASK, "stream_options": {}}, 400, "stream"),
    ({"messages": ASK, "tools": [{"type": "function"}]}, 400, "tools"),
    ({"messages": ASK, "logprobs": True}, 400, "logprobs"),
    ({"messages": ASK, "response_format": {"type": "json_object"}}, 400, "response_format"),
    ({"messages": ASK, "frobnicate": 1}, 400, "Unrecognized request argument: frobnicate"),
    ({"messages": ASK, "model": "gpt-5"}, 404, "does not exist"),
    ({"messages": [{"role": "user", "content": "x" * 900_000}]}, 400, "900,000 characters"),
    (b" " * 2_000_000, 413, "bytes"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_bad_requests_are_refused_in_openais_form(url, case):
    body, status, words = WRONG[case]
    got, reply, _ = post(url, body)
    assert got == status and set(reply) == {"error"}
    assert words in reply["error"]["message"] and len(reply["error"]["message"]) < 400
    assert set(reply["error"]) == {"message", "type", "param", "code"}


def test_fields_without_effect_on_the_answer_are_accepted(url):
    more = {"user": "me", "metadata": {}, "tools": [], "presence_penalty": 0, "logprobs": None}
    status, reply, _ = post(url, {"messages": ASK, **more})
    assert status == 200 and reply["choices"][0]["message"]["content"]
    status, reply, _ = post(url, {"messages": [{"role": "user", "content": "\ud800?"}]})
    assert status == 200


@pytest.mark.parametrize("path", ["/v1/nothing", "/v1/completions", "/chat/completions", CHAT])
def test_unknown_paths_name_the_known_ones(url, path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(url + path)
    said = json.loads(refused.value.read())["error"]["message"]
    assert f"GET {path}; this server has POST {CHAT}, GET /v1/models" in said


def test_the_model_by_its_name(url, client):
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'gpt-5' does not exist: there is 'tiny'"):
        client.models.retrieve("gpt-5")


def test_only_its_own_pages_may_call_it(url):
    for headers, status in (
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": ""}, 415),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
        ({"Origin": url}, 200),
    ):
        got, reply, _ = post(url, {"messages": ASK}, headers)
        assert got == status, headers
        assert status == 200 or set(reply["error"]) == {"message", "type", "param", "code"}


def test_pages_of_an_allowed_origin_may_call_it(served):
    _, serving_loop = served
    page = "http://localhost:5173"
    for key in ("", "secret"):
        service = Service(serving_loop, "tiny", key=key)
        app = make_app(service, callers("127.0.0.1", [page], key=bool(key)))
        url = listen.serve_in_background(app, listen.bind("127.0.0.1", 0))
        asks = {"Access-Control-Request-Method": "POST"}
        asks["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-os"
        for origin, status in ((page, 200), ("http://evil.example", 400)):
            preflight = urllib.request.Request(
                url + CHAT, headers={"Origin": origin} | asks, method="OPTIONS"
            )
            try:
                with urllib.request.urlopen(preflight) as reply:
                    got, headers = reply.status, reply.headers
            except urllib.error.HTTPError as error:
                got, headers = error.code, error.headers
            assert got == status
            allowed = headers.get("Access-Control-Allow-Origin")
            assert allowed == (page if status == 200 else None)
        sent = {"Origin": page, "Authorization": "Bearer secret"}
        status, _, headers = post(url, {"messages": ASK}, sent)
        assert (status, headers["Access-Control-Allow-Origin"]) == (200, page)
        status, _, headers = post(url, {"messages": []}, sent)
        assert (status, headers["Access-Control-Allow-Origin"]) == (400, page)


def test_health_metrics_and_the_page(url):
    assert json.loads(get(f"{url}/health"))["status"] == "ok"
    lines = dict(
        line.rsplit(" ", 1) for line in get(f"{url}/metrics").splitlines() if line[0] != "#"
    )
    assert float(lines['r1s_requests_total{status="200"}']) >= 1
    assert float(lines["r1s_tokens_written"]) >= 8 and float(lines["r1s_slots"]) == 4
    assert float(lines['r1s_searches{outcome="found"}']) >= 1
    assert float(lines["r1s_first_token_seconds_count"]) >= 1
    assert ".requestSubmit" not in get(f"{url}/page.js")  # opening a link must send nothing
    page = get(url)
    assert "<script src=" in page and "innerHTML" not in page + get(f"{url}/page.js")


def test_a_configured_key_is_required():
    with serving(WebRetriever(), key="secret") as (url, _):
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Bearer schlüssel"},
            {"Authorization": "secret"},
        ):
            sent = {name: value.encode().decode("latin-1") for name, value in headers.items()}
            status, reply, reply_headers = post(url, {"messages": ASK}, sent)
            assert status == 401 and reply["error"]["code"] == "invalid_api_key"
            assert reply_headers["WWW-Authenticate"] == "Bearer"
        raw = http.client.HTTPConnection(urlsplit(url).netloc)
        raw.request("GET", "/v1/models", headers={"Authorization": b"Bearer \xff\xfe"})
        assert raw.getresponse().status == 401
        assert post(url, {"messages": ASK}, {"Authorization": "bearer secret"})[0] == 200
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret")
        assert client.chat.completions.create(model="tiny", messages=ASK).choices[0].message.content
        for path in ("/health", "/metrics", "/", "/page.js"):
            assert get(url + path)


@pytest.mark.parametrize("key", ["schlüssel", "\udcff", "a\n", " a", "a\x00b"])
def test_a_key_that_no_client_can_send_is_refused(key):
    with pytest.raises(ConfigError, match="--api-key"):
        check_key(key)


def sent_request(url: str, **more) -> socket.socket:
    """A connection that sent a request and reads no reply yet."""
    host, port = urlsplit(url).hostname, urlsplit(url).port
    body = json.dumps({"messages": ASK, **more}).encode()
    sock = socket.create_connection((host, port))
    head = f"{HEAD}Content-Length: {len(body)}\r\n\r\n"
    sock.sendall(head.encode() + body)
    return sock


def test_clients_that_hang_up_free_their_slots_and_a_full_queue_sets_retry_after():
    retriever = GatedRetriever()
    with serving(retriever, waiting=1) as (url, serving_loop):
        gone = [sent_request(url, stream=i % 2 == 0) for i in range(4)]
        until(lambda: serving_loop.slots_busy == 4)
        waits = sent_request(url)
        until(lambda: serving_loop.queued == 1)
        status, reply, headers = post(url, {"messages": ASK})
        assert status == 429 and headers["Retry-After"]
        assert reply["error"]["code"] == "rate_limit_exceeded"
        for sock in gone:
            sock.close()
        until(lambda: serving_loop.slots_busy == 1 and serving_loop.queued == 0)
        retriever.gate.set()
        reply = http.client.HTTPResponse(waits)
        reply.begin()
        assert json.loads(reply.read())["choices"][0]["message"]["content"] in TRADES
        until(lambda: serving_loop.slots_busy == 0)


def test_an_answer_ends_at_its_deadline():
    retriever = GatedRetriever()
    with serving(retriever, limits=Limits(deadline_s=0.5)) as (url, serving_loop):
        status, reply, _ = post(url, {"messages": ASK})
        assert status == 504 and reply["error"]["code"] == "deadline"
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.APIError, match="no whole answer"):
            list(client.chat.completions.create(model="tiny", messages=ASK, stream=True))
        until(lambda: serving_loop.slots_busy == 0)
        retriever.gate.set()


def test_a_failing_retriever_is_reported_and_answers_continue():
    with serving(RaisingRetriever()) as (url, _):
        status, reply, _ = post(url, {"messages": ASK, "temperature": 0})
        message = reply["choices"][0]["message"]
        assert status == 200 and message["content"] in TRADES
        (search,) = message["searches"]
        assert search["query"] in TRADES and not search["documents"]
        assert (search["status"], search["error"]) == ("failed", "the search failed")
        assert 'r1s_searches{outcome="error"} 1.0' in get(f"{url}/metrics")


def test_the_system_may_search_the_question_itself_first(monkeypatch):
    monkeypatch.setattr("r1s_jax.serving.completion._QUIET_S", 0.05)
    retriever = GatedRetriever()
    with serving(retriever, retrieve_first=True) as (url, serving_loop):
        body = {"messages": ASK, "temperature": 0, "stream": True}
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any")
        stream = client.chat.completions.create(model="tiny", **body)  # starts before documents
        raw = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        raw.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
        lines = iter(raw.getresponse().readline, b"data: [DONE]\n")
        before = list(itertools.takewhile(lambda line: line != b": waiting\n", lines))
        assert b'"status": "searching"' in b"".join(before) and not retriever.answered.is_set()
        gone = sent_request(url, stream=True)
        until(lambda: len(retriever.queries) == 3)
        gone.close()
        retriever.gate.set()
        answers, _ = streamed(stream)
        assert all(line.strip() in (b"", b": waiting") or b"data" in line for line in lines)
        message = post(url, body | {"stream": False})[1]["choices"][0]["message"]
        (search,) = message["searches"]  # the policy does not search again
        assert search["query"] == ASK[0]["content"] and len(search["documents"]) == 2
        assert answers[0]["searches"][0] == search
        assert answers[0]["content"] == message["content"]
        until(lambda: serving_loop.slots_busy == 0)


def test_tokenised_prompts_have_a_place_and_a_deadline(served):
    _, serving_loop = served
    service = Service(serving_loop, "tiny", limits=Limits(deadline_s=2))
    gate, read = threading.Event(), service.desk.read
    service.desk.read = lambda raw: gate.wait() and read(raw)
    url = listen.serve_in_background(make_app(service), listen.bind("127.0.0.1", 0))
    places = serving_loop.waiting + serving_loop.rows
    connections = [sent_request(url) for _ in range(places)]
    until(lambda: service.desk._promised == places)
    assert post(url, {"messages": ASK})[0] == 429
    statuses = [http.client.HTTPResponse(sock) for sock in connections]
    for reply in statuses:
        reply.begin()
    assert {reply.status for reply in statuses} == {504}
    until(lambda: service.desk._promised == 0)
    gate.set()
    assert post(url, {"messages": ASK})[0] == 200


def test_a_failing_policy_is_reported_and_the_server_unhealthy():
    with serving(WebRetriever()) as (url, serving_loop):
        assert post(url, {"messages": ASK})[0] == 200  # everything is compiled and set up
        serving_loop.engine.programs = None
        status, reply, _ = post(url, {"messages": ASK})
        assert status == 500 and "policy failed" in reply["error"]["message"]
        status, reply, _ = post(url, {"messages": ASK})
        assert status == 503 and "policy failed" in reply["error"]["message"]
        with pytest.raises(urllib.error.HTTPError, match="503"):
            get(f"{url}/health")
