"""An example of each published form of question files."""

import gzip
import json
from dataclasses import replace

import pytest

from r1s_jax.data.question_forms import Question
from r1s_jax.data.questions import read_questions
from r1s_jax.io.journal import DataError

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
    "SQuAD on the hub": (
        {"id": "5733", "question": "who?", "context": "c", "title": "T"}
        | {"answers": {"text": ["x", "y", "x"], "answer_start": [1, 2, 1]}},
        Question(0, "who?", ("x", "y"), source_id="5733"),
    ),
    "SQuAD's rows": (
        {"id": "5733", "question": "who?", "is_impossible": False}
        | {"answers": [{"text": "x", "answer_start": 1}, {"text": "y", "answer_start": 2}]},
        Question(0, "who?", ("x", "y"), source_id="5733"),
    ),
    "SimpleQA": ({"problem": " who? ", "answer": "x"}, Question(0, "who?", ("x",))),
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
            continue  # mixed types, impossible in a table
        datasets.Dataset.from_list([row]).to_parquet(tmp_path / f"{i}.parquet")
        assert read_questions(tmp_path / f"{i}.parquet") == [expected]


def test_a_compressed_array_of_several_lines_with_a_byte_order_mark(tmp_path):
    rows = [row for row, _ in FORMS.values() if row.get("id") != 42 and "_id" not in row]
    rows = [row | {"id": f"n{i}", "question_id": ""} for i, row in enumerate(rows)]
    with gzip.open(tmp_path / "q.json.gz", "wt", encoding="utf-8-sig") as file:
        json.dump(rows, file, indent=2)
    questions = read_questions(tmp_path / "q.json.gz")
    assert [(q.id, q.source_id) for q in questions] == [(i, f"n{i}") for i in range(len(rows))]
    whole = (tmp_path / "q.json.gz").read_bytes()
    (tmp_path / "q.json.gz").write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"q\.json\.gz"):
        read_questions(tmp_path / "q.json.gz")


def test_an_empty_array_has_no_questions(tmp_path):
    (tmp_path / "q.json").write_text(" [ ]\n")
    with pytest.raises(DataError, match="no questions"):
        read_questions(tmp_path / "q.json")


def test_ids_are_unique(tmp_path):
    rows = [{"_id": "a", "question": f"q{i}", "answer": "x"} for i in range(2)]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"q\.json, item 2: id a was used before"):
        read_questions(tmp_path / "q.json")


ADA = Question(0, "Who is Ada, then?", ("x", "y"))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("q.csv", 'question,answer\n"Who is Ada, then?",x\n', ("x",)),
        ("q.csv", '\ufeffQuestion ,Answer,note\r\n\r\n"Who is Ada, then?",x,\r\n', ("x",)),
        ("q.csv", 'answers;problem\n"[""x"", ""y""]";Who is Ada, then?\n', ("x", "y")),
        (
            "q.tsv",
            "question\tanswer\tgolden_answers\nWho is Ada, then?\t\t['x', 'y']\n",
            ("x", "y"),
        ),
        ("nq.qa.csv", "Who is Ada, then?\t['x', \"y\"]\n", ("x", "y")),
        ("q.csv", ',question,answer\n0,"Who is Ada, then?","[x]"\n', ("[x]",)),
        ("q.csv", 'question,answer\n"Who is Ada, then?",x\u2028y\n', ("x\u2028y",)),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_tables_in_text(tmp_path, name, text, expected, packed):
    file = tmp_path / (name + (".gz" if packed else ""))
    file.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    assert read_questions(file) == [replace(ADA, answers=expected)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "Who is Ada?,x\nWho is Bo?,y\n",
            r"row 1: `question` must be .*keys here are who is ada\?, x",
        ),
        ("question,question,answer\na,b,c\n", "two columns are named 'question'"),
        ("question,answer\na,b,c\n", "row 1: 3 cells for 2 names"),
        ('question,answer\n"who?,x\n', "line 2: no table: Error: unexpected end of data"),
        ("question,answer\nwho?,['x' 'y']\n", "row 1: a list without commas .* as JSON"),
        ("question,answer\n", "no questions"),
        ("question,answer\nwho?,\n", "row 1: `answer` must be a text"),
    ],
)
def test_broken_tables_are_refused(tmp_path, text, message):
    (tmp_path / "q.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_questions(tmp_path / "q.csv")


SQUAD = [{"id": f"i{i}", "question": f"{i}?", "answers": [{"text": "x"}]} for i in range(3)]


@pytest.mark.parametrize("indent", [None, 1])
def test_the_file_format_of_squad(tmp_path, indent, capsys):
    none = {"id": "n", "question": "none?", "answers": [], "is_impossible": True}
    pages = [{"context": "c", "qas": SQUAD[:2]}, {"context": "d", "qas": [SQUAD[2], none]}]
    file = tmp_path / "train.json"
    file.write_text(json.dumps({"version": "2.0", "data": [{"paragraphs": pages}]}, indent=indent))
    questions = read_questions(file)
    assert [(q.source_id, q.question, q.answers) for q in questions] == [
        (f"i{i}", f"{i}?", ("x",)) for i in range(3)
    ]
    assert "1 rows marked as unanswerable" in " ".join(capsys.readouterr().err.split())
    file.write_text(json.dumps({"data": SQUAD}, indent=indent))
    assert len(read_questions(file)) == 3
    file.write_text(json.dumps({"data": [3]}, indent=indent))
    with pytest.raises(DataError, match=r"train\.json: expected JSON objects in the list `data`"):
        read_questions(file)


def test_an_object_of_several_lines_and_json_lines_named_json(tmp_path):
    file = tmp_path / "q.json"
    file.write_text(json.dumps(SQUAD[0], indent=1))
    assert len(read_questions(file)) == 1
    file.write_text("".join(json.dumps(row) + "\n" for row in SQUAD))
    assert len(read_questions(file)) == 3
    file.write_text('{\n"question": "who?",\n"answer" "x"}\n')
    with pytest.raises(DataError, match=r"q\.json: no JSON: Expecting ':' delimiter at line 3"):
        read_questions(file)
