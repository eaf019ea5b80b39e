"""Terminals of any encoding, and text files that are UTF-8 whatever the locale."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from r1s_jax.retrieval.corpus import read_passages
from r1s_jax.retrieval.encoder import HashEncoder
from r1s_jax.retrieval.index import build_index, save_index
from tests.makers import run_cli
from tests.test_layout import FILES

TEXT = "café 日本 </think> <answer> Göteborg </answer>"


def r1s(*args: str | Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs the command in its own process, with additional environment variables."""
    base = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))}
    return subprocess.run(
        [sys.executable, "-m", "r1s_jax.cli", *map(os.fsencode, args)],
        capture_output=True,
        env=base | {"JAX_PLATFORMS": "cpu"} | environment,
    )


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> Path:
    row = {"question": "Où?", "answer": "Göteborg", "pred_ans": "Göteborg", "solution": TEXT}
    path = tmp_path_factory.mktemp("out") / "a.jsonl"
    path.write_text(json.dumps(row | {"gen_text_store": TEXT}, ensure_ascii=False) + "\n", "utf-8")
    return path


def test_any_terminal_shows_traces(answers):
    shown = r1s("traces", answers, PYTHONIOENCODING="latin-1")
    assert shown.returncode == 0, shown.stderr
    assert "café ?? </think>" in shown.stdout.decode("latin-1")


def test_json_output_is_ascii(answers):
    paid = r1s("reward", answers, "--variant", "f1", PYTHONIOENCODING="ascii")
    assert paid.returncode == 0, paid.stderr
    row = json.loads(paid.stdout.decode("ascii"))
    assert row["solution"] == TEXT and row["reward"] == 1


def test_the_c_locale_passes_arguments_unchanged(tmp_path):
    (tmp_path / "p.tsv").write_text("0\tÉtretat   é lies by the sea.\n", "utf-8")
    folder = tmp_path / "é"
    save_index(build_index(read_passages(tmp_path / "p.tsv"), HashEncoder(), kind="exact"), folder)
    c = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = r1s("index", "search", folder, "é", "--k", "1", **c)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["query"] == "é" and row["results"][0]["title"] == "Étretat"


def test_lines_of_stdin_that_are_not_utf8_are_refused(tmp_path):
    (tmp_path / "p.tsv").write_text("0\tA   b\n", "utf-8")
    index = build_index(read_passages(tmp_path / "p.tsv"), HashEncoder(), kind="exact")
    save_index(index, tmp_path / "i")
    done = run_cli("index", "search", str(tmp_path / "i"), stdin="\ufeffé\n")
    assert json.loads(done.stdout)["query"] == "é"
    refused = run_cli("index", "search", str(tmp_path / "i"), stdin="who\ncafé\n".encode("latin-1"))
    assert "stdin, line 2: no UTF-8: byte 0xe9" in str(refused.exception)


def calls_without_encoding(source: str) -> list[int]:
    """Lines of calls that read or write text in the encoding of the locale."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        named, args = {k.arg: k.value for k in node.keywords}, node.args
        builtin = isinstance(node.func, ast.Name)
        if name == "open":
            place = 1 if builtin or getattr(node.func.value, "id", "") in ("gzip", "io") else 0
            mode = args[place] if len(args) > place else named.get("mode")
            if isinstance(mode, ast.Constant) and isinstance(mode.value, str):
                text = "b" not in mode.value
                text &= place == 0 or builtin or "t" in mode.value  # gzip's default is bytes
            else:  # `open` of other classes has other parameters
                text = mode is None and (builtin or not args)
            wrong = text and not named.keys() & {"encoding", "fileobj"} and len(args) < place + 3
        elif name in ("read_text", "write_text"):
            own = builtin  # system.files.write_text always uses UTF-8
            wrong = not own and "encoding" not in named and len(args) < 1 + (name == "write_text")
        elif name in ("run", "Popen", "check_output", "check_call"):
            wrong = "text" in named or "universal_newlines" in named
        else:
            wrong = name == "TextIOWrapper" and "encoding" not in named
        lines += [node.lineno] * bool(wrong)
    return lines


def test_every_text_file_is_utf8_whatever_the_locale():
    wrong = [
        f"{file}:{line}"
        for file in FILES.values()
        for line in calls_without_encoding(file.read_text("utf-8"))
    ]
    assert not wrong


@pytest.mark.parametrize(
    "call",
    [
        "open(p)",
        "open(p, 'w')",
        "p.open()",
        "p.open('a')",
        "p.read_text()",
        "p.write_text(t)",
        "gzip.open(p, 'rt')",
        "subprocess.run(c, text=True)",
    ],
)
def test_calls_without_encoding_are_detected(call):
    assert calls_without_encoding(call) == [1]
    assert not calls_without_encoding("open(p, 'rb'); p.open('wb'); gzip.open(p); x.open(a, b)")
    assert not calls_without_encoding("open(p, encoding='utf-8'); p.read_text('utf-8')")
