"""What a corpus lacks, and where errors come from."""

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from r1s_jax.data.question_forms import Question
from r1s_jax.data.tiny_world import TinyWorld
from r1s_jax.eval import audit
from r1s_jax.eval.explain import CAUSES, budget, cause, explain_file
from r1s_jax.io.journal import DataError
from r1s_jax.retrieval.api import Passage
from r1s_jax.retrieval.encoder import HashEncoder
from r1s_jax.retrieval.index import build_index, save_index
from tests.makers import run_cli


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def index_of(lines, folder: Path | None = None):
    passages = [Passage(str(i), line) for i, line in enumerate(lines)]
    index = build_index(passages, HashEncoder(), kind="exact")
    if folder:
        save_index(index, folder)
    return index


LINES = [
    "Dune   Dune is a novel by Frank Herbert.",
    "Mercury (element)   Mercury is a metal.",
    "United Kingdom   The capital is London.",
    "The The   The The are a band of Matt Johnson.",
]


def find(*questions, lines=LINES, redirects=None):
    return audit.audit(questions, lines, index_of(lines), redirects)


def test_each_way_to_have_a_page():
    there, lacking, redirected, band = find(
        Question(0, "Who wrote Dune?", ("Frank Herbert",), supporting=("dune",)),
        Question(1, "What is Mercury?", ("a planet",), supporting=("Mercury (planet)",)),
        Question(2, "What is the capital of the UK?", ("London",), supporting=("UK",)),
        Question(3, "Who leads The The?", ("Matt Johnson",), supporting=("The The",)),
        redirects={"uk": "united kingdom"},
    )
    assert there.pages == ("title",) and there.answerable and there.page_rank == 1
    assert there.answered and there.answer_rank == 1
    assert lacking.pages == ("brackets",) and lacking.answerable is False
    assert lacking.missing == ["Mercury (planet)"] and lacking.similar == ("Mercury (element)",)
    assert lacking.answered is False and lacking.page_rank is None
    assert redirected.pages == ("redirect",) and redirected.answerable
    assert band.pages == ("title",)


def test_yes_no_and_numbers_are_no_evidence_and_words_are_whole():
    yes, number, part, cjk = find(
        Question(0, "Is it?", ("yes",)),
        Question(1, "How many?", ("1,984",)),
        Question(2, "Which?", ("meta",)),
        Question(3, "?", ("北京",)),
        lines=[*LINES, "中国   首都是北京市。 yes 1,984"],
    )
    assert yes.answered is None and yes.answerable is None and number.answered is None
    assert part.answered is False  # "metal" is another word
    assert cjk.answered is True


def test_planted_holes_are_named_all_of_them_and_no_other(tmp_path):
    world = TinyWorld((3,), 200)
    questions = world.questions(500, [1])
    lost = {questions[i].supporting[0] for i in np.random.default_rng(0).permutation(500)[:20]}
    holes = [q for q in questions if q.supporting[0] in lost]
    rows = [
        {"question": q.question, "answer": q.answers[0],
         "supporting_facts": [[t, 0] for t in q.supporting]}
        for q in questions
    ]  # fmt: skip
    lines = [p.line for p in world.passages]
    index_of([line for line in lines if line.split()[0] not in lost], tmp_path / "index")
    file = write(tmp_path / "q.jsonl", rows)
    (tmp_path / "all.tsv").write_text("".join(f"{i}\t{line}\n" for i, line in enumerate(lines)))
    out = tmp_path / "lost.jsonl"
    done = run_cli(
        "corpus", "audit", file, "--index", str(tmp_path / "index"), "--out", str(out),
        "--repair", str(tmp_path / "all.tsv"), "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    named = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["question"] for row in named} == {q.question for q in holes}
    assert all(row["missing"] and set(row["missing"]) <= lost for row in named)
    summary = result["files"][file]
    assert summary["answerable"]["share"] == 1 - len(holes) / 500
    assert summary["page_at"]["1"]["share"] == pytest.approx(1 - len(holes) / 500, abs=0.02)
    assert result["repair"]["repaired"] == len(holes) and result["repair"]["still_lost"] == 0
    assert set(result["repair"]["titles"]) == lost
    shown = run_cli("corpus", "audit", file, "--index", str(tmp_path / "index"))
    assert shown.exit_code == 0 and "can be answered" in shown.output


@pytest.mark.parametrize(
    ("lines", "row", "words"),
    [
        (LINES, {}, "names no supporting titles"),
        (
            ["no title here"],
            {"supporting_facts": [["Dune", 0]]},
            "the passages of this index have no titles",
        ),
    ],
)
def test_what_cannot_be_told_is_said(tmp_path, lines, row, words):
    file = write(tmp_path / "q.jsonl", [{"question": "Who?", "answer": "Ada Lovelace"} | row])
    result = audit.audit_files([file], index_of(lines))
    (warning,) = result["warnings"]
    assert words in warning


@pytest.mark.parametrize("text", ["", "\n"])
def test_an_empty_file_is_one_message(tmp_path, text):
    file = tmp_path / "q.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=r"q\.jsonl: no questions"):
        audit.audit_files([str(file)], index_of(LINES))


def test_a_file_of_results_is_never_overwritten(tmp_path):
    file = write(tmp_path / "q.jsonl", [{"question": "Who?", "answer": "A"}])
    with pytest.raises(DataError, match="there already"):
        audit.audit_files([file], index_of(LINES), out=tmp_path / "q.jsonl")


def test_redirects_need_both_titles(tmp_path):
    file = write(tmp_path / "r.jsonl", [{"title": "UK"}])
    with pytest.raises(DataError, match="line 1: expected `title` and `target`"):
        audit.read_redirects(Path(file))


def test_each_cause():
    asked, lacking, unknown = find(
        Question(0, "Who wrote Dune?", ("Frank Herbert",), supporting=("Dune",)),
        Question(1, "What is Mercury?", ("a planet",), supporting=("Mercury (planet)",)),
        Question(2, "Is it?", ("yes",)),
    )
    dune, other = LINES[0], LINES[1]
    assert cause(lacking, "metal", [], 5) == "page_absent"
    assert cause(asked, "", [dune], 5) == cause(asked, "I don't know.", [], 5) == "no_answer"
    assert cause(asked, "Ada", [other, dune], 5) == "not_read"
    assert cause(asked, "Ada", [other], 5) == "never_asked"
    assert cause(replace(asked, page_rank=None), "Ada", [other], 5) == "retriever_missed"
    assert cause(unknown, "no", [other], 5) == "cannot_tell"


def test_the_shares_of_the_causes_are_the_loss():
    rng = np.random.default_rng(0)
    scores = rng.choice([0.0, 0.4, 1.0], 300)
    parts = budget(scores, list(rng.choice(list(CAUSES), 300)))
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1 - scores.mean())
    assert all(part["low"] <= part["share"] <= part["high"] for part in parts.values())


def test_answers_are_explained_and_shown_by_cause(tmp_path):
    index_of(LINES, tmp_path / "index")
    questions = write(
        tmp_path / "q.jsonl",
        [
            {"question": "Who wrote Dune?", "answer": "Frank Herbert",
             "supporting_facts": [["Dune", 0]]},
            {"question": "What is Mercury?", "answer": "a planet",
             "supporting_facts": [["Mercury (planet)", 0]]},
        ],
    )  # fmt: skip
    block = "<|begin_of_query|> Dune <|end_of_query|>\n\n<|begin_of_documents|>\n(1)"
    texts = [f"{block}{LINES[0]}\n<|end_of_documents|>\n\n Ada", "a metal"]
    asked = [("Who wrote Dune?", "Frank Herbert", "Ada"), ("What is Mercury?", "a planet", "metal")]
    answers = write(
        tmp_path / "a.jsonl",
        [
            {"question": q, "answer": gold, "pred_ans": said, "gen_text_store": text}
            for (q, gold, said), text in zip(asked, texts, strict=True)
        ],
    )
    out = str(tmp_path / "why.jsonl")
    options = ["--index", str(tmp_path / "index"), "--questions", questions]
    done = run_cli("eval", "explain", answers, *options, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["with_titles"] == 2 and result["loss"]["em"]["total"] == 1.0
    shares = {name: part["share"] for name, part in result["loss"]["em"]["causes"].items()}
    assert shares == dict.fromkeys(CAUSES, 0.0) | {"not_read": 0.5, "page_absent": 0.5}
    shown = run_cli("traces", out, "--cause", "not_read")
    assert "Who wrote Dune?" in shown.output and "Mercury" not in shown.output
    table = run_cli("eval", "explain", answers, *options)
    assert table.exit_code == 0 and "page_absent" in table.output


@pytest.mark.skipif("R1S_DATA" not in os.environ, reason="needs the published traces (R1S_DATA)")
def test_the_published_traces_lose_what_their_causes_lose(tmp_path):
    data = Path(os.environ["R1S_DATA"])
    with gzip.open(data / "passages_hotpotqa_abstract.tsv.gz", "rt", encoding="utf-8") as file:
        lines = [line.rstrip("\n").partition("\t")[2] for line in file]
    passages = [Passage(str(i), line) for i, line in enumerate(lines)]
    index = build_index(passages, HashEncoder(), kind="bm25")
    file = data / "traces" / "hotpotqa_qwen.jsonl.gz"
    result = explain_file(file, index)
    assert result["answers"] == 500
    for name, score in (("f1", 0.719), ("em", 0.58), ("cem", 0.654)):
        loss = result["loss"][name]
        assert loss["total"] == pytest.approx(1 - score, abs=6e-4)
        parts = [part["share"] for part in loss["causes"].values()]
        assert sum(parts) == pytest.approx(loss["total"], abs=1e-12)
