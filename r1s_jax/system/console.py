"""The terminal: messages, progress bars, and the one line that programs read."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from r1s_jax.border.text import printable

# Everything for people goes to stderr; stdout carries the one JSON line a program may read.
console = Console(stderr=True)
out_console = Console(soft_wrap=True, highlight=False)


def warn(text: str) -> None:
    """A message about something that goes on all the same."""
    console.print(f"[yellow]warning:[/] {escape(printable(text))}")


def make_progress() -> Progress:
    """A progress display with a free text field `info` for each task."""
    return Progress(
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[info]}"),
        console=console,
    )


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for one long job; yields the function to call with (done, total)."""
    with make_progress() as progress:
        task = progress.add_task(title, total=None, info="")
        yield lambda done, total: progress.update(task, completed=done, total=total)
