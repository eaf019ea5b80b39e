"""Executes the notebooks in examples/ cell by cell: shortened, and unchanged."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"


def execute(name: str, folder: Path) -> str:
    """Runs every cell in `folder`; returns the printed text. Raises CellExecutionError."""
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "committed without outputs"
    NotebookClient(notebook, timeout=7200, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setenv("R1S_NOTEBOOK", "short")


def test_a_policy_learns_to_search_shortened(short, tmp_path):
    printed = execute("learn_to_search.ipynb", tmp_path)
    assert "searches per question:" in printed and "The right answer:" in printed


@pytest.mark.slow
def test_a_policy_learns_to_search(tmp_path):
    printed = execute("learn_to_search.ipynb", tmp_path)
    after = float(printed.partition("F1 on held-out questions: ")[2].split()[2])
    assert after > 0.9


@pytest.mark.slow
def test_your_corpus_shortened(short, tmp_path):
    printed = execute("your_corpus.ipynb", tmp_path)
    assert "F1 gained:" in printed and "report.html" in printed
