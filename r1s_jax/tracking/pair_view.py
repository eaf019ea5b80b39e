"""One trajectory beside another that began alike: at the terminal or as a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from r1s_jax.data.traces import Trace
from r1s_jax.io.text import printable
from r1s_jax.tracking.pages import write_page
from r1s_jax.tracking.trace_view import LABELS, as_text, legend

Shown = tuple[str, Trace, Mapping[str, float]]  # a heading, the trajectory, parts of its reward


def show_pair(
    pair: Sequence[Shown], same: int, notes: Sequence[str], html: Path | None = None
) -> None:
    """Prints one or two trajectories side by side, or writes them as a page.

    `same`: so many characters after the prompt are equal.
    """
    where = where_they_part(pair, same)
    if html:
        shown = [(head, trace, _rewarded(trace, parts)) for head, trace, parts in pair]
        write_page(html, "pair.html", pair=shown, where=where, notes=notes, labels=LABELS)
        return
    console = Console()
    console.print(legend())
    table = Table(show_lines=True, expand=True)
    for head, _, _ in pair:
        table.add_column(head, ratio=1)
    table.add_row(*(_rewarded(trace, parts) for _, trace, parts in pair))
    table.add_row(*(as_text(trace) for _, trace, _ in pair))
    console.print(table)
    for line in [where, *notes]:
        console.print(Text(printable(line)), soft_wrap=True)


def _rewarded(trace: Trace, parts: Mapping[str, float]) -> str:
    """The title of a trajectory and the parts of its reward."""
    return "  ".join([trace.title(), *(f"{name} {value:.3g}" for name, value in parts.items())])


def where_they_part(pair: Sequence[Shown], same: int) -> str:
    """Where the texts part, in words; "" for one alone."""
    if len(pair) < 2:
        return ""
    texts = [trace.solution.text for _, trace, _ in pair]
    if texts[0] == texts[1]:
        return "Both texts are the same."
    start = max(0, same - 40)
    ends = [text[same : same + 40] for text in texts]
    return (
        f"The texts part after {same} characters: ...{texts[0][start:same]!r}, then {ends[0]!r} "
        f"and {ends[1]!r}"
    )
