"""Rows and passages of tables that Hugging Face `datasets` reads (the extra `datasets`)."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1s_jax.io.errors import shorten
from r1s_jax.retrieval.api import Passage
from r1s_jax.retrieval.corpus import CorpusError, SeenIds, row_passage

# Prefix of references to tables on the hub, and to saved tables with a split.
HUB = "datasets:"
# The configs listed by the library's errors about a missing or unknown config.
_CONFIGS = re.compile(r"(?:available configs|Available): (\[.*?\])")


def is_table(source: str | Path) -> bool:
    """Whether a source is a table of the library `datasets` rather than a JSONL file."""
    path = Path(source)
    return str(source).startswith(HUB) or path.suffix == ".parquet" or path.is_dir()


def table_rows(name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a table, streamed in its order and counted from 1.

    Args:
        name: a Parquet file, a folder that `save_to_disk` wrote, or `ORG/NAME[:CONFIG]` on the hub;
            the last two may end in `:SPLIT`, which is required if there are several. `datasets:`
            may precede the name.

    Raises:
        CorpusError: it cannot be opened or read; `datasets` is not installed.
    """
    name = name.removeprefix(HUB)
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(name, "needs `datasets`: pip install 'r1s-jax[datasets]'") from error
    try:
        rows = iter(_open(datasets, name))
    except (OSError, ValueError, IndexError) as error:  # IndexError: a saved table without rows
        raise CorpusError(name, f"cannot be opened: {error}") from error
    number = 0
    while (row := _next(rows, name, number)) is not None:
        number += 1
        yield number, row


def dataset_passages(name: str) -> Iterator[Passage]:
    """The passages of a table (see table_rows): columns `id`, and `title` and `text` or `contents`.

    Raises:
        CorpusError: as table_rows does; a row is not a passage; an id is repeated; there are no
            rows.
    """
    seen, number = SeenIds(), 0
    for number, row in table_rows(name):
        try:
            passage = row_passage(row)
        except ValueError as error:
            raise CorpusError(name, f"not a passage: {error}", number) from error
        if not seen.add(passage.id):
            raise CorpusError(name, f"id {passage.id!r} came before", number)
        yield passage
    if number == 0:
        raise CorpusError(name, "no passages")


def _open(datasets: Any, name: str) -> Any:
    if Path(name).is_file():
        return datasets.load_dataset("parquet", data_files=name, split="train", streaming=True)
    place, _, split = (name, "", "") if Path(name).exists() else name.partition(":")
    if Path(place).exists():
        table = datasets.load_from_disk(place)
    else:
        table, place, split = _load_from_hub(datasets, place, split)
    if not isinstance(table, dict):
        return table
    if not split and len(table) == 1:
        return next(iter(table.values()))
    if split not in table:
        splits = ", ".join(table)
        raise CorpusError(name, f"name one of its splits, {place}:SPLIT; there are: {splits}")
    return table[split]


def _load_from_hub(datasets: Any, place: str, rest: str) -> tuple[Any, str, str]:
    """A table on the hub, its name with its config, and the requested split.

    `rest` is CONFIG:SPLIT, CONFIG, SPLIT or empty.
    """
    first, _, second = rest.partition(":")
    try:
        if second:
            return datasets.load_dataset(place, first, streaming=True), f"{place}:{first}", second
        return datasets.load_dataset(place, streaming=True), place, first
    except ValueError as error:
        listed = _CONFIGS.search(str(error))
        if not listed:
            raise
        configs = re.findall(r"'([^']*)'", listed[1])
        if second or first not in configs:
            raise CorpusError(
                f"{HUB}{place}",
                f"name one of its configs, {HUB}{place}:CONFIG[:SPLIT]; there are: "
                f"{shorten(', '.join(configs), 200)}",
            ) from None
        return datasets.load_dataset(place, first, streaming=True), f"{place}:{first}", ""


def _next(rows: Iterator[dict[str, Any]], name: str, number: int) -> dict[str, Any] | None:
    try:
        return next(rows, None)
    except (OSError, ValueError) as error:
        raise CorpusError(name, f"damaged after this row: {error}", number) from error
