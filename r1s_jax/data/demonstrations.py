"""Worked solutions for the cold start, from published trajectories or those of an earlier run."""

from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from r1s_jax.data.traces import read_traces
from r1s_jax.io.journal import DataError
from r1s_jax.protocol.dialect import Dialect
from r1s_jax.protocol.solution import R1_SEARCHER
from r1s_jax.rewards.answer_scores import normalize_answer
from r1s_jax.rewards.rules import stage2
from r1s_jax.system.console import console


class Demonstration(NamedTuple):
    """A worked solution for the cold start."""

    question: str
    spans: tuple[tuple[str, float], ...]  # (text, weight of its tokens in the loss)
    first_weight: float = 1.0  # of the first token that has a weight: the decision to search


def read_demonstrations(
    files: Sequence[Path],
    unwanted: Container[str] = frozenset(),
    dialect: Dialect = R1_SEARCHER,
) -> list[Demonstration]:
    """The trajectories of files (see traces.read_traces) that are worth imitating.

    Leaves out, and counts on the terminal: questions in `unwanted` (normalised texts), trajectories
    that did not finish, and trajectories that stage 2 does not reward (a broken format, no tags, a
    wrong answer). The loss covers the policy's text, with the token that ends its last turn in
    dialects that have one, and never the system's text. Raises DataError if no trajectory remains,
    for example because they are in another `dialect`.
    """
    demonstrations, evaluated, unrewarded, unfinished = [], 0, 0, 0
    for trace in (trace for file in files for trace in read_traces(file)):
        if normalize_answer(trace.question) in unwanted:
            evaluated += 1
            continue
        solution = replace(trace.solution, dialect=dialect)
        if not solution.complete:
            unfinished += 1
            continue
        if stage2(solution, trace.answers).value <= 0:
            unrewarded += 1
            continue
        spans = [(text, float(by_policy)) for text, by_policy in trace.spans]
        end = dialect.turn_end
        if end and not spans[-1][0].endswith(end):  # files omit the token that ends the last turn
            spans.append((end, 1.0))
        demonstrations.append(Demonstration(trace.question, tuple(spans)))
    console.print(
        f"Demonstrations: {len(demonstrations)} kept; left out: {unrewarded} for their format or "
        f"answer, {evaluated} for a question of the evaluation, {unfinished} that did not finish"
    )
    if not demonstrations:
        names = ", ".join(map(str, files))
        raise DataError(f"no trajectory in {names} is worth imitating in dialect {dialect.name}")
    return demonstrations


def demonstrations_at(
    demonstrations: Sequence[Demonstration], step: int, size: int, seed: int
) -> list[Demonstration]:
    """The `size` demonstrations of a step; each epoch is a new permutation of all of them."""
    chosen = []
    for i in range(step * size, (step + 1) * size):
        epoch, place = divmod(i, len(demonstrations))
        if not chosen or place == 0:
            order = np.random.default_rng((seed, epoch)).permutation(len(demonstrations))
        chosen.append(demonstrations[order[place]])
    return chosen
