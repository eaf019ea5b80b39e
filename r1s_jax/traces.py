"""Trajectories for reading: from a run or a file of answers, filtered, in colour."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from r1s_jax import protocol
from r1s_jax.data import DataError, gold_answers, read_rows
from r1s_jax.eval.results import score_row
from r1s_jax.rewards import Solution

STYLES = {
    "policy": "cyan",
    "query": "bold yellow",
    "documents": "dim green",
    "answer": "bold magenta",
}


@dataclass(frozen=True)
class Trace:
    """One trajectory; of an answer to a file's question, `reward` is its F1."""

    question: str
    answers: tuple[str, ...]
    spans: Sequence[tuple[str, bool]]  # (text, written by the policy?)
    reward: float | None = None
    searches: int | None = None
    finish: str = ""
    step: int | None = None

    def text(self) -> Text:
        """Question, gold answers and the whole text in colour."""
        out = Text.assemble(("Question: ", "bold"), self.question)
        out.append(f"   gold: {' | '.join(self.answers)}\n", "dim")
        for piece, by_policy in self.spans:
            out.append_text(colour_policy(piece) if by_policy else Text(piece, STYLES["documents"]))
        return out

    def title(self) -> str:
        """What is known of it besides its text."""
        known = {"step": self.step, "reward": self.reward, "searches": self.searches}
        parts = [f"{k} {v:.3g}" for k, v in known.items() if v is not None]
        return "  ".join([*parts, self.finish] if self.finish else parts)


@dataclass(frozen=True)
class Wanted:
    """Which traces to show; None and the empty text ask for nothing."""

    min_reward: float | None = None
    max_reward: float | None = None
    searches: int | None = None
    finish: str = ""
    step: int | None = None
    contains: str = ""

    def fits(self, trace: Trace) -> bool:
        """Whether a trace is all that was asked for; what it does not know, it is not."""
        reward = trace.reward
        low, high = self.min_reward, self.max_reward
        return (
            (low is None or (reward is not None and reward >= low))
            and (high is None or (reward is not None and reward <= high))
            and (self.searches is None or trace.searches == self.searches)
            and (not self.finish or trace.finish == self.finish)
            and (self.step is None or trace.step == self.step)
            and any(self.contains in text for text in (trace.question, *dict(trace.spans)))
        )


def read_traces(source: Path) -> Iterator[Trace]:
    """Traces of a run's directory, of a `traces.jsonl`, or of a file of evaluated answers.

    Raises DataError for a row that is neither, or a directory without traces.
    """
    path = source / "traces.jsonl" if source.is_dir() else source
    if source.is_dir() and not path.exists():
        raise DataError(f"{source} holds no traces.jsonl: is it the directory of a run?")
    for number, row in read_rows(path):
        try:
            yield _of_run(row) if "spans" in row else _of_answers(row)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}, line {number}: no trajectory ({error})") from error


def show(traces: Sequence[Trace], found: int, html: Path | None = None) -> None:
    """Prints traces, through a pager where there is a reader; or writes them as a page."""
    if html:
        with open(os.devnull, "w") as nowhere:
            console = Console(file=nowhere, record=True, width=120)
            _print(console, traces, found)
        html.parent.mkdir(parents=True, exist_ok=True)
        console.save_html(str(html))
        return
    console = Console()
    if not console.is_terminal:
        _print(console, traces, found)
        return
    with console.pager(styles=True):
        _print(console, traces, found)


def legend() -> Text:
    """The colours by name."""
    return Text.assemble(*((f" {name} ", style) for name, style in STYLES.items()))


def colour_policy(text: str) -> Text:
    """Text of the policy, its queries and its answer set off."""
    coloured = Text(text, STYLES["policy"])
    for begin, end, style in (
        (protocol.BEGIN_QUERY, protocol.END_QUERY, "query"),
        (protocol.BEGIN_ANSWER, protocol.END_ANSWER, "answer"),
    ):
        at = text.find(begin)
        while at >= 0:
            close = text.find(end, at)
            stop = close + len(end) if close >= 0 else len(text)
            coloured.stylize(STYLES[style], at, stop)
            at = text.find(begin, stop)
    return coloured


def _print(console: Console, traces: Sequence[Trace], found: int) -> None:
    console.print(legend())
    for trace in traces:
        console.print(Rule(Text(trace.title())))
        console.print(trace.text())
    console.print(Rule(Text(f"{len(traces)} of {found} that fit")))


def _of_run(row: dict[str, Any]) -> Trace:
    return Trace(
        row["question"],
        tuple(row["answers"]),
        [(text, by_policy) for text, by_policy in row["spans"]],
        row["reward"],
        len(row["searches"]),
        row["finish"],
        row["step"],
    )


def _of_answers(row: dict[str, Any]) -> Trace:
    scores = score_row(row)
    solution = Solution.of_text(row["gen_text_store"])
    return Trace(
        row["question"],
        gold_answers(row),
        [(text, by_policy) for text, by_policy in solution.spans if text],
        scores["f1"],
        int(scores["searches"]),
        str(row.get("stop_reason_final", "")),
    )
