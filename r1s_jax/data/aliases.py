"""Other names of right answers, which 2WikiMultiHopQA keeps in a file beside its questions.

A row of it names its answer's Wikidata entity (`answer_id`); `id_aliases.json` has a line for each:
`{"Q_id": "Q145", "aliases": ["UK"], "demonyms": ["British"]}`. All of them are right, as the
published evaluation has it.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from r1s_jax.data.question_forms import Question
from r1s_jax.data.rows import read_rows
from r1s_jax.io.journal import DataError
from r1s_jax.io.schema import check
from r1s_jax.system.console import console

ALIASES = "id_aliases.json"


class _Names(msgspec.Struct):
    """A line of the file."""

    id: str = msgspec.field(name="Q_id")
    aliases: list[str] = []
    demonyms: list[str] = []


class Aliases:
    """The file beside a file of questions, read where a row first asks for it."""

    def __init__(self, questions: str | Path):
        self._questions = Path(questions)
        self._file = self._questions.parent / ALIASES

    def added(self, question: Question, row: Mapping[str, Any]) -> Question:
        """The question of a row with the other names of its answer.

        Raises DataError for a file that is damaged.
        """
        id = row.get("answer_id")
        names = self._names.get(id, ()) if isinstance(id, str) and id else ()
        if not names:
            return question
        return replace(question, answers=tuple(dict.fromkeys((*question.answers, *names))))

    @cached_property
    def _names(self) -> dict[str, tuple[str, ...]]:
        if not self._file.is_file():
            if self._questions.exists():  # and not a table of the hub
                console.print(
                    f"{self._questions}: only one name of each answer is right. 2WikiMultiHopQA's "
                    f"{ALIASES} has their other names: put it beside"
                )
            return {}
        found = {}
        for number, row in read_rows(self._file):
            names = check(row, _Names, f"{self._file}, line {number}", DataError)
            both = (name.strip() for name in (*names.aliases, *names.demonyms))
            found[names.id] = tuple(name for name in both if name)
        return found
