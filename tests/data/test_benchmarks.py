import json

import pytest

from r1s_jax.data.benchmarks import BENCHMARKS, benchmark_of, questions_file
from r1s_jax.data.questions import read_questions
from r1s_jax.system.assets import AssetError
from tests.makers import run_cli


def test_a_benchmark_is_fetched_by_name(monkeypatch, tmp_path):
    fetched = tmp_path / "dev.jsonl"
    row = {"id": "dev_0", "question": "Who?", "golden_answers": ["Ada", "Ada Lovelace"]}
    fetched.write_text(json.dumps(row) + "\n")
    requests = []

    def hf_hub_download(repo, file, **_):
        requests.append((repo, file))
        return str(fetched)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    (question,) = read_questions(questions_file("2wiki"))
    assert requests == [("RUC-NLPIR/FlashRAG_datasets", "2wikimultihopqa/dev.jsonl")]
    assert question.answers == ("Ada", "Ada Lovelace") and question.id == 0


def test_a_failed_download_says_what_to_do(monkeypatch):
    def hf_hub_download(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    with pytest.raises(AssetError, match=r"popqa/test.jsonl': not fetched .*give its path"):
        questions_file("popqa")


def test_benchmarks_are_listed():
    rows = [*map(json.loads, run_cli("data", "benchmarks", "--json").stdout.splitlines())]
    assert [row["name"] for row in rows] == list(BENCHMARKS)
    assert rows[0] == {"name": "nq", "title": "NQ", "split": "test", "questions": 3610} | {
        "source": "hf:datasets/RUC-NLPIR/FlashRAG_datasets:nq/test.jsonl"
    }
    shown = run_cli("data", "benchmarks").stdout
    assert all(word in shown for word in ("Bamboogle", "12,576", "popqa"))


def test_other_names_are_paths_or_references(tmp_path):
    assert questions_file(str(tmp_path)) == tmp_path
    with pytest.raises(AssetError, match="no such file"):
        questions_file("hotpot")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("eval_set/hotpotqa_500.jsonl", "hotpotqa"),
        ("2WikiMultihopQA", "2wiki"),
        ("own", None),
        ("my_bamboogle.jsonl.gz", "bamboogle"),
        ("notmusique.jsonl", None),
        ("nq", "nq"),
        ("nq_test.judged.jsonl", "nq"),
        ("nq_hotpotqa_train.parquet", None),
        ("nq_hotpotqa_train/test.parquet", None),
        ("unique.jsonl", None),
        ("runs/nq/hotpotqa.jsonl", "hotpotqa"),
        ("2wiki_2wikimultihopqa.jsonl", "2wiki"),
        *((b.source, name) for name, b in BENCHMARKS.items()),
    ],
)
def test_the_name_of_a_file_tells_its_benchmark(name, expected):
    assert benchmark_of(name) == expected
