"""The terminal: messages, progress bars, and the JSON line that programs read."""

import codecs
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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

from r1s_jax.io.text import printable

# Text for people goes to stderr; stdout has only the JSON line that programs may read.
console = Console(stderr=True)
out_console = Console(soft_wrap=True, highlight=False)


def speak_to_any_terminal() -> None:
    """Makes stdout and stderr write `?` for characters that their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")


def read_as_utf8() -> None:
    """Restarts this process, once, in UTF-8 mode if Python decodes file names as ASCII.

    Python does so in the C locale with PYTHONUTF8=0: "é" in an argument would be two surrogates.
    """
    if not sys.flags.utf8_mode and codecs.lookup(sys.getfilesystemencoding()).name == "ascii":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def json_line(value: Any) -> str:
    """One JSON value for stdout: characters outside ASCII are escaped unless stdout is UTF-8."""
    encoding = codecs.lookup(getattr(sys.stdout, "encoding", None) or "utf-8").name
    return json.dumps(value, ensure_ascii=encoding != "utf-8")


def warn(text: str) -> None:
    """Prints a warning; the program goes on."""
    console.print(f"[yellow]warning:[/] {escape(printable(text))}")


def make_progress() -> Progress:
    """A progress display; each task has a text field `info`."""
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
def bars() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Bars for the parts of a long job; yields the function that makes one of a title."""
    with make_progress() as progress:

        def bar(title: str) -> Callable[[int, int], None]:
            task = progress.add_task(title, total=None, info="")
            return lambda done, total: progress.update(task, completed=done, total=total)

        yield bar


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for one long job; yields the function to call with (done, total)."""
    with bars() as bar:
        yield bar(title)
