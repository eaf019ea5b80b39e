"""`r1s serve` in its own process: start, misbehaving clients, and shutdown."""

import asyncio
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from urllib.parse import urlsplit

import openai
import psutil
import pytest

from r1s_jax.data.tiny_world import TRADES
from r1s_jax.models.weights import save_params
from tests.http_server import LocalServer
from tests.makers import run_cli, scripted_policy
from tests.serving.test_server import ASK, HEAD, get, until

RUBBISH = [
    b"\x00\xff\xfe\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: " + b"x" * 200_000 + b"\r\n\r\n",
    f"{HEAD}Content-Length: 9\r\n\r\nnot json!".encode(),
    f"{HEAD}Content-Length: 5000\r\n\r\n{{".encode(),
    f"{HEAD}Transfer-Encoding: chunked\r\n\r\nzz\r\n".encode(),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    policy = scripted_policy()
    out = tmp_path_factory.mktemp("scripted") / "policy"
    return save_params(
        policy.params, policy.model, out, policy.tokenizer, "float32", dialect=policy.dialect
    )


def slowly(seconds: float):
    def answer(path, body):
        time.sleep(seconds)
        return 200, {"answers": [[f"{query}   found"] for query in body["queries"]]}

    return answer


@contextmanager
def serving(folder, retriever: str, *more: str):
    """The process and its address."""
    command = [sys.executable, "-m", "r1s_jax.cli", "serve", str(folder), "--port", "0"]
    command += ["--retriever", f"{retriever}/queries", "rollout.max_length=256", *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", line), line
        yield process, line
    finally:
        process.kill()
        process.wait()


def client_of(url: str, kind=openai.OpenAI):
    return kind(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60)


def test_sigterm_lets_running_answers_finish(folder):
    with LocalServer(slowly(1.5)) as engine, serving(folder, engine.url) as (process, url):
        client, got = client_of(url), []
        assert [m.id for m in client.models.list()] == ["policy"]
        assert json.loads(get(f"{url}/health"))["slots"] == 16

        def ask(stream: bool) -> None:
            done = client.chat.completions.create(model="policy", messages=ASK, stream=stream)
            if stream:
                got.append("".join(c.choices[0].delta.content or "" for c in done))
            else:
                got.append(done.choices[0].message.content)

        threads = [threading.Thread(target=ask, args=(i % 2 == 0,)) for i in range(4)]
        for thread in threads:
            thread.start()
        until(lambda: engine.requests >= 1)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(30)
        assert process.wait(30) == 0
        assert len(got) == 4 and set(got) <= set(TRADES)
        with pytest.raises(OSError):
            get(url)


@pytest.mark.parametrize(
    "seconds", [pytest.param(4, id="short"), pytest.param(30, id="long", marks=pytest.mark.slow)]
)
def test_clients_that_hang_up_or_send_rubbish_do_not_affect_others(folder, seconds):
    with (
        LocalServer(slowly(0.05)) as engine,
        serving(folder, engine.url, "--waiting", "200") as (process, url),
    ):
        expected = {seed: _ask(url, seed) for seed in range(8)}
        memory = psutil.Process(process.pid).memory_info().rss
        wrong, right = asyncio.run(_crowd(url, seconds, expected))
        assert not wrong and right > 64
        until(lambda: json.loads(get(f"{url}/health"))["busy"] == 0)
        assert psutil.Process(process.pid).memory_info().rss - memory < 200e6

        late = threading.Thread(target=lambda: asyncio.run(_crowd(url, 3, expected)))
        late.start()
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
        late.join(60)
        assert not late.is_alive()


def _ask(url: str, seed: int) -> tuple:
    done = client_of(url).chat.completions.create(model="policy", messages=ASK, seed=seed)
    message = done.choices[0].message
    return message.content, message.reasoning_content, message.searches[0]["query"]


async def _crowd(url: str, seconds: float, expected: dict) -> tuple[list, int]:
    """Runs 64 clients; some hang up half-way, one in eight sends rubbish. Returns the wrong answers
    to the others and the number of right ones."""
    client, end = client_of(url, openai.AsyncOpenAI), time.monotonic() + seconds
    wrong, right = [], 0

    async def one(number: int) -> None:
        nonlocal right
        draw = random.Random(number)
        while time.monotonic() < end:
            seed = draw.randrange(8)
            if number % 8 == 0:
                await _send(url, draw.choice(RUBBISH))
                continue
            try:
                if number % 4 == 1:
                    await _hang_up(url, seed, draw.uniform(0, 0.2))
                    continue
                done = await client.chat.completions.create(model="policy", messages=ASK, seed=seed)
                message = done.choices[0].message
                got = message.content, message.reasoning_content, message.searches[0]["query"]
                right += got == expected[seed]
                if got != expected[seed]:
                    wrong.append((seed, got))
            except Exception as error:
                wrong.append(error)

    await asyncio.gather(*map(one, range(64)))
    return wrong, right


async def _send(url: str, data: bytes) -> None:
    place = urlsplit(url)
    try:
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        writer.write(data)
        await asyncio.wait_for(reader.read(100), 0.3)
    except (OSError, TimeoutError):
        pass
    else:
        writer.close()


async def _hang_up(url: str, seed: int, after: float) -> None:
    body = json.dumps({"messages": ASK, "seed": seed, "stream": True})
    head = f"{HEAD}Content-Length: {len(body)}\r\n\r\n"
    place = urlsplit(url)
    try:
        _, writer = await asyncio.open_connection(place.hostname, place.port)
        writer.write((head + body).encode())
        await asyncio.sleep(after)
        writer.transport.abort()
    except OSError:
        pass


def test_a_client_that_stops_reading_is_disconnected(folder, monkeypatch):
    from r1s_jax.serving import events

    async def never(message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.sleep(60)

    async def forever():
        while True:
            yield b"data: x\n\n"

    async def receive():
        await asyncio.sleep(60)

    monkeypatch.setattr(events, "_WRITE_S", 0.1)
    calls = []
    stream = events.EventStream(forever(), lambda: calls.append(True))
    with pytest.raises(ConnectionError, match="stopped reading"):
        asyncio.run(stream({}, receive, never))
    assert calls == [True]


def test_bad_input_is_one_message(folder, tmp_path):
    port = socket.create_server(("127.0.0.1", 0))
    with port:
        used_port = str(port.getsockname()[1])
        for arguments, words in [
            ((str(folder),), "name one of an index"),
            ((str(tmp_path / "none"), "--retriever", "http://x/queries"), "none"),
            ((str(folder), "--retriever", "http://x/nothing"), "/retrieve"),
            ((str(folder), "--retriever", "http://x/queries", "--port", used_port), "--port"),
            (
                (str(folder), "--retriever", "http://x/queries", "protocol.dialect=tool_call"),
                "speaks",
            ),
            ((str(folder), "--retriever", "http://x/queries", "--cors", "localhost:1"), "--cors"),
            ((str(folder), "--retriever", "http://x/queries", "--api-key", "ü"), "--api-key"),
        ]:
            done = run_cli("serve", *arguments)
            assert done.exit_code, arguments
            said = done.output + str(done.exception)
            assert words in said and len(str(done.exception)) < 400, said
