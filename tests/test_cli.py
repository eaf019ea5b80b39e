"""The commands, as users type them."""

import ast
import json
import os
import sys
from pathlib import Path

import jax
import pytest

from r1s_jax import __version__, cli
from r1s_jax.config import MeshConfig
from r1s_jax.data.tiny_world import TinyWorld, build_tokenizer
from r1s_jax.io.errors import ConfigError
from r1s_jax.io.journal import DataError
from r1s_jax.models.params import init_params
from r1s_jax.models.sharding import make_mesh
from r1s_jax.system import chips
from tests.makers import SMALL
from tests.makers import run_cli as run
from tests.test_layout import FILES


def test_help_lists_commands_and_first_steps():
    text = run("--help").output
    for word in ("train", "ask", "index", "tiny_world", "wheel:name==version"):
        assert word in text
    assert "--resume" in run("train", "--help").output


def test_version_is_that_of_the_changelog_and_the_citation():
    said = run("--version").stdout
    root = Path(__file__).parents[1]
    assert said.startswith(f"r1s_jax {__version__} (jax ")
    assert f"\n## [{__version__}] - " in (root / "CHANGELOG.md").read_text("utf-8")
    assert f"\nversion: {__version__}\n" in (root / "CITATION.cff").read_text("utf-8")


def test_configs_lists_every_recipe():
    output = run("configs").output
    assert "tiny_world" in output and "wiki_smollm2" in output


def test_index_search_reads_arguments_and_lines(index):
    world = TinyWorld((0, 0, 0), 30)
    names = [p.name for p in world.people[:3]]
    by_argument = run("index", "search", str(index), *names, "--k", "2")
    by_line = run("index", "search", str(index), "--k", "2", stdin="\n".join(names))
    assert by_argument.output == by_line.output
    rows = [json.loads(line) for line in by_argument.output.splitlines()]
    assert [row["query"] for row in rows] == names
    for row, name in zip(rows, names, strict=True):
        assert len(row["results"]) == 2
        best = row["results"][0]
        assert best.keys() == {"id", "score", "title", "text", "line"}
        assert best["title"] == name


def test_index_encode_build_info_and_plan(tmp_path):
    passages, out = tmp_path / "p.tsv", tmp_path / "i"
    passages.write_text("".join(f"{i}\tTown {i}   lies by river {i}\n" for i in range(40)))
    for shard in ("1/2", "2/2"):
        part = ("--out", str(tmp_path / "v"), "--shard", shard)
        assert run("index", "encode", str(passages), *part).stdout.strip().endswith(".npy")
    built = ("--vectors", str(tmp_path / "v"), "--out", str(out), "--kind", "exact")
    assert run("index", "build", str(passages), *built).exit_code == 0
    report = json.loads(run("index", "info", str(out), "--json").stdout)
    assert (report["kind"], report["passages"], report["dims"]) == ("exact", 40, 512)
    assert report["recall"] == {"k": 5, "queries": 40, "recall": 1.0}
    assert report["disk_bytes"] > 40 * 2048
    assert "recall" in run("index", "info", str(out)).stdout
    size = ("--passages", "36e6", "--dims", "1024")
    report = json.loads(run("index", "plan", *size, "--json").stdout)
    assert report["kinds"]["scann"]["memory"] < 128e9 < report["kinds"]["exact"]["memory"]
    assert "36,000,000 passages" in run("index", "plan", *size).stdout


def test_ask_streams_to_the_end(model, index):
    done = run("ask", "What is the trade of Bakori?", "--model", str(model), "--index", str(index))
    assert done.exit_code == 0, done.output
    assert "No answer" in done.output or "</answer>" in done.output or "<eos>" in done.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("train", "tiny_word"), "no recipe 'tiny_word'"),
        (("train", "tiny_world", "stage2.step=3"), "did you mean 'steps'"),
        (("train", "tiny_world", "seed=three"), "must be a whole number"),
        (("train", "tiny_world", "--resume"), "--resume needs --run-dir"),
        (("train", "tiny_world", "policy.model=x"), "not both"),
        (("ask", "q", "--model", "/nowhere", "--index", "/nowhere"), "/nowhere"),
        (("index", "search", "/nowhere", "q"), "/nowhere"),
        (("index", "info", "/nowhere"), "/nowhere is not an index"),
        (("index", "encode", "/nowhere.tsv", "--out", "/x", "--shard", "0/2"), "expected I/N"),
    ],
)
def test_bad_input_is_one_clear_message(args, message, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["r1s", *args])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    "args",
    [
        ("index", "plan", "--dims", "8", "--passages", "inf"),
        ("index", "search", "x", "q", "--k", "0"),
        ("eval", "judge", "x", "--url", "http://x", "--model", "m", "--concurrency", "0"),
        ("traces", "x", "--limit", "-3"),
        ("data", "tiny-world", "x", "--seed", "-1"),
    ],
)
def test_a_number_out_of_range_is_named(args, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["r1s", *args])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert args[-2] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "advice"),
    [
        (("bench", "decode", "--json"), "`r1s bench` is now `python -m benchmarks`"),
        (("eval", "run", "q", "--max-length", "9"), "write rollout.max_length=TOKENS"),
        (("serve", "m", "--slots=8"), "--slots=8 is a setting now: write rollout.slots=N"),
        (("ask", "Who?", "--force-dialect"), "write protocol.force=true"),
    ],
)
def test_a_command_or_option_by_its_old_name_names_the_new_one(args, advice, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["r1s", *args])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert advice in capsys.readouterr().err


def test_a_broken_question_file_is_named(tmp_path, monkeypatch, capsys):
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "a?", "answer": "b"}\n{"question": "c?"\n')
    passages = tmp_path / "passages.tsv"
    passages.write_text("0\tTitle   text\n")
    changes = [f"environment.questions={questions}", f"environment.passages={passages}"]
    monkeypatch.setenv("R1S_CACHE", str(tmp_path / "cache"))
    model = "policy.model=tests/fixtures/parity/llama"
    monkeypatch.setattr("r1s_jax.train.make_policy", lambda *told: _tiny_policy(dialect=told[2]))
    args = ["r1s", "train", "wiki_smollm2", model, "environment.encoder=hash", *changes]
    monkeypatch.setattr("sys.argv", [*args, "--run-dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit):
        cli.main()
    assert "questions.jsonl, line 2" in capsys.readouterr().err


def _tiny_policy(dialect):
    from r1s_jax.models.pretrained import Pretrained

    tokenizer = build_tokenizer()
    return Pretrained(SMALL, init_params(SMALL, 0), tokenizer, (tokenizer.eos_token_id,), dialect)


def test_reward_writes_every_row_back(tmp_path):
    rows = [{"question": "q", "answer": ["x", "y"], "solution": f"</think><answer>{a}</answer>"}
            for a in ("y", "z")]  # fmt: skip
    path = tmp_path / "solutions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("reward", str(path), "--variant", "stage2")
    got = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["reward"] for row in got] == [1.0, 0.0]
    assert got[0]["parts"]["format"] == 1.0
    assert [{k: r[k] for k in rows[0]} for r in got] == rows


def test_reward_finds_a_rule_where_the_command_is_typed(tmp_path, monkeypatch):
    (tmp_path / "typed_here.py").write_text("def rule(solution, golds): return 7\n")
    (tmp_path / "s.jsonl").write_text('{"answer": "x", "solution": "s"}\n')
    monkeypatch.chdir(tmp_path)
    done = run("reward", "s.jsonl", "--variant", "typed_here:rule")
    assert json.loads(done.stdout)["reward"] == 7.0


def test_reward_names_the_line_that_it_cannot_read(tmp_path):
    path = tmp_path / "solutions.jsonl"
    path.write_text('{"question": "q", "answer": "x", "solution": "s"}\n{"question": "q"}\n')
    done = run("reward", str(path), "--variant", "f1")
    assert "line 2: `solution` must be a text" in str(done.exception)
    assert len(done.stdout.splitlines()) == 1


def test_export_refuses_an_existing_folder(model, tmp_path):
    out = tmp_path / "hf"
    assert run("export", str(model), str(out), "--dtype", "float32").stdout.strip() == str(out)
    assert (out / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert isinstance(run("export", str(model), str(out)).exception, FileExistsError)


def test_eval_score_compares_two_files(tmp_path):
    files = []
    for name, answer in (("a", "Rome"), ("b", "Paris")):
        row = {"question": "q", "answer": "Paris", "pred_ans": answer, "searches": 1}
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text(json.dumps(row) + "\n")
    done = run("eval", "score", *map(str, files), "--json")
    first, second, gain = map(json.loads, done.stdout.splitlines())
    assert (first["em"], second["em"], gain["em"]["difference"]) == (0.0, 100.0, 100.0)
    text = run("eval", "score", *map(str, files)).stdout
    assert "cover-EM" in text and "b.jsonl minus a.jsonl" in text


def test_a_bug_shows_its_traceback_and_a_mistake_does_not(monkeypatch, capsys):
    """A ValueError of ours is shown as a traceback; R1S_DEBUG=1 shows every traceback."""

    def shown(error: Exception) -> str:
        def fail(*_, **__):
            raise error

        monkeypatch.setattr("r1s_jax.recipes.titles", fail)
        monkeypatch.setattr("sys.argv", ["r1s", "configs"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 1
        return capsys.readouterr().err

    assert "Traceback" in shown(ValueError("operands could not be broadcast"))
    assert "Traceback" in shown(KeyError("layers"))
    assert shown(DataError("q.jsonl, line 3: no question")).strip() == (
        "error: q.jsonl, line 3: no question"
    )
    assert "Traceback" not in shown(FileNotFoundError(2, "No such file", "x"))
    monkeypatch.setenv("R1S_DEBUG", "1")
    assert "Traceback" in shown(DataError("q.jsonl, line 3: no question"))


def test_every_error_of_ours_is_a_user_error():
    """Every error that a command shows as a message derives from UserError."""
    bases = {
        node.name: {ast.unparse(base) for base in node.bases}
        for path in FILES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Error", "Failure"))
    }
    assert len(bases) > 12
    for name, parents in bases.items():
        assert name == "UserError" or parents & ({"UserError"} | bases.keys()), name


@pytest.mark.parametrize("here", [False, True])
def test_the_tpu_runtime_is_asked_for_only_where_there_is_a_tpu(here, monkeypatch):
    monkeypatch.setattr(chips, "_TPU_DEVICES", ("/dev/null",) if here else ("/dev/no-such-chip*",))
    monkeypatch.delitem(sys.modules, "libtpu", raising=False)
    for name in chips._TPU_WANTED:  # JAX sets one where the runtime is installed
        monkeypatch.delenv(name, raising=False)
    chips.hide_tpu_runtime()
    assert ("libtpu" in sys.modules) is not here
    chips.show_tpu_runtime()
    assert "libtpu" not in sys.modules


def test_jax_flags_that_change_numbers_are_ignored_with_a_warning(monkeypatch, capsys):
    for name in ("JAX_ENABLE_X64", "JAX_NUMPY_RANK_PROMOTION", "JAX_DISABLE_JIT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("JAX_NUMPY_DTYPE_PROMOTION", "standard")
    cli.ignore_jax_switches()
    assert not capsys.readouterr().err, "these ask for the defaults"
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    cli.ignore_jax_switches()
    assert "JAX_ENABLE_X64=1 is ignored" in capsys.readouterr().err
    assert "JAX_ENABLE_X64" not in os.environ
    # Where JAX was imported before, as in a notebook, it is refused.
    with jax.enable_x64(True), pytest.raises(ConfigError, match="32 bits"):
        make_mesh(MeshConfig())
