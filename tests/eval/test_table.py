import csv
import json
from pathlib import Path

import pytest

from r1s_jax.data.benchmarks import BENCHMARKS
from r1s_jax.eval import table
from r1s_jax.io.journal import DataError
from tests.makers import run_cli

ROWS = [
    {"question": "a", "answer": "Rome", "pred_ans": "Rome", "judge": "True"},
    {"question": "b", "answer": "Paris", "pred_ans": "Lyon", "judge": "True"},
]


def results(folder: Path, name: str, rows=ROWS, **header) -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if header:
        (folder / f"{name}.header.json").write_text(json.dumps(header | {"format": 2}))
    return path


def run_of(questions: str, mode: str = "search") -> dict:
    return {"model": "runs/mine", "mode": mode, "questions": questions}


def test_a_cell_names_model_benchmark_and_size(tmp_path):
    source = {"corpus": "c0ffee", "kind": "scann"}
    one = results(tmp_path, "one.jsonl", run=run_of("hotpotqa_500.jsonl"), source=source)
    two = results(tmp_path, "two.jsonl", run=run_of("musique.jsonl", "direct"), source={})
    bare = results(tmp_path, "mine_2wiki.jsonl", [ROWS[0] | {"judge": "unparsable"}])
    cells = table.measured([one, two, bare])
    assert cells == [
        table.Cell("runs/mine (search)", "hotpotqa", 50.0, 100.0, 2, "c0ffee", 50.0),
        table.Cell("runs/mine (direct)", "musique", 50.0, 100.0, 2, "none", 50.0),
        table.Cell("mine_2wiki", "2wiki", 100.0, None, 1, "", 100.0),
    ]
    text = table.as_markdown([*table.published(), *cells])
    assert (
        "| R1-Searcher, Qwen2.5-7B base | 65.4/75.0 | 63.6/65.0 | 52.8/54.4 | 28.2/31.4 |" in text
    )
    assert "| runs/mine (search) | 50.0/100.0 | - | - | - |" in text
    assert "| mine_2wiki | - | 100.0/- | - | - |" in text
    assert "- runs/mine (search), hotpotqa: 2 questions, corpus c0ffee" in text
    assert "do not compare" not in text


def test_rows_over_different_corpora_are_marked(tmp_path):
    files = [
        results(tmp_path, f"{m}.jsonl", run=run_of("bamboogle.jsonl", m), source={"corpus": m})
        for m in ("rag", "search")
    ]
    assert "bamboogle: these rows searched different corpora" in table.as_markdown(
        table.measured(files)
    )


def test_files_and_figure(tmp_path):
    cells = [*table.published(), *table.measured([results(tmp_path, "own_benchmark.jsonl")])]
    rows = list(csv.DictReader(table.as_csv(cells).splitlines()))
    assert len(rows) == 17
    assert rows[-1]["benchmark"] == "own_benchmark" and rows[-1]["acc_r"] == "50.0"
    table.plot(cells, tmp_path / "table.png")
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_has_one_file_per_benchmark(tmp_path):
    run = run_of("musique.jsonl")
    files = [results(tmp_path, name, run=run, source={}) for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(DataError, match=r"b.jsonl: there is another file of runs/mine \(search\)"):
        table.measured(files)


def test_the_wide_table_has_seven_benchmarks_and_their_average(tmp_path):
    shares = dict(zip(BENCHMARKS, range(7), strict=True))
    files = [
        results(tmp_path, f"{name}.jsonl", [ROWS[0]] * right + [ROWS[1]] * (6 - right),
                run=run_of(f"{name}.jsonl"), source={"corpus": "c"})
        for name, right in shares.items()
    ]  # fmt: skip
    files += [
        results(tmp_path, name, run=run_of(name, "rag"), source={}) for name in ("nq", "own.jsonl")
    ]
    cells = table.measured(files)
    lines = table.as_wide_markdown(cells).splitlines()
    heads = "NQ | TriviaQA | PopQA | HotpotQA | 2Wiki | MuSiQue | Bamboogle | average | own"
    assert lines[0] == f"| EM (SQuAD), % | {heads} |"
    ours = "0.0 | 16.7 | 33.3 | 50.0 | 66.7 | 83.3 | 100.0 | 50.0 | -"
    assert lines[2] == f"| runs/mine (search) | {ours} |"
    assert lines[3] == f"| runs/mine (rag) | 50.0 {'| - ' * 7}| 50.0 |"
    assert "Published" not in table.as_wide_markdown(cells)
    table.plot(cells, tmp_path / "table.png", wide=True)
    done = run_cli("eval", "table", *map(str, files), "--all", "--out", str(tmp_path / "t"))
    assert done.stdout.splitlines()[0] == lines[0]
    assert "em_squad" in (tmp_path / "t.csv").read_text()


def test_exact_match_is_by_the_normaliser_of_squad(tmp_path):
    rows = [{"question": "a", "answer": "J.R.R. Tolkien", "pred_ans": "JRR Tolkien"}]
    (cell,) = table.measured([results(tmp_path, "nq.jsonl", rows)])
    assert (cell.acc_r, cell.em_squad) == (0.0, 100.0)


def test_other_questions_and_other_weights_are_marked(tmp_path):
    def digests(model: str, questions: str) -> dict:
        return {"model": {"sha256": model}, "questions": {"sha256": questions, "count": 2}}

    files = [
        results(tmp_path, "a.jsonl", run=run_of("bamboogle.jsonl"), **digests("m", "q")),
        results(tmp_path, "b.jsonl", run=run_of("bamboogle.jsonl", "rag"), **digests("m", "r")),
        results(tmp_path, "c.jsonl", run=run_of("musique.jsonl"), **digests("n", "s")),
    ]
    text = table.as_markdown(table.measured(files))
    assert "bamboogle: these rows answered different questions" in text
    assert "runs/mine (search): this row mixes answers of different weights" in text
    assert text.count("**") == 4
    done = run_cli("eval", "score", *map(str, files[:2]))
    assert "these files answer different questions" in " ".join(done.output.split())
