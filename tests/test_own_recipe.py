"""A recipe in a user's file: the same dialect and prompt in every use of its policy."""

import json
import shutil
import subprocess
import sys

import pytest

from r1s_jax.config import ConfigError, CorpusConfig
from r1s_jax.data.traces import read_traces
from r1s_jax.io.journal import rows_so_far
from r1s_jax.models.pretrained import load_pretrained
from r1s_jax.recipes import load_recipe, titles
from r1s_jax.rollout import engine
from r1s_jax.serving import ask
from tests.makers import HERMES_CHAT, run_cli, save_letters_model
from tests.test_train import CORPUS

RECIPE = """
from r1s_jax.config import override
from r1s_jax.configs import wiki_smollm2

CHANGES = {changes!r}


def config():
    return override(wiki_smollm2.config(), CHANGES)
"""
CHANGES = [c for c in CORPUS if "length" not in c and "retrieve_first" not in c]
CHANGES += ["rollout.max_length=2048", "rollout.max_prompt_length=1536", "environment.passages="]
CHANGES += ["optimizer.pack_length=0", "rollout.max_turn_length=8", "rollout.prefill_chunk=256"]
CHANGES += ["rollout.retrieve_first=false", "eval.questions=1", "search.max_failure_rate=1"]


@pytest.fixture
def seen(monkeypatch):
    """Token ids of every prompt, by the module that encoded it."""
    ids = {}

    def watch(module):
        encode_start = module.encode_start

        def recorded(tokenizer, text):
            tokens = encode_start(tokenizer, text)
            ids.setdefault(module.__name__, []).append(tokens)
            return tokens

        monkeypatch.setattr(module, "encode_start", recorded)

    watch(engine)
    watch(ask)
    return ids


@pytest.mark.slow
def test_one_dialect_and_prompt_everywhere(seen, index, tmp_path, monkeypatch):
    dialect, thinking = "tool_call", "off"
    mine = tmp_path / "mine"
    mine.mkdir()
    save_letters_model(mine / "base", HERMES_CHAT, end="<|im_end|>")
    row = {"question": "What is the trade of Bakor1?", "answer": "smith"}
    other = {"question": "What is the trade of Bakor2?", "answer": "baker"}
    (mine / "q.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(other)}\n")
    (mine / "prompt.txt").write_text("Look it up, please. {question}")
    changes = [*CHANGES, f"policy.model={mine / 'base'}", f"environment.questions={mine}/q.jsonl"]
    changes += [f"environment.index={index}", f"protocol.prompt={mine / 'prompt.txt'}"]
    changes += [f"protocol.dialect={dialect}", f"protocol.thinking={thinking}"]
    (mine / "my_recipe.py").write_text(RECIPE.format(changes=changes))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)

    def call(*words):
        done = run_cli(*map(str, words))
        assert done.exit_code == 0, (done.output, done.exception)
        return done.output

    call("train", mine / "my_recipe.py", "--run-dir", "run")
    shutil.rmtree(sorted((elsewhere / "run" / "checkpoints").glob("[0-9]*"))[-1])
    (mine / "prompt.txt").unlink()  # the run has a copy
    call("train", mine / "my_recipe.py", "--run-dir", "run", "--resume")
    trained = {tuple(ids) for ids in seen.pop("r1s_jax.rollout.engine")}
    call("export", "run", "model", "--dtype", "float32")
    assert load_pretrained("model").dialect == load_pretrained("run").dialect
    for model in ("run", "model"):
        out = f"{model}.jsonl"
        call("eval", "run", mine / "q.jsonl", "--model", model, "--out", out, "--index", index,
             "rollout.max_length=2048", "rollout.max_turn_length=8")  # fmt: skip
        assert {tuple(ids) for ids in seen.pop("r1s_jax.rollout.engine")} == trained
        header = json.loads((elsewhere / f"{out}.header.json").read_text())
        assert (header["dialect"]["dialect"], header["dialect"]["thinking"]) == (dialect, thinking)
        assert len(rows_so_far(elsewhere / out)) == 2
        assert next(read_traces(elsewhere / out)).dialect == load_pretrained(model).dialect
        call("ask", row["question"], "--model", model, "--index", index)
        (prompt_ids,) = seen.pop("r1s_jax.serving.ask")
        assert tuple(prompt_ids) in trained
    words = ["ask", "Who?", "--model", "model", "--index", str(index), "protocol.dialect=search_r1"]
    refused = run_cli(*words)
    assert refused.exit_code == 1 and f"the policy speaks {dialect}" in str(refused.exception)
    call(*words, "protocol.force=true")
    assert next(read_traces(elsewhere / "run")).dialect.name == dialect


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", r"has no function config\(\)"),
        ("raise RuntimeError('broken')", "cannot be read: RuntimeError: broken"),
        ("def config(:", "cannot be read: SyntaxError"),
        ("def config():\n    return 3", r"config\(\) returned a int, not a Config"),
        ("import sys\nsys.exit(0)", r"ends the program \(sys.exit\)"),
        ("def config():\n    raise SystemExit(3)", r"ends the program \(sys.exit\)"),
        ("def config():\n    return 1 / 0", r"config\(\) cannot be read: ZeroDivisionError"),
    ],
)
def test_a_file_that_is_no_recipe_says_why(text, message, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(text)
    done = run_cli("train", str(file), "--run-dir", str(tmp_path / "run"))
    assert done.exit_code == 1
    with pytest.raises(type(done.exception), match=f"mine.py.*{message}"):
        raise done.exception
    assert not (tmp_path / "run").exists()


TYPES = """
from dataclasses import replace
from r1s_jax.configs import tiny_world


def config():
    c = tiny_world.config()
    return replace(c, {change})
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "stage1=replace(c.stage1, steps=2.5)",
            "StageConfig.steps must be a whole number, got 2.5",
        ),
        (
            "policy=replace(c.policy, param_dtype='x')",
            "param_dtype must be one of float32, bfloat16",
        ),
        ("environment=5", "Config.environment must be a TinyWorldConfig or a CorpusConfig, got 5"),
        ("stage1=None", "Config.stage1 must be a StageConfig, got None"),
        ("seed=True", "Config.seed must be a whole number, got True"),
        ("seed='3'", "Config.seed must be a whole number, got '3'"),
        ("seed=10**5000", "seed must be from 0"),
        ("name=b'x'", "Config.name must be a text"),
        (
            "rollout=replace(c.rollout, partial_rollouts=1)",
            "partial_rollouts must be true or false, got 1",
        ),
        (
            "rollout=replace(c.rollout, slots=10**5000)",
            "rollout.slots must be at most .* cannot be",
        ),
        ("rollout=replace(c.rollout, top_p=10**400)", "RolloutConfig.top_p must be a number"),
        ("rollout=replace(c.rollout, top_p=float('nan'))", "top_p must be a number, got nan"),
        (
            "algorithm=replace(c.algorithm, loss=['clip'])",
            "AlgorithmConfig.loss must be one of clip",
        ),
        ("mesh=replace(c.mesh, fsdp=-2)", "mesh.fsdp must be at least -1"),
    ],
)
def test_values_of_other_types_are_named_with_field_and_file(change, message, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(TYPES.format(change=change))
    with pytest.raises(ConfigError, match=rf"mine\.py: .*{message}") as caught:
        load_recipe(str(file))
    assert len(str(caught.value)) <= 400


def test_whole_numbers_are_numbers_and_lists_are_no_tuples(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(TYPES.format(change="rollout=replace(c.rollout, temperature=1)"))
    assert load_recipe(str(file)).rollout.temperature == 1
    for questions in (["q.jsonl"], "q.jsonl", (1,)):
        with pytest.raises(ConfigError, match=r"CorpusConfig\.questions must be a tuple of texts"):
            CorpusConfig(questions=questions, index="i")


def test_recipes_have_titles_where_python_keeps_no_docstrings():
    command = [sys.executable, "-OO", "-c", "from r1s_jax.recipes import titles; print(titles())"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == str(titles()), done.stderr
    assert all(titles().values())


def test_a_recipe_is_copied_to_start_from(tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    assert run_cli("configs", "--copy", "tiny_world", str(file)).exit_code == 0
    done = run_cli("compile", str(file), "--topology", "v0:1x1")
    assert "no recipe" not in str(done.exception)
    for words, message in (
        (["tiny_world", str(file)], "exists"),
        (["tiny", str(tmp_path / "b.py")], "no recipe 'tiny'"),
        (["tiny_world", str(tmp_path / "b.txt")], "ends in .py"),
        (["tiny_world"], "--copy takes a recipe and a file"),
    ):
        done = run_cli("configs", "--copy", *words)
        assert done.exit_code == 1 and message in str(done.exception)
    done = run_cli("train", "no_such.py")
    assert "there is no such file" in str(done.exception)
