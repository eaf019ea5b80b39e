"""A failed search never counts as a search without hits."""

import json
import time

import pytest

from r1s_jax.eval.run import EvalRun, answer_file
from r1s_jax.io.journal import rows_so_far
from r1s_jax.presets import EVALUATION
from r1s_jax.retrieval.http import HttpRetriever
from r1s_jax.rollout.broker import SearchFailure
from r1s_jax.system.locks import InUse, only_one
from tests.fakes import EmptyRetriever
from tests.http_server import LocalServer
from tests.makers import with_rollout


def good(path, body):
    return 200, {"answers": [["0\tTitle   text about it"] * body["k"] for _ in body["queries"]]}


BROKEN = {
    "500": lambda path, body: (500, {}),
    "hangs": lambda path, body: time.sleep(3) or (200, {}),
    "lies": lambda path, body: (200, {"answers": ["Dune is a novel."] * len(body["queries"])}),
    "404": lambda path, body: (404, {"detail": "no"}),
}


@pytest.fixture
def questions(tmp_path):
    rows = [
        {"id": i, "question": f"What is the trade of Bakor{i}?", "answer": "smith"}
        for i in (3, 4, 5)
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SMALL = with_rollout(EVALUATION, documents_per_query=1, slots=2, max_length=192)


def evaluate(questions, model, out, url, **options):
    run = EvalRun(str(questions), str(model), SMALL, "rag")
    retriever = HttpRetriever(url + "/queries", timeout_s=0.5, retries=0)
    return answer_file(run, retriever, {"retriever": "it"}, out, **options)


def without_times(path):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows_so_far(path)]


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in BROKEN]


@pytest.mark.parametrize("kind", ["dead", *SLOW])
@pytest.mark.slow
def test_failures_end_an_evaluation_and_can_be_retried(kind, model, questions, tmp_path):
    out, state = tmp_path / "out.jsonl", {"broken": True}

    def serve(path, body):
        return BROKEN[kind](path, body) if state["broken"] and kind != "dead" else good(path, body)

    with LocalServer(serve) as server:
        url = "http://127.0.0.1:9" if kind == "dead" else server.url
        with pytest.raises(SearchFailure, match=r"3 of 3 searches failed \(100%.*--retry-failed"):
            evaluate(questions, model, out, url)
        rows = rows_so_far(out)
        assert [row["stop_reason_final"] for row in rows] == ["retrieve_error"] * 3
        assert all(row["searches"] == 0 and row["pred_ans"] == "I don't know." for row in rows)
        header = json.loads((tmp_path / "out.jsonl.header.json").read_text())
        assert header["searches"] == {"found": 0, "empty": 0, "failed": 3, "unanswered": 0}
        state["broken"] = False
        with pytest.raises(SearchFailure, match="3 of 3"):  # a resumed run still counts them
            evaluate(questions, model, out, server.url)
        evaluate(questions, model, out, server.url, retry_failed=True)
        evaluate(questions, model, tmp_path / "undisturbed.jsonl", server.url)
    assert without_times(out) == without_times(tmp_path / "undisturbed.jsonl")
    headers = [json.loads((tmp_path / f"{n}.jsonl.header.json").read_text())
               for n in ("out", "undisturbed")]  # fmt: skip
    assert headers[0] == headers[1] and headers[0]["searches"]["found"] == 3


def test_a_search_without_hits_has_not_failed(model, questions, tmp_path):
    run = EvalRun(str(questions), str(model), SMALL, "rag")
    out = answer_file(run, EmptyRetriever(), {}, tmp_path / "out.jsonl")
    assert {tuple(row["search_outcomes"]) for row in rows_so_far(out)} == {("empty",)}
    header = json.loads((tmp_path / "out.jsonl.header.json").read_text())
    assert header["searches"] == {"found": 0, "empty": 3, "failed": 0, "unanswered": 0}


def test_a_second_process_is_refused(model, questions, tmp_path):
    out = tmp_path / "out.jsonl"
    with only_one(out, "the file"), pytest.raises(InUse, match=r"process \d+ on \S+; wait for it"):
        evaluate(questions, model, out, "http://127.0.0.1:9")
    assert not out.exists()


def test_an_evaluation_that_ends_midway_counts_searches_in_its_header(model, tmp_path):
    rows = [{"id": i, "question": f"What is it, {i}?", "answer": "smith"} for i in range(12)]
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    with pytest.raises(SearchFailure, match="8 of 8 searches failed"):
        evaluate(path, model, out, "http://127.0.0.1:9")
    assert len(rows_so_far(out)) == 8
    header = json.loads((tmp_path / "out.jsonl.header.json").read_text())
    assert header["searches"]["failed"] == 8
