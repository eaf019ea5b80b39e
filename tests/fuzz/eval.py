"""Files of answers with headers and verdicts, and solutions for rewards."""

import json
from pathlib import Path
from typing import Any

from tests.fuzz.reader import Reader, lines


def _results(folder: Path) -> None:
    row = {"question": "Who?", "answer": "Ada", "pred_ans": "Ada", "stop_reason_final": "finished"}
    row |= {"gen_text_store": "x </think> <answer> Ada </answer>", "searches": 1, "judge": "True"}
    rows = [row | {"id": i} for i in range(3)]
    rows += [row | {"id": "s", "sample": i, "supporting_recall": 0.5} for i in range(2)]
    (folder / "a.jsonl").write_text(lines(*rows))
    header = _header() | {"judge": {"model": "j", "url": "u"}}
    (folder / "a.jsonl.header.json").write_text(json.dumps(header))


def _header() -> dict[str, Any]:
    """The header of a file of answers to `_journal_questions`."""
    from r1s_jax.eval.header import describe
    from r1s_jax.presets import EVALUATION
    from r1s_jax.protocol.dialects import make_dialect

    source = {"corpus": "c", "digests": {"a": "b"}}
    header = describe("m", "q", _journal_questions(), EVALUATION, source, mode="rag")
    header |= {"model": {"sha256": "5" * 64, "checkpoint": 7}, "searches": {"found": 3}}
    return header | {"dialect": make_dialect("r1_searcher").as_dict()}


def _journal_questions() -> list[Any]:
    from r1s_jax.data.questions import Question

    return [Question(i, f"Who is {i}?", ("Ada",)) for i in range(3)]


def _answers(folder: Path) -> None:
    """The files of an interrupted `r1s eval run` and of an interrupted `r1s data select`."""
    row = {"answer": "Ada", "stop_reason_final": "finished", "gen_text_store": "x", "searches": 1}
    row |= {"prompt_tokens": 3, "sampled_tokens": 4, "seconds": 0.5, "pred_ans": "Ada"}
    row |= {"search_outcomes": ["found"]}
    rating = {"answer": "Ada", "first_solved": None, "solved": 0, "difficulty": "hard"}
    for name, key, values in (("a.jsonl", "id", row), ("m.jsonl", "idx", rating)):
        rows = [{key: q.id, "question": q.question} | values for q in _journal_questions()]
        (folder / name).write_text(lines(*rows[:2]))
        (folder / f"{name}.header.json").write_text(json.dumps(_header()))


def _answer_on(folder: Path) -> Any:
    from r1s_jax.eval import difficulty, run

    questions, now = _journal_questions(), _header()
    del now["model"], now["searches"]
    answered, before = run._resume(folder / "a.jsonl", now, questions, 1)
    counts = run._Searches(answered, 1.0).counts()
    measured = difficulty._resume(folder / "m.jsonl", now, questions)
    return answered, before and before["model"].get("checkpoint"), counts, measured


def _score(folder: Path) -> Any:
    from r1s_jax.data.results import read_results
    from r1s_jax.data.traces import read_traces
    from r1s_jax.eval.score import summarize
    from r1s_jax.eval.table import as_csv, as_markdown, as_wide_markdown, measured

    file = folder / "a.jsonl"
    cells = measured([file])
    shown = as_markdown(cells), as_wide_markdown(cells), as_csv(cells)
    return summarize(read_results(file)), shown, [trace.title() for trace in read_traces(file)]


def _verdicts(folder: Path) -> None:
    (folder / "v.jsonl").write_text(lines(*({"key": f"k{i}", "verdict": "True"} for i in "ab")))


def _read_verdicts(folder: Path) -> Any:
    from r1s_jax.io.errors import BadInput
    from r1s_jax.rewards.judged import read_verdicts

    return read_verdicts(folder / "v.jsonl", BadInput)


def _solutions(folder: Path) -> None:
    row = {"question": "q", "answer": "Rome", "solution": "x </think> <answer> Rome </answer>"}
    (folder / "s.jsonl").write_text(lines(row, row))


def _rewards(folder: Path) -> Any:
    from r1s_jax.eval.rewards import reward_file

    return list(reward_file(folder / "s.jsonl", "stage2"))


def _redirects(folder: Path) -> None:
    (folder / "r.jsonl").write_text(lines({"title": "UK", "target": "United Kingdom"}))


def _read_redirects(folder: Path) -> Any:
    from r1s_jax.eval.audit import read_redirects

    return read_redirects(folder / "r.jsonl")


READERS = {
    "redirects": Reader(_redirects, _read_redirects),
    "results": Reader(_results, _score),
    "verdicts": Reader(_verdicts, _read_verdicts),
    "rewards": Reader(_solutions, _rewards),
    "answers begun": Reader(_answers, _answer_on),
}
