"""Corpora by name: their descriptions, and valid commands."""

import gzip
import json
import shlex

import pytest
import typer

from r1s_jax import cli
from r1s_jax.io.errors import ConfigError
from r1s_jax.retrieval import references
from r1s_jax.retrieval.plan import durations
from r1s_jax.retrieval.presets import PRESETS
from tests.makers import run_cli


@pytest.mark.parametrize("name", PRESETS)
def test_the_commands_for_a_preset_are_valid(name):
    preset = PRESETS[name]
    ours = [shlex.split(c)[1:] for c in preset.commands if c.startswith("r1s ")]
    for words in ours:
        command = typer.main.get_command(cli.app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        command.make_context(command.name, words)
    assert preset.json()["query_prefix"].endswith(": ")
    report = json.loads(run_cli("index", "plan", name, "--json").stdout)
    assert report["preset"]["name"] == name and report["passages"] == preset.count
    assert report["seconds"]["encode"] > report["seconds"]["build_scann"] > 0
    said = run_cli("index", "plan", name).stdout
    assert preset.source in said and "hours" in said and preset.commands[-1] in said


def test_the_list_of_presets():
    assert json.loads(run_cli("index", "plan", "--json").stdout).keys() == PRESETS.keys()
    said = run_cli("index", "plan").stdout
    assert "21,015,324 passages" in said and "about 36,000,000 passages" in said


def test_wiki_18_has_the_size_of_its_file():
    assert PRESETS["wiki-18"].vectors_bytes == 64_559_075_373


def test_a_given_rate_replaces_the_estimate():
    assert durations(1000, 8, rate=10)["encode"] == 100
    assert durations(1000, 8)["encode"] is None
    assert durations(446, 8, weights=10.6e6)["encode"] == 10
    report = json.loads(run_cli("index", "plan", "kilt", "--rate", "1000", "--json").stdout)
    assert report["seconds"]["encode"] == 36_000


def test_passages_by_name(tmp_path, monkeypatch):
    rows = [
        {"id": "0", "contents": '"Heroes (album)"\nis the\ntwelfth.'},
        {"id": "1", "contents": '""Heroes" (song)"\nA song.'},
    ]
    (tmp_path / "w.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    resolved = []
    monkeypatch.setattr(
        references, "resolve", lambda ref: resolved.append(ref) or tmp_path / "w.jsonl.gz"
    )
    assert list(references.corpus_passages(["wiki-18"])) == [
        ("0", "Heroes (album)   is the twelfth."),
        ("1", '"Heroes" (song)   A song.'),
    ]
    assert resolved == ["hf:datasets/PeterJinGo/wiki-18-corpus:wiki-18.jsonl.gz"]
    with pytest.raises(ConfigError, match="r1s corpus kilt") as error:
        list(references.corpus_passages(["kilt"]))
    assert len(str(error.value)) < 400
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kilt").touch()  # an existing file precedes a preset
    list(references.corpus_passages(["kilt"]))
    assert resolved[-1] == "kilt"


def test_an_unknown_preset_is_named():
    assert "no corpus is known as 'x'" in str(run_cli("index", "plan", "x").exception)
    assert "give --passages and --dims" in str(run_cli("index", "plan", "--dims", "8").exception)
