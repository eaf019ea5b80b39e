"""What makes two configs the same run, and what of one is written down."""

import json
from dataclasses import replace

import pytest

from r1s_jax.config import ConfigError, CorpusConfig
from r1s_jax.configs import wiki_smollm2
from r1s_jax.tracking.run_dir import as_written, open_run_dir


def config(**changes):
    environment = CorpusConfig(
        questions=("q.jsonl",),
        retriever="http://me:secret@host:8000/queries?key=hidden",
    )
    return replace(wiki_smollm2.config(), environment=environment, **changes)


def begin(path, given) -> None:
    open_run_dir(path, given, resume=False)
    (path / "metrics.jsonl").touch()


def test_no_credentials_are_written(tmp_path):
    written = json.dumps(as_written(config()))
    assert "secret" not in written and "hidden" not in written and "host:8000/queries" in written
    begin(tmp_path / "run", config())
    assert "secret" not in (tmp_path / "run" / "config.json").read_text()
    open_run_dir(tmp_path / "run", config(), resume=True)


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    """It does not know the newest fields, and a default of its time has changed since."""
    begin(tmp_path / "run", config())
    file = tmp_path / "run" / "config.json"
    old = json.loads(file.read_text())
    old["rollout"]["max_query_length"] = 64
    del old["search"]["served_by"], old["eval"]
    file.write_text(json.dumps(old))
    open_run_dir(tmp_path / "run", config(), resume=True)
    with pytest.raises(ConfigError, match="another config: seed was 0, now 3"):
        open_run_dir(tmp_path / "run", config(seed=3), resume=True)


def test_one_file_by_two_names_is_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begin(tmp_path / "run", config())
    monkeypatch.chdir("/")
    named = replace(config().environment, questions=(str(tmp_path / "q.jsonl"),))
    open_run_dir(tmp_path / "run", replace(config(), environment=named), resume=True)
    other = replace(named, questions=(str(tmp_path / "other.jsonl"),))
    with pytest.raises(ConfigError, match=r"environment.questions was \['q.jsonl'\]"):
        open_run_dir(tmp_path / "run", replace(config(), environment=other), resume=True)
