"""Trajectories in colour: at the terminal or as a page."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from r1s_jax.data.traces import Branch, Trace
from r1s_jax.io.text import printable
from r1s_jax.tracking.pages import write_page

STYLES = {
    "policy": "cyan",
    "query": "bold yellow",
    "documents": "dim green",
    "answer": "bold magenta",
}
# Labels on a page, beside the colours.
LABELS = {
    "policy": "wrote",
    "query": "searched",
    "documents": "retrieved",
    "answer": "answered",
}


def as_text(trace: Trace) -> Text:
    """Question, gold answers and the whole text in colour."""
    out = Text.assemble(("Question: ", "bold"), printable(trace.question))
    out.append(printable(f"   gold: {' | '.join(trace.answers)}\n"), "dim")
    search = 0
    for kind, text in trace.pieces():
        out.append(printable(text), STYLES[kind])
        if kind == "documents":
            for fork in trace.forks_at(search):
                out.append_text(_fork_text(fork))
            search += 1
    for fork in trace.forks_from(search):
        out.append_text(_fork_text(fork))
    return out


def _fork_text(fork: Branch) -> Text:
    """A fork, set apart from the trajectory that it belongs to."""
    out = Text.assemble(("\n  ⑂ ", "bold"), (printable(fork.title()), "dim"), "\n   ")
    for kind, text in fork.pieces:
        out.append(printable(text), STYLES[kind])
    return out.append("\n")


def show(traces: Sequence[Trace], matching: int, html: Path | None = None) -> None:
    """Prints traces, with a pager on a terminal; or writes them as a page."""
    if html:
        write_page(html, "traces.html", traces=traces, matching=matching, labels=LABELS)
        return
    console = Console()
    if not console.is_terminal:
        _print(console, traces, matching)
        return
    with console.pager(styles=True):
        _print(console, traces, matching)


def legend() -> Text:
    """The colours by name."""
    return Text.assemble(*((f" {name} ", style) for name, style in STYLES.items()))


def _print(console: Console, traces: Sequence[Trace], matching: int) -> None:
    console.print(legend())
    for trace in traces:
        console.print(Rule(Text(printable(trace.title()))))
        console.print(as_text(trace))
    console.print(Rule(Text(f"{len(traces)} of {matching} that fit")))
