"""Files from users' bug reports, each with the right result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from r1s_jax.data.questions import read_questions
from r1s_jax.io.journal import DataError
from r1s_jax.models.gguf import WeightsError
from r1s_jax.models.pretrained import load_pretrained
from tests.makers import run_cli

DATA = Path(os.environ.get("R1S_DATA", "/nowhere"), "field3")
pytestmark = pytest.mark.skipif(not DATA.exists(), reason="R1S_DATA does not name the data")


def result(*args: object):
    return run_cli(*map(str, args))


@pytest.mark.parametrize("name", ["q.csv", "nq.qa.csv", "squad.json", "squad_hub.jsonl"])
def test_tables_and_squad_are_questions(name):
    questions = read_questions(DATA / "questions_csv_squad" / name)
    assert questions[0].question.lower().rstrip("?") == "who wrote dune"
    assert questions[0].answers[0] == "Herbert"


def test_a_problem_is_a_question():
    (question,) = read_questions(DATA / "questions_csv_squad" / "simpleqa.jsonl")
    assert (question.question, question.answers) == ("Who wrote Dune?", ("Herbert",))


def test_a_folder_of_shards_is_a_corpus(tmp_path):
    built = result(
        *("index", "build", DATA / "folder_of_shards" / "shards", "--out", tmp_path / "idx"),
        *("--encoder", "hash", "--kind", "exact"),
    )
    assert built.exit_code == 0, built.output
    hits = result("index", "search", tmp_path / "idx", "Passage number 39", "--k", 1)
    assert "d39" in hits.output, "the last passage of the second file, by its own id"


def test_the_index_selects_one_of_two_tensors():
    folder = DATA / "shard_index_ignored" / "model"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    right = load_file(folder / index["lm_head.weight"])["lm_head.weight"]
    try:
        head = load_pretrained(str(folder)).params["lm_head"]
    except WeightsError as error:
        assert "lm_head.weight" in str(error)
    else:
        np.testing.assert_array_equal(head, right.astype(np.float32).T)


def test_an_unsharded_file_precedes_older_shards():
    folder = DATA / "shard_index_ignored" / "stale"
    right = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    embed = load_pretrained(str(folder)).params["embed"]
    np.testing.assert_array_equal(embed, right.astype(np.float32))


def test_the_leading_space_of_a_sentencepiece_tokenizer(tmp_path):
    data = DATA / "sentencepiece_prefix_space"
    built = result(
        *("index", "build", data / "c.tsv", "--out", tmp_path / "idx"),
        *("--encoder", "hash", "--kind", "exact"),
    )
    assert built.exit_code == 0, built.output
    out = tmp_path / "o.jsonl"
    done = result(
        *("eval", "run", data / "q.jsonl", "--model", data / "model", "--mode", "rag"),
        *("--limit", 1, "rollout.max_length=700", "rollout.max_turn_length=16"),
        "rollout.documents_per_query=1",
        *("--index", tmp_path / "idx", "--out", out),
    )
    assert done.exit_code == 0, done.output
    text = json.loads(out.read_text().splitlines()[0])["gen_text_store"]
    query = " <|begin_of_query|> Who wrote Dune ? <|end_of_query|>"
    assert text.startswith(f"{query}\n\n<|begin_of_documents|>")


def test_other_questions_in_a_file_of_the_same_name_are_refused(model, tmp_path):
    data, out = DATA / "eval_resume_other_questions", tmp_path / "o.jsonl"
    common = ("--model", model, "--mode", "direct", "--out", out, "rollout.max_turn_length=4")
    first = result("eval", "run", data / "a" / "q.jsonl", *common, "--limit", 2)
    assert first.exit_code == 0, first.output
    second = result("eval", "run", data / "b" / "q.jsonl", *common)
    assert isinstance(second.exception, DataError) and "questions" in str(second.exception)
    assert len(out.read_text().splitlines()) == 2


@pytest.mark.parametrize("command", [("traces", "--limit", "1"), ("reward", "--variant", "f1")])
def test_an_ascii_terminal(command):
    name, *options = command
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "r1s_jax.cli",
            name,
            DATA / "ascii_terminal" / "uni2.jsonl",
            *options,
        ],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout and done.stdout.isascii()
