"""Question files in every form, and files of answer aliases."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz.reader import Reader, lines


def _questions(folder: Path) -> None:
    rows = [{"id": i, "question": f"Who is {i}?", "answer": ["a", "b"]} for i in range(4)]
    (folder / "q.jsonl").write_text(lines(*rows))


def _published_questions() -> list[dict[str, Any]]:
    """A row of each published form; one file may mix them."""
    facts = {"title": ["Ada", "Bo"], "sent_id": [0, 1]}
    pages = [{"idx": 0, "title": "Ada", "is_supporting": True}, {"idx": 1, "title": "Bo"}]
    steps = [{"id": 1, "support_paragraph": {"title": "Ada"}}]
    messages = [{"role": "user", "content": "Answer it. Question: who sings x?"}]
    truth = {"ground_truth": {"target": ["a", "b"]}, "style": "rule"}
    question = {"question": "Who?"}
    return [
        question | {"_id": "h", "answer": "yes", "supporting_facts": [["Ada", 0], ["Bo", 1]]},
        question | {"id": "w", "answer": "yes", "supporting_facts": facts},
        question | {"id": "m", "answer": "a", "answer_aliases": ["b"], "paragraphs": pages},
        question | {"answers": ["a"], "positive_ctxs": []},
        question | {"question_id": "t", "answer": {"value": "a", "aliases": ["b", "c"]}},
        question | {"id": 42, "possible_answers": '["a", "b"]'},
        {"prompt": messages, "reward_model": truth, "extra_info": {"index": 0}},
        question | {"id": "f", "golden_answers": ["a"], "metadata": {"supporting_facts": facts}},
        question
        | {"id": "g", "golden_answers": ["a"], "metadata": {"question_decomposition": steps}},
    ]


def _tables(folder: Path) -> None:
    """Questions in CSV, TSV and DPR's form."""
    rows = [f'{i},"Who, then, is {i}?","[""a"", ""b""]"' for i in range(3)]
    (folder / "q.csv").write_text("\n".join(["id,question,answer", *rows]) + "\n")
    rows = [f"Who is {i}?\t['a', \"b\"]\n" for i in range(3)]
    (folder / "q.tsv").write_text("problem\tanswers\n" + "".join(rows))
    (folder / "dpr.csv").write_text("".join(rows))


def _read_tables(folder: Path) -> Any:
    return [_read_questions(name)(folder) for name in ("q.csv", "q.tsv", "dpr.csv")]


def _squad(folder: Path) -> None:
    answers = [{"text": "a", "answer_start": 3}, {"text": "b", "answer_start": 9}]
    questions = [{"id": f"q{i}", "question": f"Who is {i}?", "answers": answers} for i in range(3)]
    questions[2] |= {"is_impossible": True, "answers": []}
    whole = {
        "version": "2",
        "data": [{"title": "T", "paragraphs": [{"context": "c", "qas": questions}]}],
    }
    (folder / "squad.json").write_text(json.dumps(whole, indent=1))
    row = {"question": "Who?", "context": "c", "answers": {"text": ["a"], "answer_start": [3]}}
    rows = [row | {"id": "h0"}, row | {"id": "h1", "answers": {"text": [], "answer_start": []}}]
    (folder / "hub.jsonl").write_text(lines(*rows))


def _read_squad(folder: Path) -> Any:
    return [_read_questions(name)(folder) for name in ("squad.json", "hub.jsonl")]


def _read_questions(name: str) -> Callable[[Path], Any]:
    return lambda folder: _import("data.questions", "read_questions")(folder / name)


def _aliases(folder: Path) -> None:
    row = {"question": "Where?", "answer": "Rome", "answer_id": "Q1"}
    (folder / "dev.jsonl").write_text(lines(row, row))
    names = {"Q_id": "Q1", "aliases": ["Roma"], "demonyms": ["Roman"]}
    (folder / "id_aliases.json").write_text(lines(names, names | {"Q_id": "Q2"}))


def _link_rules(folder: Path) -> None:
    rules = [
        {"kind": "band", "is": "is a band"},
        {"kind": "band", "link": "the band of {title}", "pattern": "singer of {page}"},
        {"kind": "band", "question": "Where was {link} founded?", "pattern": "in {answer}"},
    ]
    (folder / "rules.jsonl").write_text(lines(*rules))


def _read_links(folder: Path) -> Any:
    from r1s_jax.data.links import link_questions, read_rules
    from r1s_jax.retrieval.api import Passage

    pages = ["Ann   Ann is the singer of The Xs.", "The Xs   The Xs is a band founded in Rome."]
    passages = [Passage(str(i), line) for i, line in enumerate(pages)]
    return link_questions(passages, read_rules(folder / "rules.jsonl"))


def _import(module: str, name: str) -> Any:
    import importlib

    return getattr(importlib.import_module(f"r1s_jax.{module}"), name)


READERS = {
    "rules of links": Reader(_link_rules, _read_links),
    "questions": Reader(_questions, _read_questions("q.jsonl")),
    "questions published": Reader(
        lambda f: (f / "q.jsonl").write_text(lines(*_published_questions())),
        _read_questions("q.jsonl"),
    ),
    "questions array": Reader(
        lambda f: (f / "q.json").write_text(json.dumps(_published_questions(), indent=1)),
        _read_questions("q.json"),
    ),
    "questions tables": Reader(_tables, _read_tables),
    "questions squad": Reader(_squad, _read_squad),
    "aliases": Reader(_aliases, _read_questions("dev.jsonl")),
}
