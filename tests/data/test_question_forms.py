"""Question files as they are published, an example of each."""

import gzip
import json

import pytest

from r1s_jax.data.question_forms import Question
from r1s_jax.data.questions import read_questions
from r1s_jax.data.rows import DataError

HOTPOT = {"_id": "5a8b", "answer": "yes", "question": "Are they kin?", "type": "comparison"}
FACTS = [["Ada", 0], ["Ada", 2], ["Bo", 0]]
PAGES = [{"idx": i, "title": t, "is_supporting": t != "C"} for i, t in enumerate("ACB")]
MUSIQUE = {"id": "2hop__1_2", "question": "Which state?", "answer": "New York State"}
STEPS = [{"id": i, "support_paragraph": {"title": t}} for i, t in enumerate("AB")]
VERL = {"data_source": "nq", "ability": "fact-reasoning", "extra_info": {"index": 0}}
ASKED = "Question: is this it? Answer the given question. Question: who sings x?\n"
MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": ASKED}]


def target(value):
    return {"reward_model": {"style": "rule", "ground_truth": {"target": value}}}


FORMS = {
    "HotpotQA": (
        HOTPOT | {"supporting_facts": FACTS, "context": [["Ada", ["Ada is."]]]},
        Question(0, "Are they kin?", ("yes",), source_id="5a8b", supporting=("Ada", "Bo")),
    ),
    "HotpotQA on the hub": (
        {"id": "5a8b", "question": "Are they kin?", "answer": "yes"}
        | {"supporting_facts": {"title": ["Ada", "Bo"], "sent_id": [0, 0]}},
        Question(0, "Are they kin?", ("yes",), source_id="5a8b", supporting=("Ada", "Bo")),
    ),
    "2Wiki": (
        HOTPOT | {"supporting_facts": FACTS, "evidences": [["Ada", "child", "Bo"]]},
        Question(0, "Are they kin?", ("yes",), source_id="5a8b", supporting=("Ada", "Bo")),
    ),
    "MuSiQue": (
        MUSIQUE | {"answer_aliases": ["NY", ""], "answerable": True, "paragraphs": PAGES},
        Question(0, "Which state?", ("New York State", "NY"), 0, "2hop__1_2", ("A", "B")),
    ),
    "DPR": (
        {"dataset": "nq_dev", "question": "who?", "answers": ["Carole King"], "positive_ctxs": []},
        Question(0, "who?", ("Carole King",)),
    ),
    "NQ-open": ({"question": "who?", "answer": ["x", "y"]}, Question(0, "who?", ("x", "y"))),
    "TriviaQA": (
        {"question": "Which musical?", "question_id": "tc_33"}
        | {"answer": {"value": "Sunset", "aliases": ["Sun", "Sunset"], "normalized_value": "s"}},
        Question(0, "Which musical?", ("Sunset", "Sun"), source_id="tc_33"),
    ),
    "PopQA": (
        {"id": 42, "question": "What is he?", "obj": "x", "possible_answers": '["x", "y"]'},
        Question(42, "What is he?", ("x", "y")),
    ),
    "PopQA, its list read": (
        {"id": 42, "question": "What is he?", "possible_answers": ["x", "y"]},
        Question(42, "What is he?", ("x", "y")),
    ),
    "verl": (
        VERL | {"prompt": MESSAGES} | target(["x", "y"]),
        Question(0, "who sings x?", ("x", "y")),
    ),
    "verl without a marker": (
        VERL | {"prompt": [{"role": "user", "content": " who? "}]} | target("x"),
        Question(0, "who?", ("x",)),
    ),
    "Search-R1": (
        VERL
        | {"id": "train_0", "question": "who?", "golden_answers": ["x"], "prompt": MESSAGES}
        | target(["z"]),
        Question(0, "who?", ("x",), source_id="train_0"),
    ),
    "FlashRAG": (
        {"id": "dev_0", "question": "who?", "golden_answers": ["x"]}
        | {"metadata": {"supporting_facts": {"title": ["A", "B"], "sent_id": [0, 1]}}},
        Question(0, "who?", ("x",), source_id="dev_0", supporting=("A", "B")),
    ),
    "FlashRAG's MuSiQue": (
        {"id": "dev_0", "question": "who?", "golden_answers": ["x"]}
        | {"metadata": {"question_decomposition": STEPS}},
        Question(0, "who?", ("x",), source_id="dev_0", supporting=("A", "B")),
    ),
    "of other supporting facts": (
        {"question": "who?", "answer": "x", "supporting_facts": [3, [4]], "metadata": "m"},
        Question(0, "who?", ("x",)),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_are_read(tmp_path, name):
    row, expected = FORMS[name]
    files = {"a.json": [row], "b.json": [row], "c.jsonl": row}
    for file, value in files.items():
        text = json.dumps(value, indent=1 if file == "b.json" else None)
        (tmp_path / file).write_text("\n" + text + "\n", encoding="utf-8")
        assert read_questions(tmp_path / file) == [expected], file


def test_forms_are_read_from_tables(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    for i, (row, expected) in enumerate(FORMS.values()):
        if isinstance(row.get("supporting_facts"), list):
            continue  # of two types, which a table does not hold
        datasets.Dataset.from_list([row]).to_parquet(tmp_path / f"{i}.parquet")
        assert read_questions(tmp_path / f"{i}.parquet") == [expected]


def test_an_array_of_several_lines_packed_and_with_a_mark(tmp_path):
    rows = [row for row, _ in FORMS.values() if row.get("id") != 42 and "_id" not in row]
    rows = [row | {"id": f"n{i}", "question_id": ""} for i, row in enumerate(rows)]
    with gzip.open(tmp_path / "q.json.gz", "wt", encoding="utf-8-sig") as file:
        json.dump(rows, file, indent=2)
    read = read_questions(tmp_path / "q.json.gz")
    assert [(q.id, q.source_id) for q in read] == [(i, f"n{i}") for i in range(len(rows))]
    whole = (tmp_path / "q.json.gz").read_bytes()
    (tmp_path / "q.json.gz").write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"q\.json\.gz"):
        read_questions(tmp_path / "q.json.gz")


def test_an_empty_array_has_no_questions(tmp_path):
    (tmp_path / "q.json").write_text(" [ ]\n")
    with pytest.raises(DataError, match="no questions"):
        read_questions(tmp_path / "q.json")


def test_one_name_is_of_one_question(tmp_path):
    rows = [{"_id": "a", "question": f"q{i}", "answer": "x"} for i in range(2)]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"q\.json, item 2: id a was used before"):
        read_questions(tmp_path / "q.json")
