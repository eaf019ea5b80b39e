"""The judge against a real server that is slow, fails, and replies nonsense."""

import json
import threading
import time
from collections import Counter

import pytest

from r1s_jax.data.results import read_header, read_results
from r1s_jax.eval.judge import judge_file, parse_verdict
from r1s_jax.eval.score import summarize
from r1s_jax.io.journal import DataError
from r1s_jax.system.chat_api import ChatApiError, ChatEndpoint
from tests.http_server import LocalServer


class JudgeServer(LocalServer):
    """Replies True where the prediction is the gold answer; `faults(n)` may spoil request n.

    Replies to the first `together` requests once all of them are open; otherwise they fail.
    """

    def __init__(self, faults=lambda n: None, together=1):
        super().__init__(self.judge)
        self.faults, self.company = faults, threading.Barrier(together)
        self.together, self.arrived = together, 0
        self.judged, self.open, self.most_open = Counter(), 0, 0

    def judge(self, path, body):
        with self.lock:
            self.arrived += 1
            arrived, fault = self.arrived, self.faults(self.arrived)
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        if arrived <= self.together:
            self.company.wait(timeout=60)
        prompt = body["messages"][0]["content"]
        with self.lock:
            self.open -= 1
            self.judged[prompt] += fault is None
        if isinstance(fault, int):
            return fault, {"error": {"message": "overloaded"}}
        if fault is not None:
            return 200, fault
        gold = prompt.split("Correct answers: ")[1].splitlines()[0]
        predicted = prompt.split("Answer of the model: ")[1].splitlines()[0]
        verdict = "I cannot tell." if predicted == "?" else str(gold == predicted)
        message = {"role": "assistant", "content": verdict}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        reply = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
        return 200, reply | {"choices": [choice]}


def write_rows(path, n):
    rows = [
        {"question": f"q{i}", "answer": f"a{i}", "pred_ans": ["?", f"a{i}", "wrong"][i % 3]}
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, rows


def verdicts_of(out):
    return [json.loads(line).get("judge") for line in out.read_text().splitlines()]


WANTED = ["unparsable", "True", "False"]


def test_every_row_is_judged_once_despite_failures(tmp_path):
    path, rows = write_rows(tmp_path / "a.jsonl", 400)
    out = tmp_path / "a.judged.jsonl"
    statuses = [500, 429, 503]
    faults = lambda n: statuses[n // 10 % 3] if n % 10 == 0 else None  # noqa: E731
    with JudgeServer(faults, together=32) as server:
        counts = judge_file(path, ChatEndpoint(server.url, "j", concurrency=32), out)
    assert counts == {"unparsable": 134, "True": 133, "False": 133}
    assert verdicts_of(out) == [WANTED[i % 3] for i in range(400)]
    assert [json.loads(line)["question"] for line in out.read_text().splitlines()] == [
        row["question"] for row in rows
    ]
    assert len(server.judged) == 400 and set(server.judged.values()) == {1}
    assert server.most_open == 32
    scores = summarize(read_results(out))
    assert (scores["judged"], scores["acc_l"]) == (266, 50.0)
    header = read_header(out)
    assert header["judge"] == {"model": "j", "url": server.url}
    assert header.keys() == {"format", "judge", "made_by", "seal"}


def test_only_failed_rows_are_judged_again(tmp_path):
    path, _ = write_rows(tmp_path / "a.jsonl", 40)
    out = tmp_path / "out.jsonl"
    nonsense = [b"<html>busy</html>", {"choices": []}, {"choices": [{"message": {}}]}]
    faults = lambda n: nonsense[n % 3] if n % 4 == 0 else None  # noqa: E731
    with JudgeServer(faults) as server:
        with pytest.raises(ChatApiError, match="10 of 40 rows have no verdict"):
            judge_file(path, ChatEndpoint(server.url, "j", retries=0), out)
        assert Counter(v is None for v in verdicts_of(out)) == {False: 30, True: 10}
        journal = tmp_path / "out.jsonl.verdicts.jsonl"
        journal.write_bytes(journal.read_bytes()[:-9])  # the state after a kill: one verdict lost
        server.faults, before = lambda n: None, server.requests
        judge_file(path, ChatEndpoint(server.url, "j"), out)
        assert server.requests - before == 11
    assert verdicts_of(out) == [WANTED[i % 3] for i in range(40)]


def test_an_endpoint_that_always_fails_ends_the_command(tmp_path):
    path, _ = write_rows(tmp_path / "a.jsonl", 200)
    with JudgeServer(lambda n: 401) as server:
        with pytest.raises(ChatApiError, match=r"failed \d+ requests in a row.*401"):
            judge_file(path, ChatEndpoint(server.url, "j", concurrency=4), tmp_path / "out.jsonl")
        assert server.requests < 16
    with pytest.raises(ChatApiError, match="Connection error"):
        judge_file(path, ChatEndpoint(server.url, "j", retries=0), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_dead_endpoint_deletes_no_verdict(tmp_path):
    """Neither the judged file nor the file with the rows changes."""
    path, _ = write_rows(tmp_path / "a.jsonl", 3)
    with JudgeServer() as server:
        judge_file(path, ChatEndpoint(server.url, "j"), tmp_path / "out.jsonl")
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(ChatApiError):
        judge_file(path, ChatEndpoint(server.url, "other", retries=0), tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == before
    with pytest.raises(DataError, match="is the file to judge"):
        judge_file(tmp_path / "out.jsonl", ChatEndpoint(server.url, "j"), tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_equal_rows_share_a_verdict_but_not_between_judges(tmp_path):
    path, _ = write_rows(tmp_path / "a.jsonl", 3)
    path.write_text(path.read_text() * 5)
    with JudgeServer() as server:
        judge_file(path, ChatEndpoint(server.url, "j"), tmp_path / "out.jsonl")
        assert server.requests == 3
        judge_file(path, ChatEndpoint(server.url, "other"), tmp_path / "out.jsonl")
        assert server.requests == 6
    assert verdicts_of(tmp_path / "out.jsonl") == WANTED * 5


def test_requests_per_minute_are_limited(tmp_path):
    path, _ = write_rows(tmp_path / "a.jsonl", 6)
    begin = time.monotonic()
    with JudgeServer() as server:
        judge_file(
            path, ChatEndpoint(server.url, "j", requests_per_minute=600), tmp_path / "out.jsonl"
        )
    assert time.monotonic() - begin > 0.45  # five pauses of a tenth of a second


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("True", "True"),
        (" false.", "False"),
        ("<think>True? No, it is not.</think>\n**False**", "False"),
        ("True or False", "unparsable"),
        ("Truely", "unparsable"),
        ("", "unparsable"),
    ],
)
def test_a_verdict_is_parsed_or_missing(reply, verdict):
    assert parse_verdict(reply) == verdict


def test_a_broken_row_stops_before_the_first_request(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n')
    with pytest.raises(DataError, match="line 1: `pred_ans`"):
        judge_file(path, ChatEndpoint("http://127.0.0.1:9", "j"), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
