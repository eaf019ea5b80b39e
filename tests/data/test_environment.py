"""Sources of documents of a corpus recipe: passages, a built index, a search server."""

import json
from dataclasses import replace

import numpy as np
import pytest

from r1s_jax.config import CorpusConfig
from r1s_jax.data.environment import CorpusEnvironment
from r1s_jax.io.errors import ConfigError
from r1s_jax.io.journal import DataError
from r1s_jax.retrieval.corpus import read_passages
from r1s_jax.retrieval.encoder import HashEncoder
from r1s_jax.retrieval.index import build_index, save_index
from r1s_jax.retrieval.references import open_search_engine
from tests.http_server import LocalServer

LINES = {"0": "Rome   Rome is a city in Italy.", "1": "Dune   Dune is a novel by Herbert."}


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("R1S_CACHE", str(tmp_path / "cache"))
    passages, questions = tmp_path / "passages.tsv", tmp_path / "questions.jsonl"
    passages.write_text("".join(f"{id}\t{line}\n" for id, line in LINES.items()))
    rows = [{"question": f"Who wrote Dune, part {i}?", "answer": "Herbert"} for i in range(4)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return passages, questions


def first_line(questions, **source) -> str:
    config = CorpusConfig(questions=(str(questions),), **source)
    environment = CorpusEnvironment(config, seed=0, held_out=1)
    batch, held_out = environment.batch(0, 2), environment.evaluation(8)
    assert len(batch.questions) == 2 and len(held_out.questions) == 1
    assert held_out.questions[0] not in batch.questions
    return batch.retriever.search(["novel Dune by Herbert"], 1)[0][0].line


def test_passages_are_indexed_and_an_index_brings_its_own_encoder(files, tmp_path):
    passages, questions = files
    assert first_line(questions, passages=(str(passages),)) == LINES["1"]
    save_index(build_index(read_passages(passages), HashEncoder()), tmp_path / "index")
    # The encoder of the config has no effect here.
    source = {"index": str(tmp_path / "index"), "encoder": "wheel:absent==1"}
    assert first_line(questions, **source) == LINES["1"]


def test_questions_drawn_by_difficulty_are_the_same_after_a_resume(files):
    config = CorpusConfig(
        questions=(str(files[1]),), passages=(str(files[0]),), sampler="difficulty"
    )
    first, resumed = (CorpusEnvironment(config, seed=0, held_out=1) for _ in range(2))
    batch = first.batch(0, 2)
    first.note([q for q in batch.questions for _ in range(2)], np.array([1.0, 1.0, 0.0, 1.0]))
    resumed.restore(json.loads(json.dumps(first.state())))
    for step in range(1, 9):
        assert first.batch(step, 1).questions == resumed.batch(step, 1).questions
    with pytest.raises(ConfigError, match="draws from all files"):
        replace(config, mix=(1.0,))


def test_a_search_server(files):
    def answer(path, body):
        return 200, {"answers": [[LINES["1"]] for _ in body["queries"]]}

    with LocalServer(answer) as server:
        assert first_line(files[1], retriever=f"{server.url}/queries") == LINES["1"]


def test_exactly_one_engine_is_named(tmp_path):
    for named in ({}, {"index": tmp_path, "url": "http://x/queries"}, {"url": "x", "site": ""}):
        with pytest.raises(ConfigError, match="name one of"):
            open_search_engine(**named)


def test_questions_of_the_evaluation_are_never_trained(files, tmp_path, capsys):
    passages, questions = files
    other = tmp_path / "hotpotqa.jsonl"
    other.write_text('{"question": "who wrote dune part 2", "answer": "Herbert"}\n')
    config = CorpusConfig((str(questions),), passages=(str(passages),), exclude=(str(other),))
    environment = CorpusEnvironment(config, seed=0, held_out=1)
    held_out = {q.question for q in environment.evaluation(1).questions}
    trained = {q.question for step in range(4) for q in environment.batch(step, 4).questions}
    assert trained.isdisjoint({"Who wrote Dune, part 2?"} | held_out)
    learned = 4 - len(held_out | {"Who wrote Dune, part 2?"})
    assert f"{learned} to learn from, 1 held out" in capsys.readouterr().err
    everything = tmp_path / "all.jsonl"
    everything.write_text(questions.read_text())
    config = CorpusConfig((str(questions),), passages=(str(passages),), exclude=(str(everything),))
    with pytest.raises(DataError, match=r"questions\.jsonl: every question"):
        CorpusEnvironment(config, seed=0, held_out=1)


def test_another_batch_size_continues_at_the_same_question(tmp_path, files):
    passages, _ = files
    questions = tmp_path / "many.jsonl"
    rows = (f'{{"question": "Who is {i}?", "answer": "x"}}\n' for i in range(24))
    questions.write_text("".join(rows))
    config = CorpusConfig((str(questions),), passages=(str(passages),))
    environment = CorpusEnvironment(config, seed=0, held_out=0)
    first = [q.id for step in range(3) for q in environment.batch(step, 4).questions]
    saved = json.loads(json.dumps(environment.state()))
    again = CorpusEnvironment(config, seed=0, held_out=0)
    again.restore(saved)
    for stage2 in (environment, again):
        then = [q.id for step in range(2) for q in stage2.batch(3 + step, 6).questions]
        assert sorted(first + then) == list(range(24)), "no question twice in an epoch"


def test_held_out_questions_do_not_depend_on_seed_or_order_of_files(files, tmp_path):
    passages, questions = files
    turned = tmp_path / "turned.jsonl"
    turned.write_text("\n".join(reversed(questions.read_text().splitlines())))
    held_out = {
        tuple(
            q.question
            for q in CorpusEnvironment(
                CorpusConfig((str(file),), passages=(str(passages),)), seed, held_out=2
            )
            .evaluation(2)
            .questions
        )
        for file in (questions, turned)
        for seed in (0, 1, 2)
    }
    assert len(held_out) == 1


def test_a_mix_needs_a_share_for_each_file():
    for mix in ((1.0,), (1.0, 0.0), (1.0, 2.0, 3.0)):
        with pytest.raises(ConfigError, match=r"environment\.mix"):
            CorpusConfig(("a", "b"), passages=("p",), mix=mix)
