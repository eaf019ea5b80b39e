"""Rewards of solutions in a file."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from r1s_jax.data.rows import gold_answers, read_rows
from r1s_jax.data.traces import is_complete
from r1s_jax.io.journal import DataError
from r1s_jax.protocol.dialects import make_dialect
from r1s_jax.protocol.solution import R1_SEARCHER, Solution
from r1s_jax.rewards.registry import reward_rule


def reward_file(
    path: str | Path, variant: str, dialect: str = R1_SEARCHER.name
) -> Iterator[dict[str, Any]]:
    """Each row of a JSONL file (`.gz` too) with its `reward` and `parts`, in order.

    Rows hold `solution`, the text after the prompt in that dialect, and `answer`, one right answer
    or a list; optionally `finish` (or `stop_reason_final`), how it ended. Raises ValueError for an
    unknown variant or dialect; DataError, naming the line, for a row that lacks a key.
    """
    rule, solution_dialect, number = reward_rule(variant), make_dialect(dialect), 0
    for number, row in read_rows(path):
        try:
            text = row.get("solution")
            if not isinstance(text, str):
                raise ValueError("`solution` must be a text")
            complete = is_complete(str(row.get("finish") or row.get("stop_reason_final") or ""))
            solution = replace(Solution.of_text(text, solution_dialect), complete=complete)
            reward = rule(solution, gold_answers(row))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        yield row | {"reward": reward.value, "parts": reward.parts}
    if not number:
        raise DataError(f"{path}: no rows in this file")
