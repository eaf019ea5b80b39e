"""Aliases of right answers, which 2WikiMultiHopQA keeps in a file beside its questions.

A row of questions names the Wikidata entity of its answer (`answer_id`); `id_aliases.json` has one
line per entity: `{"Q_id": "Q145", "aliases": ["UK"], "demonyms": ["British"]}`. The published
evaluation counts every alias and demonym as right.
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
    """One line of `id_aliases.json`."""

    id: str = msgspec.field(name="Q_id")
    aliases: list[str] = []
    demonyms: list[str] = []


class Aliases:
    """The aliases beside a file of questions, read when a row first needs them."""

    def __init__(self, questions: str | Path):
        self._questions = Path(questions)
        self._file = self._questions.parent / ALIASES

    def added(self, question: Question, row: Mapping[str, Any]) -> Question:
        """The question of `row` with the aliases of its answer added.

        Raises DataError for a damaged file of aliases.
        """
        id = row.get("answer_id")
        names = self._names.get(id, ()) if isinstance(id, str) and id else ()
        if not names:
            return question
        return replace(question, answers=tuple(dict.fromkeys((*question.answers, *names))))

    @cached_property
    def _names(self) -> dict[str, tuple[str, ...]]:
        if not self._file.is_file():
            if self._questions.exists():  # not a table of the hub
                console.print(
                    f"{self._questions}: only one name of each answer counts as right. "
                    f"2WikiMultiHopQA's {ALIASES} has the aliases: put it into the same folder"
                )
            return {}
        names = {}
        for number, row in read_rows(self._file):
            entity = check(row, _Names, f"{self._file}, line {number}", DataError)
            stripped = (name.strip() for name in (*entity.aliases, *entity.demonyms))
            names[entity.id] = tuple(name for name in stripped if name)
        return names
