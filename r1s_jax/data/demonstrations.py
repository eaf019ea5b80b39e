"""Worked solutions for the cold start, from trajectories that others (or an earlier run) left."""

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
    first_weight: float = 1.0  # of the first token with any weight: the decision to search


def read_demonstrations(
    files: Sequence[Path],
    unwanted: Container[str] = frozenset(),
    dialect: Dialect = R1_SEARCHER,
) -> list[Demonstration]:
    """The trajectories of files (see traces.read_traces) that are worth imitating.

    Left out, and counted on the terminal: answers to questions in `unwanted` (normalised), and
    what stage 2 would not reward: a broken format, no tags, a wrong answer, and what did not end by
    itself. The loss is on what the policy wrote, the end of its last turn included where that is
    what acts, never on what the system did. Raises DataError where nothing remains, as for
    trajectories in another `dialect`.
    """
    kept, held_out, bad, cut = [], 0, 0, 0
    for trace in (trace for file in files for trace in read_traces(file)):
        if normalize_answer(trace.question) in unwanted:
            held_out += 1
            continue
        solution = replace(trace.solution, dialect=dialect)
        if not solution.complete:
            cut += 1
            continue
        if stage2(solution, trace.answers).value <= 0:
            bad += 1
            continue
        spans = [(text, float(by_policy)) for text, by_policy in trace.spans]
        end = dialect.turn_end
        if end and not spans[-1][0].endswith(end):  # files leave away the token that ended it all
            spans.append((end, 1.0))
        kept.append(Demonstration(trace.question, tuple(spans)))
    console.print(
        f"Demonstrations: {len(kept)} kept, {bad} left out for their format or answer, {held_out} "
        f"for a question of the evaluation, {cut} that did not end by themselves"
    )
    if not kept:
        named = ", ".join(map(str, files))
        raise DataError(f"no trajectory in {named} is worth imitating in dialect {dialect.name}")
    return kept


def demonstrations_at(
    all_of_them: Sequence[Demonstration], step: int, size: int, seed: int
) -> list[Demonstration]:
    """Those of a step: each once before any comes again, in an order of its own each time."""
    chosen = []
    for i in range(step * size, (step + 1) * size):
        epoch, place = divmod(i, len(all_of_them))
        if not chosen or place == 0:
            order = np.random.default_rng((seed, epoch)).permutation(len(all_of_them))
        chosen.append(all_of_them[order[place]])
    return chosen
