"""The paper's table: models by benchmarks, cover-EM and judged accuracy, with the published rows.

ACC_R is cover-EM and ACC_L the judge's accuracy (R1-Searcher, arXiv 2503.05592, table 2). The wide
form has seven benchmarks and EM as Search-R1 (arXiv 2503.09516) reports it, by SQuAD's normaliser.
"""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from r1s_jax.data.benchmarks import BENCHMARKS, PAPER, TITLES, benchmark_of
from r1s_jax.data.results import header_path, read_header, read_results
from r1s_jax.eval.score import summarize
from r1s_jax.io.journal import DataError
from r1s_jax.io.text import printable

_COLUMNS = PAPER  # of the published rows
_PUBLISHED = {
    "R1-Searcher, Qwen2.5-7B base": ("65.4/75.0", "63.6/65.0", "52.8/54.4", "28.2/31.4"),
    "R1-Searcher, Llama-3.1-8B-Instruct": ("64.8/74.6", "59.4/62.8", "50.4/54.4", "25.4/28.2"),
    "GPT-4o-mini, ReARTeR": ("46.8/50.6", "55.4/53.4", "49.6/54.4", "29.6/30.2"),
    "GPT-4o-mini, no search": ("32.4/40.4", "34.8/34.6", "24.0/28.0", "13.4/17.0"),
}


@dataclass(frozen=True)
class Cell:
    """One model on one benchmark; percent, None where it was not measured."""

    model: str
    benchmark: str
    acc_r: float | None
    acc_l: float | None
    n: int = 0  # 0: published by others
    corpus: str = ""
    em_squad: float | None = None
    weights: str = ""  # digest of the model, from the header; "": unknown
    asked: str = ""  # digest of the questions, from the header; "": unknown

    def __str__(self) -> str:
        return "/".join("-" if v is None else f"{v:.1f}" for v in (self.acc_r, self.acc_l))


def published() -> list[Cell]:
    """The published rows, for comparison."""
    return [
        Cell(model, benchmark, *_pair(pair))
        for model, row in _PUBLISHED.items()
        for benchmark, pair in zip(_COLUMNS, row, strict=True)
    ]


def _pair(text: str) -> tuple[float, float]:
    acc_r, acc_l = map(float, text.split("/"))
    return acc_r, acc_l


def measured(files: Iterable[Path]) -> list[Cell]:
    """One cell per result file; its header or its name gives model, benchmark and corpus.

    Raises DataError for two files of the same model and benchmark.
    """
    cells: dict[tuple[str, str], Cell] = {}
    for file in files:
        cell = _measure(file)
        if (cell.model, cell.benchmark) in cells:
            raise DataError(f"{file}: there is another file of {cell.model} on {cell.benchmark}")
        cells[cell.model, cell.benchmark] = cell
    return list(cells.values())


def _measure(file: Path) -> Cell:
    header, summary = read_header(file) or {}, summarize(read_results(file))
    run, source = header.get("run", {}), header.get("source")
    if (run and "mode" not in run) or (source and "corpus" not in source):
        raise DataError(
            f"{header_path(file)} is no header of `r1s eval run`: no mode, or no corpus"
        )
    name = run.get("questions", file.name)
    benchmark = benchmark_of(name) or _stem(name)
    model = f"{run['model']} ({run['mode']})" if run else _stem(file.name)
    corpus = source["corpus"] if source else "none" if run else ""
    questions = summary.get("questions", summary["n"])  # several samples count as one question
    scores = (summary["cem"], summary["acc_l"], questions, corpus, summary["em_squad"])
    digests = (header.get(name, {}).get("sha256", "") for name in ("model", "questions"))
    return Cell(model, benchmark, *scores, *digests)


def _stem(name: str) -> str:
    return name.partition(".")[0]


def as_markdown(cells: Sequence[Cell]) -> str:
    """The table, with notes on the number of questions and the corpus of each measured row."""
    columns, rows = _grid(cells)
    titles = [TITLES.get(b) or _cell(b) for b in columns]
    lines = ["| ACC_R / ACC_L, % | " + " | ".join(titles) + " |"]
    lines.append("| --- |" + " --- |" * len(columns))
    for model, row in rows.items():
        lines.append(
            f"| {_cell(model)} | " + " | ".join(str(row.get(b, "-")) for b in columns) + " |"
        )
    return "\n".join([*lines, "", *_notes(cells)])


def as_wide_markdown(cells: Sequence[Cell]) -> str:
    """EM by SQuAD's normaliser on the seven benchmarks, and their macro-average, with the notes.

    A model that lacks one of the seven has no average. Other benchmarks follow the average and do
    not count in it.
    """
    columns, rows = _grid(cells, tuple(BENCHMARKS))
    others = columns[len(BENCHMARKS) :]
    titles = [*TITLES.values(), "average", *map(_cell, others)]
    lines = ["| EM (SQuAD), % | " + " | ".join(titles) + " |"]
    lines.append("| --- |" + " --- |" * len(titles))
    for model, row in rows.items():
        scores = {name: cell.em_squad for name, cell in row.items()}
        seven = [scores.get(name) for name in BENCHMARKS]
        shown = [*seven, _average(seven), *map(scores.get, others)]
        numbers = ("-" if v is None else f"{v:.1f}" for v in shown)
        lines.append(f"| {_cell(model)} | " + " | ".join(numbers) + " |")
    return "\n".join([*lines, "", *_notes(cells)])


def _average(scores: Sequence[float | None]) -> float | None:
    measured = [score for score in scores if score is not None]
    return sum(measured) / len(measured) if len(measured) == len(scores) else None


def _cell(text: str) -> str:
    """An outside name for a Markdown table, with Markdown's marks escaped."""
    return re.sub(r"([\\|`*<>\[\]])", r"\\\1", printable(" ".join(text.split())))


def as_csv(cells: Sequence[Cell]) -> str:
    """One line per model and benchmark: `model, benchmark, acc_r, acc_l, n, corpus, em_squad`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "benchmark", "acc_r", "acc_l", "n", "corpus", "em_squad"])
    for c in cells:
        writer.writerow([c.model, c.benchmark, c.acc_r, c.acc_l, c.n, c.corpus, c.em_squad])
    return text.getvalue()


def plot(cells: Sequence[Cell], path: Path, *, wide: bool = False) -> None:
    """Bars of ACC_R and dots of ACC_L, a group per benchmark; `wide`: bars of EM on the seven."""
    columns, rows = _grid(cells, tuple(BENCHMARKS) if wide else PAPER)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 + 2 * len(columns), 4), layout="constrained")
    axes = figure.subplots()
    width, at = 0.8 / len(rows), np.arange(len(columns))
    for i, (model, row) in enumerate(rows.items()):
        where = at + (i - (len(rows) - 1) / 2) * width
        row_cells = [row.get(b) for b in columns]
        heights = [_number(c and (c.em_squad if wide else c.acc_r)) for c in row_cells]
        bars = axes.bar(where, heights, width, label=model)
        if wide:
            continue
        dots = [_number(c and c.acc_l) for c in row_cells]
        axes.plot(where, dots, "o", color=bars.patches[0].get_facecolor(), markeredgecolor="black")
    axes.set_xticks(at, [TITLES.get(b, b) for b in columns])
    axes.set(ylabel="EM (SQuAD), %" if wide else "ACC_R (bar), ACC_L (dot), %", ylim=(0, 100))
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def _grid(
    cells: Sequence[Cell], first: Sequence[str] = PAPER
) -> tuple[list[str], dict[str, dict[str, Cell]]]:
    """(the `first` benchmarks, then any others; the cells of each model by benchmark)."""
    rows: dict[str, dict[str, Cell]] = {}
    for cell in cells:
        rows.setdefault(cell.model, {})[cell.benchmark] = cell
    return list(dict.fromkeys([*first, *(c.benchmark for c in cells)])), rows


def _notes(cells: Sequence[Cell]) -> list[str]:
    ours = [cell for cell in cells if cell.n]
    lines = [
        f"- {_cell(c.model)}, {_cell(c.benchmark)}: {c.n} questions, corpus {_corpus(c)}"
        for c in ours
    ]
    if any(not cell.n for cell in cells):
        lines.append("- Published rows: over KILT (HotpotQA: the 2017 abstracts).")
    for benchmark in dict.fromkeys(c.benchmark for c in ours):
        searched = {c.corpus for c in ours if c.benchmark == benchmark and c.corpus != "none"}
        if len(searched) > 1:
            lines.append(
                f"- **{benchmark}: these rows searched different corpora; do not compare them.**"
            )
        if len({c.asked for c in ours if c.benchmark == benchmark and c.asked}) > 1:
            lines.append(
                f"- **{_cell(benchmark)}: these rows answered different questions; do not compare "
                "them.**"
            )
    for model in dict.fromkeys(c.model for c in ours):
        if len({c.weights for c in ours if c.model == model and c.weights}) > 1:
            lines.append(
                f"- **{_cell(model)}: this row mixes answers of different weights; it is not "
                "one model.**"
            )
    return lines


def _corpus(cell: Cell) -> str:
    return cell.corpus[:12] or "unknown"
