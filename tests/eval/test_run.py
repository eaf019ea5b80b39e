"""Answering a file: every mode, the published schema, and resuming."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from r1s_jax.data.results import read_header, read_results, score_row, write_header
from r1s_jax.eval.run import NO_ANSWER, EvalRun, answer_file
from r1s_jax.eval.score import summarize
from r1s_jax.io.errors import ConfigError
from r1s_jax.io.journal import DataError
from r1s_jax.presets import EVALUATION
from r1s_jax.protocol import r1_searcher as protocol
from r1s_jax.system.files import write_rows
from tests import makers
from tests.fakes import EchoRetriever
from tests.makers import save_other_weights
from tests.retrieval.test_online import Web
from tests.rollout.test_loop import MODEL, searching_params

COLUMNS = {"id", "question", "answer", "pred_ans", "stop_reason_final", "gen_text_store"}
COLUMNS |= {"searches", "prompt_tokens", "sampled_tokens", "seconds", "search_outcomes"}
PROMPT = "{question} : "


@pytest.fixture(scope="module")
def searcher(tmp_path_factory):
    """A random model that favours the tags."""
    import jax
    import numpy as np

    from r1s_jax.data.tiny_world import build_tokenizer
    from r1s_jax.models.weights import save_params

    tokenizer = build_tokenizer()
    params = jax.tree.map(np.asarray, searching_params())
    folder = tmp_path_factory.mktemp("models") / "searcher"
    eos = (tokenizer.eos_token_id,)
    return str(save_params(params, MODEL, folder, tokenizer, "float32", eos_token_ids=eos))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    names = ["Bakori", "Tamizo", "Ropado", "Nilasa", "Vutemi"]
    rows = [{"idx": 10 + i, "question": f"What is the trade of {n}?", "answer": ["baker", "smith"]}
            for i, n in enumerate(names)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_run(questions, searcher, **changes) -> EvalRun:
    prompt = Path(searcher).parent / "prompt.txt"
    prompt.write_text(PROMPT)
    of_run = {name: changes.pop(name) for name in ("mode", "samples", "limit") if name in changes}
    options = dict(temperature=1.0, slots=2, max_length=192, max_turn_length=24)
    fields = options | {"documents_per_query": 2} | changes
    settings = makers.with_rollout(EVALUATION, f"protocol.prompt={prompt}", **fields)
    return EvalRun(str(questions), searcher, settings, **of_run)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def strip(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_rows_are_complete_and_can_be_scored(questions, searcher, tmp_path):
    retriever = EchoRetriever()
    run = make_run(questions, searcher)
    out = answer_file(run, retriever, {"index": "echo"}, tmp_path / "deep" / "out.jsonl")
    rows = rows_of(out)
    assert [row["id"] for row in rows] == [10, 11, 12, 13, 14]
    for row in rows:
        assert row.keys() == COLUMNS
        assert row["answer"] == ["baker", "smith"]
        assert row["searches"] <= row["gen_text_store"].count(protocol.BEGIN_DOCUMENTS)
        assert (row["stop_reason_final"] == "finished") or row["pred_ans"] == NO_ANSWER
    assert sum(row["searches"] for row in rows) > 0
    assert summarize(read_results(out))["n"] == 5
    header = json.loads((tmp_path / "deep" / "out.jsonl.header.json").read_text())
    assert header["source"] == {"index": "echo"}
    assert header["run"]["rollout"]["documents_per_query"] == 2


def test_a_resumed_run_gives_the_same_file(questions, searcher, tmp_path):
    run, retriever = make_run(questions, searcher), EchoRetriever()
    whole = answer_file(run, retriever, {}, tmp_path / "whole.jsonl")
    cut = tmp_path / "cut.jsonl"
    lines = whole.read_text().splitlines(keepends=True)
    cut.write_text(lines[0] + lines[1] + lines[2][:40])  # the state after a kill
    (tmp_path / "cut.jsonl.header.json").write_text(
        (tmp_path / "whole.jsonl.header.json").read_text()
    )
    answer_file(run, retriever, {}, cut)
    assert strip(rows_of(cut)) == strip(rows_of(whole))
    before = cut.read_bytes()
    answer_file(run, retriever, {}, cut)  # already complete
    assert cut.read_bytes() == before


def test_a_file_of_another_run_is_not_changed(questions, searcher, tmp_path):
    run = make_run(questions, searcher, mode="direct", limit=1)
    out = answer_file(run, None, {}, tmp_path / "out.jsonl")
    before = out.read_bytes()
    with pytest.raises(DataError, match="written by another run"):
        answer_file(make_run(questions, searcher, limit=1), EchoRetriever(), {}, out)
    with pytest.raises(DataError, match="name an index"):
        answer_file(make_run(questions, searcher), None, {}, tmp_path / "other.jsonl")
    with pytest.raises(ValueError, match="mode 'wrong'"):
        make_run(questions, searcher, mode="wrong")
    assert out.read_bytes() == before


def test_unanswerable_questions_are_reported_before_the_first_answer(questions, searcher, tmp_path):
    long = {"question": "What is the trade of " + "Bakori " * 200 + "?", "answer": "baker"}
    (tmp_path / "q.jsonl").write_text(questions.read_text() + json.dumps(long) + "\n")
    run = make_run(tmp_path / "q.jsonl", searcher, mode="direct")
    with pytest.raises(ValueError, match=r"question 5 .* more than rollout\.max_prompt_length=96"):
        answer_file(run, None, {}, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(DataError, match="holds the questions"):
        answer_file(run, None, {}, tmp_path / "q.jsonl")


def test_direct_never_searches_and_rag_searches_once(questions, searcher, tmp_path):
    direct = make_run(questions, searcher, mode="direct")
    rows = rows_of(answer_file(direct, None, {}, tmp_path / "direct.jsonl"))
    assert {row["searches"] for row in rows} == {0}
    rag = make_run(questions, searcher, mode="rag")
    rows = rows_of(answer_file(rag, EchoRetriever(), {}, tmp_path / "rag.jsonl"))
    assert {row["searches"] for row in rows} == {1}
    assert all("the trade of" in row["gen_text_store"] for row in rows)


def test_documents_of_the_first_search_need_no_room_of_the_prompts(questions, searcher, tmp_path):
    """A prompt of nearly half the maximum length, and documents that fill their third of it."""
    (tmp_path / "q.jsonl").write_text(
        json.dumps({"question": "the trade of Bakori, " * 4, "answer": "baker"}) + "\n"
    )
    run = make_run(tmp_path / "q.jsonl", searcher, mode="rag", slots=1, documents_per_query=9)
    (row,) = rows_of(answer_file(run, EchoRetriever(), {}, tmp_path / "rag.jsonl"))
    assert row["searches"] == 1 and row["prompt_tokens"] > 192 // 2


@pytest.mark.slow
def test_several_samples_per_question(questions, searcher, tmp_path):
    run = make_run(questions, searcher, samples=3, slots=4)
    whole = answer_file(run, EchoRetriever(), {}, tmp_path / "whole.jsonl")
    rows = rows_of(whole)
    assert [(row["id"], row["sample"]) for row in rows] == [
        (id, sample) for id in range(10, 15) for sample in range(3)
    ]
    assert read_header(whole)["run"]["samples"] == 3
    score = summarize(read_results(whole))
    assert (score["samples"], score["questions"], score["n"]) == (3, 5, 15)
    single = answer_file(
        make_run(questions, searcher, slots=5), EchoRetriever(), {}, tmp_path / "one.jsonl"
    )
    texts = [row["gen_text_store"] for row in rows]
    assert [row["gen_text_store"] for row in rows_of(single)] == texts[::3]
    assert len(set(texts)) > 5
    assert read_header(single)["run"]["samples"] == 1
    cut = tmp_path / "cut.jsonl"
    lines = whole.read_text().splitlines(keepends=True)
    header = read_header(whole)
    del header["searches"], header["prefill_tokens"]
    for count in (4, 6):
        cut.write_text("".join(lines[:count]))
        (tmp_path / "cut.jsonl.header.json").write_text(json.dumps(header))
        answer_file(run, EchoRetriever(), {}, cut)
        assert strip(rows_of(cut)) == strip(rows)
        # What was computed before the stop is not in the header that was cut.
        counted = [{**read_header(file), "prefill_tokens": 0} for file in (cut, whole)]
        assert counted[0] == counted[1]
    for changes in (
        dict(samples=0),
        dict(samples=2, temperature=0.0),
        dict(samples=2, temperature=1e-9),
    ):
        with pytest.raises(ConfigError, match="samples="):
            make_run(questions, searcher, **changes)


@pytest.mark.slow
def test_only_samples_with_failed_searches_are_repeated(questions, searcher, tmp_path):
    run = make_run(questions, searcher, samples=2, mode="rag")
    out = answer_file(run, EchoRetriever(), {}, tmp_path / "out.jsonl")
    whole = rows_of(out)
    spoilt = [dict(row) for row in whole[:-1]]
    for i in (2, 3, 5):
        spoilt[i] |= {"pred_ans": "x", "search_outcomes": ["error"]}
    spoilt[4]["pred_ans"] = "kept"
    out.write_text("".join(json.dumps(row) + "\n" for row in spoilt))
    answer_file(run, EchoRetriever(), {}, out, retry_failed=True)
    assert strip(rows_of(out)) == strip([*whole[:4], whole[4] | {"pred_ans": "kept"}, *whole[5:]])


@pytest.mark.slow
def test_ids_and_supporting_pages_are_written(questions, searcher, tmp_path):
    facts = [["Bakori", 0], ["nobody", 1]]
    rows = [
        {"_id": f"5a{i}", "question": f"Bakori   {i} ?", "answer": "x", "supporting_facts": facts}
        for i in range(3)
    ]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    run = make_run(tmp_path / "q.json", searcher, mode="rag")
    out = answer_file(run, EchoRetriever(), {}, tmp_path / "out.jsonl")
    written = rows_of(out)
    assert [(row["id"], row["supporting_recall"]) for row in written] == [
        (f"5a{i}", 0.5) for i in range(3)
    ]
    assert summarize(read_results(out))["supporting_recall"] == 50.0
    out.write_text(json.dumps(written[0]) + "\n")
    answer_file(run, EchoRetriever(), {}, out)
    assert [row["id"] for row in rows_of(out)] == ["5a0", "5a1", "5a2"]
    for change in ({"id": "5a9"}, {"question": "Another?"}):
        out.write_text(json.dumps(written[0] | change) + "\n")
        with pytest.raises(DataError, match="line 1 answers another question"):
            answer_file(run, EchoRetriever(), {}, out)


def test_on_accelerators_it_computes_in_bfloat16(questions, searcher, tmp_path, monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "tpu")
    run = make_run(questions, searcher, mode="direct", limit=2)
    out = answer_file(run, None, {}, tmp_path / "out.jsonl")
    assert len(rows_of(out)) == 2 and read_header(out)["dtype"] == "bfloat16"
    monkeypatch.undo()
    monkeypatch.setattr("r1s_jax.system.dtype.bfloat16_speedup", lambda: 1.0)
    with pytest.raises(DataError, match="written by another run"):  # other vectors
        answer_file(run, None, {}, out)


@pytest.mark.slow
def test_the_live_web_can_be_searched(questions, searcher, tmp_path):
    """By the command; a local server is the search API and the web."""
    with Web(["/timbuktu"]) as web:
        env = {"SERPER_API_KEY": "k", "SERPER_URL": f"{web.url}/search"}
        options = ["--model", searcher, "--online", "--site", "", "--mode", "rag", "--limit", "1"]
        options += ["rollout.max_length=512", "rollout.max_turn_length=8"]
        options += ["--out", str(tmp_path / "out.jsonl")]
        command = [sys.executable, "-m", "r1s_jax.cli", "eval", "run", str(questions), *options]
        done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
        assert done.returncode == 1 and "1 of 1 searches failed (100%" in done.stderr, done.stderr
        assert web.asked[0]["q"].startswith("What is the trade of")
    (row,) = rows_of(tmp_path / "out.jsonl")
    # Links to this machine are refused, so the pages of the local server are an error.
    assert row["searches"] == 0 and row["stop_reason_final"] == "retrieve_error"
    assert row["search_outcomes"] == ["error"]
    header = json.loads((tmp_path / "out.jsonl.header.json").read_text())
    assert header["source"]["corpus"] == "the web, site:*"


def test_the_command(questions, searcher, index, tmp_path):
    out, prompt = tmp_path / "out.jsonl", tmp_path / "prompt.txt"
    prompt.write_text(PROMPT)
    options = ["--model", searcher, "--index", str(index), "--out", str(out)]
    options += ["rollout.documents_per_query=1", "rollout.max_length=128"]
    options += ["rollout.max_turn_length=16", f"protocol.prompt={prompt}"]
    command = [sys.executable, "-m", "r1s_jax.cli", "eval", "run", str(questions), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(out)
    assert len(rows_of(out)) == 5
    header = json.loads((tmp_path / "out.jsonl.header.json").read_text())
    assert header["source"]["encoder"]["fingerprint"]


def test_a_file_of_answers_is_audited_by_answering_again(questions, searcher, index, tmp_path):
    out, prompt = tmp_path / "out.jsonl", tmp_path / "prompt.txt"
    prompt.write_text(PROMPT)
    settings = ["rollout.temperature=1.0", "rollout.max_length=128", "rollout.max_turn_length=16"]
    settings += ["rollout.documents_per_query=1", f"protocol.prompt={prompt}"]
    options = ["--model", searcher, "--index", str(index), "--out", str(out), "--samples", "2"]
    assert makers.run_cli("eval", "run", str(questions), *options, *settings).exit_code == 0
    done = makers.run_cli("audit", str(out), "--steps", "3", "--json")
    report = json.loads(done.output.splitlines()[-1])
    assert done.exit_code == 0 and report["equal"] and len(report["rows"]) == 6

    text = out.read_text()
    rows = rows_of(out)
    out.write_text(text.replace('"sampled_tokens": ', '"sampled_tokens": 1', 1))
    done = makers.run_cli("audit", str(out))
    assert done.exit_code == 1 and "out.jsonl: it is not as it was written" in done.output

    rows[3]["pred_ans"] = "made up"  # with a new header: only answering again shows it
    write_rows(out, rows)
    write_header(out, read_header(out))
    done = makers.run_cli("audit", str(out), "--all")
    assert done.exit_code == 1 and "sample 1: differs in pred_ans" in done.output
    assert "9 of 10 executed again are equal" in done.output

    header = tmp_path / "out.jsonl.header.json"
    header.write_text(header.read_text().replace('"count": 5', '"count": 6'))
    done = makers.run_cli("audit", str(out), "--steps", "0")
    assert done.exit_code == 1 and "out.jsonl.header.json" in done.output
    header.unlink()
    done = makers.run_cli("audit", str(out))
    assert "its header has no digests" in str(done.exception)


@pytest.mark.slow  # tests/rollout/test_loop.py checks the same for the loop
def test_speculative_tokens_change_no_answer(questions, searcher, tmp_path):
    def answers(speculative_tokens: int) -> list[dict]:
        run = make_run(questions, searcher, slots=2, speculative_tokens=speculative_tokens)
        return rows_of(
            answer_file(run, EchoRetriever(), {}, tmp_path / f"{speculative_tokens}.jsonl")
        )

    plain, speculated = (
        [{k: v for k, v in row.items() if k != "seconds"} for row in answers(speculative_tokens)]
        for speculative_tokens in (0, 3)
    )
    assert plain == speculated
    assert read_header(tmp_path / "0.jsonl") == read_header(tmp_path / "3.jsonl")


def test_other_weights_under_one_name_are_refused(questions, searcher, tmp_path):
    """A folder with overwritten weights, and a file of other questions with the same ids."""
    model = shutil.copytree(searcher, tmp_path / "m")
    run = make_run(questions, str(model), mode="direct", limit=2)
    out = answer_file(run, None, {}, tmp_path / "out.jsonl")
    before = out.read_bytes()
    (tmp_path / questions.name).write_text(questions.read_text().replace("trade", "teacher"))
    other = make_run(tmp_path / questions.name, str(model), mode="direct")
    for retry in (False, True):
        with pytest.raises(DataError, match="other questions"):
            answer_file(other, None, {}, out, retry_failed=retry)
    save_other_weights(model)
    for retry in (False, True):
        with pytest.raises(DataError, match="other model"):
            answer_file(make_run(questions, str(model), mode="direct"), None, {}, out,
                        retry_failed=retry)  # fmt: skip
    assert out.read_bytes() == before


def test_forks_tell_what_searches_were_worth(questions, searcher, tmp_path):
    """The answers are those of a run without forks; a stopped run with forks continues."""
    forked = dict(forks=1.0, fork="nothing", forks_per_trajectory=16)
    plain = answer_file(
        make_run(questions, searcher), EchoRetriever(), {}, tmp_path / "plain.jsonl"
    )
    run, out = make_run(questions, searcher, **forked), tmp_path / "forks.jsonl"
    rows = rows_of(answer_file(run, EchoRetriever(), {}, out))
    without = [{k: v for k, v in row.items() if k not in ("forks", "hops")} for row in rows]
    assert strip(without) == strip(rows_of(plain))
    forks = [fork for row in rows for fork in row["forks"]]
    assert len(forks) >= 3
    for row in rows:
        asked = [fork["search"] for fork in row["forks"]]
        assert asked == list(range(1, len(asked) + 1))
        for fork in row["forks"]:
            before = row["gen_text_store"].split(protocol.END_QUERY)[: fork["search"]]
            assert fork["gen_text_store"].startswith(protocol.END_QUERY.join(before))
    out.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    assert strip(rows_of(answer_file(run, EchoRetriever(), {}, out))) == strip(rows)
    with pytest.raises(ConfigError, match="there is none to fork"):
        make_run(questions, searcher, mode="direct", **forked)
    with pytest.raises(DataError, match="forks"):
        answer_file(make_run(questions, searcher), EchoRetriever(), {}, out)


def test_the_worth_of_searches_is_scored_by_number_and_hops():
    def row(id: int, pred: str, forks: list[tuple], hops: int) -> dict:
        return {
            "id": id,
            "question": f"{id}?",
            "answer": "Rome",
            "pred_ans": pred,
            "gen_text_store": "",
            "hops": hops,
            "forks": [
                {"search": n, "pred_ans": p, "with_search": bool(made)} for n, p, *made in forks
            ],
        }

    rows = [row(1, "Rome", [(1, "Oslo"), (2, "Rome")], 2), row(2, "Rome", [(1, "Rome")], 1)]
    rows += [row(3, "Oslo", [(1, "Rome")], 1), row(4, "Rome", [], 1)]
    results = [r | {"scores": score_row(r)} for r in rows]
    worth = summarize(results)["search_worth"]
    assert worth["all"]["n"] == 4
    assert worth["all"]["mean"] == pytest.approx(0.0)
    assert {n: w["mean"] for n, w in worth["search"].items()} == {"1": 0.0, "2": 0.0}
    assert {n: w["mean"] for n, w in worth["hops"].items()} == {"1": -50.0, "2": 50.0}
    assert worth["hops"]["1"]["interval"] == [-100.0, 0.0]
    assert "search_worth" not in summarize([results[3]])
    forks = [(1, "Oslo", True), (1, "Oslo"), (1, "Rome")]  # a draw with the search, two without
    drawn = [r | {"scores": score_row(r)} for r in [row(5, "Rome", forks, 1)]]
    worth = summarize([*drawn, results[0]])["search_worth"]["search"]["1"]
    assert (worth["n"], worth["mean"]) == (2, 50.0)
