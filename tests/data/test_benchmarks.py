import json

import pytest

from r1s_jax.data.benchmarks import benchmark_of, questions_file
from r1s_jax.data.questions import read_questions
from r1s_jax.system.assets import AssetError


def test_a_benchmark_is_fetched_by_name(monkeypatch, tmp_path):
    fetched = tmp_path / "dev.jsonl"
    row = {"id": "dev_0", "question": "Who?", "golden_answers": ["Ada", "Ada Lovelace"]}
    fetched.write_text(json.dumps(row) + "\n")
    asked = []

    def hf_hub_download(repo, file, **_):
        asked.append((repo, file))
        return str(fetched)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    (question,) = read_questions(questions_file("2wiki"))
    assert asked == [("RUC-NLPIR/FlashRAG_datasets", "2wikimultihopqa/dev.jsonl")]
    assert question.answers == ("Ada", "Ada Lovelace") and question.id == 0


def test_anything_else_is_a_reference(tmp_path):
    assert questions_file(str(tmp_path)) == tmp_path
    with pytest.raises(AssetError, match="no such file"):
        questions_file("hotpot")


@pytest.mark.parametrize(
    ("name", "benchmark"),
    [
        ("eval_set/hotpotqa_500.jsonl", "hotpotqa"),
        ("2WikiMultihopQA", "2wiki"),
        ("own", None),
        ("my_bamboogle.jsonl.gz", "bamboogle"),
        ("notmusique.jsonl", None),
    ],
)
def test_a_file_says_which_benchmark_it_is(name, benchmark):
    assert benchmark_of(name) == benchmark
