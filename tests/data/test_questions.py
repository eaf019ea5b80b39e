import gzip
import json

import numpy as np
import pytest

from r1s_jax.data.questions import (
    ByDifficulty,
    Question,
    question_stream,
    read_questions,
    texts,
    without,
)
from r1s_jax.io.errors import BadInput
from r1s_jax.io.journal import DataError

QUESTIONS = [Question(i, f"q{i}", ("a",)) for i in range(10)]


def write(path, *lines: str):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def ids(stream, count: int) -> list[int]:
    return [question.id for question in stream.take(count)]


def test_reads_text_and_list_answers_and_either_id(tmp_path):
    path = write(
        tmp_path / "q.jsonl",
        '{"idx": 7, "question": " who? ", "answer": "x"}',
        "",
        '{"id": 3, "question": "what?", "answer": ["y", "z"]}',
        '{"id": "5a8b", "question": "when?", "answer": "ü"}',
    )
    assert read_questions(path) == [
        Question(7, "who?", ("x",)),
        Question(3, "what?", ("y", "z")),
        Question(2, "when?", ("ü",), source_id="5a8b"),
    ]


def test_aliases_of_answers_are_read_from_the_file_beside(tmp_path, capsys):
    """2WikiMultiHopQA has its aliases in a second file."""
    rows = [
        {"_id": "a", "question": "where?", "answer": "United Kingdom", "answer_id": "Q145"},
        {"_id": "b", "question": "really?", "answer": "yes", "answer_id": None},
        {"_id": "c", "question": "who?", "answer": "nobody", "answer_id": "Q7"},
    ]
    path = tmp_path / "dev.json"
    path.write_text(json.dumps(rows))
    alone = [question.answers for question in read_questions(path)]
    assert alone == [("United Kingdom",), ("yes",), ("nobody",)]
    assert "id_aliases.json has the aliases" in " ".join(capsys.readouterr().err.split())
    names = {"Q_id": "Q145", "aliases": ["UK", "United Kingdom"], "demonyms": ["British", " "]}
    write(tmp_path / "id_aliases.json", json.dumps(names), '{"Q_id": "Q1", "aliases": ["x"]}')
    answers = [question.answers for question in read_questions(path)]
    assert answers == [("United Kingdom", "UK", "British"), ("yes",), ("nobody",)]
    assert not capsys.readouterr().err
    write(tmp_path / "id_aliases.json", '{"Q_id": "Q145", "aliases": "UK"}')
    with pytest.raises(DataError, match=r"id_aliases\.json, line 1: aliases"):
        read_questions(path)


def test_reads_gzip(tmp_path):
    path = tmp_path / "q.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write('{"question": "who?", "answer": "x"}\n')
    assert read_questions(path) == [Question(0, "who?", ("x",))]
    whole = path.read_bytes()
    for damaged in (whole[:-12], gzip.compress(b"{}")[:10] + b"\xff" * 20, b"no gzip"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"q\.jsonl\.gz"):
            read_questions(path)


def test_reads_a_byte_order_mark(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "who?", "answer": "x"}\n', encoding="utf-8-sig")
    assert read_questions(path) == [Question(0, "who?", ("x",))]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"question": "who?"', "delimiter"),
        ('["who?", "x"]', "JSON object"),
        ('{"question":' * 100_000, "nested deeper"),
        ('{"answer": "x"}', "question` must be a text, and not empty"),
        ('{"question": "  ", "answer": "x"}', "question` must be a text, and not empty"),
        ('{"question": "who?"}', "answer"),
        ('{"question": "who?", "answer": []}', "answer"),
        ('{"question": "who?", "answer": ["x", ""]}', "answer"),
        ('{"question": "who?", "answer": 3}', "answer"),
        ('{"idx": 0, "question": "who?", "answer": "x"}', "used before"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, complaint):
    path = write(tmp_path / "q.jsonl", '{"idx": 0, "question": "a?", "answer": "b"}', line)
    with pytest.raises(DataError, match=rf"q\.jsonl, line 2: .*{complaint}"):
        read_questions(path)


def test_a_file_without_questions_or_not_of_text_is_refused(tmp_path):
    with pytest.raises(DataError, match="no questions"):
        read_questions(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"binary\.jsonl"):
        read_questions(tmp_path / "binary.jsonl")


def test_stream_is_repeatable_and_depends_on_the_seed():
    first, again, other = (question_stream([QUESTIONS], seed=s) for s in (1, 1, 2))
    order = ids(first, 10)
    assert order == ids(again, 10)
    assert order != ids(other, 10)


def test_each_epoch_is_another_permutation_and_every_batch_is_full():
    stream = question_stream([QUESTIONS], seed=0)
    batches = [stream.take(4) for _ in range(10)]
    assert {len(batch) for batch in batches} == {4}
    order = [question.id for batch in batches for question in batch]
    epochs = [tuple(order[start : start + 10]) for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == len(epochs)


def test_a_restored_stream_continues_identically():
    stream = question_stream([QUESTIONS], seed=5)
    ids(stream, 15)
    state = json.loads(json.dumps(stream.state()))
    rest = ids(stream, 21)
    for restored in (stream, question_stream([QUESTIONS], seed=5)):
        restored.restore(state)
        assert ids(restored, 4) + ids(restored, 17) == rest, "whatever the size of batches"


def test_a_stream_needs_questions():
    with pytest.raises(ValueError, match="at least one question"):
        question_stream([], seed=0)
    with pytest.raises(ValueError, match="of each source"):
        question_stream([QUESTIONS, []], seed=0)


def test_the_mixing_ratio_does_not_depend_on_the_sizes_of_files():
    small = [Question(i, f"s{i}", ("a",)) for i in range(3)]
    stream = question_stream([QUESTIONS, small], seed=0, mix=(1, 3))
    state = stream.state()
    drawn = [question.question[0] for _ in range(20) for question in stream.take(8)]
    assert drawn.count("s") == 120
    again = question_stream([QUESTIONS, small], seed=0, mix=(1, 3))
    again.restore(state)
    assert [q.question[0] for _ in range(20) for q in again.take(8)] == drawn


def test_questions_of_the_evaluation_are_recognised_by_their_text():
    unwanted = texts([Question(0, "Who wrote the novel Dune?", ("x",))])
    questions = [Question(1, "who wrote novel  DUNE", ("x",)), Question(2, "Who wrote It?", ("y",))]
    assert [q.id for q in without(questions, unwanted)] == [2]


def test_reads_tables(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    rows = {"question": ["who?", "what?"], "golden_answers": [["x"], ["y", "z"]], "id": ["a", "b"]}
    table = datasets.Dataset.from_dict(rows)
    path, saved = tmp_path / "q.parquet", tmp_path / "saved"
    table.to_parquet(path)
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(saved)
    expected = [
        Question(0, "who?", ("x",), source_id="a"),
        Question(1, "what?", ("y", "z"), source_id="b"),
    ]
    assert read_questions(path) == expected
    assert read_questions(f"datasets:{saved}:train") == expected
    with pytest.raises(DataError, match="name one of its splits"):
        read_questions(saved)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"q\.parquet"):
        read_questions(path)


def test_questions_of_middling_difficulty_come_most_often():
    sampler = ByDifficulty(QUESTIONS, seed=0)
    solved, never, some = QUESTIONS[:3], QUESTIONS[3:6], QUESTIONS[6:8]
    for questions, rewards in ((solved, (1, 1)), (never, (0, 0.5)), (some, (0, 1))):
        for question in questions:
            sampler.note([question] * 3, np.array([*rewards, np.nan]))
    drawn = [q.id for step in range(2000) for q in sampler.take(1, step, 0)]
    shares = np.bincount(drawn, minlength=10) / len(drawn)
    # Two with some right samples and two not seen yet have weight 1, six have weight 0.2.
    np.testing.assert_allclose(shares[6:], 1 / 5.2, atol=0.03)
    np.testing.assert_allclose(shares[:6], 0.2 / 5.2, atol=0.015)


def test_a_draw_depends_on_the_step_and_on_what_was_noted():
    first, again, other = (ByDifficulty(QUESTIONS, seed=s) for s in (1, 1, 2))
    assert ids_at(first, 0) == ids_at(again, 0) != ids_at(other, 0)
    assert len(set(ids_at(first, 3))) == 4, "a step has no question twice"
    assert len(first.take(25, 0, 0)) == 25, "unless it has more than there are"
    first.note(QUESTIONS, np.linspace(0, 1, len(QUESTIONS)))
    assert [ids_at(first, step) for step in range(9)] != [ids_at(again, s) for s in range(9)]
    again.restore(json.loads(json.dumps(first.state())))
    assert [ids_at(first, step) for step in range(9)] == [ids_at(again, s) for s in range(9)]
    assert first.state() == again.state()
    fewer = ByDifficulty(QUESTIONS[5:], seed=1)
    fewer.restore(first.state())
    assert fewer.state().items() <= first.state().items() and len(fewer.state()) == 5
    (name, *_) = first.state()
    with pytest.raises(BadInput, match="scores of questions in a checkpoint"):
        again.restore({name: "many"})


def ids_at(sampler: ByDifficulty, step: int) -> list[int]:
    return [question.id for question in sampler.take(4, step, 0)]
