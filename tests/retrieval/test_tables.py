"""Passages from tables: Parquet files and saved `datasets`, whole and broken."""

import json

import pytest

from r1s_jax.config import CorpusConfig
from r1s_jax.io.errors import ConfigError
from r1s_jax.retrieval.corpus import CorpusError
from r1s_jax.retrieval.references import open_retriever, read_corpus

datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")

ROWS = [
    {"id": "a", "title": "Rome", "text": "Rome is a city\nin Italy."},
    {"id": "b", "title": "Dune", "text": "Dune is a novel by Herbert."},
]
LINES = ["Rome   Rome is a city in Italy.", "Dune   Dune is a novel by Herbert."]


def read(reference) -> list[tuple[str, str]]:
    return [tuple(passage) for passage in read_corpus(str(reference))]


@pytest.fixture
def parquet(tmp_path):
    def write(rows, name="p.parquet"):
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / name)
        return tmp_path / name

    return write


def test_a_parquet_file_in_both_forms(parquet):
    assert read(parquet(ROWS)) == list(zip("ab", LINES, strict=True))
    rows = [{"id": 7, "contents": '"Rome"\nA city.'}]
    assert read(parquet(rows, "contents.parquet")) == [("7", "Rome   A city.")]


def test_a_saved_table_and_its_splits(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "train")
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "two")
    whole = list(zip("ab", LINES, strict=True))
    assert read(tmp_path / "one") == read(tmp_path / "train") == whole
    assert (
        read(f"datasets:{tmp_path / 'one'}") == read(f"datasets:{tmp_path / 'two'}:train") == whole
    )
    assert read(f"datasets:{tmp_path / 'two'}:test") == whole[1:]
    for name in (tmp_path / "two", f"datasets:{tmp_path / 'two'}:dev"):
        with pytest.raises(CorpusError, match=r"name one of its splits.*train, test"):
            read(name)


def test_a_table_of_several_configs_names_them(monkeypatch):
    """hotpot_qa and trivia_qa have several configs."""
    tables = {
        "distractor": {"train": ROWS[:1], "validation": ROWS[1:]},
        "fullwiki": {"train": ROWS},
    }

    def load(place, config=None, *, streaming):
        configs = list(tables)
        if config is None:
            raise ValueError(
                f"Config name is missing.\nPlease pick one among the available configs: {configs}\n"
                f"Example of usage:\n\t`load_dataset('{place}', 'distractor')`"
            )
        if config not in tables:
            raise ValueError(f"BuilderConfig '{config}' not found. Available: {configs}")
        return tables[config]

    monkeypatch.setattr(datasets, "load_dataset", load)
    whole = list(zip("ab", LINES, strict=True))
    assert read("datasets:hotpot_qa:fullwiki") == read("datasets:hotpot_qa:fullwiki:train") == whole
    assert read("datasets:hotpot_qa:distractor:validation") == whole[1:]
    for name in ("", ":train", ":train:train"):
        with pytest.raises(CorpusError, match=r"one of its configs.*distractor, fullwiki"):
            read(f"datasets:hotpot_qa{name}")
    for name in ("", ":dev"):
        with pytest.raises(CorpusError, match=r"qa:distractor:SPLIT; there are: train, validation"):
            read(f"datasets:hotpot_qa:distractor{name}")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS, {"id": None, "title": "x", "text": "y"}], r"p\.parquet:3: .*'id' is missing"),
        ([*ROWS, {"id": "c", "title": "x", "text": None}], r"p\.parquet:3: .*'text' is missing"),
        ([*ROWS, ROWS[0]], r"p\.parquet:3: id 'a' came before"),
        ([{"id": "a", "body": "x"}], r"p\.parquet:1: .*'title' is missing"),
    ],
)
def test_broken_rows_are_named(parquet, rows, message):
    with pytest.raises(CorpusError, match=message):
        read(parquet(rows))


def test_a_file_that_is_no_table_is_refused(parquet, tmp_path):
    path = parquet([{"id": str(i), "contents": "x" * 99} for i in range(5000)])
    path.write_bytes(path.read_bytes()[:-40])
    (tmp_path / "empty").mkdir()
    datasets.Dataset.from_list(ROWS).select([]).save_to_disk(tmp_path / "none")
    for name in (path, tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(CorpusError, match="cannot be opened"):
            read(name)
    datasets.Dataset.from_list(ROWS).select([]).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(CorpusError, match="no passages"):
        read(tmp_path / "none.parquet")


def test_a_recipe_requires_a_table_that_cannot_change(parquet, tmp_path, monkeypatch):
    monkeypatch.setenv("R1S_CACHE", str(tmp_path / "cache"))
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "?", "answer": "!"}))
    for reference in (str(parquet(ROWS)), str(tmp_path / "saved")):
        config = CorpusConfig(
            questions=(str(tmp_path / "q.jsonl"),), passages=(reference,), encoder="hash"
        )
        hits = open_retriever(config).search(["novel Dune by Herbert"], 1)
        assert hits[0][0].line == LINES[1]
    with pytest.raises(ConfigError, match="Build its index once"):
        open_retriever(CorpusConfig(questions=("q",), passages=("datasets:a/b",), encoder="hash"))
