import html
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from r1s_jax.data.traces import Trace, Wanted, read_traces, sample_traces
from r1s_jax.io.journal import DataError
from r1s_jax.protocol import r1_searcher as protocol
from r1s_jax.tracking.trace_view import LABELS, as_text, show

DOCUMENTS = protocol.document_block(["Rome is a city."])
QUERY = f"{protocol.BEGIN_QUERY} Rome {protocol.END_QUERY}"
ANSWER = f" </think> {protocol.BEGIN_ANSWER} a city {protocol.END_ANSWER}"


@pytest.mark.parametrize("protocol", ["[]", '"r1"', "3"])
def test_a_run_whose_config_is_damaged_is_named(tmp_path, protocol):
    (tmp_path / "config.json").write_text(f'{{"protocol": {protocol}}}')
    (tmp_path / "traces.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"config\.json: protocol: Expected"):
        next(read_traces(tmp_path))


RUN_ROW = {
    "step": 3,
    "question": "What is Rome?",
    "answers": ["city"],
    "reward": 0.5,
    "finish": "finished",
    "spans": [[QUERY, True], [DOCUMENTS, False], [ANSWER, True]],
    "token_advantages": [[QUERY, 0.5], [ANSWER, 0.25]],
    "searches": [{"query": "Rome"}],
}
ANSWERED = {
    "question": "What is Rome?",
    "answer": "city",
    "pred_ans": "a city",
    "stop_reason_final": "finished",
    "gen_text_store": QUERY + DOCUMENTS + ANSWER,
}


def write(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_run_and_a_file_of_answers_read_alike(tmp_path):
    write(tmp_path / "traces.jsonl", RUN_ROW)
    (of_run,) = read_traces(tmp_path)
    (of_answers,) = read_traces(write(tmp_path / "answers.jsonl", ANSWERED))
    assert of_run.spans == [(QUERY, True), (DOCUMENTS, False), (ANSWER, True)]
    assert of_answers.spans == of_run.spans
    assert (of_run.reward, of_run.searches, of_run.step) == (0.5, 1, 3)
    assert (of_answers.reward, of_answers.searches, of_answers.step) == (1.0, 1, None)


@pytest.mark.parametrize(
    ("filter", "fits"),
    [
        (Wanted(), True),
        (Wanted(min_reward=0.5, max_reward=0.5), True),
        (Wanted(min_reward=0.6), False),
        (Wanted(max_reward=0.4), False),
        (Wanted(searches=1, finish="finished", step=3), True),
        (Wanted(searches=2), False),
        (Wanted(finish="length"), False),
        (Wanted(step=4), False),
        (Wanted(contains="is a city."), True),
        (Wanted(contains="Paris"), False),
    ],
)
def test_traces_are_filtered(tmp_path, filter, fits):
    (trace,) = read_traces(write(tmp_path / "traces.jsonl", RUN_ROW))
    assert filter.fits(trace) is fits


def test_a_trace_without_a_reward_fits_no_range():
    trace = Trace("q", ("a",), [("text", True)])
    assert not Wanted(min_reward=0.0).fits(trace) and not Wanted(max_reward=1.0).fits(trace)


def test_each_part_has_its_colour(tmp_path):
    (trace,) = read_traces(write(tmp_path / "traces.jsonl", RUN_ROW))
    text = as_text(trace)
    styles = {str(s.style): text.plain[s.start : s.end] for s in text.spans}
    assert styles["bold yellow"] == QUERY
    assert styles["bold magenta"] == ANSWER.split("</think> ")[1]
    assert styles["dim green"] == DOCUMENTS


def test_tokens_are_assigned_to_pieces():
    begin, end = protocol.BEGIN_QUERY, protocol.END_QUERY
    spans = [(f"So {begin}é{end}", True), (DOCUMENTS, False), (" it", True)]
    tokens = [("So ", 1.0), (begin, 2.0), ("", 3.0), ("é", 4.0), (f"{end}", -5.0)]
    trace = Trace("q", ("a",), spans, token_advantages=[*tokens, (" i", 6.0), ("t", 7.0)])
    assert list(trace.token_pieces()) == [
        ("policy", [("So ", "+1")]),
        ("query", [(begin, "+2"), ("é", "+3 +4"), (end, "-5")]),
        ("documents", [(DOCUMENTS, "")]),
        ("policy", [(" i", "+6"), ("t", "+7")]),
    ]
    across = [(f"So {begin}", 1.0), (f"é{end}", 2.0), (" it", 3.0)]
    pieces = list(Trace("q", ("a",), spans, token_advantages=across).token_pieces())
    assert pieces[:2] == [
        ("policy", [("So ", "+1")]),
        ("query", [(begin, "+1"), (f"é{end}", "+2")]),
    ]
    kl = Trace("q", ("a",), spans, token_advantages=across, token_kl=[0.5, 0.25, 0.125])
    assert list(kl.token_pieces())[-1] == ("policy", [(" it", "+3/0.12")])


def test_a_run_is_sampled_evenly(tmp_path):
    path = write(tmp_path / "traces.jsonl", *[RUN_ROW | {"step": step} for step in range(1, 10)])
    path.write_text(path.read_text() + '{"step": 10')  # an unfinished line
    traces, count = sample_traces(path, 3)
    assert [trace.step for trace in traces] == [1, 5, 9] and count == 9
    assert len(sample_traces(path, 100)[0]) == 9
    assert sample_traces(write(tmp_path / "none.jsonl"), 3) == ([], 0)


def test_the_last_line_of_a_running_run_may_be_unfinished(tmp_path):
    line = json.dumps(RUN_ROW)
    (tmp_path / "traces.jsonl").write_text(line + "\n" + line[:20])
    assert len(list(read_traces(tmp_path))) == 1


def test_a_row_that_is_no_trajectory_is_named(tmp_path):
    with pytest.raises(DataError, match=r"line 2: no trajectory \(.*missing required field `step`"):
        broken = {k: v for k, v in RUN_ROW.items() if k != "step"}
        list(read_traces(write(tmp_path / "traces.jsonl", RUN_ROW, broken)))
    with pytest.raises(DataError, match=r"line 1: no trajectory \(.*question: Expected `str`"):
        list(read_traces(write(tmp_path / "traces.jsonl", RUN_ROW | {"question": 3})))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no traces.jsonl"):
        list(read_traces(tmp_path / "empty"))


def test_the_command(tmp_path):
    path = write(tmp_path / "traces.jsonl", *[RUN_ROW] * 12)
    command = [sys.executable, "-m", "r1s_jax.cli", "traces", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("Question: What is Rome?") == 10
    assert "10 of 12 that fit" in done.stdout
    page = tmp_path / "deep" / "page.html"
    subprocess.run([*command, "--html", str(page), "--limit", "0"], check=True, capture_output=True)
    text = page.read_text()
    assert text.count("Question:") == 12
    for kind, label in LABELS.items():
        assert f'<div class="piece {kind}"><b class="label">{label}</b>' in text
    assert html.escape(QUERY) in text and QUERY not in text


@pytest.mark.skipif("R1S_DATA" not in os.environ, reason="R1S_DATA names no data folder")
def test_published_traces_are_split_at_their_documents():
    traces = list(read_traces(Path(os.environ["R1S_DATA"], "traces", "bamboogle_qwen.jsonl.gz")))
    assert len(traces) == 125
    for trace in traces:
        blocks = [text for text, by_policy in trace.spans if not by_policy]
        assert len(blocks) == trace.searches
        written = "".join(text for text, by_policy in trace.spans if by_policy)
        assert protocol.BEGIN_DOCUMENTS not in written


NOTHING = protocol.document_block([])
OTHERWISE = f" </think> {protocol.BEGIN_ANSWER} a river {protocol.END_ANSWER}"


def test_forks_are_shown_beside_their_search(tmp_path):
    fork = {"turn": 0, "reward": 0.25, "finish": "finished"}
    fork["spans"] = [[QUERY, True], [NOTHING, False], [OTHERWISE, True]]
    write(tmp_path / "traces.jsonl", RUN_ROW | {"forks": [fork]})
    answered = {"search": 1, "pred_ans": "a river", "stop_reason_final": "finished"}
    answered["gen_text_store"] = QUERY + NOTHING + OTHERWISE
    file = write(tmp_path / "answers.jsonl", ANSWERED | {"forks": [answered]})
    (of_run,), (of_answers,) = read_traces(tmp_path), read_traces(file)
    assert [b.worth for b in (*of_run.forks, *of_answers.forks)] == [0.25, 1.0]
    assert of_run.forks[0].pieces == of_answers.forks[0].pieces
    assert ("policy", QUERY) not in of_run.forks[0].pieces
    shown = as_text(of_run).plain
    assert shown.index("Rome is a city") < shown.index("worth +0.25") < shown.index("a river")
    assert shown.index("a river") < shown.rindex("a city")
    page = tmp_path / "page.html"
    show([of_run], 1, page)
    text = page.read_text("utf-8")
    assert text.index("Rome is a city") < text.index("worth +0.25") < text.index("a river")
    assert text.index("a river") < text.rindex("a city")


def test_a_search_of_several_draws_has_one_worth(tmp_path):
    def fork(reward: float | None, **more: bool) -> dict:
        spans = [[QUERY, True], [NOTHING, False], [OTHERWISE, True]]
        return {"turn": 0, "reward": reward, "finish": "finished", "spans": spans} | more

    forks = [fork(0.25), fork(None), fork(0.0, with_search=True)]
    write(tmp_path / "traces.jsonl", RUN_ROW | {"reward": 1.0, "forks": forks})
    (trace,) = read_traces(tmp_path)
    assert [branch.worth for branch in trace.forks] == [0.25, None, None]
    titles = [branch.title() for branch in trace.forks]
    assert titles[0] == "the search was worth +0.25; without it: reward 0.25 finished"
    assert titles[1:] == ["without it: finished", "with it once more: reward 0 finished"]


def test_a_damaged_fork_is_named(tmp_path):
    write(tmp_path / "traces.jsonl", RUN_ROW | {"forks": [{"turn": 0}]})
    with pytest.raises(DataError, match=r"line 1.*forks"):
        next(read_traces(tmp_path))
    file = write(tmp_path / "answers.jsonl", ANSWERED | {"forks": [{"search": "1"}]})
    with pytest.raises(DataError, match="forks"):
        next(read_traces(file))
